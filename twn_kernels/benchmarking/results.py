"""What one benchmark run leaves behind: one JSON document, its fields and units, and the only reader and writer of it.

Owns the schema alone. What the numbers mean together (overheads, targets, tables, plots) is derived elsewhere, so that
a document holds measurements and counts and nothing that could disagree with them.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from twn_kernels.errors import ResultError, did_you_mean, quoted

__all__ = ["KIND", "PASSES", "ROUTES", "SCHEMA", "SUITES", "Row", "Run", "Time", "load", "parse", "save"]

SCHEMA = 1
KIND = "twn-bench"
SUITES = ("linear", "group", "layer", "model")
PASSES = ("forward", "forward_backward", "decode")
ROUTES = ("reasoning", "half", "suffix", "base", "alternating", "both")
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Time:
    """One contender's time in one case, microseconds for one call (one decode step, one forward, one forward+backward).

    Attributes:
        median, p20, p80: over the rounds; ``p20 <= median <= p80``.
        rounds: how many samples. A sample of a small kernel is the mean over one graph's rotated buffers.
    """

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        id: ``<case>-<contender>``; unique in a document.
        case: what all its contenders have in common; rows with one ``case`` were timed together, interleaved.
        suite: ``linear``, ``group``, ``layer`` or ``model``.
        pass_: ``forward``, ``forward_backward`` or ``decode`` (one step, in a CUDA graph unless the contender is what
            a library does by itself; ``in_graph`` says); ``"pass"`` in JSON.
        model: size whose shapes these are: ``8B``, ``4B``, ``2B`` or ``tiny``.
        site: ``qkv``, ``o``, ``gate_up``, ``down``, or ``mlp`` for the last two together (a linear by its own name,
            such as ``q``); None for whole layers.
        layers: decoder layers that were built, None below the layer suite.
        layers_full: decoder layers that the real model has, None below the layer suite.
        tokens: rows of the input of every linear: batch * sequence in prefill, batch in decode.
        context: tokens that the KV cache holds a row before a decode step; None without a cache.
        routes: ``reasoning`` (one adapter on every row), ``half`` (first half reasoning, rest embedding), ``suffix``
            (query rows under embedding after a sequence under reasoning), ``base``, ``alternating`` (row by row),
            ``both``.
        ranks: ``(reasoning, embedding)``.
        dtype: of weights and activations: ``bf16``, ``fp16``, ``fp32``.
        contender: what ran, by its name in the suite.
        impl: which implementation of this package served it (``+`` between them where sites of the case differ); None
            for what is not this package.
        is_baseline: True for what a user would run instead of this package.
        correct: held to the oracle against fp64 truth; None where it did not run at all.
        error_ratio: its largest error over the oracle's budget; at most 1 where ``correct``. None where not measured.
        time_us: None where it has none, and then ``reason`` says why.
        reason: one sentence; None where there is a time.
        in_graph: timed as replays of a CUDA graph, without what Python and launches cost; None without a time.
        ideal_bytes: bytes that the case must move at least: each input read once, each output written once.
        ideal_flops: floating-point operations that the case must do at least.
        percent_of_roof: 100 * (time that the run's measured roofs allow for the ideal work) / median; None without
            roofs or time.
        overhead_percent: 100 * (median / median of ``fused_base`` in the same case - 1); None without both times.
        memory_added_bytes: bytes held beyond the plain model's weights (adapters, copies); None where not counted.
        command: reproduces the row.
    """

    id: str
    case: str
    suite: str
    pass_: str
    model: str
    site: str | None
    layers: int | None
    layers_full: int | None
    tokens: int
    context: int | None
    routes: str
    ranks: tuple[int, int]
    dtype: str
    contender: str
    impl: str | None
    is_baseline: bool
    correct: bool | None
    error_ratio: float | None
    time_us: Time | None
    reason: str | None
    in_graph: bool | None
    ideal_bytes: int
    ideal_flops: int
    percent_of_roof: float | None
    overhead_percent: float | None
    memory_added_bytes: int | None
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The row, ready for JSON."""
        values = {"pass" if name == "pass_" else name: value for name, value in asdict(self).items()}
        return values | {"ranks": list(self.ranks)}


@dataclass(frozen=True)
class Run:
    """One run: where it ran, what the machine can do, and its rows.

    Attributes:
        created: UTC, ISO 8601.
        commit: of the tree that was measured, or ``unknown``.
        dirty: whether that tree had uncommitted changes; None where unknown.
        command: started the run.
        environment: of :func:`twn_kernels.benchmarking.environment.stamp`: GPU, driver, clocks, versions, CPU.
        roofs: of :func:`twn_kernels.benchmarking.roofs.measure`; empty where not measured. ``copy_gb_per_s``,
            ``matmul_tflops`` and ``launch_gap_us`` are numbers, ``pitched_gemm`` a list of measurements.
        peers: packages that could be compared with: name to version, or ``absent``.
        cases: the rows, in the order in which they were measured.
    """

    created: str
    commit: str
    dirty: bool | None
    command: str
    environment: dict[str, Any]
    roofs: dict[str, Any]
    peers: dict[str, str]
    cases: tuple[Row, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The document, ready for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"schema": SCHEMA, "kind": KIND, **own, "cases": [row.to_dict() for row in self.cases]}


def save(run: Run, path: str | os.PathLike) -> Path:
    """Write the document, whole or not at all.

    Raises:
        ResultError: a row breaks the schema, so that nothing could read it back.
    """
    path = Path(path)
    document = run.to_dict()
    parse(document, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load(path: str | os.PathLike) -> Run:
    """Read a document.

    Raises:
        ResultError: the file is missing, is no JSON, is of another kind or schema, or holds a malformed row.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(
            f"result file {path} cannot be read: {error.strerror or error}. "
            "Name a JSON file that a benchmark run wrote."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f"result file {path} is no JSON ({error}). Name a file that a benchmark run wrote.") from None
    return parse(document, str(path))


