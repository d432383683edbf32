"""From result files to a report: Markdown for people, the README's measured section, and the plots beside it.

The README only ever takes results of a GPU. Results of a CPU appear in the full report under a heading that says what
they are: proof that the suites run, and nothing about speed on a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from twn_kernels.benchmarking import plots
from twn_kernels.benchmarking.charts import charts
from twn_kernels.benchmarking.digest import Contest, Device, Source, devices, is_gpu, roofs_of
from twn_kernels.benchmarking.tables import PASS_WORDS, SLOWER, all_rows, commit_of, contest_rows, target_rows
from twn_kernels.benchmarking.targets import judge
from twn_kernels.errors import OptionError

__all__ = ["BEGIN", "END", "full_report", "readme_section", "replace_section", "write_report"]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_STANDARD_RANKS = (64, 64)  # what the targets are about
_WHOLE = ("model", "layer")  # suites of which the README shows every standard row; of the others, the rows that lose


def full_report(sources: Sequence[Source]) -> str:
    """Everything, device by device, GPUs first: runs, targets, cases, and every row."""
    blocks = ["# Benchmark report"]
    if not sources:
        blocks.append(_nothing_measured())
    for device in devices(sources):
        blocks.append(_device_heading(device))
        if device.is_gpu:
            blocks += ["#### Targets", _text(target_rows(judge(device)))]
        for (suite, pass_), entries in _by_table(device.contests):
            blocks += [f"#### {suite}, {PASS_WORDS[pass_]}", _text(contest_rows(entries))]
        blocks += ["#### All rows", _text(all_rows(device.contests))]
    return "\n\n".join(blocks) + "\n"


def readme_section(sources: Iterable[Source], figures: Sequence[str] = ()) -> str:
    """What stands between the README's markers: GPU results alone, or that there are none and how to get some.

    Args:
        sources: runs; those of a CPU are left out, and rows of the tiny model, which only shows that the suites run.
        figures: paths of plots as the README links them.
    """
    measured = devices(_of_real_models(source) for source in sources if is_gpu(source.run))
    if not measured:
        return _nothing_measured()
    blocks = [f"Written by `twn-kernels bench report`; each number stands in a result file. {_reading()}"]
    for device in measured:
        blocks += [_device_heading(device), _text(target_rows(judge(device)))]
        for (suite, pass_), table in _by_table(device.contests):
            blocks += _readme_table(suite, pass_, table)
    blocks += [f"![{Path(figure).stem}]({figure})" for figure in figures]
    return "\n\n".join(blocks)


def replace_section(text: str, section: str, name: str = "README") -> str:
    """``text`` with ``section`` between its markers.

    Raises:
        OptionError: a marker is missing, stands more than once, or the end stands before the beginning.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise OptionError(
            f'{name} must hold the lines "{BEGIN}" and "{END}" once each, in this order; it has '
            f"{text.count(BEGIN)} and {text.count(END)}. Put them where the measured section belongs."
        )
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def write_report(sources: Sequence[Source], folder: str | os.PathLike) -> list[Path]:
    """Write ``report.md`` and one SVG a chart and device into ``folder``; the same results give the same bytes.

    Raises:
        MissingDependency: matplotlib is not installed; nothing was written.
    """
    plots.require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        plots.write(chart, folder / f"{chart.name}-{_slug(device.name)}.svg")
        for device in devices(sources)
        for chart in charts(device)
    ]
    report = folder / "report.md"
    links = "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
    report.write_text(full_report(sources) + links, encoding="utf-8")
    return [report, *drawn]


def _of_real_models(source: Source) -> Source:
    rows = tuple(row for row in source.run.cases if row.model != "tiny")
    return source._replace(run=replace(source.run, cases=rows))


def _by_table(contests: Sequence[Contest]):
    grouped = groupby(contests, key=lambda contest: (contest.case.suite, contest.case.pass_))
    return [(key, list(entries)) for key, entries in grouped]


def _device_heading(device: Device) -> str:
    used = {contest.source.name: contest.source for contest in device.contests}
    used |= {contest.source.name: contest.source for entry in device.sums for contest in entry.contests}
    lines = [f"### {device.name}" if device.is_gpu else f"### {device.name}: a CPU, not a GPU measurement", ""]
    if not device.is_gpu:
        lines += ["These rows show that the suites run. They say nothing about speed on a GPU.", ""]
    return "\n".join(lines + [_run_line(source) for source in used.values()])


def _run_line(source: Source) -> str:
    run = source.run
    roofs = roofs_of(run)
    shown = "none" if roofs is None else f"{roofs[0]:.4g} GB/s, {roofs[1]:.4g} TFLOP/s"
    peers = ", ".join(f"{name} {version}" for name, version in sorted(run.peers.items())) or "none looked for"
    return (
        f"- commit {commit_of(run)}, {run.created}, `{run.command}`, in `{source.name}`; "
        f"measured roofs: {shown}; peers: {peers}"
    )


def _readme_table(suite: str, pass_: str, contests: Sequence[Contest]) -> list[str]:
    """A table for the README: chosen by what a case is, never by how it ended; and whatever ended badly."""
    lost = [contest for contest in contests if _lost(contest)]
    shown = [c for c in contests if c in lost or suite in _WHOLE and c.case.ranks == _STANDARD_RANKS]
    compared = [contest for contest in contests if contest.times_alternative is not None]
    slower = sum(contest.times_alternative > 1 for contest in compared)
    untimed = sum(contest.ours is None or contest.ours.time_us is None for contest in contests)
    summary = (
        f"{suite}, {PASS_WORDS[pass_]}: {_counted(len(contests))}; ours is faster than the fastest alternative in "
        f"{len(compared) - slower} of {len(compared)}, slower in {slower}, and has no time in {untimed}."
    )
    left_out = len(contests) - len(shown)
    if left_out:
        summary += f" Not shown here: {_counted(left_out)} in which it does not lose; the result files hold them."
    return [summary, _text(contest_rows(shown))] if shown else [summary]


def _counted(cases: int) -> str:
    return "1 case" if cases == 1 else f"{cases} cases"


def _lost(contest: Contest) -> bool:
    """Whether we are slower, wrong, or did not run where another did."""
    ours, times = contest.ours, contest.times_alternative
    return (times is not None and times > 1) or ours is None or ours.time_us is None


_MEASURE = """```sh
python -m bench.gpu --minutes 60 --out out/gpu    # says at its end where in bench/results its result belongs
twn-kernels bench report --readme README.md
```"""


def _nothing_measured() -> str:
    return (
        "Nothing has been measured on a GPU yet: no result of one is committed, so this section holds no numbers.\n"
        f"On a machine with a GPU, measure and write this section with\n\n{_MEASURE}\n\n"
        f"What the package set out to reach:\n\n{_text(target_rows(judge(None)))}"
    )


def _reading() -> str:
    return (
        "A row's contenders ran on the same tensors, interleaved; times are medians with their 20th and 80th "
        f"percentiles; {SLOWER} marks where the fastest alternative wins. Fused base, plain and merged are bounds: "
        "they leave the adapters out, or hold another copy of the weights for each combination of adapters."
    )


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines)
