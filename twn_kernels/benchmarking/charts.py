"""What the plots show, as plain data: a roofline, overhead against tokens, and where a layer's time goes.

Owns the selection of rows and the arithmetic; :mod:`plots` draws it. Every point comes from a result file, and limits
from the roofs that the same run measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twn_kernels.benchmarking.cases import GROUPS
from twn_kernels.benchmarking.digest import (
    AUTO,
    FUSED_BASE,
    Contest,
    Device,
    LayerSum,
    device_of,
    is_bound,
    roofs_of,
)
from twn_kernels.benchmarking.results import Row

__all__ = ["Bars", "Chart", "Lines", "Series", "charts"]

_PREFERRED = ("half", (64, 64), "bf16")  # the combination that the targets are about
_PASS_WORDS = {"forward": "prefill", "decode": "decode", "forward_backward": "forward and backward"}


@dataclass(frozen=True)
class Series:
    """One line or cloud of points.

    Attributes:
        name: for the legend.
        x, y: coordinates.
        is_limit: a bound, not a measurement of a case.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    is_limit: bool = False


@dataclass(frozen=True)
class Lines:
    """A chart of series over a logarithmic x axis; ``name`` is the file's stem, ``y_scale`` one of matplotlib's."""

    name: str
    title: str
    x_label: str
    y_label: str
    y_scale: str
    series: tuple[Series, ...]
    scattered: bool = False


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars: ``parts`` holds a part's name and its length in each of ``bars``."""

    name: str
    title: str
    x_label: str
    bars: tuple[str, ...]
    parts: tuple[tuple[str, tuple[float, ...]], ...]


Chart = Lines | Bars


def charts(device: Device) -> list[Chart]:
    """All charts that a device has data for."""
    contests, sums = device.contests, device.sums
    drawn = [_roofline(contests)]
    for pass_ in ("forward", "decode"):
        drawn += _overheads([entry for entry in sums if entry.case.pass_ == pass_])
    for pass_ in ("forward", "decode"):
        drawn.append(_layer_bars([entry for entry in sums if entry.case.pass_ == pass_], contests))
    return [chart for chart in drawn if chart is not None]


def _roofline(contests: Sequence[Contest]) -> Lines | None:
    """TFLOP/s of each case's least work against its operations a byte, under the roofs of the newest run."""
    series = []
    for suite in ("linear", "group", "layer", "model"):
        for contender in (AUTO, FUSED_BASE):
            rows = [c.row(contender) for c in contests if c.case.suite == suite and c.case.pass_ != "forward_backward"]
            points = sorted(_roofline_point(row) for row in rows if row is not None and _on_roofline(row))
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(f"{suite}, {contender}", x, y))
    if not series:
        return None
    newest = max((contest.source.run for contest in contests), key=lambda run: run.created)
    roofs = roofs_of(newest)
    if roofs is not None:
        bandwidth, rate = roofs
        ridge = rate * 1e3 / bandwidth
        low = min(min(entry.x) for entry in series)
        high = max(max(entry.x) for entry in series)
        x = (min(low, ridge / 2), ridge, max(high, ridge * 2))
        roof = tuple(min(rate, value * bandwidth / 1e3) for value in x)
        series.append(Series(f"measured roofs: {bandwidth:.4g} GB/s, {rate:.4g} TFLOP/s", x, roof, is_limit=True))
    title = f"Roofline on {device_of(newest)}; rates count each case's least work"
    return Lines("roofline", title, "operations a byte", "TFLOP/s", "log", tuple(series), scattered=True)


def _on_roofline(row: Row) -> bool:
    return row.time_us is not None and row.ideal_bytes > 0 and row.ideal_flops > 0


def _roofline_point(row: Row) -> tuple[float, float]:
    return row.ideal_flops / row.ideal_bytes, row.ideal_flops / row.time_us.median / 1e6


