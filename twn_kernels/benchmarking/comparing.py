"""Two runs of one benchmark, row by row: what became slower beyond noise, what broke, what is missing.

Owns the rule for "beyond noise" and what makes two runs comparable at all. Reading files is :mod:`results`' part.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from twn_kernels.benchmarking.digest import device_of
from twn_kernels.benchmarking.results import Row, Run
from twn_kernels.errors import ResultError

__all__ = ["FLOOR", "Change", "Comparison", "compare_runs", "noise_of", "render"]

# Two runs on one card differ by a few percent through clocks and temperature alone, however small the spread inside
# each run is. Not measured on our own cards yet, so `bench compare --noise` sets another.
FLOOR = 0.03
# What a row measures; rows of one id that differ in any of these are not the same measurement.
_PROBLEM = ("suite", "pass_", "model", "site", "layers", "tokens", "context", "routes", "ranks", "dtype", "contender")
_NO_TIME = "no time"
_LIBRARIES = ("torch", "triton", "transformers", "peft", "driver", "built_for_cuda", "limit")


@dataclass(frozen=True)
class Change:
    """One row in both runs, or in one of them.

    Attributes:
        id: of the row.
        before_us, after_us: medians; None where a run has no time for it.
        ratio: after / before; None without both.
        noise: relative change that the spreads of both runs and the floor allow; None without both times.
        is_baseline: whether it is what a user would run instead, not this package.
        note: why it is listed, one clause.
    """

    id: str
    before_us: float | None
    after_us: float | None
    ratio: float | None
    noise: float | None
    is_baseline: bool
    note: str

    def to_dict(self) -> dict[str, Any]:
        """The change, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Comparison:
    """What changed from one run to another; every row of either run stands in exactly one list.

    Attributes:
        slower: beyond noise; fails.
        broken: failed the gate or lost its time, and had not before; fails.
        missing: in one run only; fails.
        faster: beyond noise.
        repaired: passes the gate or has a time, and had not before.
        same: timed in both, within noise.
        untimed: without a time in both.
        differences: what else differs between the runs, one clause each (libraries, driver).
    """

    slower: tuple[Change, ...]
    broken: tuple[Change, ...]
    missing: tuple[Change, ...]
    faster: tuple[Change, ...]
    repaired: tuple[Change, ...]
    same: tuple[Change, ...]
    untimed: tuple[Change, ...]
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not (self.slower or self.broken or self.missing)

    def to_dict(self) -> dict[str, Any]:
        """The comparison, ready for JSON."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "differences"}
        changes = {name: [change.to_dict() for change in entries] for name, entries in lists.items()}
        return {"ok": self.ok, "differences": list(self.differences), **changes}


def compare_runs(before: Run, after: Run, *, floor: float = FLOOR) -> Comparison:
    """Pair the rows of two runs by id and judge each pair.

    A pair is slower (or faster) where its medians differ by more than :func:`noise_of` allows. Rows of baselines are
    judged like all others: where they move, the machine or a library did, and the runs say little about this package.

    Args:
        before, after: two runs on the same device.
        floor: relative change that is noise whatever the spreads say.

    Raises:
        ResultError: the runs are of different devices, hold no rows, or use one id for different problems.
    """
    _require_comparable(before, after)
    old, new = ({row.id: row for row in run.cases} for run in (before, after))
    lists: dict[str, list[Change]] = {f.name: [] for f in fields(Comparison) if f.name != "differences"}
    for name in [*old, *(name for name in new if name not in old)]:
        if name in old and name in new:
            where, change = _judge(old[name], new[name], floor)
        else:
            row, run = (old[name], "first") if name in old else (new[name], "second")
            where, change = "missing", _one_sided(row, run)
        lists[where].append(change)
    for name, reverse in (("slower", True), ("faster", False)):
        lists[name].sort(key=lambda change: change.ratio, reverse=reverse)
    return Comparison(
        **{name: tuple(entries) for name, entries in lists.items()}, differences=tuple(_differences(before, after))
    )


def noise_of(before: Row, after: Row, floor: float = FLOOR) -> float:
    """Relative change of the median that is no news: half of each run's p20-p80 spread, added, but at least ``floor``.

    Added rather than taken as a root of squares: the rounds of one run share its clocks and so are not independent.
    """
    spreads = [(row.time_us.p80 - row.time_us.p20) / (2 * row.time_us.median) for row in (before, after)]
    return max(floor, sum(spreads))


_HEADINGS = {
    "slower": "slower beyond noise",
    "broken": "broken",
    "missing": "in one run only",
    "faster": "faster beyond noise",
    "repaired": "repaired",
}


def render(comparison: Comparison) -> str:
    """The comparison as lines: what fails first, then what is better, then counts."""
    lines = []
    for name, words in _HEADINGS.items():
        changes = getattr(comparison, name)
        if changes:
            lines += [f"{words} ({len(changes)}):", *map(_line, changes), ""]
    lines += [f"differs too: {difference}" for difference in comparison.differences]
    loudest = max((change.noise for change in comparison.same), default=0.0)
    within = f"{len(comparison.same)} within noise" + (f" (up to {100 * loudest:.1f} %)" if comparison.same else "")
    lines.append(f"{within}, {len(comparison.untimed)} without a time in both: {_conclusion(comparison)}")
    return "\n".join(lines)


def _line(change: Change) -> str:
    times = [_NO_TIME if time is None else f"{time:.6g} us" for time in (change.before_us, change.after_us)]
    baseline = " (not this package: a baseline moved)" if change.is_baseline and change.ratio is not None else ""
    return f"  {change.id}: {times[0]} -> {times[1]}, {change.note}{baseline}"


def _conclusion(comparison: Comparison) -> str:
    if comparison.ok:
        return "no regression"
    failed = [f"{len(getattr(comparison, name))} {name}" for name in ("slower", "broken", "missing")]
    return "not ok: " + ", ".join(words for words in failed if not words.startswith("0 "))


def _judge(old: Row, new: Row, floor: float) -> tuple[str, Change]:
    if old.time_us is None or new.time_us is None:
        return _judge_untimed(old, new)
    ratio, noise = new.time_us.median / old.time_us.median, noise_of(old, new, floor)
    # Symmetric in log: what is slower from A to B is faster from B to A.
    where = "slower" if ratio > 1 + noise else "faster" if ratio < 1 / (1 + noise) else "same"
    note = f"{100 * (ratio - 1):+.1f} %, noise {100 * noise:.1f} %"
    if old.in_graph != new.in_graph:
        note += ", in a CUDA graph before and not now" if old.in_graph else ", in a CUDA graph now and not before"
    return where, _change(old, new, ratio, noise, note)


def _judge_untimed(old: Row, new: Row) -> tuple[str, Change]:
    wrong = new.correct is False and old.correct is not False
    lost = old.time_us is not None or old.correct is True and new.correct is not True
    if wrong or lost:
        what = "fails the gate now" if wrong else "has no time any more"
        return "broken", _change(old, new, None, None, f"{what}: {new.reason}")
    if new.time_us is not None or new.correct is True and old.correct is not True:
        return "repaired", _change(old, new, None, None, f"before: {old.reason}")
    return "untimed", _change(old, new, None, None, str(new.reason))


def _change(old: Row, new: Row, ratio: float | None, noise: float | None, note: str) -> Change:
    times = [None if row.time_us is None else row.time_us.median for row in (old, new)]
    return Change(old.id, *times, ratio, noise, new.is_baseline, note)


def _one_sided(row: Row, run: str) -> Change:
    time = None if row.time_us is None else row.time_us.median
    times = (time, None) if run == "first" else (None, time)
    return Change(row.id, *times, None, None, row.is_baseline, f"only in the {run} run")


def _require_comparable(before: Run, after: Run) -> None:
    names = [device_of(run) for run in (before, after)]
    if names[0] != names[1]:
        raise ResultError(
            f'the runs are of different devices, "{names[0]}" and "{names[1]}": their times say nothing about a '
            "change. Compare two runs of one device."
        )
    for which, run in (("first", before), ("second", after)):
        if not run.cases:
            raise ResultError(f"the {which} run ({run.created}, {run.commit}) holds no rows; expected at least one.")
    old = {row.id: row for row in before.cases}
    for row in after.cases:
        if row.id not in old:
            continue
        for name in _PROBLEM:
            was, now = getattr(old[row.id], name), getattr(row, name)
            if was != now:
                raise ResultError(
                    f'"{row.id}" is two problems: its {name.rstrip("_")} is {was!r} in the first run and {now!r} in '
                    "the second. Compare runs of one version of the suites."
                )


def _differences(before: Run, after: Run) -> list[str]:
    old, new = (_flat(run.environment) for run in (before, after))
    names = [name for name in old if name in new and name.rsplit(".", 1)[-1] in _LIBRARIES]
    return [f"{name}: {old[name]}, then {new[name]}" for name in names if old[name] != new[name]]


def _flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in entries.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
