"""Draws what :mod:`charts` derived: one figure a chart, through matplotlib's objects, without its global state.

matplotlib is imported when something is drawn. The same chart gives the same bytes: no date, no random ids.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from twn_kernels.benchmarking.charts import Bars, Chart, Lines
from twn_kernels.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "require_matplotlib", "write"]

# Okabe and Ito's palette: told apart by most colour-blind readers. Markers differ too, for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_PERCENT_TICKS = (-50, -20, -10, -5, 0, 2, 4, 6, 8, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_SIZE_INCHES = (9.0, 4.8)


def require_matplotlib() -> None:
    """Raise MissingDependency where matplotlib is absent; call it before anything is written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            'plots need matplotlib, which is not installed. Run: pip install "twn_kernels[bench]"   Or leave out --out.'
        ) from error


def write(chart: Chart, path: str | os.PathLike) -> Path:
    """Draw a chart into a file whose suffix names the format (``.svg``, ``.png``).

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "twn_kernels"}):
        figure(chart).savefig(path, metadata=undated)
    return path


def figure(chart: Chart) -> Figure:
    """A chart as a matplotlib figure."""
    from matplotlib.figure import Figure

    width, height = _SIZE_INCHES
    if isinstance(chart, Bars):
        height = max(height, 1 + 0.25 * len(chart.bars))
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    if isinstance(chart, Bars):
        _draw_bars(axes, chart)
    else:
        _draw_lines(axes, chart)
    axes.set_title(chart.title, fontsize=9)
    drawn.legend(loc="outside right upper", fontsize=7)
    return drawn


def _draw_lines(axes, chart: Lines) -> None:
    for index, series in enumerate(chart.series):
        style = {"color": _COLOURS[index % len(_COLOURS)], "label": series.name}
        if series.is_limit:
            axes.plot(series.x, series.y, linestyle="--", linewidth=1, **style)
        else:
            line = "" if chart.scattered else "-"
            axes.plot(
                series.x,
                series.y,
                linestyle=line,
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=5,
                markerfacecolor="none",
                **style,
            )
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_xscale("log", base=2)
    if chart.y_scale == "symlog":
        axes.set_yscale("symlog", linthresh=10)  # overheads: a few percent of ours beside hundreds of others
        axes.axhline(0, color="black", linewidth=0.5)
    else:
        axes.set_yscale(chart.y_scale)
    if chart.y_scale == "symlog":
        highest = max(max(series.y) for series in chart.series)
        lowest = min(min(series.y) for series in chart.series)
        axes.set_yticks([tick for tick in _PERCENT_TICKS if lowest - 5 <= tick <= 1.2 * highest + 5])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, which="major", linewidth=0.3)


def _draw_bars(axes, chart: Bars) -> None:
    left = [0.0] * len(chart.bars)
    for index, (part, values) in enumerate(chart.parts):
        axes.barh(range(len(chart.bars)), values, left=left, color=_COLOURS[index % len(_COLOURS)], label=part)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(chart.bars)), chart.bars, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(chart.x_label)
