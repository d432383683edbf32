"""The decode kernel's block program, run on a CPU: its numbers, its isolation, its order of work in every residency."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "ops")]

from emulated import Emulator, readable
from group_cases import GroupCase, arguments, converted, eager_torch
from host_program import needs_cxx

from twn_kernels.testing.oracle import assert_as_good_as_torch

pytestmark = needs_cxx
BF16, FP16 = torch.bfloat16, torch.float16
NAN = float("nan")

CASES = [
    GroupCase(1, 64, (40,), ((8, 16),), BF16, "reasoning"),
    GroupCase(3, 72, (33,), ((5, 1),), FP16, bias=True),
    GroupCase(7, 200, (70, 24, 9), ((8, 16), (4, 0), (0, 33)), BF16, front="norm", bias=True),
    GroupCase(8, 8, (130,), ((1, 72),), FP16, "alternating", front="norm"),
    GroupCase(9, 136, (48, 48), ((16, 8), (8, 16)), BF16, front="norm", back="swiglu", bias=True),
    GroupCase(16, 264, (24,), ((64, 48),), BF16, front="gated", back="residual"),
    GroupCase(17, 128, (65, 65), ((12, 0), (0, 7)), FP16, "both", back="swiglu"),
    GroupCase(31, 520, (129,), ((96, 256),), BF16, "suffix", back="residual"),
    GroupCase(33, 80, (50, 60), ((17, 17), (3, 100)), BF16, "embedding"),
    GroupCase(64, 160, (140, 24), ((8, 40), (31, 2)), FP16, "mixed", front="norm"),
    GroupCase(64, 96, (72, 72), ((16, 16), (16, 16)), BF16, "alternating", front="norm", back="swiglu"),
    GroupCase(5, 96, (64,), ((8, 8),), BF16, "base", front="norm", back="residual"),
]
each_arch = pytest.mark.parametrize("arch", [80, 90, 120], ids=["sm80", "sm90", "sm120"])


def hold(emulator: Emulator, args: dict, plan) -> torch.Tensor:
    y = emulator(args, plan)
    truth = torch.cat(eager_torch(converted(args, torch.Tensor.double), plan), dim=1)
    own = torch.cat(eager_torch(args, plan), dim=1)
    assert_as_good_as_torch(y, truth, own, "y")
    return y


@each_arch
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch(case, arch, cut_from_nan):
    hold(Emulator(arch), arguments(case, "cpu", readable(cut_from_nan)), case.plan("cpu"))


@each_arch
@pytest.mark.parametrize("resident", [1, 2, 7])
@pytest.mark.parametrize("processors", [1, 2, 3, 8, 61])
def test_any_number_of_blocks_ends_with_the_same_bits_however_few_run_at_a_time(processors, resident, arch):
    case = GroupCase(6, 328, (150, 40), ((24, 16), (8, 0)), BF16, front="norm")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    alone = hold(Emulator(arch, processors=processors, resident=1), args, plan)
    emulator = Emulator(arch, processors=processors, resident=resident)
    for _ in range(3):  # on words that the launch before has left
        assert torch.equal(emulator(args, plan), alone)


@each_arch
def test_launches_of_other_shapes_share_the_words(arch):
    emulator = Emulator(arch, processors=4, resident=3)
    for case in [*CASES[:6], *CASES[::2]]:
        hold(emulator, arguments(case, "cpu"), case.plan("cpu"))


@each_arch
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_more_stages_change_no_bit(stages, arch):
    case = GroupCase(4, 1000, (100,), ((16, 8),), FP16, "mixed")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    assert torch.equal(Emulator(arch, stages=stages)(args, plan), Emulator(arch)(args, plan))


@each_arch
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5], CASES[9]], ids=str)
def test_a_nan_stays_with_its_row_and_with_the_users_of_its_adapter(case, arch):
    case = replace(case, routes="mixed")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    clean = Emulator(arch)(args, plan)
    bad = case.tokens // 2
    args["x"][bad, 3] = NAN
    y = Emulator(arch)(args, plan)
    assert y[bad].isnan().all()
    others = torch.arange(case.tokens) != bad
    assert torch.equal(y[others], clean[others])


@each_arch
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("bit", [1, 2], ids=["reasoning", "embedding"])
def test_a_broken_adapter_reaches_only_the_rows_that_use_it(bit, part, arch):
    case = GroupCase(9, 104, (40, 30), ((8, 16), (24, 5)), BF16, front="norm")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    clean = Emulator(arch)(args, plan)
    lora = getattr(args["projections"][0], "reasoning" if bit == 1 else "embedding")
    getattr(lora, part)[...] = float("inf") if part == "A" else NAN
    y = Emulator(arch)(args, plan)
    users = (plan.routes & bit) != 0
    assert torch.equal(y[~users], clean[~users]) and not y[users, :40].isfinite().any()
    assert torch.equal(y[:, 40:], clean[:, 40:])  # the other projection has adapters of its own


@each_arch
def test_adapters_that_are_not_present_are_not_read(arch):
    case = GroupCase(5, 64, (40,), ((8, 16),), BF16, "reasoning")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    clean = Emulator(arch)(args, plan)
    args["projections"][0].embedding.A.fill_(NAN)
    args["projections"][0].embedding.B.fill_(NAN)
    assert torch.equal(Emulator(arch)(args, plan), clean)


@each_arch
def test_strided_adapters_of_odd_rank(arch, cut_from_nan):
    """Pitches and addresses that no 16-byte word begins at: read element by element."""
    case = GroupCase(10, 96, (50,), ((13, 3),), BF16, "mixed")
    args = arguments(case, "cpu", readable(cut_from_nan))
    (projection,) = args["projections"]
    loras = [lora._replace(A=cut_from_nan(lora.A), B=cut_from_nan(lora.B)) for lora in projection[2:]]
    args["projections"] = [projection._replace(reasoning=loras[0], embedding=loras[1])]
    hold(Emulator(arch), args, case.plan("cpu"))
