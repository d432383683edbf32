"""The product of a site group against fp64 truth: projections, widths, ranks, routes, dtypes, strides, epilogues."""

from __future__ import annotations

import pytest
import torch
from group_problems import GroupInputs, GroupProblem, check, run
from triton_problems import BF16, FP16, FP32

from twn_kernels.impl.triton import group_product as launcher
from twn_kernels.impl.triton.group_config import GroupConfig

THREE = ((16, 8), (1, 17), (0, 48))
# Every token class (decode, few, tiles with a tail), one to three projections, unequal widths and ranks (absent, 1,
# no multiple of 16, several steps), every route pattern, dtype, front and epilogue occurs; odd sizes go by pointer,
# multiples of 8 by descriptor.
PROBLEMS = [
    GroupProblem(1, 64, (48, 16, 16), ((16, 16), (16, 16), (16, 16)), BF16, "reasoning"),
    GroupProblem(1, 33, (50,), ((3, 0),), FP32, "both", residual=True),
    GroupProblem(7, 144, (40, 8, 72), THREE, BF16, "mixed", (True, True, True)),
    GroupProblem(16, 129, (70, 70), ((64, 32), (5, 48)), FP16, "alternating", swiglu=True),
    GroupProblem(17, 72, (96, 24, 24), THREE, FP16, "suffix", (True, False, True)),
    GroupProblem(40, 72, (96,), ((48, 17),), BF16, "both", residual=True),
    GroupProblem(64, 40, (70, 70), ((16, 0), (0, 16)), BF16, "mixed", swiglu=True),
    GroupProblem(129, 33, (130, 257), ((8, 24), (100, 1)), BF16, "alternating", (False, True)),
    GroupProblem(140, 80, (136,), ((16, 8),), BF16, "suffix", (True,), residual=True),
    GroupProblem(70, 72, (40, 264), ((16, 8), (8, 16)), FP16, "embedding"),
    GroupProblem(70, 72, (264, 24), ((16, 8), (8, 16)), BF16, "base", (True, True)),
    GroupProblem(70, 40, (48, 24, 24), THREE, FP32, "mixed", (True, True, True)),
    GroupProblem(35, 40, (48, 48), ((17, 48), (1, 3)), FP32, "alternating", swiglu=True),
    GroupProblem(70, 72, (96, 40), ((16, 8), (33, 16)), BF16, "mixed", adapter_dtype=FP32),
    GroupProblem(5, 72, (40, 40), ((16, 8), (33, 16)), FP16, "mixed", adapter_dtype=FP32, swiglu=True),
    GroupProblem(70, 72, (96,), ((16, 8),), FP16, "both", (True,), FP32, residual=True),
    GroupProblem(70, 72, (96, 40, 40), ((0, 0), (0, 0), (0, 0)), BF16, "mixed"),
    GroupProblem(66, 72, (96, 40), ((16, 8), (8, 16)), BF16, "mixed", front="norm"),
    GroupProblem(66, 72, (96,), ((16, 8),), BF16, "mixed", front="gated", residual=True),
    GroupProblem(66, 40, (48,), ((16, 8),), FP32, "mixed", front="gated"),
]
# Two tile rows; the last tile of each output has a tail.
LARGE = GroupProblem(130, 72, (500, 240, 200), THREE, BF16, "mixed", (True, False, True))
LARGE_SWIGLU = GroupProblem(130, 72, (136, 136), ((48, 17), (16, 32)), BF16, "suffix", (True, False), swiglu=True)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_as_good_as_torch(problem, device):
    check(GroupInputs(problem, device))


@pytest.mark.parametrize(
    "problem",
    [
        GroupProblem(70, 70, (45, 20, 33), THREE, BF16, "mixed", (True, True, True)),
        GroupProblem(37, 70, (45, 45), ((8, 24), (5, 16)), FP32, "mixed", (True, False), swiglu=True),
        GroupProblem(9, 72, (45,), ((8, 24),), FP16, "mixed", residual=True),
    ],
    ids=str,
)
def test_operands_cut_from_larger_buffers_of_nan(problem, device, cut_from_nan):
    check(GroupInputs(problem, device, cut_from_nan))


def _launched(inputs: GroupInputs, monkeypatch) -> GroupConfig:
    """The configuration that the launcher took for these inputs, which are checked on the way."""
    taken = []
    real = launcher._config
    monkeypatch.setattr(launcher, "_config", lambda *args: taken.append(real(*args)) or taken[-1])
    check(inputs)
    return taken[-1]


