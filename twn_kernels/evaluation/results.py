"""The result document of an evaluation: its fields, and the only reader and writer of it.

Owns the schema alone. Tables, plots and other benchmarks' formats are derived from a document elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twn_kernels.errors import ResultError, did_you_mean

__all__ = ["KIND", "SCHEMA", "load_result", "parse", "save_result", "write_json"]

SCHEMA = 1
KIND = "twn-eval"

Check = Callable[[Any, str], None]


def save_result(document: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write a document, whole or not at all.

    Raises:
        ResultError: it breaks the schema, so that nothing could read it back, or the file cannot be written.
    """
    parse(document, str(path))
    return write_json(document, path)


def write_json(document: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write any JSON file, whole or not at all, making its folder; raises as :func:`save_result`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1, allow_nan=False, ensure_ascii=False)
                file.write("\n")
            os.chmod(temporary, 0o644)  # mkstemp's files are private
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ResultError(f'"{path}" cannot be written: {error.strerror or error}.') from error
    return path


def load_result(path: str | os.PathLike) -> dict[str, Any]:
    """Read a document.

    Raises:
        ResultError: the file is missing, is no JSON, is of another kind or schema, or holds a malformed field.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(
            f'result file "{path}" cannot be read: {error.strerror or error}. Name one that an evaluation wrote.'
        ) from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f'result file "{path}" is no JSON ({error}). Name one that an evaluation wrote.') from None
    return parse(document, str(path))


def parse(document: Any, source: str) -> dict[str, Any]:
    """A document as read from JSON, checked and returned.

    Raises:
        ResultError: it is of another kind or schema, or a field is missing, unknown or malformed; names the field.
    """
    if not isinstance(document, dict) or document.get("kind") != KIND:
        got = f"kind {document.get('kind')!r}" if isinstance(document, dict) else type(document).__name__
        raise ResultError(f'{source} is no evaluation result: expected an object of kind "{KIND}", got {got}.')
    if document.get("schema") != SCHEMA or isinstance(document.get("schema"), bool):
        raise ResultError(
            f"{source} has schema {document.get('schema')!r}; this version reads schema {SCHEMA}. "
            "Evaluate again, or read it with the version of twn_kernels that wrote it."
        )
    _DOCUMENT(document, source)
    if not document["splits"]:
        raise ResultError(f"{source}.splits is empty; expected at least one split.")
    if set(document["splits"]) != set(document["data"]["splits"]):
        raise ResultError(f"{source}.splits and .data.splits must name the same splits.")
    for name, split in document["splits"].items():
        _check_together(split, f"{source}.splits.{name}", document["metric"])
    return document


def _check_together(split: dict, where: str, metric: str) -> None:
    """What no field can say alone: every table has the metric that decides, every column has a row for each query."""
    if not split["modes"]:
        raise ResultError(f"{where}.modes is empty; expected at least one mode.")
    gate = [name for name in ("oracle", "random", "sweep", "best_in_hindsight", "calibration") if name in split]
    if ("auto" in split["modes"]) != (len(gate) == 5):
        raise ResultError(
            f"{where} must tell of the gate (oracle, random, sweep, ...) exactly where it has a mode auto."
        )
    for mode, told in split["modes"].items():
        if metric not in told:
            raise ResultError(f"{where}.modes.{mode} has no {metric}, which the document says decides.")
    columns = split["per_query"]
    for name, values in columns.items():
        if len(values) != len(columns["id"]):
            raise ResultError(
                f"{where}.per_query.{name} must have one entry for each of {len(columns['id'])} queries, "
                f"got {len(values)}."
            )


def _is(words: str, check: Callable[[Any], bool]) -> Check:
    def run(value: Any, where: str) -> None:
        if not check(value):
            shown = repr(value)
            raise ResultError(f"{where} must be {words}, got {shown if len(shown) <= 80 else shown[:77] + '...'}.")

    return run


def _or_null(check: Check) -> Check:
    def run(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return run


def _object(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    known = {**required, **(optional or {})}

    def run(value: Any, where: str) -> None:
        _MAPPING(value, where)
        for name in value:
            if name not in known:
                raise ResultError(f"{where}.{name} is no field of schema {SCHEMA}.{did_you_mean(name, known)}")
        for name in required:
            if name not in value:
                raise ResultError(f"{where}.{name} is missing.")
        for name, entry in value.items():
            known[name](entry, f"{where}.{name}")

    return run


def _of(check: Check, *needed: str) -> Check:
    """An object of any names, ``needed`` among them."""

    def run(value: Any, where: str) -> None:
        _MAPPING(value, where)
        for name in needed:
            if name not in value:
                raise ResultError(f"{where}.{name} is missing.")
        for name, entry in value.items():
            check(entry, f"{where}.{name}")

    return run


def _list(check: Check) -> Check:
    def run(value: Any, where: str) -> None:
        _LIST(value, where)
        for place, entry in enumerate(value):
            check(entry, f"{where}[{place}]")

    return run


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_MAPPING = _is("an object", lambda value: isinstance(value, dict))
_LIST = _is("a list", lambda value: isinstance(value, list))
_BOOL = _is("true or false", lambda value: isinstance(value, bool))
_TEXT = _is("a non-empty string", lambda value: isinstance(value, str) and value.strip() != "")
_COUNT = _is(
    "a whole number of 0 or more", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
)
_NUMBER = _is("a finite number", _number)
_SHARE = _is("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
_ANY: Check = lambda value, where: None  # noqa: E731

_INTERVAL = _object({"mean": _NUMBER, "low": _NUMBER, "high": _NUMBER, "confidence": _SHARE, "resamples": _COUNT})
_BIN = _object({"low": _SHARE, "high": _SHARE, "queries": _COUNT, "mean_score": _SHARE, "improved_rate": _SHARE})
_CALIBRATION = _object(
    {
        "improved_rate": _SHARE,
        "brier": _SHARE,
        "brier_of_rate": _SHARE,
        "auroc": _or_null(_SHARE),
        "reliability": _list(_BIN),
    }
)
_TOLD = _is("a finite number of 0 or more, or true or false", lambda v: isinstance(v, bool) or (_number(v) and v >= 0))
_MODE = _of(
    _TOLD,
    *("think_rate", "fallback_rate", "query_tokens", "document_tokens"),
    *("query_seconds", "document_seconds", "seconds_measured"),
)
_POINT = _of(_or_null(_NUMBER), "threshold", "think_rate", "query_tokens", "document_tokens")
_SPLIT = _object(
    {
        "modes": _object({}, {"never": _MODE, "always": _MODE, "auto": _MODE}),
        "classes": _of(_of(_NUMBER)),
        "per_query": _object(
            {
                "id": _list(_TEXT),
                "class": _list(_ANY),
                "never": _list(_SHARE),
                "margin_never": _list(_or_null(_NUMBER)),
            },
            {
                "gate_score": _list(_SHARE),
                "always": _list(_SHARE),
                "margin_always": _list(_or_null(_NUMBER)),
                "tokens": _list(_COUNT),
                "fell_back": _list(_BOOL),
            },
        ),
    },
    {
        "differences": _of(_INTERVAL),
        "oracle": _of(_TOLD, "think_rate", "query_tokens"),
        "random": _of(_TOLD, "p_value"),
        "sweep": _list(_POINT),
        "best_in_hindsight": _POINT,
        "calibration": _of(_CALIBRATION),
    },
)
_DATA = _object({"digest": _TEXT, "queries": _COUNT, "documents": _COUNT, "queries_without_positive": _COUNT})
_DOCUMENT = _object(
    {
        "schema": _COUNT,
        "kind": _TEXT,
        "created": _TEXT,
        "commit": _TEXT,
        "dirty": _or_null(_BOOL),
        "versions": _of(_TEXT),
        "command": _TEXT,
        "data": _object({"name": _TEXT, "splits": _of(_DATA)}),
        "model": _object({"base": _TEXT, "checkpoint": _TEXT, "parameters": _or_null(_of(_NUMBER))}),
        "options": _of(_ANY, "seed", "resamples", "threshold", "think_documents", "k"),
        "metric": _TEXT,
        "splits": _of(_SPLIT),
        "seconds": _NUMBER,
    }
)
