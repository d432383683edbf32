"""Long lists of layer paths as a person would write them: ``model.layers.{0-35}.mlp.up_proj``."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["collapse"]

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def collapse(paths: Iterable[str]) -> list[str]:
    """Paths that differ in their first index alone, as one path with ranges; nothing is left out."""
    groups: dict[tuple[str, str], list[int]] = {}
    plain: list[str] = []
    for path in paths:
        found = _INDEX.search(path)
        if found is None:
            plain.append(path)
        else:
            groups.setdefault((path[: found.start()], path[found.end() :]), []).append(int(found.group()))
    return plain + [f"{before}{_ranges(indices)}{after}" for (before, after), indices in groups.items()]


def _ranges(indices: list[int]) -> str:
    indices = sorted(set(indices))
    if len(indices) == 1:
        return str(indices[0])
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "}"
