"""The learned queries: one parameter, expanded over the batch without a copy."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from twn_kernels.errors import DtypeError, OptionError, ShapeError, TWNError
from twn_kernels.modules import QueryBank
from twn_kernels.testing.oracle import assert_as_good_as_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_input_gets_the_queries_without_a_copy(dtype):
    queries = torch.randn(4, 8).to(dtype)
    bank = QueryBank(queries)
    out = bank(3)
    assert out.dtype == dtype and out.shape == (3, 4, 8)
    assert all(torch.equal(row, queries) for row in out)
    assert out.data_ptr() == bank.queries.data_ptr() and out.stride(0) == 0
    assert bank(3, dtype).data_ptr() == bank.queries.data_ptr()
    assert bank(0).shape == (0, 4, 8)
    assert (bank.num_queries, bank.hidden) == (4, 8)
    assert "num_queries=4, hidden=8" in repr(bank)


def test_another_dtype_is_converted_once_for_the_batch():
    queries = torch.randn(4, 8)
    out = QueryBank(queries)(5, torch.bfloat16)
    assert out.dtype == torch.bfloat16 and out.stride(0) == 0
    assert torch.equal(out[4], queries.bfloat16())


def test_the_gradient_sums_over_the_batch():
    bank = QueryBank(torch.randn(2, 3, dtype=torch.float64))
    weights = torch.randn(5, 2, 3, dtype=torch.float64)
    (bank(5) * weights).sum().backward()
    assert_as_good_as_torch(bank.queries.grad, weights.sum(0).double(), weights.sum(0))
    bank.queries.grad = None
    (bank(5, torch.float32) * weights.float()).sum().backward()
    assert bank.queries.grad.dtype == torch.float64 and bank.queries.grad.any()


def test_the_given_tensor_is_not_the_parameter():
    given = torch.randn(2, 3)
    kept = given.clone()
    bank = QueryBank(given)
    with torch.no_grad():
        bank.queries.add_(1)
    assert torch.equal(given, kept) and bank.queries.requires_grad


def test_state_dict_round_trips():
    bank = QueryBank(torch.randn(2, 3).bfloat16())
    assert list(bank.state_dict()) == ["queries"]
    fresh = QueryBank(torch.zeros(2, 3).bfloat16())
    fresh.load_state_dict(bank.state_dict())
    assert torch.equal(fresh.queries, bank.queries)
    assert torch.equal(copy.deepcopy(bank).queries, bank.queries)
    assert bank.to(torch.float32)(1).dtype == torch.float32


def test_fullgraph_without_recompiles():
    bank = QueryBank(torch.randn(4, 8))
    frames = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def run(x):
        return torch.cat([x, bank(x.shape[0], x.dtype)], dim=1)

    for batch in (3, 8, 17):
        x = torch.randn(batch, 2, 8).bfloat16()
        assert torch.equal(run(x)[:, 2:], bank(batch, torch.bfloat16))
    assert frames.frame_count == 1


BAD = {
    "type": ([[1.0]], DtypeError, "queries must be a tensor [num_queries, hidden], got list."),
    "batched": (
        torch.zeros(1, 4, 8), ShapeError,
        "queries must be [num_queries, hidden] with one query or more, got [1, 4, 8].",
    ),
    "one": (torch.zeros(8), ShapeError, "with one query or more, got [8]."),
    "none": (torch.zeros(0, 8), ShapeError, "with one query or more, got [0, 8]."),
    "no_hidden": (torch.zeros(4, 0), ShapeError, "with one query or more, got [4, 0]."),
    "integers": (torch.zeros(4, 8).int(), DtypeError, "queries must be floating point, got torch.int32."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_no_queries(name):
    queries, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        QueryBank(queries)
    assert isinstance(caught.value, TWNError)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), OptionError, "batch_size must be a whole number >= 0, got -1."),
        ((2.0,), OptionError, "batch_size must be a whole number >= 0, got 2.0."),
        ((True,), OptionError, "batch_size must be a whole number >= 0, got True."),
        ((2, torch.int8), DtypeError, "dtype must be a floating-point torch.dtype or None, got torch.int8."),
        ((2, "bf16"), DtypeError, "dtype must be a floating-point torch.dtype or None, got 'bf16'."),
    ],
    ids=["negative", "float", "bool", "int_dtype", "name"],
)
def test_bad_call(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        QueryBank(torch.zeros(4, 8))(*arguments)
    assert isinstance(caught.value, TWNError)
