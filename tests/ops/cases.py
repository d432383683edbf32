"""Cases for the dual-LoRA ops: shapes, routes and dtypes with readable ids, and the tensors that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear, dual_lora_linear_fanout

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    out_features: int
    rank_r: int
    rank_e: int
    dtype: torch.dtype
    routes: str = "mixed"
    bias: bool = True
    adapter_dtype: torch.dtype | None = None
    dropout: tuple[float, float] = (0.0, 0.0)

    def __str__(self) -> str:
        adapters = f"-{DTYPE_NAMES[self.adapter_dtype]}adapters" if self.adapter_dtype else ""
        dropout = f"-drop{self.dropout[0]}+{self.dropout[1]}" if any(self.dropout) else ""
        return (
            f"t{self.tokens}-r{self.rank_r}+{self.rank_e}-in{self.in_features}-out{self.out_features}-"
            f"{DTYPE_NAMES[self.dtype]}{adapters}-{self.routes}{'-bias' if self.bias else ''}{dropout}"
        )

    def plan(self, device) -> RoutePlan:
        if self.routes in ("reasoning", "embedding", "both"):
            return RoutePlan.uniform(self.routes, self.tokens, device=device)
        if self.routes == "base":
            return RoutePlan.uniform(None, self.tokens, device=device)
        if self.routes == "segments":
            third = self.tokens // 3
            lengths = [third, 0, third, self.tokens - 2 * third]
            return RoutePlan.from_segments(lengths, ["reasoning", "both", None, "reasoning"], device=device)
        if self.routes == "suffix":
            suffix = min(5, self.tokens)
            return RoutePlan.from_segments([self.tokens - suffix, suffix], ["reasoning", "embedding"], device=device)
        values = (
            torch.arange(self.tokens) % 2 + 1 if self.routes == "alternating" else torch.randint(0, 4, (self.tokens,))
        )
        return RoutePlan.from_routes(values.to(device, torch.int8))


def tensors(case: Case, device, cut=lambda t: t) -> dict:
    """Inputs of one case; adapters of opposite sign, so that a row served by the wrong one is far off."""
    dtype, adapter_dtype = case.dtype, case.adapter_dtype or case.dtype
    scale = case.in_features**-0.5

    def draw(*shape, dtype=dtype, scale=1.0):
        return cut((torch.randn(*shape) * scale).to(device, dtype))

    def lora(rank, scaling):
        a = draw(rank, case.in_features, dtype=adapter_dtype, scale=scale)
        return LoRA(a, draw(case.out_features, rank, dtype=adapter_dtype), scaling)

    return {
        "x": draw(case.tokens, case.in_features),
        "weight": draw(case.out_features, case.in_features, scale=scale),
        "bias": draw(case.out_features) if case.bias else None,
        "reasoning": lora(case.rank_r, 0.5),
        "embedding": lora(case.rank_e, -1.75),
    }


def as_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    def cast(value):
        if isinstance(value, LoRA):
            return LoRA(value.A.to(dtype), value.B.to(dtype), value.scaling)
        return None if value is None else value.to(dtype)

    return {name: cast(value) for name, value in inputs.items()}


def run(case: Case, inputs: dict, plan: RoutePlan, impl: str, *, fanout: bool = False, seed: int = 0) -> dict:
    """Outputs and every gradient of one case under one implementation, by name."""
    leaves = {"x": inputs["x"], "bias": inputs["bias"]}
    for name in ("reasoning", "embedding"):
        leaves |= {f"{name}.A": inputs[name].A, f"{name}.B": inputs[name].B}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    adapters = [LoRA(leaves[f"{n}.A"], leaves[f"{n}.B"], inputs[n].scaling) for n in ("reasoning", "embedding")]
    op = dual_lora_linear_fanout if fanout else dual_lora_linear
    torch.manual_seed(seed)
    out = op(leaves["x"], inputs["weight"], leaves.get("bias"), *adapters, plan, dropout=case.dropout, impl=impl)
    outputs = dict(zip(("y_reasoning", "y_embedding"), out, strict=True)) if fanout else {"y": out}
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs.values()]
    torch.autograd.backward(list(outputs.values()), pulls)
    return outputs | {f"d({name})": leaf.grad for name, leaf in leaves.items()}
