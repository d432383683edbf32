"""Numbers of the small kernels without a GPU: their own programs, run on a host, held to fp64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from host_program import library, needs_cxx, program, run
from small_emulated import GATE_REPORT, front, gate_scores, pool_queries

from twn_kernels.impl.reference import gate as gate_reference
from twn_kernels.impl.reference import pooling as pooling_reference
from twn_kernels.impl.reference.group import _input as front_reference
from twn_kernels.testing.oracle import assert_as_good_as_torch

pytestmark = needs_cxx

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALVES = FLOATS[1:]


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 48), (2, 1, 33), (1, 7, 1), (2, 3, 4104), (2, 65, 16)], ids=str)
def test_pooling(shape, dtype, pooling, normalize, cut_from_nan):
    states = (torch.randn(shape) + 0.5).to(dtype)
    for view in (states, cut_from_nan(states), states.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        truth = pooling_reference.pool_queries(states.double(), pooling, normalize)
        own = pooling_reference.pool_queries(states, pooling, normalize)
        assert_as_good_as_torch(pool_queries(view, pooling, normalize), truth, own, pooling)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e20, 3e38])
def test_pooling_at_every_size(size):
    states = torch.tensor([[[3.0, -4.0, 0.0]], [[0.0, 0.0, 1.0]]]) / 4 * size
    truth = pooling_reference.pool_queries(states.double(), "first", True)
    assert_as_good_as_torch(pool_queries(states, "first", True), truth, truth.float(), f"of size {size}")


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pooling_of_what_is_not_finite(bad, normalize):
    states = torch.randn(6, 2, 40)
    states[1, 0], states[3], states[5] = -states[1, 1], 0.0, 0.0
    clean = pool_queries(states, "mean", normalize)
    assert torch.equal(clean[[1, 3]], torch.zeros(2, 40))
    states[[2, 5], 1, 3] = bad
    dirty = pool_queries(states, "mean", normalize)
    assert torch.equal(dirty[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    expected = pooling_reference.pool_queries(states, "mean", normalize)
    assert torch.equal(dirty.isnan(), expected.isnan()) and torch.equal(dirty.isinf(), expected.isinf())


@pytest.mark.parametrize("one_warp", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("wide", [True, False], ids=["fp32_weight", "same_weight"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 17), (4, 2568), (1, 1)], ids=str)
def test_norm_in_front(shape, dtype, wide, one_warp, cut_from_nan):
    x = (3 * torch.randn(shape)).to(dtype)
    weight = (1 + 0.2 * torch.randn(shape[1])).to(torch.float32 if wide else dtype)
    truth = front_reference(x.double(), weight.double(), 1e-6, False)
    own = front_reference(x, weight, 1e-6, False)
    for view in (x, cut_from_nan(x)):
        z = front(view, weight, 1e-6, one_warp=one_warp)
        assert z.dtype == dtype
        assert_as_good_as_torch(z, truth, own)
        # Rounded in the same two places: another rounding shows in far more than the few that the order of a sum moves.
        assert (z != own).float().mean() < 0.01


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 34), (4, 2576)], ids=str)
def test_gate_and_up_in_front(shape, dtype, cut_from_nan):
    x = (3 * torch.randn(shape)).to(dtype)
    own = front_reference(x, None, 0.0, True)
    for view in (x, cut_from_nan(x)):
        z = front(view, None, 0.0, one_warp=False)
        assert_as_good_as_torch(z, front_reference(x.double(), None, 0.0, True), own)
        assert (z != own).float().mean() < 0.01


def test_front_keeps_nan_in_its_row():
    x = torch.randn(4, 72).bfloat16()
    weight = torch.ones(72)
    clean = front(x, weight, 1e-6, one_warp=False)
    x[1, 70] = math.nan
    dirty = front(x, weight, 1e-6, one_warp=False)
    assert torch.equal(dirty[[0, 2, 3]], clean[[0, 2, 3]]) and dirty[1].isnan().all()


def test_conversions_are_torch_s():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    widen, half, bfloat = (getattr(library("small"), name) for name in ("of_half", "half_of", "bfloat_of"))
    widen.restype, half.restype, bfloat.restype = ctypes.c_float, ctypes.c_uint16, ctypes.c_uint16
    halves = bits.view(torch.float16).float()
    own = torch.tensor([widen(ctypes.c_uint16(value & 0xFFFF)) for value in bits.tolist()])
    assert torch.equal(own.nan_to_num(7.25), halves.nan_to_num(7.25))
    between = torch.cat([halves[halves.isfinite()] * factor for factor in (1.0, 1.0003, 0.9998)])
    between = torch.cat([between, torch.tensor([65504.0, 65519.9, 65520.0, 1e30, -1e30, 2.9e-8, 3.0e-8, math.inf])])
    for convert, dtype in ((half, torch.float16), (bfloat, torch.bfloat16)):
        sample = between[torch.randperm(len(between))[:5000]] if dtype == torch.bfloat16 else between[::7]
        got = torch.tensor([convert(ctypes.c_float(value)) for value in sample.tolist()], dtype=torch.int32)
        assert torch.equal(got.to(torch.int16).view(dtype), sample.to(dtype))


def weight(*shape, dtype=torch.float32, bias=True):
    w = 1 + 0.3 * torch.randn(shape) if len(shape) == 1 else torch.randn(shape) * 1.5 / shape[1] ** 0.5
    return w.to(dtype), (0.5 * torch.randn(shape[0])).to(dtype) if bias else None


# Shape, bias, whether the activation follows; IN stands for the width of the input.
LAYOUTS = {
    "one_linear": [((1, "IN"), True, False)],
    "two_logits": [((16, "IN"), True, True), ((2, 16), True, False)],
    "deep": [((70, "IN"), False, True), ((7, 70), True, True), ((9, 7), False, True), ((1, 9), False, False)],
    "norm_first": [(("IN",), True, False), ((33, "IN"), True, True), ((2, 33), True, False)],
    "rms_norms": [(("IN",), False, False), ((16, "IN"), True, False), ((16,), False, True), ((2, 16), True, False)],
    "norms": [((16, "IN"), True, False), ((16,), False, False), ((16,), True, True), ((1, 16), True, False)],
}


def steps_of(layout, width, dtype=torch.float32):
    shapes = [([width if side == "IN" else side for side in shape], bias, on) for shape, bias, on in LAYOUTS[layout]]
    return [(*weight(*shape, dtype=dtype, bias=bias), on) for shape, bias, on in shapes]


def wide(steps):
    return [(w.double(), None if b is None else b.double(), on) for w, b, on in steps]


def check_gate(features, last, steps, activation="gelu", **options):
    truth, _ = gate_reference.gate_scores(
        features.double(), None if last is None else last.double(), wide(steps), activation, None
    )
    own, _ = gate_reference.gate_scores(features, last, steps, activation, None)
    scores, _, report = gate_scores(features, last, steps, activation, **options)
    assert report == 0
    assert_as_good_as_torch(scores, truth, own)
    return scores


@pytest.mark.parametrize("rows", [1, 3, 4, 36, 72])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gate(layout, dtype, rows):
    for width in (24, 301):
        steps = steps_of(layout, width, dtype)
        features = (2 * torch.randn(72, width)).to(dtype)
        truth, _ = gate_reference.gate_scores(features.double(), None, wide(steps), "gelu", None)
        own, _ = gate_reference.gate_scores(features, None, steps, "gelu", None)
        # Beside a single score, torch may be exact by luck: all 72 are compared, however few there are in a launch.
        scores = torch.cat([gate_scores(part, None, steps, "gelu")[0] for part in features.split(rows)])
        assert_as_good_as_torch(scores, truth, own)
        # The order of every sum is fixed: the grid and the launch do not matter.
        for blocks, launches in ((1, 1), (5, 3)):
            again, _, report = gate_scores(features[:rows], None, steps, "gelu", blocks=blocks, launches=launches)
            assert torch.equal(again, scores[:rows]) and report == 0


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
def test_gate_activations(activation):
    check_gate(2 * torch.randn(40, 24), None, steps_of("deep", 24), activation)


@pytest.mark.parametrize("layout", ["two_logits", "norm_first"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gate_pools_and_joins(dtype, layout, cut_from_nan):
    queries, last = torch.randn(9, 5, 43).to(dtype), torch.randn(9, 27).to(dtype)
    steps = steps_of(layout, 43)
    check_gate(queries, None, steps)
    steps = steps_of(layout, 70)
    expected = check_gate(queries, last, steps)
    strided = queries.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for view in (cut_from_nan(queries), strided):
        assert torch.equal(check_gate(view, cut_from_nan(last), steps), expected)


def test_gate_with_long_rows_and_odd_weights(cut_from_nan):
    features = torch.randn(2, 9001)  # more chunks than one task takes
    w, b = weight(33, 9001)
    check_gate(features, None, [(w, b, True), (*weight(1, 33), False)])
    for dtype in HALVES:
        cut = cut_from_nan(w.to(dtype))
        check_gate(features, None, [(cut, b, True), (*weight(2, 33, dtype=torch.bfloat16), False)])


@pytest.mark.parametrize("outputs", [1, 2])
def test_gate_decides_as_python_does(outputs):
    size = torch.tensor([-3e38, -1e30, -200.0, 0.0, 200.0, 1e30, 3e38, math.nan])
    head = torch.ones(1, 1) if outputs == 1 else torch.tensor([[-1.0], [1.0]])
    scores, think, _ = gate_scores(size[:, None], None, [(head, None, False)], "gelu", 0.5)
    assert scores[[0, 1, 3, 5, 6]].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0] and scores[7].isnan()
    assert think.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    # fp32 rounds 0.7 down: a score of that very number is below it.
    near = torch.special.logit(torch.tensor([0.7]) + torch.arange(-20, 21) * 2**-24)
    scores, think, _ = gate_scores(near[:, None], None, [(torch.ones(1, 1), None, False)], "gelu", 0.7)
    assert think.tolist() == [score >= 0.7 for score in scores.tolist()]
    assert torch.tensor(0.7) in scores and 0 < think.sum() < len(think)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["norm_first", "rms_norms", "deep"])
@pytest.mark.parametrize("rows", [4, 9])
def test_gate_keeps_nan_in_its_row(layout, bad, rows):
    steps, features = steps_of(layout, 30), torch.randn(rows, 30)
    clean, _, _ = gate_scores(features, None, steps, "gelu")
    features[2, 29] = bad
    dirty, _, _ = gate_scores(features, None, steps, "gelu")
    others = torch.arange(rows) != 2
    assert torch.equal(dirty[others], clean[others]) and not torch.equal(dirty[2], clean[2])
    expected, _ = gate_reference.gate_scores(features, None, steps, "gelu", None)
    assert dirty[2].isnan() == expected[2].isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wait_that_runs_out_reports_and_gives_nan(layout):
    scores, think, report = gate_scores(torch.randn(6, 24), None, steps_of(layout, 24), "relu", 0.0, deaf=True)
    assert report == GATE_REPORT
    assert scores.isnan().all() and think.tolist() == [0] * 6


def test_blocks_race_for_nothing():
    assert run(program("small_gate_threads"), 60, 10, 1).strip() == "60 gates"


def test_no_data_race():
    racy = program("small_gate_threads", "-fsanitize=thread", "-O1", "-g")
    assert run(racy, 12, 4, 2, TSAN_OPTIONS="halt_on_error=1").strip() == "12 gates"