def _overheads(sums: Sequence[LayerSum]) -> list[Lines]:
    """For each model size, percent over our own fused base of each contender, against tokens."""
    drawn = []
    for model in dict.fromkeys(entry.case.model for entry in sums):
        chosen = _one_combination([entry for entry in sums if entry.case.model == model])
        contenders = dict.fromkeys(name for entry in chosen for name in entry.medians if name != FUSED_BASE)
        series = []
        for name in contenders:
            points = [(entry.case.tokens, entry.overhead(name)) for entry in chosen]
            points = sorted((x, y) for x, y in points if y is not None)
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(name, x, y))
        if series:
            case = chosen[0].case
            what = _PASS_WORDS[case.pass_]
            title = f"{model} {what}, linears of a layer, {_combination_words(case)}, {_device(chosen[0])}"
            y_label = "% over our own fused base"
            drawn.append(Lines(f"overhead-{what}-{model}", title, "tokens", y_label, "symlog", tuple(series)))
    return drawn


def _layer_bars(sums: Sequence[LayerSum], contests: Sequence[Contest]) -> Bars | None:
    """For each model size at its largest token count: the four site groups, and what else the layer does.

    What else is the layer's own time minus its site groups; it is left out where the groups, each timed with a cold
    cache, add up to more than the layer.
    """
    bars: list[str] = []
    parts: dict[str, list[float]] = {name: [] for name in (*GROUPS, "attention and the rest")}
    for model in dict.fromkeys(entry.case.model for entry in sums):
        chosen = _one_combination([entry for entry in sums if entry.case.model == model])
        largest = max(chosen, key=lambda entry: entry.case.tokens)
        layer = _layer_contest(largest, contests)
        for name in largest.medians:
            if not is_bound(largest.contests[0].row(name)) or name == FUSED_BASE:
                for site, contest in zip(GROUPS, largest.contests, strict=True):
                    parts[site].append(contest.row(name).time_us.median)
                row = layer.row(name) if layer is not None else None
                rest = row.time_us.median - largest.medians[name] if row is not None and row.time_us is not None else 0
                parts["attention and the rest"].append(max(0.0, rest))
                alone = "" if rest > 0 else ", linears alone"
                bars.append(f"{model}, T={largest.case.tokens}, {name}{alone}")
    if not bars:
        return None
    what, case = _PASS_WORDS[sums[0].case.pass_], sums[0].case
    title = f"Where a layer's time goes: {what}, {_combination_words(case)}, {_device(sums[0])}"
    entries = tuple((name, tuple(values)) for name, values in parts.items() if any(values))
    return Bars(f"layer-time-{what}", title, "us", tuple(bars), entries)


def _layer_contest(entry: LayerSum, contests: Sequence[Contest]) -> Contest | None:
    """The layer suite's contest of the same problem in the same run; the shortest context where there are several."""
    case = entry.case
    problem = (case.pass_, case.model, case.tokens, case.routes, case.ranks, case.dtype)
    same = [
        contest
        for contest in contests
        if contest.case.suite == "layer"
        and contest.source.name == entry.contests[0].source.name
        and problem == tuple(getattr(contest.case, n) for n in ("pass_", "model", "tokens", "routes", "ranks", "dtype"))
    ]
    return min(same, key=lambda contest: contest.case.context or 0, default=None)


def _one_combination(sums: list[LayerSum]) -> list[LayerSum]:
    """The entries of one (routes, ranks, dtype): the preferred one where it was measured, else the most measured."""
    counts: dict[tuple, list[LayerSum]] = {}
    for entry in sums:
        counts.setdefault((entry.case.routes, entry.case.ranks, entry.case.dtype), []).append(entry)
    return counts[_PREFERRED] if _PREFERRED in counts else max(counts.values(), key=len)


def _combination_words(case: Row) -> str:
    return f"routes {case.routes}, ranks {case.ranks[0]}+{case.ranks[1]}, {case.dtype}"


def _device(entry: LayerSum) -> str:
    return device_of(entry.contests[0].source.run)
