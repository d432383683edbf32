"""The doctor's checks of the site-group op: forward, backward, and that a NaN stays where it is.

The truth is written here in plain PyTorch with autograd and shares nothing with any implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.doctor.check import DTYPES, FAIL, NOT_AVAILABLE, Check, check_name, compare, first_line, fix
from twn_kernels.ops import LoRA, Norm, Projection, RoutePlan, choice, dual_lora_group

__all__ = ["checks"]

OP = "dual_lora_group"
TOKENS, FEATURES = 37, 96
# Every front and back of a decoder layer, with tails, unequal ranks and an absent adapter: out_features and ranks of
# each projection, then the options.
SITES: dict[str, tuple[tuple[tuple[int, int, int], ...], dict[str, bool]]] = {
    "qkv": (((81, 16, 5), (24, 0, 8), (40, 3, 0)), {"norm": True, "bias": True}),
    "o": (((81, 7, 16),), {"residual": True}),
    "gate_up": (((72, 16, 5), (72, 5, 16)), {"norm": True, "swiglu": True}),
    "down": (((81, 16, 16),), {"gated": True, "residual": True}),
}
_INTERPRETED = "bf16"
_SCALINGS = (0.5, -1.75)
_EPS = 1e-6
_POISONED_ROW = 4  # of the base: routes repeat 0, 1, 2, 3


def checks(impl: str, dtype: str, device: torch.device) -> Iterator[Check]:
    """One line each for forward, backward and isolation of ``impl`` in one of ``DTYPES``.

    Triton's interpreter takes seconds a call, so there one dtype stands for all.
    """
    if impl == "triton" and device.type == "cpu" and dtype != _INTERPRETED:
        detail = f"left out in the interpreter, where {_INTERPRETED} stands for all"
        yield Check(check_name(OP, "forward", impl, dtype, device), NOT_AVAILABLE, detail)
        return
    if not hasattr(choice.load(impl), "group"):
        yield Check(check_name(OP, "forward", impl, dtype, device), NOT_AVAILABLE, f"{impl} has no such op")
        return
    for part, (run, sites) in _PARTS.items():
        name = check_name(OP, part, impl, dtype, device)
        if part == "backward" and choice.is_for_inference(impl):
            yield Check(name, NOT_AVAILABLE, f"{impl} is for inference")
            continue
        got, truth, own = {}, {}, {}
        try:
            for site in sites:
                for into, results in zip((got, truth, own), run(site, _inputs(site, dtype, device), impl), strict=True):
                    into.update(results)
        except Exception as error:  # whatever breaks is the finding; the remaining checks must still run
            yield Check(name, FAIL, first_line(error), fix(impl, error))
            continue
        yield compare(name, impl, list(truth), got, truth, own)


def _forward(site: str, inputs: dict, impl: str) -> tuple[dict, dict, dict]:
    with torch.no_grad():
        runs = _in_package(inputs, impl), _in_torch(_wide(inputs)), _in_torch(inputs)
    return tuple({f"{site} y{i}": y for i, y in enumerate(run)} for run in runs)


def _backward(site: str, inputs: dict, impl: str) -> tuple[dict, dict, dict]:
    runs = (
        _gradients(lambda moved: _in_package(moved, impl), inputs),
        _gradients(_in_torch, _wide(inputs)),
        _gradients(_in_torch, inputs),
    )
    return tuple({f"{site} d({name})": grad for name, grad in run.items()} for run in runs)


def _isolation(site: str, inputs: dict, impl: str) -> tuple[dict, dict, dict]:
    """A base row of NaN and an embedding adapter of NaN: other rows, and reasoning's gradients, are as without them."""
    routes = inputs["routes"].where(inputs["routes"] != 3, 1)  # a row of both has a NaN in its reasoning too
    clean, poisoned = {**inputs, "routes": routes & 1}, {**inputs, "routes": routes, "x": inputs["x"].clone()}
    poisoned["x"][_POISONED_ROW] = torch.nan
    poisoned["projections"] = [_poisoned(projection) for projection in inputs["projections"]]
    rows = (routes != 2).index_fill(0, torch.tensor(_POISONED_ROW, device=routes.device), False)

    def kept(function: Callable, of: dict, wide: bool = False) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = function(_wide(of) if wide else of)
        found = {f"{site} y{i} of the other rows": y[rows] for i, y in enumerate(outputs)}
        if choice.is_for_inference(impl):
            return found
        grads = _gradients(function, _wide(of) if wide else of, rows)
        return found | {f"{site} d({name})": grad for name, grad in grads.items() if ".reasoning." in name}

    return kept(lambda moved: _in_package(moved, impl), poisoned), kept(_in_torch, clean, True), kept(_in_torch, clean)


# In the backward pass, what stands before and after the products is PyTorch's own: the sites differ in their number.
_PARTS: dict[str, tuple[Callable[[str, dict, str], tuple[dict, dict, dict]], tuple[str, ...]]] = {
    "forward": (_forward, tuple(SITES)),
    "backward": (_backward, ("qkv", "down")),
    "isolation": (_isolation, ("gate_up",)),
}


