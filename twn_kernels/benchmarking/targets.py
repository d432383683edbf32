"""What the package set out to reach, and whether the measured rows of a device show it.

A target is judged by its worst row: one row that misses it makes it missed, and the verdict says how many rows meet
it. Targets are for an H100- or H200-class card; on others the values stand without a verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from twn_kernels.benchmarking.cases import GROUPS, MODELS
from twn_kernels.benchmarking.counters import ELEMENT_BYTES, adapter_elements, base_elements
from twn_kernels.benchmarking.digest import AUTO, CUDA, CUDA_BASE, PLAIN, Contest, Device

__all__ = ["MET", "MISSED", "NOT_JUDGED", "NOT_MEASURED", "Verdict", "judge"]

MET, MISSED, NOT_MEASURED, NOT_JUDGED = "met", "missed", "not measured", "not judged"
_SPLIT = ("half", "suffix", "alternating")  # routes under which some rows take one adapter and some the other
_RANKS = (64, 64)
_PREFILL_TOKENS, _DECODE_TOKENS = 2048, 32
_HOPPER = re.compile(r"\bG?H[12]00\b")


class _Value(NamedTuple):
    """One measured value of a target and the id (or the pattern of ids) of the row that shows it."""

    value: float
    row: str


@dataclass(frozen=True)
class _Target:
    name: str
    text: str
    limit: float
    unit: str  # "%" or "x"
    at_least: bool
    suites: str
    values: Callable[[Device], Iterator[_Value]]

    def met(self, value: float) -> bool:
        exact = round(value, 9)  # 104 over 100 is 4.000000000000004 % in binary
        return exact >= self.limit if self.at_least else exact <= self.limit


@dataclass(frozen=True)
class Verdict:
    """One target, judged.

    Attributes:
        name: short and stable.
        target: in words.
        limit: with its relation and unit, such as ``<= 4 %``.
        value: the worst row's, in ``unit``; None where nothing was measured.
        unit: ``%`` or ``x``.
        verdict: :data:`MET`, :data:`MISSED`, :data:`NOT_MEASURED` or :data:`NOT_JUDGED`.
        row: id of the worst row, ``*`` for the four site groups of a layer; None where nothing was measured.
        rows: how many rows the target is about.
        rows_met: how many of them meet it.
        command: measures it.
    """

    name: str
    target: str
    limit: str
    value: float | None
    unit: str
    verdict: str
    row: str | None
    rows: int
    rows_met: int
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The verdict, ready for JSON, which has no word for a value without bound: null."""
        value = None if self.value is None or math.isinf(self.value) else self.value
        return asdict(self) | {"value": value}


def judge(device: Device | None) -> list[Verdict]:
    """Every target against what is known of one device; None, or a CPU, gives "not measured" throughout."""
    return [_judge(target, device if device is not None and device.is_gpu else None) for target in _TARGETS]


def _judge(target: _Target, device: Device | None) -> Verdict:
    values = [] if device is None else list(target.values(device))
    hopper = device is not None and _HOPPER.search(device.name) is not None
    pick = min if target.at_least else max
    worst = pick(values, key=lambda entry: entry.value, default=None)
    met = sum(target.met(entry.value) for entry in values)
    verdict = NOT_MEASURED if worst is None else NOT_JUDGED if not hopper else MET if met == len(values) else MISSED
    return Verdict(
        target.name,
        target.text,
        f"{'>=' if target.at_least else '<='} {target.limit:g} {target.unit}",
        None if worst is None else round(worst.value, 9),
        target.unit,
        verdict,
        None if worst is None else worst.row,
        len(values),
        met,
        f"twn-kernels bench gpu --minutes 60 --out DIR {_suites(target)}",
    )


def _suites(target: _Target) -> str:
    return " ".join(f"--suite {suite}" for suite in target.suites.split())


def _split_overhead(pass_: str, model: str) -> Callable[[Device], Iterator[_Value]]:
    """Overheads over our own fused base, of rows split between two adapters of rank 64.

    A decode step is judged by the kernels that were made for it, against themselves without adapters, where both were
    timed; else by what ``impl="auto"`` took.
    """
    own = pass_ == "decode"

    def fits(case) -> bool:
        in_range = case.tokens >= _PREFILL_TOKENS if pass_ == "forward" else case.tokens <= _DECODE_TOKENS
        same = (case.pass_, case.model, case.ranks) == (pass_, model, _RANKS)
        return same and in_range and case.routes in _SPLIT and case.dtype != "fp32"

    def values(device: Device) -> Iterator[_Value]:
        for entry in device.sums:
            overhead, name = entry.overhead(CUDA, CUDA_BASE) if own else None, CUDA
            if overhead is None:
                overhead, name = entry.overhead(AUTO), AUTO
            if fits(entry.case) and overhead is not None:
                yield _Value(overhead, entry.id_of(name))
        for contest in device.contests:
            if contest.case.suite not in ("layer", "model") or not fits(contest.case):
                continue
            value = (_cuda_over_its_base(contest) if own else None) or _ours_over_base(contest)
            if value is not None:
                yield value

    return values


