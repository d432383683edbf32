"""Contests and verdicts as Markdown tables. Every number is a measured one or a ratio of two numbers of the same row.

A case that we lose keeps its row and is marked; a contender without a time keeps its row and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from twn_kernels.benchmarking.digest import AUTO, FUSED_BASE, PLAIN, Contest, is_bound
from twn_kernels.benchmarking.results import Row, Run
from twn_kernels.benchmarking.targets import Verdict

__all__ = ["PASS_WORDS", "SLOWER", "all_rows", "commit_of", "contest_rows", "microseconds", "target_rows"]

PASS_WORDS = {"forward": "prefill", "decode": "decode", "forward_backward": "forward and backward"}
SLOWER = "**slower**"
_NONE = "-"


def target_rows(verdicts: Sequence[Verdict]) -> list[str]:
    """The targets: what, limit, the worst row's value, the verdict, that row, and what measures it."""
    head = ("target", "limit", "worst row", "verdict", "row", "measured by")
    return _table(head, ([v.target, v.limit, _value(v), _verdict(v), _code(v.row), _code(v.command)] for v in verdicts))


def contest_rows(contests: Iterable[Contest]) -> list[str]:
    """One line a case: this package beside the fastest alternative and the bounds, all of the same contest."""
    head = (
        "case",
        "ours, us (p20-p80)",
        "fastest alternative",
        "its us",
        "ours / it",
        "ours over fused base",
        "it over fused base",
        "plain us",
        "merged us",
        "% of roof",
        "commit",
        "command",
    )
    return _table(head, map(_contest, contests))


def all_rows(contests: Iterable[Contest]) -> list[str]:
    """One line a contender, in the order in which they were measured."""
    head = (
        "row",
        "us (p20-p80, rounds)",
        "over fused base",
        "% of roof",
        "error / budget",
        "memory added, bytes",
        "note",
        "commit",
        "command",
    )
    return _table(head, (_contender(contest, row) for contest in contests for row in contest.rows))


def microseconds(value: float) -> str:
    """A time as the tables print it: about four digits, never in powers of ten."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def commit_of(run: Run) -> str:
    """The run's commit, short, and whether the tree had changes that it does not hold."""
    return run.commit[:10] + (" with changes" if run.dirty else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str | None) -> str:
    return _NONE if text is None else f"`{text}`"


def _contest(contest: Contest) -> list[str]:
    ours = contest.ours
    best = contest.alternatives[0] if contest.alternatives else None
    return [
        _code(contest.case.case),
        "not run" if ours is None else _spread(ours) + _eager(contest, ours),
        _NONE if best is None else best.contender,
        _median(best) + _eager(contest, best),
        _ratio(contest.times_alternative),
        _percent(ours and ours.overhead_percent),
        _percent(best and best.overhead_percent),
        _plain(contest),
        _median(_fastest_merged(contest)),
        _plain_percent(ours and ours.percent_of_roof),
        commit_of(contest.source.run),
        _code((ours or contest.case).command),
    ]


def _contender(contest: Contest, row: Row) -> list[str]:
    rounds = "" if row.time_us is None else f", {row.time_us.rounds}"
    return [
        _code(row.id),
        _spread(row) + rounds + _eager(contest, row),
        _percent(row.overhead_percent),
        _plain_percent(row.percent_of_roof),
        _NONE if row.error_ratio is None else f"{row.error_ratio:.2f}",
        _NONE if row.memory_added_bytes is None else str(row.memory_added_bytes),
        _note(contest, row),
        commit_of(contest.source.run),
        _code(row.command),
    ]


def _note(contest: Contest, row: Row) -> str:
    if row.correct is False:
        return "fails the gate"
    if row.contender == AUTO:
        times = contest.times_alternative
        loses = f", {SLOWER}: {_times(times)} of {contest.alternatives[0].contender}" if times and times > 1 else ""
        return f"this package ({row.impl}){loses}"
    if row.contender == FUSED_BASE:
        return "this package without adapters"
    if not row.is_baseline:
        return "this package, named implementation"
    return "bound" if is_bound(row) else ""


def _fastest_merged(contest: Contest) -> Row | None:
    rows = [row for row in contest.rows if row.contender.startswith("merged") and row.time_us is not None]
    return min(rows, key=lambda row: row.time_us.median, default=None)


def _spread(row: Row) -> str:
    if row.time_us is None:
        return f"no time: {row.reason}"
    time = row.time_us
    return f"{microseconds(time.median)} ({microseconds(time.p20)}-{microseconds(time.p80)})"


def _median(row: Row | None) -> str:
    return _NONE if row is None or row.time_us is None else microseconds(row.time_us.median)


def _eager(contest: Contest, row: Row | None) -> str:
    """Marks a time that holds Python and launches where others of the contest were replayed from a CUDA graph."""
    mixed = any(other.in_graph for other in contest.rows)
    return " eager" if mixed and row is not None and row.in_graph is False else ""


def _plain(contest: Contest) -> str:
    plain, graph = contest.row(PLAIN), contest.row(f"{PLAIN}_graph")
    beside = "" if graph is None or graph.time_us is None else f"; graph {_median(graph)}"
    return _median(plain) + _eager(contest, plain) + beside


def _ratio(times: float | None) -> str:
    if times is None:
        return _NONE
    return f"{_times(times)} {SLOWER}" if times > 1 else _times(times)


def _times(value: float) -> str:
    """A ratio with as many digits as it takes to stand on the right side of 1."""
    return _printed(value, 1.0, 2)


def _printed(value: float, limit: float, digits: int) -> str:
    """A value with more digits where fewer would move it onto or across its limit."""
    for places in range(digits, 9):
        text = f"{value:.{places}f}"
        if (float(text) > limit, float(text) < limit) == (value > limit, value < limit):
            break
    return text


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:+.1f} %"


def _plain_percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _value(verdict: Verdict) -> str:
    if verdict.value is None:
        return _NONE
    if math.isinf(verdict.value):
        return "no overhead of ours"
    return f"{_printed(verdict.value, float(verdict.limit.split()[1]), 2)} {verdict.unit}"


def _verdict(verdict: Verdict) -> str:
    counted = f" ({verdict.rows_met} of {verdict.rows} rows meet it)" if verdict.rows else ""
    return verdict.verdict + counted
