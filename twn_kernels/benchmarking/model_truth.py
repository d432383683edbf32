"""What layers and models must give: their own attention, with linears and norms written in plain torch, in fp64.

One layer at a time is copied to fp64, so that the truth of a model fits beside the model; a training step keeps its
copies, and is meant for few layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.benchmarking.model_problem import ModelProblem, fixed_cache, sharing_copy
from twn_kernels.benchmarking.problem import NORM_EPS
from twn_kernels.ops import LoRA

__all__ = ["ModelTruth"]

_CHUNK_TOKENS = 1024  # at once in fp64; at 32 heads the scores of one row of 1024 take 256 MiB


class ModelTruth:
    """Named results of the first call of a case, in fp64 and in torch's own arithmetic.

    Args:
        problem: the case.
        base_only: without adapters.
    """

    def __init__(self, problem: ModelProblem, *, base_only: bool = False) -> None:
        self.problem, self.base_only = problem, base_only
        self.training = problem.case.pass_ == "forward_backward"
        self.exact = self._by_rows()
        self.in_torch = self._run(problem.dtype, slice(None))

    def _by_rows(self) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        step = max(1, _CHUNK_TOKENS // self.problem.case.sequence)
        for row in range(0, self.problem.case.rows, step):
            for name, value in self._run(torch.float64, slice(row, row + step)).items():
                parts.setdefault(name, []).append(value)
        return {n: torch.cat(p) if n in ("y", "dx") else torch.stack(p).sum(0) for n, p in parts.items()}

    def _run(self, dtype: torch.dtype, rows: slice) -> dict[str, Tensor]:
        problem = self.problem
        hidden = problem.hidden[rows].detach().to(dtype, copy=True)
        if not self.training:
            with torch.no_grad():
                return {"y": self._forward(hidden, dtype, rows, {})}
        leaves = {"dx": hidden.requires_grad_()}
        y = self._forward(hidden, dtype, rows, leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), problem.dy[rows].to(dtype))
        return dict(zip(leaves, grads, strict=True)) | {"y": y.detach()}

    def _forward(self, hidden: Tensor, dtype: torch.dtype, rows: slice, leaves: dict[str, Tensor]) -> Tensor:
        """The layers one after another; each is copied to ``dtype`` when its turn comes."""
        problem = self.problem
        start = problem.case.context or 0
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        embeddings = problem.model.rotary_emb(hidden, positions.view(1, 1, -1).expand(3, hidden.shape[0], -1))
        indices = range(len(problem.model.layers)) if problem.case.suite == "model" else range(1)
        for index in indices:
            layer = self._copy(index, dtype, rows, leaves)
            cache = None
            if problem.keys:
                own = ([side[i][rows].to(dtype) for i in range(index + 1)] for side in (problem.keys, problem.values))
                cache = fixed_cache(*own)
            hidden = layer(hidden, position_embeddings=embeddings, attention_mask=None, past_key_values=cache)
        if problem.case.suite == "model":
            hidden = _Norm(problem.model.norm.weight, dtype)(hidden)
        return hidden

    def _copy(self, index: int, dtype: torch.dtype, rows: slice, leaves: dict[str, Tensor]) -> nn.Module:
        layer = sharing_copy(self.problem.model.layers[index])
        masks = [] if self.base_only else [mask[rows] for mask in self.problem.masks()]
        for name, module in list(layer.named_modules()):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, nn.Linear):
                path = f"layers.{index}.{name}"
                pair = [_cast(lora, dtype) for lora in self.problem.loras[path]]
                setattr(layer.get_submodule(parent), leaf, _Linear(module.weight, pair, masks, dtype))
                if self.training and not self.base_only:
                    leaves |= dict(_leaves(path, pair, self.problem.used))
            elif type(module).__name__.endswith("RMSNorm"):
                setattr(layer.get_submodule(parent), leaf, _Norm(module.weight, dtype))
        return layer


def _cast(lora: LoRA, dtype: torch.dtype) -> LoRA:
    return LoRA(*(t.detach().to(dtype, copy=True) for t in (lora.A, lora.B)), lora.scaling)


def _leaves(path: str, pair: list[LoRA], used: list[int]) -> Iterator[tuple[str, Tensor]]:
    for adapter in used:
        A, B, _ = pair[adapter]
        yield f"dA{adapter}.{path}", A.requires_grad_()
        yield f"dB{adapter}.{path}", B.requires_grad_()


class _Linear(nn.Module):
    """A linear with masked low-rank terms, written as PEFT computes them."""

    def __init__(self, weight: Tensor, pair: list[LoRA], masks: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.own_weight, self.pair, self.masks = weight.detach().to(dtype), pair, masks

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.own_weight)
        for mask, (A, B, scaling) in zip(self.masks, self.pair, strict=False):
            y = y + torch.where(mask[..., None], F.linear(F.linear(x, A), B) * scaling, 0.0)
        return y


class _Norm(nn.Module):
    """RMSNorm, in fp64 throughout for the truth and in transformers' order of rounding otherwise."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.own_weight = weight.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return self.own_weight * wide.to(x.dtype)
