"""Whether a row of the table that ``impl="auto"`` follows is shown by the result file that it names.

The rules are those that :mod:`twn_kernels.ops.choice_table` writes down under "rules that need the result file". This
reads the file anew and shares nothing with what derives rows, so that a table that was edited by hand is caught too.
"""

from __future__ import annotations

from pathlib import Path

from twn_kernels.benchmarking import results
from twn_kernels.benchmarking.digest import arch_of, is_gpu
from twn_kernels.errors import ResultError
from twn_kernels.ops.choice_table import IMPLS, Row

__all__ = ["objections"]


def objections(row: Row, root: str | Path) -> list[str]:
    """What speaks against ``row``, one sentence each; empty where its source shows it.

    Args:
        row: of the table.
        root: the directory that ``row.source`` is relative to, a checkout.
    """
    try:
        run = results.load(Path(root) / row.source)
        arch = arch_of(run) if is_gpu(run) else "a CPU"
    except ResultError as error:
        return [str(error)]
    if arch != row.arch:
        return [f"{row.source} was measured on {arch}, not on {row.arch}."]
    counts = _measured(run, row)
    inside = {case: rows for tokens, cases in counts.items() if _serves(row, tokens) for case, rows in cases.items()}
    found = _range_objections(row, sorted(counts))
    missing, foreign = sorted(set(inside) - set(row.cases)), sorted(set(row.cases) - set(inside))
    if missing:
        found.append(f"{row.source} has more cases in the range than are listed: {', '.join(missing)}.")
    if foreign:
        found.append(f"{row.source} has no such case of {row.site} in {row.dtype} in the range: {', '.join(foreign)}.")
    for case in row.cases:
        found += _case_objections(row, case, inside.get(case, {}))
    return found


def _serves(row: Row, tokens: int) -> bool:
    return row.min_tokens <= tokens <= row.max_tokens


def _measured(run: results.Run, row: Row) -> dict[int, dict[str, dict[str, results.Row]]]:
    """``tokens -> case -> impl -> result`` of this dtype and site, forward, under routes that use an adapter."""
    found: dict[int, dict[str, dict[str, results.Row]]] = {}
    for entry in run.cases:
        site = "linear" if entry.suite == "linear" else entry.site
        counts = entry.suite in ("linear", "group") and entry.pass_ != "forward_backward" and entry.routes != "base"
        if counts and (entry.dtype, site) == (row.dtype, row.site):
            impls = found.setdefault(entry.tokens, {}).setdefault(entry.case, {})
            if entry.impl in IMPLS and entry.contender == f"ours_{entry.impl}":
                impls[entry.impl] = entry
    return found


def _range_objections(row: Row, counts: list[int]) -> list[str]:
    found = []
    if row.min_tokens not in counts:
        found.append(f"min_tokens {row.min_tokens} is no token count that was measured.")
    later = [tokens for tokens in counts if tokens > row.max_tokens]
    if not later and counts and row.max_tokens > counts[-1]:
        found.append(f"max_tokens {row.max_tokens} lies beyond the largest token count measured, {counts[-1]}.")
    return found


def _case_objections(row: Row, case: str, entries: dict[str, results.Row]) -> list[str]:
    if not entries:
        return []
    own = entries.get(row.impl)
    if own is None or own.correct is not True or own.time_us is None:
        return [f"{row.impl} was not right, or has no time, in {case}."]
    timed = {impl: entry.time_us.median for impl, entry in entries.items() if entry.time_us is not None}
    found = []
    fastest = min(timed, key=timed.get)
    if timed[fastest] < timed[row.impl]:
        found.append(f"{fastest} took {timed[fastest]} us in {case}, {row.impl} {timed[row.impl]} us.")
    if timed != dict(row.measured[case]):
        found.append(f"measured says {dict(row.measured[case])} for {case}, the file {timed}.")
    return found