def parse(document: object, source: str = "document") -> Run:
    """A document as read from JSON, checked.

    Args:
        document: what ``json.loads`` gave.
        source: what to call it in messages, usually its path.

    Raises:
        ResultError: it is of another kind or schema, or a field is missing, unknown or malformed; names the field.
    """
    if not isinstance(document, dict) or document.get("kind") != KIND:
        got = type(document).__name__ if not isinstance(document, dict) else f"kind {document.get('kind')!r}"
        raise ResultError(f'{source} is no benchmark result: expected an object of kind "{KIND}", got {got}.')
    if document.get("schema") != SCHEMA or isinstance(document.get("schema"), bool):
        raise ResultError(
            f"{source} has schema {document.get('schema')!r}; this version reads schema {SCHEMA}. "
            "Measure again, or read it with the version of twn_kernels that wrote it."
        )
    _check_fields(document, _RUN, source)
    rows, seen = [], {}
    for index, entry in enumerate(document["cases"]):
        row = parse_row(entry, f"{source}: cases[{index}]")
        if row.id in seen:
            raise ResultError(f"{source}: cases[{index}].id repeats that of cases[{seen[row.id]}]: {row.id!r}.")
        seen[row.id] = index
        rows.append(row)
    own = {name: document[name] for name in _RUN if name not in ("schema", "kind", "cases")}
    return Run(**own, cases=tuple(rows))


def parse_row(entry: object, source: str = "row") -> Row:
    """One row as read from JSON, checked; raises as :func:`parse`."""
    if not isinstance(entry, dict):
        raise ResultError(f"{source} must be an object, got {type(entry).__name__}.")
    _check_fields(entry, _ROW, source)
    time = entry["time_us"]
    if time is not None:
        _check_fields(time, _TIME, f"{source}.time_us")
        if not time["p20"] <= time["median"] <= time["p80"]:
            raise ResultError(f"{source}.time_us must have p20 <= median <= p80, got {time}.")
        time = Time(**time)
    _check_together(entry, source)
    values = {"pass_" if name == "pass" else name: value for name, value in entry.items()}
    return Row(**(values | {"ranks": tuple(entry["ranks"]), "time_us": time}))


