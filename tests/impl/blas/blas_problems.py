"""Problems for the vendor-GEMM form of a group: flat tensors of the implementation contract, plain and packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from twn_kernels.impl.blas import panels

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCALING = (0.5, -1.75)  # opposite signs: a row served by the wrong adapter is far off


@dataclass(frozen=True)
class Problem:
    """``outputs``: out_features of each projection; ``ranks``: (reasoning, embedding) of each, 0 where absent."""

    tokens: int
    features: int
    outputs: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]
    dtype: torch.dtype = BF16
    routes: str = "mixed"
    front: str = "plain"
    back: str = "plain"
    bias: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        outputs, ranks = "+".join(map(str, self.outputs)), ",".join(f"{r}.{e}" for r, e in self.ranks)
        name = f"t{self.tokens}-{self.front}{self.features}-{outputs}{self.back}-r{ranks}-{dtype}-{self.routes}"
        return name + "-bias" * self.bias

    @property
    def present(self) -> int:
        return {"reasoning": 1, "embedding": 2, "base": 0}.get(self.routes, 3)

    def draw(self, device, cut=lambda t: t) -> dict:
        """The tensors of the contract by name."""

        def draw(*shape, scale=1.0):
            return cut((torch.randn(*shape) * scale).to(device, self.dtype))

        K, count = self.features, len(self.outputs)
        routes = None
        if self.routes in ("mixed", "suffix"):
            row = torch.arange(self.tokens)
            routes = (row % 4 if self.routes == "mixed" else (row >= self.tokens - 3) + 1).to(device, torch.int8)
        return {
            "x": draw(self.tokens, K * (2 if self.front == "gated" else 1)),
            "norm_weight": draw(K) if self.front == "norm" else None,
            "eps": 1e-6,
            "gated": self.front == "gated",
            "weights": [draw(n, K, scale=K**-0.5) for n in self.outputs],
            "biases": [draw(n) if self.bias and i != 1 else None for i, n in enumerate(self.outputs)],
            "A_r": [draw(r, K, scale=K**-0.5) for r, _ in self.ranks],
            "B_r": [draw(n, r) for n, (r, _) in zip(self.outputs, self.ranks, strict=True)],
            "A_e": [draw(e, K, scale=K**-0.5) for _, e in self.ranks],
            "B_e": [draw(n, e) for n, (_, e) in zip(self.outputs, self.ranks, strict=True)],
            "scaling_r": [SCALING[0]] * count,
            "scaling_e": [SCALING[1] * (i + 1) for i in range(count)],
            "routes": routes,
            "present": self.present,
            "swiglu": self.back == "swiglu",
            "residual": draw(self.tokens, self.outputs[0]) if self.back == "residual" else None,
        }


def packed(tensors: dict, *, clean: bool = False) -> list[torch.Tensor]:
    """What a group's weights look like packed, in buffers that start as NaN; ``clean``: without ``poison``."""
    weights = tensors["weights"]
    ranks = tuple((r.shape[1], e.shape[1]) for r, e in zip(tensors["B_r"], tensors["B_e"], strict=True))
    plan = panels.layout(weights[0].shape[1], tuple(w.shape[0] for w in weights), ranks)
    storages = [weights[0].new_full((panel.rows, panel.pitch), torch.nan) for panel in plan.panels]
    for panel, storage in zip(plan.panels, storages, strict=True):
        panels.clear_padding_(plan, panel, storage)
        for i in panel.projections:
            panels.weight_view(plan, panel, storage, i).copy_(weights[i])
    bits = panels.adapter_bits(plan, weights[0].device)
    poison = torch.full_like(bits, 7)
    B = [b for pair in zip(tensors["B_r"], tensors["B_e"], strict=True) for b in pair]
    panels.fill_adapters_(plan, storages, B, bits, poison)
    return [panels.key(plan, weights[0]), *storages, *([] if clean else [poison])]


def converted(tensors: dict, dtype: torch.dtype) -> dict:
    """Every floating tensor in another dtype."""

    def cast(value):
        if isinstance(value, list):
            return [cast(part) for part in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in tensors.items()}


def rows_of(tensors: dict, bit: int) -> torch.Tensor:
    """bool ``[tokens]``: the rows that use an adapter."""
    if tensors["routes"] is None:
        return torch.full((tensors["x"].shape[0],), bool(tensors["present"] & bit))
    return (tensors["routes"].cpu() & bit & tensors["present"]) != 0


def eager(t: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The group, and its shrinks, as one would write them in torch's ops: all rounded to the dtype of the tensors."""
    x = t["x"]
    if t["norm_weight"] is not None:
        h = x if x.dtype == torch.float64 else x.float()
        x = t["norm_weight"] * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + t["eps"])).to(x.dtype)
    if t["gated"]:
        gate, up = x.chunk(2, dim=1)
        x = F.silu(gate) * up
    outputs, shrinks = [], []
    for i, (weight, bias) in enumerate(zip(t["weights"], t["biases"], strict=True)):
        y = F.linear(x, weight, bias)
        for bit, side in ((1, "r"), (2, "e")):
            rows = rows_of(t, bit).to(x.device)[:, None]
            s = torch.where(rows, (x @ t[f"A_{side}"][i].T) * t[f"scaling_{side}"][i], 0.0)
            shrinks.append(s)
            y = y + torch.where(rows, s @ t[f"B_{side}"][i].T, 0.0)
        outputs.append(y)
    y = F.silu(outputs[0]) * outputs[1] if t["swiglu"] else torch.cat(outputs, dim=1)
    return (y if t["residual"] is None else t["residual"] + y), torch.cat(shrinks, dim=1)
