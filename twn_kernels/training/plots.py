"""A stage's log as curves: one panel a logged figure, drawn without matplotlib's global state."""

from __future__ import annotations

import json
from pathlib import Path

from twn_kernels.training.stage_trainer import LOG_FILE

__all__ = ["PLOT_FILE", "draw_log"]

PLOT_FILE = "log.svg"
_NOT_DRAWN = {"step", "seconds"}
_PANEL_INCHES = (3.2, 2.4)
_COLUMNS = 3


def draw_log(folder: str | Path, title: str) -> Path | None:
    """Draw ``log.jsonl`` of a folder into ``log.svg`` beside it.

    Args:
        folder: of a stage.
        title: above the panels.

    Returns:
        The plot; None where there is nothing to draw or matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    log = Path(folder) / LOG_FILE
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _NOT_DRAWN))
    if not names:
        return None
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        drawn = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*drawn, strict=True), linewidth=1)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    path = Path(folder) / PLOT_FILE
    with matplotlib.rc_context({"svg.hashsalt": "twn_kernels"}):
        figure.savefig(path, metadata={"Date": None})
    return path