def _pitched(tensor: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The values as a view of columns of a wider buffer of NaN, as in a packed panel; both sides stay aligned."""
    buffer = tensor.new_full((tensor.shape[0], before + tensor.shape[1] + after), float("nan"))
    view = buffer[:, before : before + tensor.shape[1]]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
def test_descriptors_over_weights_that_lie_in_panels(swiglu, device, monkeypatch):
    """Every weight, its B and x have pitches of their own; a descriptor must not read beyond its columns."""
    ranks = ((16, 8), (8, 24))
    inputs = GroupInputs(GroupProblem(130, 72, (136, 136), ranks, BF16, "mixed", swiglu=swiglu), device)
    inputs.weights = [_pitched(w, 16 * (i + 1), 8) for i, w in enumerate(inputs.weights)]
    inputs.B_r = [_pitched(b, 8, 16 * (i + 1)) for i, b in enumerate(inputs.B_r)]
    inputs.x = _pitched(inputs.x, 24, 8)
    config = _launched(inputs, monkeypatch)
    assert torch.cuda.is_available() or config.descriptors


def test_adapters_and_residual_of_any_layout(device):
    inputs = GroupInputs(GroupProblem(20, 48, (40,), ((16, 8),), FP32, "mixed", residual=True), device)
    inputs.B_r = [inputs.B_r[0].t().contiguous().t()]
    inputs.B_e = [inputs.B_e[0].repeat_interleave(2, dim=1)[:, ::2]]
    inputs.residual = torch.full((1, 1), 0.75, device=device).expand(20, 40)
    check(inputs)


def test_rows_that_are_one_row_of_memory_go_by_pointer(device, monkeypatch):
    inputs = GroupInputs(GroupProblem(70, 72, (40, 24), ((16, 8), (8, 16)), BF16, "mixed"), device)
    inputs.x = inputs.x[:1].expand(70, 72)
    assert not _launched(inputs, monkeypatch).descriptors


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiles of the interpreted architecture")
@pytest.mark.parametrize("problem", [LARGE, LARGE_SWIGLU], ids=str)
def test_the_largest_tiles_by_descriptor(problem, device, monkeypatch):
    config = _launched(GroupInputs(problem, device), monkeypatch)
    assert config.descriptors and config.block_m * config.block_n * (1 + problem.swiglu) == 128 * 256


@pytest.mark.parametrize(
    "problem",
    [
        GroupProblem(70, 72, (104, 40, 24), THREE, BF16, "mixed", (True, False, True)),
        GroupProblem(70, 72, (40, 40), ((16, 8), (8, 0)), FP16, "mixed", swiglu=True),
        GroupProblem(70, 72, (40,), ((16, 8),), BF16, "mixed", adapter_dtype=FP32, residual=True),
    ],
    ids=str,
)
def test_the_tiles_for_unaligned_operands(problem, device, monkeypatch):
    monkeypatch.setattr(launcher.launch, "_aligned", lambda *tensors: False)
    assert not _launched(GroupInputs(problem, device), monkeypatch).descriptors


def test_the_tiles_for_a_rank_that_is_no_multiple_of_16(device, monkeypatch):
    """There x and the weights are aligned, and s and B are not."""
    monkeypatch.setattr(launcher.launch, "_aligned", lambda *tensors: all(t.shape[-1] % 16 == 0 for t in tensors))
    ranks = ((16, 8), (24, 16))
    config = _launched(GroupInputs(GroupProblem(129, 64, (96, 32), ranks, BF16, "mixed"), device), monkeypatch)
    assert config.block_r == 16


@pytest.mark.parametrize("processors", [1, 3, 1000])
def test_any_number_of_processors_walks_every_tile_once(processors, device, monkeypatch):
    inputs = GroupInputs(GroupProblem(270, 8, (40, 72), ((4, 0), (0, 3)), FP16, "mixed", (True, True)), device)
    monkeypatch.setattr(launcher, "_processors", lambda device: processors)
    check(inputs)


@pytest.mark.parametrize("present", [1, 2, 3])
def test_no_routes_means_that_every_row_uses_what_is_present(present, device):
    routes = {1: "reasoning", 2: "embedding", 3: "both"}[present]
    inputs = GroupInputs(GroupProblem(20, 40, (40, 24), ((16, 8), (5, 17)), BF16, routes), device)
    expected = check(inputs)
    inputs.routes = None
    for name, value in run(inputs).items():
        assert torch.equal(value, expected[name]), name


def test_adapters_that_cannot_occur_are_never_read(device):
    """``present`` decides: neither routes that name the other adapter nor its NaN weights change a bit."""
    for routes, others in (("reasoning", ("A_e", "B_e")), ("base", ("A_r", "B_r", "A_e", "B_e"))):
        inputs = GroupInputs(GroupProblem(20, 40, (40, 24), ((16, 8), (5, 17)), BF16, routes), device)
        expected = run(inputs)
        inputs.routes = inputs.routes | (2 if routes == "reasoning" else 3)
        for name in others:
            for tensor in getattr(inputs, name):
                tensor.fill_(float("nan"))
        for name, value in run(inputs).items():
            assert torch.equal(value, expected[name]), name


def test_base_only_is_the_plain_product_bit_for_bit(device):
    """Rows without an adapter get the same bits whether adapters can occur or not."""
    problem = GroupProblem(70, 72, (40, 24), ((16, 8), (8, 16)), BF16, "unused", (True, True))
    inputs = GroupInputs(problem, device)
    routed = run(inputs)["y"]
    plain = GroupInputs(GroupProblem(*problem_fields(problem, routes="base")), device)
    for name in ("x", "weights", "biases"):
        setattr(plain, name, getattr(inputs, name))
    assert torch.equal(run(plain)["y"], routed)


def problem_fields(problem: GroupProblem, **changes) -> tuple:
    return tuple({**vars(problem), **changes}.values())


@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
def test_no_tokens(swiglu, device):
    inputs = GroupInputs(GroupProblem(0, 40, (24, 24), ((16, 8), (5, 0)), BF16, "mixed", swiglu=swiglu), device)
    results = run(inputs)
    assert results["y"].shape == (0, 24 if swiglu else 48) and results["s"].shape == (0, 29)


def test_the_same_input_gives_the_same_bits(device):
    inputs = GroupInputs(GroupProblem(33, 72, (24, 40), ((16, 8), (8, 16)), BF16, "mixed", front="norm"), device)
    first, second = run(inputs), run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
