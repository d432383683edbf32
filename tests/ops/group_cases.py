"""Cases for the site-group op, and what a user would write in eager torch instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from twn_kernels.ops import LoRA, Norm, Projection, RoutePlan

ROUTES = ("mixed", "base", "reasoning", "embedding", "both", "alternating", "suffix")


@dataclass(frozen=True)
class GroupCase:
    """``outputs``: out_features of each projection; ``ranks``: (reasoning, embedding) of each, 0 where absent."""

    tokens: int
    in_features: int
    outputs: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    routes: str = "mixed"
    front: str = "plain"  # or "norm", "gated"
    back: str = "plain"  # or "swiglu", "residual"
    bias: bool = False
    adapter_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        outputs = "+".join(map(str, self.outputs))
        ranks = ",".join(f"{r}.{e}" for r, e in self.ranks)
        extra = ("-bias" if self.bias else "") + ("-fp32adapters" if self.adapter_dtype else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"t{self.tokens}-{self.front}{self.in_features}-{outputs}{self.back}-r{ranks}-{dtype}-{self.routes}{extra}"
        )

    def plan(self, device) -> RoutePlan:
        if self.routes in ("reasoning", "embedding", "both", "base"):
            name = None if self.routes == "base" else self.routes
            return RoutePlan.uniform(name, self.tokens, device=device)
        if self.routes == "suffix":
            suffix = min(5, self.tokens)
            return RoutePlan.from_segments([self.tokens - suffix, suffix], ["reasoning", "embedding"], device=device)
        row = torch.arange(self.tokens)
        values = row % 2 + 1 if self.routes == "alternating" else row % 4
        return RoutePlan.from_routes(values.to(device, torch.int8))


def arguments(case: GroupCase, device, cut=lambda t: t) -> dict:
    """The keyword arguments of the op but for the plan; adapters of opposite sign."""
    scale = case.in_features**-0.5
    adapter_dtype = case.adapter_dtype or case.dtype

    def draw(*shape, dtype=case.dtype, scale=1.0):
        return cut((torch.randn(*shape) * scale).to(device, dtype))

    def lora(rank, out, scaling):
        if rank == 0:
            return None
        a = draw(rank, case.in_features, dtype=adapter_dtype, scale=scale)
        return LoRA(a, draw(out, rank, dtype=adapter_dtype, scale=rank**-0.5), scaling)

    projections = [
        Projection(
            draw(out, case.in_features, scale=scale),
            draw(out) if case.bias else None,
            lora(r, out, 0.5),
            lora(e, out, -1.75),
        )
        for out, (r, e) in zip(case.outputs, case.ranks, strict=True)
    ]
    width = case.in_features * (2 if case.front == "gated" else 1)
    return {
        "x": draw(case.tokens, width),
        "projections": projections,
        "norm": Norm(draw(case.in_features), 1e-6) if case.front == "norm" else None,
        "gated": case.front == "gated",
        "swiglu": case.back == "swiglu",
        "residual": draw(case.tokens, case.outputs[0]) if case.back == "residual" else None,
    }


def converted(value, function):
    """``function`` over every tensor of nested arguments."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(converted(part, function) for part in value))
    if isinstance(value, list):
        return [converted(part, function) for part in value]
    if isinstance(value, dict):
        return {name: converted(part, function) for name, part in value.items()}
    return value


def eager_torch(args: dict, plan: RoutePlan) -> tuple[torch.Tensor, ...]:
    """The group in torch's own ops, each rounding as it does there."""
    x = args["x"]
    if args["norm"] is not None:
        h = x.float() if x.dtype != torch.float64 else x
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + args["norm"].eps)).to(x.dtype)
        x = (args["norm"].weight * h).to(x.dtype)
    if args["gated"]:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    outputs = []
    for projection in args["projections"]:
        y = F.linear(x, projection.weight, projection.bias)
        for bit, lora in ((1, projection.reasoning), (2, projection.embedding)):
            if lora is not None:
                delta = (x.to(lora.A.dtype) @ lora.A.T) @ lora.B.T * lora.scaling
                y = y + torch.where(((plan.routes & bit) != 0)[:, None], delta, 0.0)
        outputs.append(y.to(x.dtype))
    if args["swiglu"]:
        outputs = [F.silu(outputs[0]) * outputs[1]]
    return tuple(outputs if args["residual"] is None else [args["residual"] + outputs[0]])


def with_gradients(function, args: dict, plan: RoutePlan) -> dict[str, torch.Tensor]:
    """Outputs and the gradient of every differentiable argument, under the same pull on each output."""
    leaves: list[torch.Tensor] = []

    def leaf(tensor):
        if tensor.dim() and tensor.is_floating_point():
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1]
        return tensor

    outputs = function(converted(args, leaf), plan)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    torch.autograd.backward(list(outputs), pulls)
    grads = {f"gradient {i}": torch.zeros_like(t) if t.grad is None else t.grad for i, t in enumerate(leaves)}
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | grads
