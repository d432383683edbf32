"""Quality against tokens thought, one panel a split, drawn with matplotlib's objects and without its global state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twn_kernels.errors import MissingDependency, OptionError, quoted

__all__ = ["draw", "require_matplotlib"]

# Okabe and Ito's palette: told apart by most colour-blind readers. Markers differ too, for print.
_MARKS = {
    "never": ("#0072B2", "o"),
    "always": ("#D55E00", "s"),
    "auto": ("#009E73", "D"),
    "oracle": ("#CC79A7", "*"),
}
_PANEL_INCHES = (4.2, 3.6)
_LABELS_A_PANEL = 3  # as many as the width of one panel holds
_SUFFIXES = (".png", ".svg", ".pdf")


def require_matplotlib(path: str | os.PathLike) -> None:
    """Raise where a plot cannot be drawn into ``path``; call it before anything long runs.

    Raises:
        MissingDependency: matplotlib is not installed.
        OptionError: the suffix names no format.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise OptionError(f'a plot must end in one of {quoted(_SUFFIXES)}, got "{Path(path).name}".')
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            'plots need matplotlib, which is not installed. Run: pip install "twn_kernels[eval]"   Or leave out --plot.'
        ) from error


def draw(document: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Draw a result into a file whose suffix names the format.

    Raises:
        MissingDependency, OptionError: as :func:`require_matplotlib`.
    """
    require_matplotlib(path)
    import matplotlib
    from matplotlib.figure import Figure

    splits, path = document["splits"], Path(path)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(splits), height), layout="constrained")
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for axes, (name, split) in zip(panels, splits.items(), strict=True):
        _draw_split(axes, split, document["metric"])
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("tokens thought a query")
    panels[0].set_ylabel(document["metric"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_LABELS_A_PANEL * len(splits), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "twn_kernels"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _draw_split(axes, split: Mapping[str, Any], metric: str) -> None:
    count = len(split["per_query"]["id"])

    def place(told: Mapping[str, Any]) -> tuple[float, float]:
        return (told["query_tokens"] + told.get("document_tokens", 0)) / count, told[metric]

    if "sweep" in split:
        axes.plot(
            *zip(*map(place, split["sweep"]), strict=True), color="#009E73", linewidth=1, label="auto, any threshold"
        )
    if {"never", "always"} <= set(split["modes"]):
        ends = [place(split["modes"][mode]) for mode in ("never", "always")]
        axes.plot(*zip(*ends, strict=True), color="#999999", linewidth=1, linestyle="--", label="random gate")
    marked = {**split["modes"], **({"oracle": split["oracle"]} if "oracle" in split else {})}
    for name, told in marked.items():
        colour, marker = _MARKS[name]
        axes.plot(*place(told), color=colour, marker=marker, linestyle="", label=name)
