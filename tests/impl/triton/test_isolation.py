"""NaN and Inf stay where they belong: with their row, or with the rows that use the adapter that holds them.

Every problem has tiles whose rows differ in their adapters, where 0 * NaN would cross rows if a mask multiplied.
"""

from __future__ import annotations

import pytest
import torch
from triton_problems import BF16, FP16, FP32, Inputs, Problem, run

from twn_kernels.impl import triton

# numpy, which the interpreter multiplies with, warns about NaN
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

BAD = [float("nan"), float("-inf")]
PROBLEMS = [
    Problem(70, 48, 72, (16, 24), BF16, "mixed"),  # both kinds of tile, one with a tail
    Problem(9, 1152, 40, (8, 16), FP16, "mixed", bias=False),  # few tokens, split shrink
    Problem(40, 48, 40, (16, 8), FP32, "mixed"),
    Problem(40, 48, 72, (16, 8), BF16, "mixed", adapter_dtype=FP32),
    Problem(40, 48, 72, (16, 8), BF16, "mixed", dropout=(0.3, 0.2)),
]
both_problems = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def _with_every_route(problem: Problem, device) -> Inputs:
    inputs = Inputs(problem, device)
    inputs.routes = (torch.arange(problem.tokens, device=device) % 4).to(torch.int8)
    return inputs


def _rows(inputs: Inputs, adapter: int) -> torch.Tensor:
    return (inputs.routes & (1 << adapter)) != 0


@pytest.mark.parametrize("bad", BAD, ids=str)
@both_problems
def test_a_bad_row_of_x(problem, bad, device):
    inputs = _with_every_route(problem, device)
    clean = {what: run(triton, inputs, what) for what in ("forward", "fanout", "backward")}
    row = 6  # route 2: embedding alone
    inputs.x[row] = bad
    others = torch.arange(problem.tokens, device=device) != row
    for what in ("forward", "fanout"):
        for name, value in run(triton, inputs, what).items():
            assert torch.equal(value[others], clean[what][name][others]), (what, name)
            if name != "s":
                assert not torch.isfinite(value[row]).any(), (what, name)
    dirty = run(triton, inputs, "backward")
    assert torch.equal(dirty["dx"], clean["backward"]["dx"])
    for name in ("dA_r", "dB_r"):
        assert torch.equal(dirty[name], clean["backward"][name]), name
    assert not torch.isfinite(dirty["dA_e"]).all()


@pytest.mark.parametrize("bad", BAD, ids=str)
@both_problems
def test_a_bad_row_of_dy(problem, bad, device):
    inputs = _with_every_route(problem, device)
    clean = run(triton, inputs, "backward")
    row = 5  # route 1: reasoning alone
    inputs.dy[row] = bad
    dirty = run(triton, inputs, "backward")
    others = torch.arange(problem.tokens, device=device) != row
    assert torch.equal(dirty["dx"][others], clean["dx"][others])
    assert not torch.isfinite(dirty["dx"][row]).any()
    for name in ("dA_e", "dB_e"):
        assert torch.equal(dirty[name], clean[name]), name
    assert not torch.isfinite(dirty["dA_r"]).all() and not torch.isfinite(dirty["dB_r"]).all()


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("adapter", [0, 1], ids=["reasoning", "embedding"])
@both_problems
def test_a_bad_element_of_an_adapter(problem, adapter, part, bad, device):
    inputs = _with_every_route(problem, device)
    clean = {what: run(triton, inputs, what) for what in ("forward", "fanout", "backward")}
    getattr(inputs, part)[adapter][1, 2] = bad
    unused = ~_rows(inputs, adapter)
    for what in ("forward", "fanout"):
        for name, value in run(triton, inputs, what).items():
            assert torch.equal(value[unused], clean[what][name][unused]), (what, name)
    y = run(triton, inputs, "forward")["y"]
    columns = [1] if part == "B" else list(range(problem.outputs))
    if not (part == "A" and any(problem.dropout)):  # the bad feature may have been dropped
        assert not torch.isfinite(y[~unused][:, columns]).any(), "the rows that use it must show it"
    other = [c for c in range(problem.outputs) if c not in columns]
    assert torch.equal(y[:, other], clean["forward"]["y"][:, other])
    own = ("r", "e")[1 - adapter]
    fanout = run(triton, inputs, "fanout")
    assert torch.equal(fanout[f"y_{own}"], clean["fanout"][f"y_{own}"])
    dirty = run(triton, inputs, "backward")
    assert torch.equal(dirty["dx"][unused], clean["backward"]["dx"][unused])
    for name in (f"dA_{own}", f"dB_{own}"):
        assert torch.equal(dirty[name], clean["backward"][name]), name


def test_tiles_whose_rows_all_use_the_bad_adapter(device):
    """Pure tiles take another path than mixed ones: rows 0..127 are reasoning, the rest base."""
    inputs = Inputs(Problem(200, 32, 40, (16, 16), BF16, "mixed"), device)
    inputs.routes = (torch.arange(200, device=device) < 128).to(torch.int8)
    clean = run(triton, inputs, "forward")["y"]
    inputs.B[0][3, 0] = float("nan")
    dirty = run(triton, inputs, "forward")["y"]
    assert torch.isnan(dirty[:128, 3]).all()
    assert torch.equal(dirty[128:], clean[128:])
    assert torch.equal(dirty[:, :3], clean[:, :3]) and torch.equal(dirty[:, 4:], clean[:, 4:])


def test_a_bad_base_weight_shows_in_every_row(device):
    inputs = Inputs(Problem(20, 48, 40, (16, 8), BF16, "mixed"), device)
    inputs.weight[3, 4] = float("nan")
    y = run(triton, inputs, "forward")["y"]
    assert torch.isnan(y[:, 3]).all() and torch.isfinite(y[:, 4:]).all()
