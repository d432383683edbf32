"""Problems for the Triton implementation: flat tensors of the implementation contract, and what they must come to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twn_kernels.impl import reference, triton
from twn_kernels.testing.oracle import assert_as_good_as_torch

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SCALING = (0.5, -1.75)  # opposite signs: a row served by the wrong adapter is far off
NAMES = {
    "forward": ("y", "s"),
    "fanout": ("y_r", "y_e", "s"),
    "backward": ("dx", "dA_r", "dB_r", "dA_e", "dB_e", "dbias"),
}


@dataclass(frozen=True)
class Problem:
    tokens: int
    features: int
    outputs: int
    ranks: tuple[int, int]
    dtype: torch.dtype
    routes: str = "mixed"
    bias: bool = True
    adapter_dtype: torch.dtype | None = None
    dropout: tuple[float, float] = (0.0, 0.0)
    fanout_grads: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        ranks = "r{}+{}".format(*self.ranks)
        parts = [f"t{self.tokens}", f"k{self.features}", f"n{self.outputs}", ranks, name, self.routes]
        if self.adapter_dtype:
            parts.append(f"{str(self.adapter_dtype).removeprefix('torch.')}_adapters")
        if any(self.dropout):
            parts.append("drop{}+{}".format(*self.dropout))
        return "-".join(parts + ["bias"] * self.bias + ["own_dy"] * self.fanout_grads)

    @property
    def present(self) -> int:
        return {"reasoning": 1, "embedding": 2, "base": 0}.get(self.routes, 3)


def draw_routes(kind: str, tokens: int) -> torch.Tensor:
    """int8 ``[tokens]``."""
    index = torch.arange(tokens)
    values = {
        "base": lambda: index * 0,
        "unused": lambda: index * 0,  # present says both, no row uses one
        "reasoning": lambda: index * 0 + 1,
        "embedding": lambda: index * 0 + 2,
        "both": lambda: index * 0 + 3,
        "alternating": lambda: index % 2 + 1,
        "suffix": lambda: torch.where(index >= tokens - 5, 2, 1),
        "mixed": lambda: torch.randint(0, 4, (tokens,)),
    }[kind]()
    return values.to(torch.int8)


class Inputs:
    """The tensors of one problem; ``cut`` may replace each by a view into a larger buffer."""

    def __init__(self, problem: Problem, device, cut=lambda t: t) -> None:
        self.problem = problem
        dtype, adapters = problem.dtype, problem.adapter_dtype or problem.dtype
        tokens, features, outputs = problem.tokens, problem.features, problem.outputs

        def draw(*shape, dtype=dtype, scale=1.0):
            tensor = (torch.randn(*shape) * scale).to(device, dtype)
            return cut(tensor) if tensor.numel() else tensor

        self.x = draw(tokens, features)
        self.weight = draw(outputs, features, scale=features**-0.5)
        self.bias = draw(outputs) if problem.bias else None
        self.A = tuple(draw(rank, features, dtype=adapters, scale=features**-0.5) for rank in problem.ranks)
        self.B = tuple(draw(outputs, rank, dtype=adapters) for rank in problem.ranks)
        self.routes = draw_routes(problem.routes, tokens).to(device)
        self.seed = torch.tensor([-0x123456789ABCDEF], device=device) if any(problem.dropout) else None
        self.dy = draw(tokens, outputs)
        self.dy_own = (draw(tokens, outputs), draw(tokens, outputs)) if problem.fanout_grads else (None, None)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        other = object.__new__(Inputs)
        other.problem, other.routes, other.seed = self.problem, self.routes, self.seed
        for name in ("x", "weight", "bias", "dy"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.to(dtype))
        for name in ("A", "B", "dy_own"):
            setattr(other, name, tuple(None if t is None else t.to(dtype) for t in getattr(self, name)))
        return other

    @property
    def arguments(self) -> tuple:
        """Arguments of ``forward`` and ``fanout``."""
        p = self.problem
        return (
            self.x, self.weight, self.bias, self.A[0], self.B[0], self.A[1], self.B[1], *SCALING,
            self.routes, p.present, *p.dropout, self.seed,
        )  # fmt: skip

    def backward_arguments(self, s, needs=(True,) * 6) -> tuple:
        """Arguments of ``backward`` with the ``s`` that the forward saved."""
        p = self.problem
        return (
            self.dy, *self.dy_own, self.x, self.weight, self.A[0], self.B[0], self.A[1], self.B[1], *SCALING, s,
            self.routes, p.present, *p.dropout, self.seed, needs,
        )  # fmt: skip


def run(impl, inputs: Inputs, what: str) -> dict[str, torch.Tensor]:
    """Results of one function of an implementation, by name."""
    if what == "backward":
        s = impl.forward(*inputs.arguments)[1]
        results = impl.backward(*inputs.backward_arguments(s))
    else:
        results = getattr(impl, what)(*inputs.arguments)
    return dict(zip(NAMES[what], results, strict=True))


def check(problem: Problem, device, what: str, cut=lambda t: t) -> dict[str, torch.Tensor]:
    """Run the Triton implementation and hold every result to the oracle, its dtype and its shape."""
    inputs = Inputs(problem, device, cut)
    actual = run(triton, inputs, what)
    truth = run(reference, inputs.to(FP64), what)
    baseline = run(reference, inputs, what)
    for name, value in actual.items():
        assert value.dtype == baseline[name].dtype, name
        assert_as_good_as_torch(value, truth[name], baseline[name], f"{what} {name}")
    return actual
