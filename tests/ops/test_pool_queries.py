"""Pooling the query states, held to the same sums written out by hand in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from twn_kernels.checkpoint.config import POOLINGS as CONFIG_POOLINGS
from twn_kernels.errors import DtypeError, OptionError, ShapeError, TWNError
from twn_kernels.ops import pool_queries
from twn_kernels.ops.pool_queries import POOLINGS
from twn_kernels.testing.oracle import assert_as_good_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def by_hand(states, pooling, normalize, dtype=torch.float64):
    x = states.to(dtype)
    if pooling == "mean":
        pooled = sum(x[:, query] for query in range(x.shape[1])) / x.shape[1]
    else:
        pooled = x[:, {"first": 0, "last": x.shape[1] - 1}[pooling]]
    return pooled / (pooled * pooled).sum(1, keepdim=True).sqrt() if normalize else pooled


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("shape", [(5, 4, 48), (3, 1, 33), (1, 7, 1)], ids=str)
def test_equals_the_sums_by_hand(shape, pooling, normalize, dtype):
    states = (torch.randn(shape) + 0.5).to(dtype)
    pooled = pool_queries(states, pooling=pooling, normalize=normalize)
    assert pooled.dtype == torch.float32
    truth = by_hand(states, pooling, normalize)
    assert_as_good_as_torch(pooled, truth, by_hand(states, pooling, normalize, torch.float32), pooling)


def test_the_default_is_the_unit_mean():
    states = torch.randn(4, 3, 16)
    assert torch.equal(pool_queries(states), pool_queries(states, pooling="mean", normalize=True))
    assert_as_good_as_torch(pool_queries(states), by_hand(states, "mean", True), by_hand(states, "mean", True).float())


def test_the_names_are_those_of_a_checkpoint_s_config():
    assert set(POOLINGS) == set(CONFIG_POOLINGS)


def test_fp16_states_that_would_overflow_when_summed():
    states = torch.full((2, 8, 4), 60000.0, dtype=torch.float16)
    assert torch.equal(pool_queries(states, normalize=False), torch.full((2, 4), 60000.0))
    assert torch.equal(pool_queries(states), torch.full((2, 4), 0.5))


def test_fp64_stays_fp64():
    states = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_as_good_as_torch(pool_queries(states), by_hand(states, "mean", True).double(), by_hand(states, "mean", True))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-10, 1.0, 1e20, 3e38])
def test_the_norm_neither_overflows_nor_vanishes(size):
    states = torch.tensor([[[3.0, -4.0, 0.0]], [[0.0, 0.0, 1.0]]]) / 4 * size
    truth = by_hand(states, "first", True)
    assert_as_good_as_torch(pool_queries(states), truth, truth.float(), f"unit vectors of size {size}")


def test_a_zero_vector_stays_zero():
    states = torch.randn(3, 2, 8)
    states[1, 0] = -states[1, 1]
    states.requires_grad_()
    pooled = pool_queries(states)
    assert torch.equal(pooled[1], torch.zeros(8))
    assert_as_good_as_torch(pooled[[0, 2]].norm(dim=1), torch.ones(2).double(), torch.ones(2))
    (pooled * torch.randn(3, 8)).sum().backward()
    assert torch.equal(states.grad[1], torch.zeros(2, 8))
    assert torch.isfinite(states.grad).all() and states.grad[0].any() and states.grad[2].any()


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_row(bad, pooling, normalize):
    states = torch.randn(4, 3, 8)
    clean = pool_queries(states, pooling=pooling, normalize=normalize)
    states[2, :, 5] = bad
    dirty = pool_queries(states, pooling=pooling, normalize=normalize)
    assert torch.equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])
    assert not torch.isfinite(dirty[2, 5])


def test_nan_in_a_query_that_is_not_read():
    states = torch.randn(2, 3, 8)
    expected = by_hand(states, "last", True)
    states[:, :2] = math.nan
    assert_as_good_as_torch(pool_queries(states, pooling="last"), expected, expected.float())


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_gradients(pooling, normalize):
    states = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool_queries(x, pooling=pooling, normalize=normalize), states)


def test_strides_and_sizes(cut_from_nan):
    states = torch.randn(3, 4, 8)
    expected = pool_queries(states)
    assert_as_good_as_torch(pool_queries(cut_from_nan(states)), expected.double(), expected)
    assert_as_good_as_torch(
        pool_queries(states.permute(2, 0, 1).contiguous().permute(1, 2, 0)), expected.double(), expected
    )
    assert pool_queries(states[:0]).shape == (0, 8)


def test_autocast_does_not_round():
    states = torch.randn(3, 4, 8)
    expected = pool_queries(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool_queries(states), expected)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_fullgraph_without_recompiles(pooling):
    frames = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def run(states):
        return pool_queries(states, pooling=pooling)

    for batch in (3, 8, 17):
        states = torch.randn(batch, 4, 8)
        assert_as_good_as_torch(
            run(states), pool_queries(states, pooling=pooling).double(), pool_queries(states, pooling=pooling)
        )
    assert frames.frame_count == 1


def test_no_host_reads():
    assert pool_queries(torch.empty(3, 4, 8, device="meta")).shape == (3, 8)


X = torch.zeros(2, 3, 4)
BAD = {
    "type": ([1.0], {}, DtypeError, "states must be a tensor [batch, num_queries, hidden], got list."),
    "shape": (
        X[0], {}, ShapeError, "states must be [batch, num_queries, hidden] with one query or more, got [3, 4].",
    ),
    "no_queries": (X[:, :0], {}, ShapeError, "with one query or more, got [2, 0, 4]."),
    "no_hidden": (X[..., :0], {}, ShapeError, "with one query or more, got [2, 3, 0]."),
    "dtype": (X.int(), {}, DtypeError, "states must be float32, float16, bfloat16 or float64, got torch.int32."),
    "pooling": (
        X, {"pooling": "maen"}, OptionError,
        'pooling must be one of "mean", "last", "first", got \'maen\'. Did you mean "mean"?',
    ),
    "pooling_type": (X, {"pooling": None}, OptionError, '"first", got None.'),
    "normalize": (X, {"normalize": "yes"}, OptionError, "normalize must be True or False, got 'yes'."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_violation(name):
    states, options, error, message = BAD[name]
    with pytest.raises(error) as caught:
        pool_queries(states, **options)
    assert message in str(caught.value)
    assert isinstance(caught.value, TWNError)