def _poisoned(projection: Projection) -> Projection:
    lora = projection.embedding
    if lora is None:
        return projection
    return projection._replace(embedding=LoRA(*(torch.full_like(t, torch.nan) for t in (lora.A, lora.B)), lora.scaling))


def _in_package(inputs: dict, impl: str) -> tuple[Tensor, ...]:
    options = {name: inputs[name] for name in ("norm", "gated", "swiglu", "residual")}
    plan = RoutePlan.from_routes(inputs["routes"])
    return dual_lora_group(inputs["x"], inputs["projections"], plan, **options, impl=impl)


def _in_torch(inputs: dict) -> tuple[Tensor, ...]:
    x, norm = inputs["x"], inputs["norm"]
    if norm is not None:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        x = norm.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
    if inputs["gated"]:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    outputs = [_linear(x, projection, inputs["routes"]) for projection in inputs["projections"]]
    if inputs["swiglu"]:
        return (F.silu(outputs[0]) * outputs[1],)
    return tuple(outputs) if inputs["residual"] is None else (inputs["residual"] + outputs[0],)


def _linear(x: Tensor, projection: Projection, routes: Tensor) -> Tensor:
    y = F.linear(x, projection.weight, projection.bias)
    for bit, lora in ((1, projection.reasoning), (2, projection.embedding)):
        if lora is not None:
            delta = F.linear(F.linear(x.to(lora.A.dtype), lora.A), lora.B) * lora.scaling
            y = y + torch.where(((routes & bit) != 0)[:, None], delta, 0.0)
    return y.to(x.dtype)


def _gradients(function: Callable, inputs: dict, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients by argument under fixed pulls on the outputs, of all rows or of some."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().requires_grad_()
        return leaves[name]

    moved = _mapped(inputs, leaf)
    outputs = function(moved)
    pulls = [
        torch.where(_in(rows, pull), pull, 0.0).to(y.dtype) for y, pull in zip(outputs, inputs["pulls"], strict=True)
    ]
    torch.autograd.backward(list(outputs), pulls)
    return {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}


def _in(rows: Tensor | None, pull: Tensor) -> Tensor:
    return torch.ones_like(pull, dtype=torch.bool) if rows is None else rows[:, None]


def _inputs(site: str, dtype: str, device: torch.device) -> dict[str, Any]:
    layer, adapter = DTYPES[dtype]
    linears, options = SITES[site]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = layer) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    def lora(rank: int, outputs: int, scaling: float) -> LoRA | None:
        if rank == 0:
            return None
        A = draw(rank, FEATURES, scale=FEATURES**-0.5, dtype=adapter)
        return LoRA(A, draw(outputs, rank, scale=rank**-0.5, dtype=adapter), scaling)

    width = FEATURES * (2 if options.get("gated") else 1)
    outputs = [linears[0][0]] if options.get("swiglu") else [out for out, _, _ in linears]
    return {
        "x": draw(TOKENS, width),
        "projections": [
            Projection(
                draw(out, FEATURES, scale=FEATURES**-0.5),
                draw(out) if options.get("bias") else None,
                *(lora(rank, out, scaling) for rank, scaling in zip(ranks, _SCALINGS, strict=True)),
            )
            for out, *ranks in linears
        ],
        "norm": Norm(1 + draw(FEATURES, scale=0.1), _EPS) if options.get("norm") else None,
        "gated": bool(options.get("gated")),
        "swiglu": bool(options.get("swiglu")),
        "residual": draw(TOKENS, linears[0][0]) if options.get("residual") else None,
        "routes": (torch.arange(TOKENS) % 4).to(device, torch.int8),
        "pulls": [draw(TOKENS, out) for out in outputs],
    }


def _mapped(inputs: dict, function: Callable[[str, Tensor], Tensor]) -> dict:
    """``function`` over x, norm, residual and all tensors of the projections, each with its name."""
    moved = dict(inputs)
    moved["x"] = function("x", inputs["x"])
    if inputs["norm"] is not None:
        moved["norm"] = Norm(function("norm.weight", inputs["norm"].weight), inputs["norm"].eps)
    if inputs["residual"] is not None:
        moved["residual"] = function("residual", inputs["residual"])
    moved["projections"] = []
    for place, projection in enumerate(inputs["projections"]):
        weight = function(f"{place}.weight", projection.weight)
        bias = None if projection.bias is None else function(f"{place}.bias", projection.bias)
        loras = {
            part: LoRA(function(f"{place}.{part}.A", lora.A), function(f"{place}.{part}.B", lora.B), lora.scaling)
            for part in ("reasoning", "embedding")
            if (lora := getattr(projection, part)) is not None
        }
        moved["projections"].append(Projection(weight, bias, **loras))
    return moved


def _wide(inputs: dict) -> dict:
    wide = _mapped(inputs, lambda name, tensor: tensor.double())
    return {**wide, "pulls": [pull.double() for pull in inputs["pulls"]]}
