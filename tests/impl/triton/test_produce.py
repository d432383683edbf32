"""The producer against fp64 truth: what it writes, where, and that its shrinks are those of the values it wrote."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from triton_problems import BF16, FP16, FP32, FP64, draw_routes

from twn_kernels.impl.triton import produce, produce_, produce_config
from twn_kernels.testing.oracle import assert_as_good_as_torch

EPS = 2.0**-17  # exact in fp32, which the kernel takes it as
NAN = float("nan")
SCALING_R, SCALING_E = (0.5, -2.0, 1.25), (-1.75, 0.75, 3.0)


@dataclass(frozen=True)
class Problem:
    tokens: int
    features: int
    ranks: tuple[tuple[int, int], ...]  # (reasoning, embedding) of each projection
    dtype: torch.dtype
    front: str = "norm"  # or "gated", "plain"
    routes: str = "mixed"
    present: int = 3
    adapter_dtype: torch.dtype | None = None
    norm_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        ranks = "_".join(f"{r}.{e}" for r, e in self.ranks)
        dtype = str(self.dtype).removeprefix("torch.")
        extra = "-fp32_adapters" * (self.adapter_dtype is not None) + "-fp32_norm" * (self.norm_dtype is not None)
        routes = f"{self.routes}.{self.present}"
        return f"t{self.tokens}-k{self.features}-r{ranks}-{dtype}-{self.front}-{routes}{extra}"


class Inputs:
    """Tensors of one problem, outputs poisoned with NaN and cut from larger buffers of NaN."""

    def __init__(self, problem: Problem, device, cut=lambda t: t) -> None:
        self.problem = p = problem
        adapters = p.adapter_dtype or p.dtype

        def draw(*shape, dtype=p.dtype, scale=1.0):
            tensor = (torch.randn(*shape) * scale).to(device, dtype)
            return cut(tensor) if tensor.numel() else tensor

        self.x = draw(p.tokens, p.features * (2 if p.front == "gated" else 1), scale=1.5)
        self.norm_weight = draw(p.features, dtype=p.norm_dtype or p.dtype) if p.front == "norm" else None
        self.A = [draw(rank, p.features, dtype=adapters, scale=p.features**-0.5) for pair in p.ranks for rank in pair]
        routes = draw_routes(p.routes, p.tokens)
        self.routes = routes.to(device)
        flat = [rank for pair in p.ranks for rank in pair]
        # blocks in another order than the arguments, apart from one another
        widths = [rank + 3 for rank in reversed(flat)]
        self.columns = [2 + start for start in reversed([0, *accumulate(widths[:-1])])]
        self.x_buffer = torch.full((p.tokens, p.features + 9), NAN, dtype=p.dtype, device=device)
        self.s_buffer = torch.full((p.tokens, sum(widths) + 4), NAN, dtype=adapters, device=device)

    def run(self, *, write=True, **changes):
        p, pairs = self.problem, len(self.problem.ranks)
        arguments = {
            "x": self.x, "norm_weight": self.norm_weight, "eps": EPS, "gated": p.front == "gated",
            "A_r": self.A[0::2], "A_e": self.A[1::2],
            "scaling_r": list(SCALING_R[:pairs]), "scaling_e": list(SCALING_E[:pairs]),
            "routes": self.routes, "present": p.present,
            "x_out": self.x_buffer[:, 5 : 5 + p.features] if write else None,
            "s_out": self.s_buffer, "s_columns": self.columns,
        }  # fmt: skip
        assert produce_(**(arguments | changes)) is None
        return self

    @property
    def written(self) -> torch.Tensor:
        return self.x_buffer[:, 5 : 5 + self.problem.features]

    @property
    def blocks(self) -> list[torch.Tensor]:
        return [self.s_buffer[:, c : c + a.shape[0]] for c, a in zip(self.columns, self.A, strict=True)]

    def uses(self, block: int) -> torch.Tensor:
        return (self.routes & (1 << block % 2) & self.problem.present) != 0

    def torch_front(self, dtype: torch.dtype) -> torch.Tensor:
        """What eager torch multiplies the weights with, in ``dtype``."""
        x = self.x.to(dtype)
        if self.problem.front == "norm":
            h = x.to(FP64 if dtype == FP64 else FP32)
            normed = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(dtype)
            return (self.norm_weight.to(dtype if dtype == FP64 else self.norm_weight.dtype) * normed).to(dtype)
        if self.problem.front == "gated":
            gate, up = x.chunk(2, dim=1)
            return F.silu(gate) * up
        return x

    def shrink(self, block: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scaling = (SCALING_R, SCALING_E)[block % 2][block // 2]
        s = scaling * (x.to(dtype) @ self.A[block].to(dtype).T)
        return torch.where(self.uses(block)[:, None], s, 0.0)

    def check(self, *, written=True) -> None:
        p = self.problem
        x_hat = self.torch_front(p.dtype)
        if written:
            assert_as_good_as_torch(self.written, self.torch_front(FP64), x_hat, "x^")
            x_hat = self.written
            outside = torch.ones_like(self.x_buffer, dtype=torch.bool)
            outside[:, 5 : 5 + p.features] = False
            assert self.x_buffer[outside].isnan().all(), "wrote beside x^"
        outside = torch.ones_like(self.s_buffer, dtype=torch.bool)
        found = []
        for i, (block, column) in enumerate(zip(self.blocks, self.columns, strict=True)):
            outside[:, column : column + block.shape[1]] = False
            assert (block[~self.uses(i)] == 0).all(), f"block {i} holds something for a row that does not use it"
            own = self.shrink(i, x_hat, FP32).to(block.dtype)
            # the truth is of the values as written: an unrounded input would be far off with fp32 adapters
            found.append((block, self.shrink(i, x_hat, FP64), own))
        # all blocks at once: of a single element, torch's own error may be nothing by luck
        assert_as_good_as_torch(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)), "s")
        assert self.s_buffer[outside].isnan().all(), "wrote beside the blocks of s"


QKV = ((16, 8), (16, 8), (16, 8))
PROBLEMS = [
    Problem(1, 64, QKV, BF16),
    Problem(1, 37, ((1, 17), (48, 0)), FP32, routes="both"),
    Problem(2, 131, ((17, 1),), FP16, "gated", routes="both"),
    Problem(7, 140, ((0, 3), (5, 0), (1, 1)), BF16, routes="alternating"),
    Problem(16, 96, ((0, 0), (16, 16)), FP16, routes="reasoning", present=1),
    Problem(17, 130, ((64, 48),), BF16, "gated"),
    Problem(33, 96, ((8, 8), (8, 8)), FP32, "plain", routes="suffix"),
    Problem(65, 70, ((48, 17), (1, 100), (16, 16)), BF16, "norm"),
    Problem(70, 40, ((16, 16),), FP32, "gated"),
    Problem(100, 33, ((3, 0),), FP16, "plain", routes="unused"),
    Problem(9, 100, ((16, 8), (4, 0)), BF16, "norm", adapter_dtype=FP32),
    Problem(9, 100, ((16, 8),), FP16, "gated", adapter_dtype=FP32, routes="both"),
    Problem(80, 50, QKV, BF16, "norm", adapter_dtype=FP32, norm_dtype=FP32),
    Problem(5, 80, ((16, 0), (0, 8)), FP16, "norm", routes="embedding", present=2, norm_dtype=FP32),
    Problem(6, 48, ((4, 4),), FP64, "norm"),
    Problem(6, 48, ((4, 4),), FP64, "gated"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_as_good_as_torch(problem, device):
    if problem.dtype == FP64 and device.type == "cuda":
        pytest.skip("float64 is interpreted only: no tile is chosen for it")
    inputs = Inputs(problem, device)
    before = inputs.x.clone()
    inputs.run().check()
    assert torch.equal(inputs.x, before)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("front", ["norm", "gated"])
def test_the_input_rounds_where_eager_torch_rounds(front, dtype, device):
    """All but the few elements whose last bit hangs on the order of a sum or on an exponential are the same bits."""
    inputs = Inputs(Problem(40, 64, ((0, 0),), dtype, front), device).run(s_out=None)
    eager = inputs.torch_front(dtype)
    once = inputs.torch_front(FP64).to(dtype)
    assert (once != eager).float().mean() > 0.1, "rounding once must show here"
    assert (inputs.written != eager).float().mean() < 0.02


@pytest.mark.parametrize("present", [1, 2])
def test_an_adapter_that_cannot_occur_is_never_read(present, device):
    """``present`` decides: routes that name the other adapter, and its NaN weights, change nothing."""
    inputs = Inputs(Problem(9, 40, ((16, 8), (3, 5)), BF16, present=present, routes="both"), device)
    for a in inputs.A[2 - present :: 2]:
        a.fill_(NAN)
    inputs.run()
    for i, block in enumerate(inputs.blocks):
        if i % 2 == present - 1:
            assert_as_good_as_torch(
                block, inputs.shrink(i, inputs.written, FP64), inputs.shrink(i, inputs.written, FP32).to(BF16), f"s {i}"
            )
        else:
            assert (block == 0).all(), i


@pytest.mark.parametrize("front", ["norm", "gated", "plain"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_operands_cut_from_larger_buffers_of_nan(dtype, front, device, cut_from_nan):
    Inputs(Problem(19, 45, ((8, 3), (0, 17)), dtype, front), device, cut_from_nan).run().check()


@pytest.mark.parametrize("front", ["norm", "gated"])
def test_many_tokens_take_the_large_tiles(front, device, monkeypatch):
    chosen = produce_config.produce_config(1030, 40, 84, False, front == "gated", 90)
    assert (chosen.block_m, chosen.block_r) == (64, 128)
    monkeypatch.setattr(produce, "produce_config", lambda *args, **kwargs: chosen)
    problem = Problem(130, 72, ((64, 3), (0, 80)), BF16, front, routes="suffix")  # rows and columns of several tiles
    Inputs(problem, device).run().check()


@pytest.mark.parametrize("problem", [Problem(20, 72, QKV, BF16), Problem(70, 72, ((5, 9),), BF16, "gated")], ids=str)
def test_the_tiles_for_unaligned_operands(problem, device, monkeypatch):
    monkeypatch.setattr(produce, "_aligned", lambda *tensors: False)
    Inputs(problem, device).run().check()


@pytest.mark.parametrize(
    "problem",
    [
        Problem(3, 640, ((16, 8), (0, 0), (3, 1)), BF16, "gated"),
        Problem(18, 150, ((4, 1),), FP16, "norm", adapter_dtype=FP32),
    ],
    ids=str,
)
def test_a_split_sum(problem, device, monkeypatch):
    """Parts that do not divide the features evenly, the last of them possibly empty."""
    monkeypatch.setattr(
        produce, "produce_config", lambda *a, **k: dataclasses.replace(produce_config.produce_config(*a, **k), splits=4)
    )
    inputs = Inputs(problem, device).run()
    inputs.check()
    again = Inputs(problem, device)
    again.x, again.A, again.norm_weight, again.routes = inputs.x, inputs.A, inputs.norm_weight, inputs.routes
    again.run()
    assert torch.equal(again.written, inputs.written)
    for first, second in zip(inputs.blocks, again.blocks, strict=True):
        assert torch.equal(first, second)


def test_a_long_sum_over_few_rows_is_split_and_others_are_not():
    choose = produce_config.produce_config
    assert choose(1, 12288, 128, False, True, 90).splits > 1
    assert choose(16, 4096, 384, False, False, 90).splits == 1
    assert choose(4096, 12288, 128, False, True, 90).splits == 1


@given(
    st.integers(1, 2**31), st.integers(1, 200_000), st.integers(0, 1536), st.booleans(), st.booleans(),
    st.sampled_from([80, 86, 87, 89, 90, 100, 103, 120, 200]), st.booleans(),
)  # fmt: skip
def test_every_configuration_is_enumerated(tokens, features, ranks, wide, gated, arch, aligned):
    chosen = produce_config.produce_config(tokens, features, ranks, wide, gated, arch, aligned=aligned)
    known = produce_config.all_produce_configs(arch)
    kind = "produce_wide" if wide or not aligned else "produce_gated" if gated else "produce"
    assert dataclasses.replace(chosen, splits=1) in known[kind]
    assert chosen.splits == 1 or features >= chosen.splits * chosen.block_k
    assert produce_config.produce_tiles(chosen, tokens, features, ranks) * chosen.block_r >= ranks
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.block_m = 1
    chosen = produce_config.group_shrink_config(tokens, features, 1 + ranks // 6, wide, arch, aligned=aligned)
    assert (
        dataclasses.replace(chosen, splits=1) in known["group_shrink_wide" if wide or not aligned else "group_shrink"]
    )


@pytest.mark.parametrize("front", ["norm", "gated", "plain"])
def test_base_rows_only(front, device):
    """Nothing is present: the adapters, NaN here, are not read, ``x^`` is written and the blocks are zero."""
    inputs = Inputs(Problem(21, 70, ((16, 8), (3, 0)), BF16, front, routes="both", present=0), device)
    for a in inputs.A:
        a.fill_(NAN)
    inputs.run()
    for block in inputs.blocks:
        assert (block == 0).all()
    assert_as_good_as_torch(inputs.written, inputs.torch_front(FP64), inputs.torch_front(BF16), "x^")
    expected = inputs.written.clone()
    inputs.x_buffer.fill_(NAN)
    inputs.run(routes=None)
    assert torch.equal(inputs.written, expected)


@pytest.mark.parametrize("present", [1, 2, 3])
def test_no_routes_means_every_row_takes_what_is_present(present, device):
    inputs = Inputs(Problem(19, 70, ((16, 8), (0, 5)), BF16, "norm", present=present), device)
    inputs.routes = torch.full_like(inputs.routes, present)
    inputs.run().check()
    expected = inputs.s_buffer.clone()
    inputs.s_buffer.fill_(NAN)
    inputs.run(routes=None)
    assert torch.equal(inputs.s_buffer.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_shrinks_alone_and_input_alone(device):
    inputs = Inputs(Problem(19, 70, ((16, 8), (0, 5)), FP16, "norm"), device).run(write=False)
    assert inputs.x_buffer.isnan().all()
    inputs.check(written=False)
    shrinks = inputs.s_buffer.clone()
    bare = Inputs(Problem(19, 70, ((0, 0),), FP16, "norm"), device)
    bare.x, bare.norm_weight = inputs.x, inputs.norm_weight
    bare.run(s_out=None).check()
    inputs.run().check()
    assert torch.equal(inputs.s_buffer.nan_to_num(7.0), shrinks.nan_to_num(7.0))


def test_adapters_in_any_layout(device):
    inputs = Inputs(Problem(9, 48, ((16, 8), (3, 0)), FP32), device).run()
    expected = inputs.s_buffer.clone()
    inputs.A = [a.t().contiguous().t() if i % 2 else a.repeat(2, 1)[: a.shape[0]] for i, a in enumerate(inputs.A)]
    inputs.run()
    assert torch.equal(inputs.s_buffer.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_no_tokens(device):
    inputs = Inputs(Problem(0, 48, QKV, BF16), device).run()
    assert inputs.x_buffer.numel() == 0


# numpy, which the interpreter multiplies with, warns about NaN
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize(
    "problem", [Problem(20, 40, ((4, 7), (3, 2)), BF16), Problem(9, 40, ((5, 9),), FP16, "gated")], ids=str
)
def test_what_is_not_finite_stays_with_its_row_or_its_adapter(problem, bad, device):
    inputs = Inputs(problem, device)
    inputs.routes = (torch.arange(problem.tokens, device=device) % 4).to(torch.int8)
    clean_x, clean_s = inputs.run().written.clone(), [block.clone() for block in inputs.blocks]
    row, others = 6, torch.arange(problem.tokens, device=device) != 6  # route 2: embedding alone
    good = inputs.x.clone()
    inputs.x[row] = bad
    inputs.run()
    assert torch.equal(inputs.written[others], clean_x[others]) and not inputs.written[row].isfinite().any()
    for i, block in enumerate(inputs.blocks):
        assert torch.equal(block[others], clean_s[i][others])
        assert not block[row].isfinite().any() if i % 2 else (block[row] == 0).all()
    inputs.x.copy_(good)
    for broken in range(len(inputs.A)):
        value = inputs.A[broken][1, 3].clone()
        inputs.A[broken][1, 3] = bad
        inputs.run()
        for i, block in enumerate(inputs.blocks):
            expected = clean_s[i].clone()
            if i == broken:
                assert not block[inputs.uses(i), 1].isfinite().any()
                expected[inputs.uses(i), 1] = bad
                block[inputs.uses(i), 1] = bad
            assert torch.equal(block.nan_to_num(7.0), expected.nan_to_num(7.0)), (broken, i)
        inputs.A[broken][1, 3] = value
