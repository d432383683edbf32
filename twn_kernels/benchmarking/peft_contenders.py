"""PEFT as a contender: its own layers with the case's adapters, in each way that its users run two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.contender import Built, Contender, Unavailable
from twn_kernels.benchmarking.problem import Inputs, Problem
from twn_kernels.benchmarking.truth import rms_norm
from twn_kernels.ops import LoRA
from twn_kernels.settings import ADAPTERS

__all__ = ["PEFT_CONTENDERS", "PeftRunner", "check_mixed", "in_peft", "peft_bytes"]

_ACTIVE = {"reasoning": ["reasoning"], "embedding": ["embedding"], "both": list(ADAPTERS)}


def in_peft(module: nn.Module, loras: Mapping[str, tuple[LoRA, LoRA]], *, fp32: bool) -> Any:
    """Wrap ``module`` in a ``PeftModel`` with two adapters; base weights stay the same tensors.

    Args:
        module: whose linears get adapters, by name.
        loras: path of a linear to its reasoning and embedding adapter.
        fp32: let PEFT keep 16-bit adapters in fp32 (its ``autocast_adapter_dtype``, on by default).

    Raises:
        Unavailable: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Unavailable("PEFT is not installed (pip install peft).") from None
    first = next(iter(loras.values()))
    # A regex, because PEFT takes a list of names as suffixes.
    targets = "|".join(path.replace(".", r"\.") for path in loras)
    configs = [
        LoraConfig(r=lora.A.shape[0], lora_alpha=lora.scaling * lora.A.shape[0], target_modules=f"(?:{targets})")
        for lora in first
    ]
    model = get_peft_model(module, configs[0], adapter_name=ADAPTERS[0], autocast_adapter_dtype=fp32)
    model.add_adapter(ADAPTERS[1], configs[1], autocast_adapter_dtype=fp32)
    layers = dict(model.get_base_model().named_modules())
    for path, pair in loras.items():
        for name, lora in zip(ADAPTERS, pair, strict=True):
            for side, value in (("lora_A", lora.A), ("lora_B", lora.B)):
                weight = getattr(layers[path], side)[name].weight
                weight.data = value.detach().to(torch.float32 if fp32 else value.dtype, copy=True)
    return model.eval()


def peft_bytes(model: Any) -> int:
    """Bytes of the adapters that PEFT holds."""
    return sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)


class PeftRunner:
    """Runs a ``PeftModel`` over a case's routes.

    Args:
        model: of :func:`in_peft`.
        case: whose routes to run.
        mixed: all rows in one forward with ``adapter_names``; else one forward for each adapter that occurs, on its
            rows, with ``set_adapter`` before it.
        backend: of ``torch.compile`` for the model's forward; None: eager.
    """

    def __init__(
        self, model: Any, case: Case, *, mixed: bool, device: torch.device, backend: str | None = None
    ) -> None:
        self.model, self.mixed = model, mixed
        self.forward = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
        self.weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        if mixed:
            self.names = ["__base__" if name is None else name for name in check_mixed(case)]
            return
        rows: dict[str | None, list[int]] = {}
        start = 0
        for length, name in case.segments():
            rows.setdefault(name, []).extend(range(start, start + length))
            start += length
        self.parts = [(name, _index(places, start, device)) for name, places in rows.items()]

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The result for every token; ``tensors`` are ``[tokens, ...]`` arguments of the model."""
        if self.mixed:
            lead = (len(self.names), -1)
            y = self.forward(*(t.view(*lead, t.shape[-1]) for t in tensors), adapter_names=self.names)
            return y.reshape(-1, y.shape[-1])
        results = [self.one(name, *(t if index is None else t[index] for t in tensors)) for name, index in self.parts]
        if len(results) == 1:
            return results[0]
        indices = [index for _, index in self.parts]
        if all(isinstance(index, slice) for index in indices):
            return torch.cat(results)
        return torch.cat(results)[_inverse(indices)]

    def one(self, name: str | None, *tensors: Tensor, **options: Any) -> Any:
        """The model's forward under one adapter, both, or none."""
        if name is None:
            with self.model.disable_adapter():
                return self.forward(*tensors, **options)
        self.model.base_model.set_adapter(_ACTIVE[name])
        if torch.is_grad_enabled():
            for weight in self.weights:  # set_adapter freezes the other adapter, which this step trains as well
                weight.requires_grad_()
        return self.forward(*tensors, **options)