def _check_together(entry: dict, source: str) -> None:
    """What no field can say alone: a case without a time says why, and what is wrong has none."""
    if entry["time_us"] is None and not entry["reason"]:
        raise ResultError(f"{source}.reason must say why {entry['id']!r} has no time, got {entry['reason']!r}.")
    if entry["time_us"] is not None and entry["correct"] is not True:
        raise ResultError(
            f"{source}.time_us must be null where correct is {json.dumps(entry['correct'])}: only a result that passed "
            "the gate is timed."
        )
    if entry["time_us"] is not None and entry["reason"] is not None:
        raise ResultError(f"{source}.reason must be null beside a time, got {entry['reason']!r}.")
    if (entry["time_us"] is None) != (entry["in_graph"] is None):
        raise ResultError(f"{source}.in_graph must be null exactly where time_us is, got {entry['in_graph']!r}.")
    if entry["id"] != f"{entry['case']}-{entry['contender']}":
        expected = f"{entry['case']}-{entry['contender']}"
        raise ResultError(f"{source}.id must be <case>-<contender>, {expected!r}, got {entry['id']!r}.")


class _Field:
    """What a value must be, in words and as a check."""

    def __init__(self, words: str, check: Callable[[Any], bool]) -> None:
        self.words, self.check = words, check

    def __or__(self, other: _Field) -> _Field:
        return _Field(f"{self.words} or {other.words}", lambda value: self.check(value) or other.check(value))


def _check_fields(entry: object, known: Mapping[str, _Field], source: str) -> None:
    if not isinstance(entry, dict):
        raise ResultError(f"{source} must be an object, got {type(entry).__name__}.")
    for name in entry:
        if name not in known:
            raise ResultError(f"{source}.{name} is no field of schema {SCHEMA}.{did_you_mean(name, known)}")
    for name, spec in known.items():
        if name not in entry:
            raise ResultError(f"{source}.{name} is missing; expected {spec.words}.")
        if not spec.check(entry[name]):
            raise ResultError(f"{source}.{name} must be {spec.words}, got {_shown(entry[name])}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(names: tuple[str, ...]) -> _Field:
    return _Field(f"one of {quoted(names)}", lambda value: isinstance(value, str) and value in names)


_NULL = _Field("null", lambda value: value is None)
_BOOL = _Field("true or false", lambda value: isinstance(value, bool))
_TEXT = _Field("a non-empty string", lambda value: isinstance(value, str) and value.strip() != "")
_OBJECT = _Field("an object", lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value))
_LIST = _Field("a list", lambda value: isinstance(value, list))
_WHOLE = _Field("a whole number of 0 or more", _whole)
_NUMBER = _Field("a finite number", _number)
_POSITIVE = _Field("a finite number above 0", lambda value: _number(value) and value > 0)
_NOT_NEGATIVE = _Field("a finite number of 0 or more", lambda value: _number(value) and value >= 0)
_COUNT = _Field("a whole number of 1 or more", lambda value: _whole(value) and value > 0)
_RANKS = _Field(
    "two whole numbers [reasoning, embedding]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(_whole(rank) for rank in value),
)
_NAMES = _Field(
    "an object of strings", lambda value: _OBJECT.check(value) and all(isinstance(v, str) for v in value.values())
)

_TIME = {"median": _POSITIVE, "p20": _POSITIVE, "p80": _POSITIVE, "rounds": _COUNT}
_ROW = {
    "id": _TEXT,
    "case": _TEXT,
    "suite": _one_of(SUITES),
    "pass": _one_of(PASSES),
    "model": _TEXT,
    "site": _TEXT | _NULL,
    "layers": _COUNT | _NULL,
    "layers_full": _COUNT | _NULL,
    "tokens": _COUNT,
    "context": _WHOLE | _NULL,
    "routes": _one_of(ROUTES),
    "ranks": _RANKS,
    "dtype": _one_of(DTYPES),
    "contender": _TEXT,
    "impl": _TEXT | _NULL,
    "is_baseline": _BOOL,
    "correct": _BOOL | _NULL,
    "error_ratio": _NOT_NEGATIVE | _NULL,
    "time_us": _OBJECT | _NULL,
    "reason": _TEXT | _NULL,
    "in_graph": _BOOL | _NULL,
    "ideal_bytes": _WHOLE,
    "ideal_flops": _WHOLE,
    "percent_of_roof": _NOT_NEGATIVE | _NULL,
    "overhead_percent": _NUMBER | _NULL,
    "memory_added_bytes": _WHOLE | _NULL,
    "command": _TEXT,
}
_RUN = {
    "schema": _COUNT,
    "kind": _TEXT,
    "created": _TEXT,
    "commit": _TEXT,
    "dirty": _BOOL | _NULL,
    "command": _TEXT,
    "environment": _OBJECT,
    "roofs": _OBJECT,
    "peers": _NAMES,
    "cases": _LIST,
}
