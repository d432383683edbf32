"""What a case must give: plain PyTorch, written once, run in fp64 for the truth and in the case's dtype for the oracle.

Shares nothing with any implementation of the package. The fp64 run goes over chunks of rows, so that the largest
shapes fit beside their weights; results are named, so that contenders need not agree on an order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.benchmarking.problem import NORM_EPS, Inputs, Problem
from twn_kernels.ops import LoRA
from twn_kernels.testing.oracle import oracle_ratio

__all__ = ["Truth", "leaves_of", "rms_norm", "site_in_torch", "worst_ratio"]

_CHUNK_BYTES = 2**28  # of fp64 activations at once
_JUDGED_ELEMENTS = 2**25


class Truth:
    """Named results of a case's first set of inputs, in fp64 and in torch's own arithmetic.

    Args:
        problem: the case.
        base_only: without adapters.
    """

    def __init__(self, problem: Problem, *, base_only: bool = False) -> None:
        self.problem, self.base_only = problem, base_only
        self.training = problem.case.pass_ == "forward_backward"
        self.exact = self._in_chunks()
        self.in_torch = self._run(problem.sets[0], problem.dtype, slice(None))

    def _in_chunks(self) -> dict[str, Tensor]:
        problem, inputs = self.problem, self.problem.sets[0]
        columns = sum(2 * site.in_features + 4 * sum(site.out_features) for site in problem.case.sites)
        step = max(1, _CHUNK_BYTES // (8 * columns))
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, problem.case.tokens, step):
            for name, value in self._run(inputs, torch.float64, slice(start, start + step)).items():
                parts.setdefault(name, []).append(value)
        # Outputs and dx have a row for each token; gradients of adapters are sums over all of them.
        return {name: torch.cat(p) if _by_rows(name) else torch.stack(p).sum(0) for name, p in parts.items()}

    def _run(self, inputs: Inputs, dtype: torch.dtype, rows: slice) -> dict[str, Tensor]:
        masks = None if self.base_only else [mask[rows] for mask in self.problem.masks()]
        cast = _cast(inputs, dtype, rows)
        if not self.training:
            with torch.no_grad():
                return {"y": site_in_torch(cast, masks, self.problem.site.swiglu)}
        leaves = leaves_of(cast, [] if self.base_only else self.problem.used)
        y = site_in_torch(cast, masks, self.problem.site.swiglu)
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cast.dy), strict=True)) | {
            "y": y.detach()
        }


def worst_ratio(truth: Truth, results: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest share of the oracle's budget that any result takes, and its name; inf where one is missing."""
    worst = (0.0, "y")
    for name, exact in truth.exact.items():
        if name not in results or results[name].shape != exact.shape:
            return float("inf"), name
        step = max(1, _JUDGED_ELEMENTS // max(1, exact[0].numel()))
        for start in range(0, exact.shape[0], step):
            part = slice(start, start + step)
            ratio = oracle_ratio(results[name][part], exact[part], truth.in_torch[name][part])
            worst = max(worst, (ratio if ratio == ratio else float("inf"), name))
    return worst


def leaves_of(inputs: Inputs, used: list[int]) -> dict[str, Tensor]:
    """The tensors that a training step differentiates, by the names of their gradients, requiring grad from now on."""
    leaves = {"dx": inputs.x}
    for index, pair in enumerate(inputs.all_loras):
        for adapter in used:
            leaves |= {f"dA{adapter}.{index}": pair[adapter].A, f"dB{adapter}.{index}": pair[adapter].B}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in the order in which transformers rounds."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)
    return weight * wide.to(x.dtype)


def site_in_torch(inputs: Inputs, masks: list[Tensor] | None, swiglu: bool) -> Tensor:
    """``[tokens, width]``: norm, linears each with its masked low-rank terms, SwiGLU or residual; as models write it.

    Args:
        inputs: in one dtype.
        masks: bool ``[tokens]`` of each adapter; None: base only.
        swiglu: the output is ``silu(y_0) * y_1``. What follows (``inputs.then``) reads it and adds ``inputs.x``.
    """
    x = inputs.x if inputs.norm is None else rms_norm(inputs.x, inputs.norm)
    outputs = []
    for weight, pair in zip(inputs.weights, inputs.loras, strict=True):
        y = F.linear(x, weight)
        for mask, lora in zip(masks or (), pair, strict=False):
            term = F.linear(F.linear(x, lora.A), lora.B) * lora.scaling
            y = y + torch.where(mask[:, None], term, 0.0)
        outputs.append(y)
    y = F.silu(outputs[0]) * outputs[1] if swiglu else torch.cat(outputs, dim=1)
    if inputs.then is not None:
        return site_in_torch(replace(inputs.then, x=y, residual=inputs.x), masks, False)
    return y if inputs.residual is None else inputs.residual + y


def _by_rows(name: str) -> bool:
    return name in ("y", "dx")


def _cast(inputs: Inputs, dtype: torch.dtype, rows: slice) -> Inputs:
    """A copy of ``rows`` in ``dtype``, its own leaves."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True)

    return Inputs(
        x=cast(inputs.x[rows]),
        norm=None if inputs.norm is None else cast(inputs.norm),
        weights=[weight.detach().to(dtype) for weight in inputs.weights],
        loras=[tuple(LoRA(cast(lora.A), cast(lora.B), lora.scaling) for lora in pair) for pair in inputs.loras],
        residual=None if inputs.residual is None else cast(inputs.residual[rows]),
        dy=cast(inputs.dy[rows]),
        then=None if inputs.then is None else _cast(inputs.then, dtype, rows),
    )
