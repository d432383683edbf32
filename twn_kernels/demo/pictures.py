"""A sheet of queries beside the images that were found for them, drawn with matplotlib's objects alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from twn_kernels.demo.retrieval import Shown

__all__ = ["contact_sheet"]

_RIGHT, _WRONG = "#009E73", "#D55E00"  # Okabe and Ito's: told apart by most colour-blind readers; the titles say it too
_ROW_INCHES, _WORDS_WIDTH = 1.15, 3.6  # the words are as wide as so many images
_LETTERS = 56


def contact_sheet(shown: Sequence[Shown], path: str | Path) -> Path:
    """Draw one row a query: its words and thought, its image, and what was found, best first.

    Args:
        shown: of :func:`twn_kernels.demo.retrieval.examples`.
        path: a PNG file.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    columns = max(len(one.found) for one in shown)
    figure = Figure(
        figsize=((columns + 1 + _WORDS_WIDTH) * _ROW_INCHES, len(shown) * _ROW_INCHES), layout="constrained"
    )
    cells = figure.subplots(len(shown), columns + 2, squeeze=False, width_ratios=[_WORDS_WIDTH, 1, *[1] * columns])
    for row, one in zip(cells, shown, strict=True):
        for cell in row:
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
        row[0].text(0, 0.5, _words(one), transform=row[0].transAxes, va="center", fontsize=8)
        if one.query.image is not None:
            _draw(row[1], one.query.image, "query", "#000000")
        for cell, entry in zip(row[2:], one.found, strict=False):
            right = entry.metadata["number"] == one.query.metadata["number"]
            title = f"{entry.metadata['number']} {'right' if right else 'wrong'}"
            _draw(cell, entry.image, title, _RIGHT if right else _WRONG)
    figure.savefig(path, dpi=110)
    return Path(path)


def _words(one: Shown) -> str:
    detail = one.details
    thought = "embedded at once" if detail.text is None else f"thought: {detail.text}"
    lines = [one.query.text or "(the image alone)", f"gate {detail.gate_score:.2f}; {thought}"]
    lines.append(f"answer {one.query.metadata['number']}")
    return "\n".join(wrapped for line in lines for wrapped in textwrap.wrap(line, _LETTERS))


def _draw(cell, image: str, title: str, colour: str) -> None:
    import numpy as np
    from PIL import Image

    with Image.open(image) as opened:
        cell.imshow(np.asarray(opened.convert("L")), cmap="gray", vmin=0, vmax=255)
    cell.set_title(title, fontsize=7, color=colour, pad=2)
    cell.spines[:].set(visible=True, color=colour, linewidth=1.5)
