"""The prefill kernel's block program, run on a CPU: its numbers, its isolation, and any number of blocks at a time."""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "ops")]

from emulated import Group, described, readable
from group_cases import GroupCase, arguments, converted, eager_torch
from host_program import library, needs_cxx

from twn_kernels.ops import RoutePlan
from twn_kernels.testing.oracle import assert_as_good_as_torch

pytestmark = needs_cxx
BF16, FP16 = torch.bfloat16, torch.float16
NAN = float("nan")
WIDE, NARROW, CHOSEN = 256, 128, 0
MOVE = "give it memory of its own, or use another impl"
LOST_TAG = 0x50000001  # kLostTag of prefill/block.h

CASES = [
    GroupCase(1, 64, (8,), ((8, 16),), BF16, "reasoning"),
    GroupCase(127, 72, (33,), ((5, 1),), FP16, bias=True),
    GroupCase(129, 200, (300, 24, 9), ((8, 16), (4, 0), (0, 33)), BF16, bias=True),
    GroupCase(129, 8, (130,), ((1, 72),), FP16, "alternating"),
    GroupCase(300, 64, (48, 48), ((16, 8), (8, 16)), BF16, back="swiglu", bias=True),
    GroupCase(130, 264, (24,), ((64, 48),), BF16, "both", back="residual"),
    GroupCase(65, 128, (265, 265), ((12, 0), (0, 7)), FP16, "both", back="swiglu"),
    GroupCase(300, 72, (129,), ((72, 256),), BF16, "suffix", back="residual"),
    GroupCase(64, 80, (50, 60), ((17, 17), (3, 100)), BF16, "embedding"),
    GroupCase(257, 64, (140, 24), ((8, 40), (31, 2)), FP16, "mixed"),
    GroupCase(128, 96, (72, 72), ((24, 65), (130, 16)), BF16, "alternating", back="swiglu"),
    GroupCase(140, 96, (64, 257), ((8, 8), (8, 8)), BF16, "base"),
    GroupCase(131, 128, (72, 264, 8), ((64, 0), (128, 8), (64, 72)), FP16, "mixed", bias=True),
]
each_width = pytest.mark.parametrize("block_n", [WIDE, NARROW])


