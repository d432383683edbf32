"""From result files to rows of the table that ``impl="auto"`` follows.

The table's format and rules are :mod:`twn_kernels.ops.choice_table`'s; this derives rows that keep them. A token count
gets a row only where one implementation was right and fastest in every case that the file holds for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twn_kernels.benchmarking.cases import MLP
from twn_kernels.benchmarking.digest import Source, arch_of, is_gpu
from twn_kernels.benchmarking.results import Row as ResultRow
from twn_kernels.errors import ResultError
from twn_kernels.ops import choice_table
from twn_kernels.ops.choice_table import DEFAULT, IMPLS, Row

__all__ = ["Choices", "Undecided", "choose"]

_FOLDER = ("bench", "results")


@dataclass(frozen=True)
class Undecided:
    """A token count without a row, and why."""

    arch: str
    dtype: str
    site: str
    tokens: int
    why: str


@dataclass(frozen=True)
class Choices:
    """What files show: rows of the table, and token counts for which they show no winner."""

    rows: tuple[Row, ...]
    undecided: tuple[Undecided, ...]

    def table(self) -> dict[str, Any]:
        """The document that ``choices.json`` holds."""
        return {"format": choice_table.FORMAT, "rows": [row.to_dict() for row in self.rows]}


def choose(sources: Iterable[Source]) -> Choices:
    """Derive the table's rows.

    Where several files measured one (architecture, dtype, site), the newest speaks for it alone.

    Args:
        sources: runs on GPUs, with the paths of their files.

    Raises:
        ResultError: a run is a CPU's, or its file does not lie in ``bench/results/<device>/``, so that no row could
            name it.
    """
    groups: dict[tuple[str, str, str], tuple[str, dict]] = {}
    for source in sorted(sources, key=lambda source: (source.run.created, source.name)):
        arch, name = _arch(source), _result_path(source.name)
        for (dtype, site), counts in _measured(source.run.cases).items():
            groups[arch, dtype, site] = (name, counts)
    rows: list[Row] = []
    undecided: list[Undecided] = []
    for key in sorted(groups):
        name, counts = groups[key]
        winners = {tokens: _winner(cases) for tokens, cases in sorted(counts.items())}
        rows += _ranges(key, name, counts, winners)
        undecided += [Undecided(*key, tokens, why) for tokens, (impl, why) in winners.items() if impl is None]
    return Choices(tuple(rows), tuple(undecided))


def _arch(source: Source) -> str:
    if not is_gpu(source.run):
        raise ResultError(f"{source.name} was measured on a CPU; choices follow results of a GPU alone.")
    arch = arch_of(source.run)
    if arch not in choice_table.ARCHS:
        raise ResultError(f'{source.name}: "{arch}" is no architecture that the choice table knows.')
    return arch


def _result_path(name: str) -> str:
    parts = Path(name).resolve().parts
    if len(parts) < 4 or parts[-4:-2] != _FOLDER:
        raise ResultError(
            f"{name} must lie in {'/'.join(_FOLDER)}/<device>/, because a row of the table names the committed "
            "file that shows it. Move it there first."
        )
    return "/".join(parts[-4:])


def _measured(rows: Iterable[ResultRow]) -> dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]]:
    """``(dtype, site) -> tokens -> case -> impl -> median`` of this package's named implementations.

    Of forward passes and decode steps on routes that use an adapter: the choice is made by the forward pass, and
    without adapters every implementation runs the plain product.
    A case that was run without a single timed implementation is there too, empty: it leaves its token count undecided.
    """
    found: dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]] = {}
    for row in rows:
        if (
            row.suite not in ("linear", "group")
            or row.site == MLP
            or row.pass_ == "forward_backward"
            or row.routes == "base"
        ):
            continue
        site = "linear" if row.suite == "linear" else row.site
        medians = found.setdefault((row.dtype, site), {}).setdefault(row.tokens, {}).setdefault(row.case, {})
        if row.impl in IMPLS and row.contender == f"ours_{row.impl}" and row.time_us is not None:
            medians[row.impl] = row.time_us.median
    return found


def _winner(cases: dict[str, dict[str, float]]) -> tuple[str | None, str]:
    """The implementation that is fastest in every case, or None and why."""
    for case, medians in cases.items():
        if DEFAULT not in medians:
            return None, f"{DEFAULT} has no time in {case}"
    fastest = {case: min(medians, key=lambda impl: (medians[impl], impl != DEFAULT)) for case, medians in cases.items()}
    impls = sorted(set(fastest.values()))
    if len(impls) > 1:
        examples = ", ".join(f"{impl} in {next(case for case in fastest if fastest[case] == impl)}" for impl in impls)
        return None, f"no single winner: {examples}"
    return impls[0], ""


def _ranges(key: tuple[str, str, str], name: str, counts: dict, winners: dict[int, tuple]) -> list[Row]:
    """One row for each run of measured token counts with one winner; it ends before the next count measured."""
    rows: list[Row] = []
    tokens: Sequence[int] = list(winners)
    start = 0
    while start < len(tokens):
        impl, stop = winners[tokens[start]][0], start + 1
        while stop < len(tokens) and winners[tokens[stop]][0] == impl:
            stop += 1
        if impl is not None:
            last = tokens[stop] - 1 if stop < len(tokens) else tokens[-1]
            cases = {case: medians for count in tokens[start:stop] for case, medians in counts[count].items()}
            arch, dtype, site = key
            rows.append(Row(arch, dtype, site, tokens[start], last, impl, name, tuple(cases), cases))
        start = stop
    return rows
