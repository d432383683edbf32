"""Forward, fan-out and backward of the kernels against fp64 truth: shapes, ranks, routes, dtypes, strides."""

from __future__ import annotations

import pytest
import torch
from triton_problems import BF16, FP16, FP32, FP64, Inputs, Problem, check, run

from twn_kernels.impl import reference, triton
from twn_kernels.impl.triton import launch
from twn_kernels.testing.oracle import assert_as_good_as_torch

# Every token count with every kind of tile edge, every rank class (1, below 16, no multiple of 16, two tiles of ranks,
# unequal, absent), every route pattern and every dtype occurs; pairs that decide code paths occur together.
PROBLEMS = [
    Problem(1, 64, 96, (16, 16), BF16, "reasoning"),
    Problem(1, 257, 33, (1, 3), FP32, "embedding", bias=False),
    Problem(2, 5, 3, (2, 1), FP32, "both"),
    Problem(7, 96, 257, (8, 64), FP16, "alternating"),
    Problem(7, 1152, 64, (16, 4), BF16, "mixed"),  # few tokens, many features: the shrink is split
    Problem(16, 64, 64, (48, 96), BF16, "both"),
    Problem(17, 640, 64, (16, 80), FP32, "suffix"),  # split, and rank 80 is two tiles
    Problem(63, 64, 96, (32, 16), BF16, "suffix"),
    Problem(63, 96, 64, (5, 9), FP32, "unused"),
    Problem(64, 96, 64, (64, 32), FP16, "both", bias=False),
    Problem(64, 64, 257, (16, 16), BF16, "mixed"),
    Problem(65, 257, 96, (100, 20), BF16, "mixed"),
    Problem(65, 64, 64, (16, 0), FP32, "reasoning"),
    Problem(65, 64, 64, (0, 16), BF16, "embedding"),
    Problem(65, 64, 64, (16, 16), FP16, "base"),
    Problem(129, 96, 130, (48, 33), BF16, "alternating"),
    Problem(129, 64, 257, (16, 32), FP32, "mixed"),
    Problem(129, 64, 96, (8, 8), FP16, "suffix"),
    Problem(33, 40, 70, (17, 256), BF16, "mixed"),
    Problem(65, 96, 72, (16, 8), BF16, "mixed", adapter_dtype=FP32),
    Problem(7, 640, 72, (16, 8), FP16, "alternating", adapter_dtype=FP32, bias=False),
    Problem(65, 96, 72, (16, 8), BF16, "mixed", dropout=(0.3, 0.6)),
    Problem(65, 40, 72, (16, 8), FP32, "both", dropout=(0.0, 0.5)),
    Problem(33, 640, 72, (4, 8), FP16, "mixed", adapter_dtype=FP32, dropout=(0.1, 0.0)),
    Problem(300, 48, 40, (16, 8), BF16, "suffix"),  # a stretch of rows without embedding is skipped
    Problem(65, 64, 64, (16, 16), FP32, "mixed", fanout_grads=True),
    Problem(65, 64, 64, (16, 8), BF16, "alternating", fanout_grads=True),
]


