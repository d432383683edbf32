"""NaN and Inf in a site group stay with their row, or with the rows and the projection that use what holds them.

Every problem has tiles whose rows differ in their adapters, where 0 * NaN would cross rows if a mask multiplied.
"""

from __future__ import annotations

import pytest
import torch
from group_problems import GroupInputs, GroupProblem, run
from triton_problems import BF16, FP16, FP32

# numpy, which the interpreter multiplies with, warns about NaN
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

RANKS = ((16, 8), (5, 24))
BAD = [float("nan"), float("-inf")]
PROBLEMS = [
    GroupProblem(70, 48, (72, 40), RANKS, BF16, "mixed", (True, True)),  # descriptors
    GroupProblem(9, 40, (40, 24), RANKS, FP16, "mixed"),  # decode tiles
    GroupProblem(20, 33, (40, 24), RANKS, FP32, "mixed"),
    GroupProblem(20, 48, (72, 24), RANKS, BF16, "mixed", adapter_dtype=FP32),
]
SWIGLU = [
    GroupProblem(70, 48, (72, 72), RANKS, BF16, "mixed", swiglu=True),
    GroupProblem(9, 40, (40, 40), RANKS, FP16, "mixed", adapter_dtype=FP32, swiglu=True),
]


def _with_every_route(problem: GroupProblem, device) -> GroupInputs:
    inputs = GroupInputs(problem, device)
    inputs.routes = (torch.arange(problem.tokens, device=device) % 4).to(torch.int8)
    return inputs


def _same(actual, expected, where) -> None:
    assert torch.equal(actual[where], expected[where])


@pytest.mark.parametrize(("problem", "bad"), list(zip(PROBLEMS + SWIGLU, BAD * 3, strict=True)), ids=str)
def test_a_bad_row_of_x(problem, bad, device):
    inputs = _with_every_route(problem, device)
    clean = run(inputs)
    row = 6  # route 2: embedding alone
    inputs.x[row] = bad
    others = torch.arange(problem.tokens, device=device) != row
    dirty = run(inputs)
    for name, value in dirty.items():
        _same(value, clean[name], others)
    assert not torch.isfinite(dirty["y"][row]).any()
    assert (dirty["s"][row, : RANKS[0][0]] == 0).all(), "reasoning is not this row's"


@pytest.mark.parametrize(
    ("adapter", "part", "bad"),
    [(0, "A", BAD[1]), (1, "A", BAD[0]), (0, "B", BAD[0]), (1, "B", BAD[1])],
    ids=["reasoning-A", "embedding-A", "reasoning-B", "embedding-B"],
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_bad_element_of_an_adapter(problem, adapter, part, bad, device):
    """In the second projection: neither the first one nor a row without the adapter may show it."""
    inputs = _with_every_route(problem, device)
    clean = run(inputs)["y"]
    getattr(inputs, f"{part}_{'re'[adapter]}")[1][1, 2] = bad
    y = run(inputs)["y"]
    users = (inputs.routes & (1 << adapter)) != 0
    first = problem.widths[0]
    columns = [first + 1] if part == "B" else list(range(first, y.shape[1]))
    assert not torch.isfinite(y[users][:, columns]).any(), "the rows that use it must show it"
    _same(y, clean, ~users)
    others = [c for c in range(y.shape[1]) if c not in columns]
    assert torch.equal(y[:, others], clean[:, others])


@pytest.mark.parametrize("projection", [0, 1], ids=["gate", "up"])
@pytest.mark.parametrize("problem", SWIGLU, ids=str)
def test_a_bad_element_under_swiglu(problem, projection, device):
    inputs = _with_every_route(problem, device)
    clean = run(inputs)["y"]
    inputs.B_e[projection][3, 0] = float("nan")
    y = run(inputs)["y"]
    users = (inputs.routes & 2) != 0
    assert torch.isnan(y[users, 3]).all()
    _same(y, clean, ~users)
    others = torch.arange(y.shape[1], device=device) != 3
    assert torch.equal(y[:, others], clean[:, others])


def test_tiles_whose_rows_all_use_the_bad_adapter(device):
    """Pure tiles take another path than mixed ones: rows 0..127 are reasoning, the rest base."""
    inputs = GroupInputs(GroupProblem(150, 32, (40, 24), RANKS, BF16, "mixed"), device)
    inputs.routes = (torch.arange(150, device=device) < 128).to(torch.int8)
    clean = run(inputs)["y"]
    inputs.B_r[0][3, 0] = float("nan")
    dirty = run(inputs)["y"]
    assert torch.isnan(dirty[:128, 3]).all()
    assert torch.equal(dirty[128:], clean[128:])
    others = torch.arange(64, device=device) != 3
    assert torch.equal(dirty[:, others], clean[:, others])


def test_a_bad_residual_stays_in_its_element(device):
    inputs = GroupInputs(GroupProblem(20, 48, (40,), RANKS[:1], BF16, "mixed", residual=True), device)
    clean = run(inputs)["y"]
    inputs.residual[3, 5] = float("nan")
    y = run(inputs)["y"]
    assert torch.isnan(y[3, 5]) and torch.isnan(y).sum() == 1
    _same(y, clean, ~torch.isnan(y))


def test_a_bad_base_weight_shows_in_every_row_of_its_column(device):
    inputs = GroupInputs(GroupProblem(20, 48, (40, 24), RANKS, BF16, "mixed"), device)
    inputs.weights[1][3, 4] = float("nan")
    y = run(inputs)["y"]
    assert torch.isnan(y[:, 43]).all() and torch.isnan(y).sum() == 20
