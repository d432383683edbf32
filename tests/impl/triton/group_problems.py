"""Problems for the Triton product of a site group: tensors of the implementation contract, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from triton_problems import FP64, draw_routes

from twn_kernels.impl import reference, triton
from twn_kernels.testing.oracle import assert_as_good_as_torch

SCALING_R, SCALING_E = (0.5, -2.0, 1.25), (-1.75, 0.75, 3.0)  # a row served by the wrong adapter is far off
EPS = 1e-5


@dataclass(frozen=True)
class GroupProblem:
    tokens: int
    features: int
    widths: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]  # (reasoning, embedding) of each projection
    dtype: torch.dtype
    routes: str = "mixed"
    bias: tuple[bool, ...] | None = None
    adapter_dtype: torch.dtype | None = None
    front: str = ""  # "norm" or "gated"
    swiglu: bool = False
    residual: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        widths = "+".join(map(str, self.widths))
        ranks = "_".join(f"{r}+{e}" for r, e in self.ranks)
        parts = [f"t{self.tokens}", f"k{self.features}", f"n{widths}", f"r{ranks}", name, self.routes]
        if self.adapter_dtype:
            parts.append(f"{str(self.adapter_dtype).removeprefix('torch.')}_adapters")
        flags = {self.front: bool(self.front), "bias": self.bias, "swiglu": self.swiglu, "residual": self.residual}
        return "-".join(parts + [flag for flag, holds in flags.items() if holds])

    @property
    def present(self) -> int:
        return {"reasoning": 1, "embedding": 2, "base": 0}.get(self.routes, 3)


class GroupInputs:
    """The tensors of one problem; ``cut`` may replace each by a view into a larger buffer."""

    def __init__(self, problem: GroupProblem, device, cut=lambda t: t) -> None:
        self.problem = p = problem
        adapters = p.adapter_dtype or p.dtype

        def draw(*shape, dtype=p.dtype, scale=1.0):
            tensor = (torch.randn(*shape) * scale).to(device, dtype)
            return cut(tensor) if tensor.numel() else tensor

        scale = p.features**-0.5
        self.x = draw(p.tokens, p.features * (2 if p.front == "gated" else 1))
        self.norm_weight = draw(p.features) if p.front == "norm" else None
        self.weights = [draw(n, p.features, scale=scale) for n in p.widths]
        self.biases = [draw(n) if has else None for n, has in zip(p.widths, p.bias or [False] * 3, strict=False)]
        self.A_r = [draw(r, p.features, dtype=adapters, scale=scale) for r, _ in p.ranks]
        self.A_e = [draw(e, p.features, dtype=adapters, scale=scale) for _, e in p.ranks]
        self.B_r = [draw(n, r, dtype=adapters) for n, (r, _) in zip(p.widths, p.ranks, strict=True)]
        self.B_e = [draw(n, e, dtype=adapters) for n, (_, e) in zip(p.widths, p.ranks, strict=True)]
        self.routes = draw_routes(p.routes, p.tokens).to(device)
        self.residual = draw(p.tokens, p.widths[0]) if p.residual else None

    def to(self, dtype: torch.dtype) -> GroupInputs:
        """The same values in another dtype."""
        other = object.__new__(GroupInputs)
        other.problem, other.routes = self.problem, self.routes
        for name in ("x", "norm_weight", "residual"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.to(dtype))
        for name in ("weights", "biases", "A_r", "A_e", "B_r", "B_e"):
            setattr(other, name, [None if t is None else t.to(dtype) for t in getattr(self, name)])
        return other

    @property
    def arguments(self) -> tuple:
        """Arguments of ``group``."""
        p, count = self.problem, len(self.problem.widths)
        return (
            self.x, self.norm_weight, EPS, p.front == "gated", self.weights, self.biases, self.A_r, self.B_r, self.A_e,
            self.B_e, list(SCALING_R[:count]), list(SCALING_E[:count]), self.routes, p.present, p.swiglu,
            self.residual,
        )  # fmt: skip


def run(inputs: GroupInputs) -> dict[str, torch.Tensor]:
    """``y`` and ``s`` of the Triton implementation."""
    return dict(zip(("y", "s"), triton.group(*inputs.arguments), strict=True))


def check(inputs: GroupInputs) -> dict[str, torch.Tensor]:
    """Run the Triton implementation and hold both results to the oracle, their dtypes and their layout."""
    actual = run(inputs)
    wide = inputs.to(FP64)
    if inputs.problem.front:  # the input is rounded by contract: the truth multiplies the rounded values
        wide.x = produced(inputs).double()
        wide.norm_weight = None
    truth = reference.group(*_plain(wide).arguments)
    baseline = reference.group(*inputs.arguments)
    for name, expected, own in zip(("y", "s"), truth, baseline, strict=True):
        assert actual[name].dtype == own.dtype and actual[name].is_contiguous(), name
        assert_as_good_as_torch(actual[name], expected, own, name)
    return actual


def produced(inputs: GroupInputs) -> torch.Tensor:
    """What the weights are multiplied with, rounded where the reference rounds."""
    identity = torch.eye(inputs.problem.features, dtype=inputs.problem.dtype, device=inputs.x.device)
    none = [identity.new_empty(0, inputs.problem.features)], [identity.new_empty(inputs.problem.features, 0)]
    front = (inputs.x, inputs.norm_weight, EPS, inputs.problem.front == "gated")
    return reference.group(*front, [identity], [None], *none, *none, [1.0], [1.0], None, 0, False, None)[0]


def _plain(inputs: GroupInputs) -> GroupInputs:
    inputs.problem = replace(inputs.problem, front="")
    return inputs