@pytest.mark.parametrize("what", ["forward", "fanout", "backward"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_as_good_as_torch(problem, what, device):
    check(problem, device, what)


@pytest.mark.parametrize("what", ["forward", "fanout", "backward"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_operands_cut_from_larger_buffers_of_nan(dtype, what, device, cut_from_nan):
    check(Problem(37, 70, 45, (8, 24), dtype, "mixed"), device, what, cut_from_nan)


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_transposed_and_expanded_operands(what, device):
    """Weights stored transposed, adapters with any strides, an upstream gradient expanded from one value."""
    inputs = Inputs(Problem(20, 48, 40, (16, 8), FP32, "mixed"), device)
    inputs.weight = inputs.weight.t().contiguous().t()
    inputs.A = tuple(A.t().contiguous().t() for A in inputs.A)
    inputs.B = (inputs.B[0].t().contiguous().t(), inputs.B[1].repeat_interleave(2, dim=1)[:, ::2])
    inputs.dy = torch.full((1, 1), 0.75, device=device).expand(20, 40)
    truth, own, actual = (
        run(reference, inputs.to(torch.float64), what),
        run(reference, inputs, what),
        run(triton, inputs, what),
    )
    for name, value in actual.items():
        assert_as_good_as_torch(value, truth[name], own[name], name)


@pytest.mark.parametrize("what", ["forward", "fanout", "backward"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(65, 72, 100, (16, 8), BF16, "mixed"),
        Problem(20, 72, 100, (16, 8), BF16, "mixed", adapter_dtype=FP32, dropout=(0.2, 0.4)),
        Problem(7, 600, 40, (16, 8), FP16, "mixed"),
    ],
    ids=str,
)
def test_the_tiles_for_unaligned_operands(problem, what, device, monkeypatch):
    monkeypatch.setattr(launch, "_aligned", lambda *tensors: False)
    check(problem, device, what)


def test_the_tiles_for_a_rank_that_is_no_multiple_of_16(device, monkeypatch):
    """There the base operands are aligned and the low-rank ones are not."""
    problem = Problem(129, 64, 96, (8, 24), BF16, "mixed")
    monkeypatch.setattr(launch, "_aligned", lambda *tensors: all(t.shape[-1] % 16 == 0 for t in tensors))
    for what in ("forward", "backward"):
        check(problem, device, what)


def test_rows_without_an_adapter_hold_exact_zeros_in_s(device):
    for problem in (Problem(33, 640, 48, (16, 8), BF16, "mixed"), Problem(33, 64, 48, (16, 8), FP32, "mixed")):
        inputs = Inputs(problem, device)
        s = triton.forward(*inputs.arguments)[1]
        assert s.is_contiguous() and s.dtype == problem.dtype
        assert (s[(inputs.routes & 1) == 0, :16] == 0).all() and (s[(inputs.routes & 2) == 0, 16:] == 0).all()
        assert (s[(inputs.routes & 1) != 0, :16] != 0).any() and (s[(inputs.routes & 2) != 0, 16:] != 0).any()


def test_an_adapter_that_cannot_occur_is_never_read(device):
    """``present`` decides: routes that name the other adapter, and its NaN weights, change nothing."""
    inputs = Inputs(Problem(33, 64, 48, (16, 8), FP32, "reasoning"), device)
    expected = run(triton, inputs, "forward"), run(triton, inputs, "backward")
    inputs.routes = inputs.routes | 2
    inputs.A[1].fill_(float("nan"))
    inputs.B[1].fill_(float("nan"))
    for before, what in zip(expected, ("forward", "backward"), strict=True):
        for name, value in run(triton, inputs, what).items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("adapters", [FP32, None], ids=["fp32_adapters", "bf16_adapters"])
def test_no_tokens(adapters, device):
    inputs = Inputs(Problem(0, 64, 48, (16, 8), BF16, "mixed", adapter_dtype=adapters), device)
    for what in ("forward", "fanout", "backward"):
        expected = run(reference, inputs, what)
        for name, value in run(triton, inputs, what).items():
            assert value.shape == expected[name].shape and value.dtype == expected[name].dtype
            assert (value == 0).all()


@pytest.mark.parametrize("index", range(6))
def test_only_the_gradients_that_are_needed(index, device):
    inputs = Inputs(Problem(20, 48, 40, (16, 8), FP32, "mixed", dropout=(0.3, 0.1)), device)
    s = triton.forward(*inputs.arguments)[1]
    everything = triton.backward(*inputs.backward_arguments(s))
    needs = tuple(i == index for i in range(6))
    alone = triton.backward(*inputs.backward_arguments(s, needs))
    assert [g is not None for g in alone] == list(needs)
    assert torch.equal(alone[index], everything[index])


@pytest.mark.parametrize("what", ["forward", "fanout", "backward"])
def test_the_same_input_gives_the_same_bits(what, device):
    """Split sums included: 1100 tokens split the gradients, 640 features the shrink."""
    tokens, features = (1100, 16) if what == "backward" else (33, 640)
    inputs = Inputs(Problem(tokens, features, 24, (16, 8), BF16, "mixed"), device)
    first = run(triton, inputs, what)
    second = run(triton, inputs, what)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_many_tokens_split_the_gradients(device):
    """Enough tokens for parts, among them one without a single row of an adapter."""
    problem = Problem(1100, 16, 24, (8, 4), BF16, "suffix")
    assert launch.grad_config(1100, 24, 8, 4, False, 90).splits > 1
    check(problem, device, "backward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 is interpreted only: no tile is chosen for it")
@pytest.mark.parametrize("dropout", [(0.0, 0.0), (0.25, 0.5)], ids=["plain", "dropout"])
def test_gradcheck_in_float64(dropout):
    inputs = Inputs(Problem(4, 3, 2, (2, 1), FP64, "mixed", dropout=dropout), "cpu")
    inputs.routes = torch.tensor([0, 1, 2, 3], dtype=torch.int8)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, A_r, B_r, A_e, B_e, bias):
            inputs.x, inputs.A, inputs.B, inputs.bias = x, (A_r, A_e), (B_r, B_e), bias
            y, s = triton.forward(*inputs.arguments)
            ctx.save_for_backward(s)
            return y

        @staticmethod
        def backward(ctx, dy):
            inputs.dy = dy
            return triton.backward(*inputs.backward_arguments(*ctx.saved_tensors))

    leaves = [inputs.x, inputs.A[0], inputs.B[0], inputs.A[1], inputs.B[1], inputs.bias]
    assert torch.autograd.gradcheck(Linear.apply, [leaf.clone().requires_grad_() for leaf in leaves])