def _index(places: list[int], total: int, device: torch.device) -> slice | Tensor | None:
    if len(places) == total:
        return None
    if places[-1] - places[0] + 1 == len(places):
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)


def _inverse(indices: list[slice | Tensor]) -> Tensor:
    device = next(index.device for index in indices if isinstance(index, Tensor))
    flat = [i if isinstance(i, Tensor) else torch.arange(i.start, i.stop, device=device) for i in indices]
    return torch.cat(flat).argsort()


def check_mixed(case: Case) -> list[str | None]:
    """One adapter's name for each row of the batch, as ``adapter_names`` takes it.

    Raises:
        Unavailable: the case's routes cannot be said so.
    """
    if case.routes == "both":
        raise Unavailable("PEFT's adapter_names gives a row one adapter; this case gives it both.")
    names = case.row_names()
    if names is None:
        raise Unavailable("PEFT's adapter_names gives a whole row one adapter; this case changes it inside a row.")
    if case.pass_ == "forward_backward":
        raise Unavailable("PEFT refuses adapter_names in training mode.")
    return names


class _Site(nn.Module):
    """A site group as transformers writes it: norm, linears, SwiGLU or residual; of an MLP, ``down`` behind it."""

    def __init__(self, inputs: Inputs, swiglu: bool) -> None:
        super().__init__()
        self.norm, self.swiglu, self.first = inputs.norm, swiglu, len(inputs.weights)
        self.linears = nn.ModuleList()
        for weight in inputs.weights + ([] if inputs.then is None else inputs.then.weights):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.linears.append(linear)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if self.norm is None else rms_norm(x, self.norm)
        outputs = [linear(x) for linear in self.linears[: self.first]]
        y = F.silu(outputs[0]) * outputs[1] if self.swiglu else torch.cat(outputs, dim=-1)
        for linear in self.linears[self.first :]:
            y = linear(y)
        return y if residual is None else residual + y


def _peft(*, fp32: bool = False, mixed: bool = False, compile_: bool = False):
    def build(problem: Problem) -> Built:
        if mixed:
            check_mixed(problem.case)
        if fp32 and problem.case.dtype == "fp32":
            raise Unavailable("The adapters of this case are fp32 already.")
        if compile_:
            torch._dynamo.reset()  # forwards that earlier cases compiled count towards dynamo's limit
        calls, added = [], 0
        for inputs in problem.sets:
            loras = {f"linears.{index}": pair for index, pair in enumerate(inputs.all_loras)}
            model = in_peft(_Site(inputs, problem.site.swiglu), loras, fp32=fp32)
            added = peft_bytes(model)
            backend = problem.compile_backend if compile_ else None
            runner = PeftRunner(model, problem.case, mixed=mixed, device=problem.device, backend=backend)
            calls.append(_call(problem, inputs, runner, model))
        return Built(calls, None, added)

    return build


def _call(problem: Problem, inputs: Inputs, run: Callable[..., Tensor], model: Any) -> Callable:
    residual = inputs.residual if inputs.then is None else inputs.x
    tensors = (inputs.x,) if residual is None else (inputs.x, residual)
    if problem.case.pass_ != "forward_backward":

        def forward():
            with torch.no_grad():
                return {"y": run(*tensors)}

        return forward
    leaves = {"dx": inputs.x.requires_grad_()} | dict(_leaves(model, problem.used))

    def both():
        y = run(*tensors)
        grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    return both


def _leaves(model: Any, used: list[int]) -> Iterator[tuple[str, Tensor]]:
    for index, layer in enumerate(model.get_base_model().linears):
        for adapter in used:
            yield f"dA{adapter}.{index}", layer.lora_A[ADAPTERS[adapter]].weight
            yield f"dB{adapter}.{index}", layer.lora_B[ADAPTERS[adapter]].weight


PEFT_CONTENDERS = (
    Contender("peft", _peft()),
    Contender("peft_fp32", _peft(fp32=True)),
    Contender("peft_mixed", _peft(mixed=True)),
    Contender("peft_compiled", _peft(compile_=True)),
)