def _over_base(row) -> float | None:
    return None if row is None else row.overhead_percent


def _cuda_over_its_base(contest: Contest) -> _Value | None:
    ours, base = contest.row(CUDA), contest.row(CUDA_BASE)
    if None in (ours, base) or None in (ours.time_us, base.time_us):
        return None
    return _Value(100 * (ours.time_us.median / base.time_us.median - 1), ours.id)


def _ours_over_base(contest: Contest) -> _Value | None:
    ours = contest.ours
    return None if _over_base(ours) is None else _Value(ours.overhead_percent, ours.id)


def _base_rows(device: Device) -> Iterator[_Value]:
    for contest in device.contests:
        ours = contest.ours
        if contest.case.routes == "base" and contest.case.pass_ != "forward_backward" and _over_base(ours) is not None:
            yield _Value(ours.overhead_percent, ours.id)


def _against_plain_model(pass_: str) -> Callable[[Device], Iterator[_Value]]:
    """Our time with both adapters over the stock model's without any."""

    def values(device: Device) -> Iterator[_Value]:
        for contest in device.contests:
            case, ours, plain = contest.case, contest.ours, contest.row(PLAIN)
            timed = None not in (ours, plain) and None not in (ours.time_us, plain.time_us)
            if timed and (case.suite, case.pass_) == ("model", pass_) and case.routes != "base":
                yield _Value(ours.time_us.median / plain.time_us.median, ours.id)

    return values


def _less_overhead(device: Device) -> Iterator[_Value]:
    """The fastest alternative's overhead over ours; where ours is none at all, as far above as can be said."""
    for contest in device.contests:
        others = contest.alternatives
        ours, theirs = _over_base(contest.ours), _over_base(others[0]) if others else None
        if ours is None or theirs is None or contest.case.routes == "base":
            continue
        ratio = theirs / ours if ours > 0 else float("inf") if theirs > ours else 0.0
        yield _Value(max(0.0, ratio), contest.ours.id)


def _training(device: Device) -> Iterator[_Value]:
    """PEFT's time over ours, forward and backward; PEFT in its fastest form that ran."""
    for contest in device.contests:
        peft = [row for row in contest.alternatives if row.contender.startswith("peft")]
        ours = contest.ours
        if peft and ours is not None and ours.time_us is not None and contest.case.pass_ == "forward_backward":
            yield _Value(peft[0].time_us.median / ours.time_us.median, ours.id)


def _added_memory(device: Device) -> Iterator[_Value]:
    """Bytes added beyond the adapters, in percent of the base linears'."""
    for contest in device.contests:
        case, ours = contest.case, contest.ours
        if case.suite != "model" or ours is None or ours.memory_added_bytes is None or case.model not in MODELS:
            continue
        sites = tuple(MODELS[case.model].group(name) for name in GROUPS)
        size = ELEMENT_BYTES[case.dtype] * case.layers
        adapters = size * sum(adapter_elements(sites, rank) for rank in case.ranks)
        yield _Value(100 * (ours.memory_added_bytes - adapters) / (size * base_elements(sites)), ours.id)


def _overhead_target(name: str, pass_: str, model: str, limit: float) -> _Target:
    what = f"prefill, T >= {_PREFILL_TOKENS}" if pass_ == "forward" else f"decode, M <= {_DECODE_TOKENS}"
    text = f"{what}, rank 64+64, rows split between the adapters, {model}: over our own fused base"
    return _Target(name, text, limit, "%", False, "group layer model", _split_overhead(pass_, model))


_TARGETS = (
    _overhead_target("prefill-8B", "forward", "8B", 4),
    _overhead_target("prefill-4B", "forward", "4B", 6),
    _overhead_target("decode-8B", "decode", "8B", 8),
    _overhead_target("decode-4B", "decode", "4B", 11),
    _Target(
        "base-rows", "base-only rows: over an unpatched fused base", 1, "%", False, "group layer model", _base_rows
    ),
    _Target(
        "model-prefill",
        "whole model with adapters: prefill time over the stock model's without any",
        1.0,
        "x",
        False,
        "model",
        _against_plain_model("forward"),
    ),
    _Target(
        "model-decode",
        "whole model with adapters: decode step over the stock model's without any (eager)",
        0.5,
        "x",
        False,
        "model",
        _against_plain_model("decode"),
    ),
    _Target(
        "less-overhead",
        "overhead of the fastest alternative over ours, every case",
        1.3,
        "x",
        True,
        "linear group layer model",
        _less_overhead,
    ),
    _Target("training", "forward and backward: PEFT's time over ours", 1.5, "x", True, "group layer model", _training),
    _Target("memory", "memory that patch adds beyond adapters, of the base's", 1, "%", False, "model", _added_memory),
)
