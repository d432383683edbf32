"""Reads and checks the table that ``impl="auto"`` follows: which implementation was measured fastest, where.

The table is ``choices.json`` beside this file: one JSON object ``{"format": 1, "rows": [...]}``. A row is an object
with exactly these fields::

    arch        "sm_90": compute capability of the GPU that was measured
    dtype       "bf16", "fp16" or "fp32": of x and the weights
    site        "linear" (one linear by itself) or a site group: "qkv", "o", "gate_up", "down"
    min_tokens  first token count that the row serves, 1 or more
    max_tokens  last one, inclusive
    impl        "blas", "triton" or "cuda"
    source      "bench/results/<device>/<file>.json": the result file that shows it
    cases       ids of that file's cases which lie in the range, none twice; at least one
    measured    {case id: {impl: median in us, ...}, ...}: for each case, every implementation that was right there,
                "blas" among them: it is what serves without the row

Rules that reading enforces, so that a wrong row fails when the table is loaded and not in some later call:

- nothing unknown, nothing missing, no key twice, no other ``format``;
- ``min_tokens <= max_tokens``, and the ranges of one (arch, dtype, site) do not overlap;
- ``measured`` has exactly the cases of ``cases``, and in each of them ``impl`` has the smallest median.

Rules that need the result file (a test of the repository holds the shipped table to them):

- ``source`` exists, and its GPU has the row's ``arch``;
- every case of the file for this dtype and site whose token count lies in the range is listed, with the file's medians;
  that is forward passes and decode steps of the suites "linear" and "group" under routes that use an adapter;
- ``impl`` passed the correctness gate in each;
- the range reaches no further than the measurements: ``min_tokens`` is a token count that was measured; ``max_tokens``
  lies below the next larger one measured or, where there is none, at the largest.

So a run of measured counts 16, 64, 256 that one implementation wins, followed by 1024 that another wins, gives the
range 16 to 1023. Between rows, below the first and above the last nothing is known and ``auto`` takes ``blas``.
The choice is made by the forward pass; the backward pass of a call follows it. So a row of ``cuda``, which has no
backward pass, does not serve a call that needs one, nor one whose tensors it cannot read: those go to ``blas`` too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twn_kernels.errors import TableError, did_you_mean, quoted

__all__ = ["ARCHS", "DEFAULT", "DTYPES", "FORMAT", "IMPLS", "PATH", "SITES", "Row", "packaged", "parse", "read"]

FORMAT = 1
PATH = Path(__file__).with_name("choices.json")

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
DTYPES = ("bf16", "fp16", "fp32")
SITES = ("linear", "qkv", "o", "gate_up", "down")
IMPLS = ("blas", "cuda", "triton")
DEFAULT = "blas"  # what auto takes where no row says otherwise

_FIELDS = ("arch", "dtype", "site", "min_tokens", "max_tokens", "impl", "source", "cases", "measured")
_NAMES = {"arch": ARCHS, "dtype": DTYPES, "site": SITES, "impl": IMPLS}
_SOURCE = re.compile(r"bench/results/[\w.+-]+/[\w.+-]+\.json")
_MAX_TOKENS = 2**31 - 1  # the contract of the ops


@dataclass(frozen=True)
class Row:
    """One row of the table, as the module's docstring describes its fields; ``measured`` holds microseconds."""

    arch: str
    dtype: str
    site: str
    min_tokens: int
    max_tokens: int
    impl: str
    source: str
    cases: tuple[str, ...]
    measured: Mapping[str, Mapping[str, float]]

    @property
    def key(self) -> tuple[str, str, str]:
        """What the row is about: (arch, dtype, site)."""
        return self.arch, self.dtype, self.site

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        measured = {case: dict(medians) for case, medians in self.measured.items()}
        return {name: getattr(self, name) for name in _FIELDS} | {"cases": list(self.cases), "measured": measured}


@functools.cache
def packaged() -> tuple[Row, ...]:
    """The rows that ship with the package, read and checked once a process.

    Raises:
        TableError: the file is damaged; see :func:`read`.
    """
    return read(PATH)