class Emulator:
    """One stream of emulated launches: they share the words that :file:`flags.h` never resets."""

    def __init__(self, block_n: int = CHOSEN, *, processors: int = 5, resident: int = 2, tight: bool = False) -> None:
        self.library = library("prefill", "-march=native")
        self.library.broken_rule.restype = ctypes.c_char_p
        assert self.library.group_bytes() == ctypes.sizeof(Group)
        self.block_n, self.processors, self.resident = block_n, processors, resident
        self.tight = tight
        self.words = torch.zeros(1 << 12, dtype=torch.int32)
        self.report = ctypes.c_uint32(0)

    def __call__(self, args: dict, plan, *, lost: int = -1, patience_ms: int = 20_000) -> torch.Tensor:
        """``y``, in a buffer that was NaN, around which it still is; rows begin at 16 bytes unless ``tight``."""
        widths = [projection.weight.shape[0] for projection in args["projections"]]
        x = args["x"]
        width = widths[0] if args["swiglu"] else sum(widths)
        buffer = torch.full((x.shape[0] + 1, width if self.tight else (width + 15) // 8 * 8), NAN, dtype=x.dtype)
        y = buffer[:-1, :width]
        group = described(args, plan, y)
        code = self.library.emulate_prefill(
            ctypes.byref(group), self.block_n, self.processors, self.resident,
            ctypes.c_void_p(self.words.data_ptr()), self.words.numel(), lost, patience_ms, ctypes.byref(self.report),
        )  # fmt: skip
        assert code == 0, f"{code}: {self.library.broken_rule()}"
        assert buffer[:, width:].isnan().all()
        assert buffer[-1].isnan().all()
        return y


def hold(emulator: Emulator, args: dict, plan) -> torch.Tensor:
    y = emulator(args, plan)
    truth = torch.cat(eager_torch(converted(args, torch.Tensor.double), plan), dim=1)
    own = torch.cat(eager_torch(args, plan), dim=1)
    assert_as_good_as_torch(y, truth, own, "y")
    assert emulator.report.value == 0
    return y


@each_width
@pytest.mark.parametrize("tight", [False, True], ids=["pitched", "tight"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch(case, tight, block_n, cut_from_nan):
    hold(Emulator(block_n, tight=tight), arguments(case, "cpu", readable(cut_from_nan)), case.plan("cpu"))


@each_width
@pytest.mark.parametrize("routes", ["mixed", "base", "reasoning", "embedding", "both", "alternating", "suffix"])
@pytest.mark.parametrize("back", ["plain", "swiglu"])
def test_every_pattern_of_routes(routes, back, block_n):
    outputs, ranks = ((40, 40), ((24, 8), (8, 72))) if back == "swiglu" else ((136,), ((24, 72),))
    case = GroupCase(150, 72, outputs, ranks, BF16, routes, back=back)
    hold(Emulator(block_n), arguments(case, "cpu"), case.plan("cpu"))


@each_width
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_every_iteration_counts_once(dtype, block_n):
    """Numbers small enough to be exact: one product too many, or one too few, is seen."""
    case = GroupCase(261, 136, (70, 265), ((66, 20), (5, 130)), dtype, "mixed")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    args = converted(args, lambda t: torch.randint(-1, 2, t.shape).to(dtype) if t.is_floating_point() else t)
    args["projections"] = [
        p._replace(reasoning=p.reasoning._replace(scaling=1.0), embedding=p.embedding._replace(scaling=-1.0))
        for p in args["projections"]
    ]
    for projection in args["projections"]:  # S stays below 8 bits, y is rounded once
        projection.weight[:, 1:] = 0
        for lora in (projection.reasoning, projection.embedding):
            lora.A[:, 5:] = 0
            lora.A[:, -1] = 1
    args["projections"][0].weight[:, -1] = 1
    args["projections"][1].weight[:, 64] = 1
    exact = torch.cat(eager_torch(converted(args, torch.Tensor.double), plan), dim=1)
    assert torch.equal(Emulator(block_n)(args, plan), exact.to(dtype))


@each_width
@pytest.mark.parametrize(("processors", "resident"), [(1, 1), (2, 1), (3, 3), (7, 2), (61, 1), (61, 5)])
def test_any_number_of_blocks_ends_with_the_same_bits_however_few_run_at_a_time(processors, resident, block_n):
    case = GroupCase(262, 136, (150, 40), ((24, 16), (8, 0)), BF16)
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    alone = hold(Emulator(block_n, processors=1, resident=1), args, plan)
    emulator = Emulator(block_n, processors=processors, resident=resident)
    for _ in range(2):  # on words that the launch before has left
        assert torch.equal(emulator(args, plan), alone)


def test_launches_of_other_shapes_share_the_words():
    emulator = Emulator(processors=4, resident=3)
    for case in [*CASES[:6], *CASES[::2]]:
        hold(emulator, arguments(case, "cpu"), case.plan("cpu"))


@pytest.mark.parametrize("tokens", [1, 64, 128, 129])
def test_rows_do_not_depend_on_the_rows_beside_them(tokens):
    case = GroupCase(256, 72, (40,), ((24, 16),), BF16, "mixed")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    whole = Emulator(WIDE)(args, plan)
    part = Emulator(WIDE)({**args, "x": args["x"][:tokens]}, RoutePlan.from_routes(plan.routes[:tokens]))
    assert torch.equal(part, whole[:tokens])


@each_width
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[7], CASES[9], CASES[12]], ids=str)
def test_a_nan_stays_with_its_row(case, block_n):
    case = replace(case, routes="mixed")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    clean = Emulator(block_n)(args, plan)
    bad = case.tokens // 2
    args["x"][bad, 3] = NAN
    y = Emulator(block_n)(args, plan)
    assert y[bad].isnan().all()
    others = torch.arange(case.tokens) != bad
    assert torch.equal(y[others], clean[others])


@each_width
@pytest.mark.parametrize("back", ["plain", "swiglu"])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("bit", [1, 2], ids=["reasoning", "embedding"])
def test_a_broken_adapter_reaches_only_the_rows_that_use_it(bit, part, back, block_n):
    case = GroupCase(150, 72, (40, 40), ((8, 16), (24, 5)), BF16, "mixed", back=back)
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    clean = Emulator(block_n)(args, plan)
    lora = getattr(args["projections"][1], "reasoning" if bit == 1 else "embedding")
    getattr(lora, part)[...] = float("inf") if part == "A" else NAN
    y = Emulator(block_n)(args, plan)
    users = (plan.routes & bit) != 0
    assert not y[users][:, -40:].isfinite().any()
    assert torch.equal(y[~users], clean[~users])
    if back == "plain":
        assert torch.equal(y[:, :40], clean[:, :40])


@each_width
@pytest.mark.parametrize("group", [0, 1])
def test_a_tag_that_never_comes_makes_its_tiles_nan_and_hangs_nobody(group, block_n):
    case = GroupCase(300, 72, (300,), ((24, 8),), BF16, "both")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    clean = Emulator(block_n)(args, plan)
    emulator = Emulator(block_n, processors=3, resident=3)
    y = emulator(args, plan, lost=4 + group, patience_ms=300)  # two tags a shrink tile, two tiles a tile row: row 1
    assert emulator.report.value == LOST_TAG
    assert y[128:256].isnan().all()
    assert torch.equal(y[:128], clean[:128])
    assert torch.equal(y[256:], clean[256:])
    emulator.report.value = 0
    assert torch.equal(emulator(args, plan), clean)  # the words are ready for the next launch


def test_a_lost_launch_waits_once_for_all_of_its_tags():
    case = GroupCase(128, 72, (300,), ((24, 256),), BF16, "embedding")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    emulator = Emulator(WIDE, processors=1, resident=1)
    start = time.monotonic()
    emulator(args, plan, lost=0, patience_ms=1500)
    assert emulator.report.value == LOST_TAG
    assert time.monotonic() - start < 5  # two tiles of four iterations each wait for the same tag


def moved(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values in rows that begin ``elements`` further than 16 bytes, at a pitch of 16 bytes."""
    buffer = torch.full((tensor.shape[0], (tensor.shape[1] + elements + 15) // 8 * 8), NAN, dtype=tensor.dtype)
    view = buffer[:, elements : elements + tensor.shape[1]]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("elements", [0, 1, 4])
def test_b_is_read_wherever_its_rows_begin(elements):
    case = GroupCase(40, 72, (40,), ((24, 13),), BF16, "both", back="residual")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    plain = Emulator(WIDE)(args, plan)
    projection = args["projections"][0]
    args["projections"] = [
        projection._replace(
            reasoning=projection.reasoning._replace(B=moved(projection.reasoning.B, elements)),
            embedding=projection.embedding._replace(B=moved(projection.embedding.B, elements)),
        )
    ]
    args["residual"] = moved(args["residual"], elements)
    assert torch.equal(Emulator(WIDE)(args, plan), plain)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x", "rows of x must begin at multiples of 16 bytes; call x.contiguous()"),
        ("weight", f"rows of a weight must begin at multiples of 16 bytes; {MOVE}"),
        ("A", f"rows of an adapter's A must begin at multiples of 16 bytes; {MOVE}"),
        ("front", "x must be ready to be multiplied; make it with twn_cuda::front first"),
        ("rows", "x has too many rows for one launch; call it for fewer at a time"),
    ],
)
def test_refusals(name, words):
    case = GroupCase(40, 72, (40,), ((24, 16),), BF16, "both")
    args, plan = arguments(case, "cpu"), case.plan("cpu")
    projection = args["projections"][0]
    if name == "x":
        args["x"] = moved(args["x"], 1)
    if name == "weight":
        projection = projection._replace(weight=moved(projection.weight, 4))
    if name == "A":
        projection = projection._replace(reasoning=projection.reasoning._replace(A=moved(projection.reasoning.A, 1)))
    args["projections"] = [projection]
    group = described(args, plan, torch.empty(40, 40, dtype=BF16))
    if name == "front":
        group.front = 1
    if name == "rows":
        group.tokens, group.projections[0].out_features = 2**30, 2**20
    refusal = library("prefill", "-march=native").refusal
    refusal.restype = ctypes.c_char_p
    assert refusal(ctypes.byref(group)).decode() == words


def test_narrow_tiles_are_chosen_where_wide_ones_leave_processors_idle():
    choose = library("prefill", "-march=native").chosen_block_n

    def chosen(tokens, outputs, swiglu=False):
        case = GroupCase(1, 8, outputs, ((0, 0),) * len(outputs), BF16, "base")
        group = described(arguments(case, "cpu"), case.plan("cpu"), torch.empty(1, sum(outputs), dtype=BF16))
        group.tokens, group.swiglu = tokens, swiglu
        return choose(ctypes.byref(group), 132)

    assert chosen(512, (4096,)) == NARROW  # 64 wide tiles, or 128 narrow ones
    assert chosen(1024, (4096,)) == WIDE
    assert chosen(4096, (4096, 1024, 1024)) == WIDE
    assert chosen(512, (2048, 2048), swiglu=True) == NARROW
