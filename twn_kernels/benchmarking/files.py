"""Which result files a command means: files by name, folders by what they hold; and pairs of them to compare."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from twn_kernels.benchmarking.digest import Source
from twn_kernels.benchmarking.results import KIND, load
from twn_kernels.errors import ResultError

__all__ = ["Found", "find", "load_pair"]


class Found(NamedTuple):
    """Runs, and JSON files of the folders that are no results."""

    sources: list[Source]
    left_out: list[Path]


def find(paths: Iterable[str | os.PathLike], relative_to: str | os.PathLike | None = None) -> Found:
    """Load every result that the paths name; a file that is named twice counts once.

    Args:
        paths: result files, and folders that are searched for them through all levels.
        relative_to: folder from which the sources are called; None: they are called by their paths as given.

    Raises:
        ResultError: a path is missing, a named file is no result, a folder holds none, or a result cannot be read.
    """
    sources: dict[Path, Source] = {}
    left_out = []
    for path in map(Path, paths):
        held = _held(path) if path.is_dir() else ([path], [])
        left_out += held[1]
        for file in held[0]:
            sources.setdefault(file.resolve(), Source(load(file), _called(file, relative_to)))
    return Found(list(sources.values()), left_out)


def _held(folder: Path) -> tuple[list[Path], list[Path]]:
    """Result files in a folder, and other JSON files there."""
    files = sorted(path for path in folder.rglob("*.json") if path.is_file() and not path.name.startswith("."))
    results = [path for path in files if _claims_to_be_one(path)]
    if not results:
        raise ResultError(f'folder "{folder}" holds no result file. Name one that a benchmark run wrote.')
    return results, [path for path in files if path not in results]


def _claims_to_be_one(path: Path) -> bool:
    """Whether a file calls itself a result; a damaged one that does is an error later, not left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True  # reading it says what is wrong
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return KIND in text
    return isinstance(document, dict) and document.get("kind") == KIND


def _called(file: Path, relative_to: str | os.PathLike | None) -> str:
    if relative_to is None:
        return str(file)
    return Path(os.path.relpath(file.resolve(), Path(relative_to).resolve())).as_posix()


def load_pair(first: str | os.PathLike, second: str | os.PathLike) -> tuple[Source, Source]:
    """Load two results of one schema; each path is a file, or a folder that holds exactly one.

    Raises:
        ResultError: as :func:`find`; or the two are of different schema versions, which the message names.
    """
    files = [_the_one(Path(path)) for path in (first, second)]
    versions = [_schema(file) for file in files]
    if versions[0] != versions[1] and None not in versions:
        raise ResultError(
            f"{files[0]} has schema {versions[0]} and {files[1]} has schema {versions[1]}: they cannot be compared. "
            "Measure both with one version of twn_kernels."
        )
    return tuple(Source(load(file), str(file)) for file in files)


def _the_one(path: Path) -> Path:
    if not path.is_dir():
        return path
    results, _ = _held(path)
    if len(results) > 1:
        names = ", ".join(str(result.relative_to(path)) for result in results[:3])
        raise ResultError(f'folder "{path}" holds {len(results)} results ({names}, ...); name one of them.')
    return results[0]


def _schema(file: Path) -> object:
    """The version that a file says it has, in JSON; None where that cannot be told."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("kind") != KIND or "schema" not in document:
        return None
    return json.dumps(document["schema"])