def read(path: str | Path) -> tuple[Row, ...]:
    """The rows of a table file.

    Raises:
        TableError: it cannot be read, or a row breaks a rule; the message names the file and the row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: the table cannot be read: {error}. Reinstall the package.") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[Row, ...]:
    """The rows in ``text``; ``name`` is what messages call the file.

    Raises:
        TableError: as :func:`read`.
    """
    try:
        table = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{name}: the table must be JSON, but {error}.") from error
    if not isinstance(table, dict):
        raise TableError(f'{name}: the table must be an object with "format" and "rows", got {_shown(table)}.')
    version = table.get("format")
    if isinstance(version, bool) or version != FORMAT:
        raise TableError(f"{name}: format must be {FORMAT}, the one that this version reads, got {_shown(version)}.")
    _check_fields(table, ("format", "rows"), name)
    if not isinstance(table["rows"], list):
        raise TableError(f"{name}: rows must be a list, got {_shown(table['rows'])}.")
    rows = tuple(_row(entry, f"{name}: rows[{index}]") for index, entry in enumerate(table["rows"]))
    _check_overlaps(rows, name)
    return rows


def _row(entry: object, where: str) -> Row:
    if not isinstance(entry, dict):
        raise TableError(f"{where} must be an object with the fields {quoted(_FIELDS)}, got {_shown(entry)}.")
    _check_fields(entry, _FIELDS, where)
    for field, names in _NAMES.items():
        if not isinstance(entry[field], str) or entry[field] not in names:
            near = did_you_mean(entry[field], names)
            raise TableError(f"{where}.{field} must be one of {quoted(names)}, got {_shown(entry[field])}.{near}")
    for field in ("min_tokens", "max_tokens"):
        _check_count(entry[field], f"{where}.{field}")
    if entry["min_tokens"] > entry["max_tokens"]:
        raise TableError(
            f"{where} has an empty range: min_tokens {entry['min_tokens']} is above max_tokens {entry['max_tokens']}."
        )
    if not isinstance(entry["source"], str) or not _SOURCE.fullmatch(entry["source"]):
        expected = '"bench/results/<device>/<file>.json", the result file that shows it'
        raise TableError(f"{where}.source must be {expected}, got {_shown(entry['source'])}.")
    _check_measured(entry, where)
    return Row(**{**entry, "cases": tuple(entry["cases"])})


def _check_fields(entry: dict, fields: tuple[str, ...], where: str) -> None:
    unknown = [name for name in entry if name not in fields]
    if unknown:
        near = did_you_mean(unknown[0], fields)
        raise TableError(f"{where} has unknown fields {quoted(unknown)}; there are {quoted(fields)}.{near}")
    missing = [name for name in fields if name not in entry]
    if missing:
        raise TableError(f"{where} lacks {quoted(missing)}; every row needs {quoted(fields)}.")


def _check_count(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_TOKENS:
        raise TableError(f"{where} must be a whole number from 1 to {_MAX_TOKENS}, got {_shown(value)}.")


def _check_measured(entry: dict, where: str) -> None:
    """Every listed case has its medians, and in each the row's implementation is the fastest."""
    cases, measured = entry["cases"], entry["measured"]
    if not isinstance(cases, list) or not cases or not all(isinstance(case, str) and case for case in cases):
        raise TableError(f"{where}.cases must list the ids of one case or more, got {_shown(cases)}.")
    if len(set(cases)) < len(cases):
        twice = sorted({case for case in cases if cases.count(case) > 1})
        raise TableError(f"{where}.cases lists {quoted(twice)} twice.")
    if not isinstance(measured, dict) or set(measured) != set(cases):
        got = quoted(measured) if isinstance(measured, dict) else _shown(measured)
        raise TableError(f"{where}.measured must have exactly the cases {quoted(cases)}, got {got}.")
    for case, medians in measured.items():
        at = f'{where}.measured["{case}"]'
        needed = dict.fromkeys((entry["impl"], DEFAULT))
        if not isinstance(medians, dict) or not medians.keys() >= needed.keys():
            raise TableError(f"{at} must hold the medians of {quoted(needed)} in us, got {_shown(medians)}.")
        for impl, median in medians.items():
            if impl not in IMPLS:
                near = did_you_mean(impl, IMPLS)
                raise TableError(f'{at} names "{impl}"; implementations are {quoted(IMPLS)}.{near}')
            if isinstance(median, bool) or not isinstance(median, int | float) or not 0 < median < float("inf"):
                raise TableError(f'{at}["{impl}"] must be a positive time in us, got {_shown(median)}.')
        fastest = min(medians, key=medians.get)
        if medians[fastest] < medians[entry["impl"]]:
            raise TableError(
                f"{where}.impl must be the fastest in each case, but in {case} "
                f"{fastest} took {medians[fastest]} us and {entry['impl']} {medians[entry['impl']]} us."
            )


def _check_overlaps(rows: tuple[Row, ...], name: str) -> None:
    order = sorted(range(len(rows)), key=lambda index: (rows[index].key, rows[index].min_tokens))
    for first, second in zip(order, order[1:], strict=False):
        a, b = rows[first], rows[second]
        if a.key == b.key and b.min_tokens <= a.max_tokens:
            low, high = sorted((first, second))
            raise TableError(
                f"{name}: rows[{high}] overlaps rows[{low}]: both serve {a.site} in {a.dtype} on {a.arch} at "
                f"{b.min_tokens} tokens. Ranges must be apart."
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'the key "{key}" stands twice in one object')
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
