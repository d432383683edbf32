"""Retrieval data on disk in BEIR's folder format, read one split at a time, and written.

A folder holds ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``. Two things go beyond BEIR: an entry may
name an ``image`` (a path relative to the folder), and a split may bring its own candidates as ``corpus/<split>.jsonl``.
Owns the format, what it forbids, and the digest of what was read; embedding is elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twn_kernels.errors import DataError, did_you_mean, quoted

__all__ = ["Entry", "Split", "read_entries", "read_split", "require_split", "split_names", "write_dataset"]

_HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Entry:
    """One document or query.

    Attributes:
        id: unique in its file.
        text, title: either may be empty; the title goes before the text, as in BEIR.
        image: path of an image, or None.
        metadata: whatever else is known; ``class`` names a class of queries, ``thought`` a written chain of thought.
    """

    id: str
    text: str = ""
    title: str = ""
    image: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> dict[str, str]:
        """The entry as an embedder takes it: a dict of ``image`` and ``text``, whichever there are."""
        words = " ".join(filter(None, (self.title.strip(), self.text.strip())))
        return ({} if self.image is None else {"image": self.image}) | ({"text": words} if words else {})


@dataclass(frozen=True)
class Split:
    """What one split ranks.

    Attributes:
        name: of the split.
        queries: those that the split judges and that have a positive, in the order of ``queries.jsonl``.
        documents: every candidate, in the order of the corpus.
        qrels: query id to document id to relevance; above 0 is a positive.
        without_positive: judged queries that were left out because none of their judgments is above 0.
        digest: SHA-256 of the files that were read (media by their bytes), in hexadecimal.
    """

    name: str
    queries: tuple[Entry, ...]
    documents: tuple[Entry, ...]
    qrels: Mapping[str, Mapping[str, int]]
    without_positive: int
    digest: str


def split_names(folder: str | Path) -> list[str]:
    """Names of the splits that ``folder`` has qrels for, sorted.

    Raises:
        DataError: there is no such folder, or it has no qrels.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'data folder "{folder}" does not exist. Name a folder that holds corpus.jsonl and qrels/.')
    names = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    if not names:
        result = (
            f' It holds the result of an evaluation, "{folder / "result.json"}".'
            if (folder / "result.json").is_file()
            else ""
        )
        raise DataError(f'data folder "{folder}" has no splits: expected one or more files qrels/<split>.tsv.{result}')
    return names


def require_split(folder: str | Path, name: str) -> None:
    """Raise DataError where a folder has no split of this name."""
    known = split_names(folder)
    if name not in known:
        raise DataError(f'"{folder}" has no split "{name}"; its splits are {quoted(known)}.{did_you_mean(name, known)}')


def read_split(folder: str | Path, name: str) -> Split:
    """Read one split and check that it is whole.

    Args:
        folder: in BEIR's format.
        name: of a file in ``qrels``.

    Raises:
        DataError: a file or an image is missing, a line is malformed (the message has its number), ids are unknown or
            duplicate, or no query has a positive.
    """
    folder = Path(folder)
    require_split(folder, name)
    own = folder / "corpus" / f"{name}.jsonl"
    corpus_path = own if own.exists() else folder / "corpus.jsonl"
    qrels_path, queries_path = folder / "qrels" / f"{name}.tsv", folder / "queries.jsonl"
    documents, queries = read_entries(corpus_path, folder), read_entries(queries_path, folder)
    document_ids, query_ids = ({entry.id for entry in entries} for entries in (documents, queries))
    qrels: dict[str, dict[str, int]] = {}
    for number, query, document, score in _judgments(qrels_path):
        for word, value, ids, home in (
            ("query", query, query_ids, queries_path),
            ("document", document, document_ids, corpus_path),
        ):
            if value not in ids:
                where = f'"{qrels_path}", line {number}'
                raise DataError(f'{where}: {word} "{value}" is not in "{home.name}".{did_you_mean(value, ids)}')
        if document in qrels.setdefault(query, {}):
            raise DataError(f'"{qrels_path}", line {number}: query "{query}" and document "{document}" come twice.')
        qrels[query][document] = score
    judged = [entry for entry in queries if any(score > 0 for score in qrels.get(entry.id, {}).values())]
    if not qrels:
        raise DataError(f'split "{name}" is empty: "{qrels_path}" holds no judgment.')
    if not judged:
        raise DataError(
            f'split "{name}" has no query with a positive: all {len(qrels)} queries of "{qrels_path}" have only scores '
            "of 0 or less."
        )
    _require_images([*documents, *judged])
    digest = _digest(qrels_path, documents, judged)
    kept = {entry.id: qrels[entry.id] for entry in judged}
    return Split(name, tuple(judged), tuple(documents), kept, len(qrels) - len(judged), digest)


def read_entries(path: str | Path, folder: str | Path) -> list[Entry]:
    """Read documents or queries.

    Args:
        path: a JSONL file of objects with ``_id`` and any of ``title``, ``text``, ``image``, ``metadata``.
        folder: what paths of images are relative to.

    Raises:
        DataError: the file is missing or empty, a line is malformed, or an id comes twice.
    """
    path, folder = Path(path), Path(folder)
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        entry = _entry(line, folder, f'"{path}", line {number}')
        if entry.id in lines:
            raise DataError(f'"{path}", line {number}: _id "{entry.id}" comes twice, first in line {lines[entry.id]}.')
        lines[entry.id] = number
        entries.append(entry)
    if not entries:
        raise DataError(f'"{path}" holds no entries; expected at least one.')
    return entries


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f'"{path}" is not UTF-8 text (byte {error.start}).') from None
    except FileNotFoundError:
        raise DataError(f'"{path}" does not exist. A data folder holds corpus.jsonl, queries.jsonl, qrels/.') from None
    except OSError as error:
        raise DataError(f'"{path}" cannot be read: {error.strerror or error}.') from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _entry(line: str, folder: Path, where: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}.") from None
    if "\\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character. Write it whole.")
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with _id and text or image, got {type(value).__name__}.")
    for name, kind, words in (
        ("_id", str, "a string"),
        ("text", str, "a string"),
        ("title", str, "a string"),
        ("image", str, "a string, the path of an image,"),
        ("metadata", dict, "an object"),
    ):
        got = value.get(name)
        if got is not None and not isinstance(got, kind):
            raise DataError(f"{where}: {name} must be {words} or absent, got {type(got).__name__}.")
    if not value.get("_id"):
        raise DataError(f"{where}: _id is missing or empty; expected a string that is unique in the file.")
    entry = Entry(
        value["_id"],
        value.get("text") or "",
        value.get("title") or "",
        _image(value.get("image"), folder, where),
        value.get("metadata") or {},
    )
    if not entry.input:
        raise DataError(f'{where}: "{entry.id}" is empty; expected text, title or image.')
    return entry


def _image(name: str | None, folder: Path, where: str) -> str | None:
    if not name:
        return None
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "://" in name:
        raise DataError(f'{where}: image must be a path inside the data folder, got "{name}".')
    return str(folder / path)


def _judgments(path: Path) -> Iterator[tuple[int, str, str, int]]:
    for number, line in _lines(path):
        fields = line.split("\t")
        if number == 1 and tuple(word.strip().lower() for word in fields) == _HEADER:
            continue
        try:
            query, document, score = fields
            value = int(score)
        except ValueError:
            shown = line if len(line) <= 80 else line[:77] + "..."
            raise DataError(
                f'"{path}", line {number}: expected query-id, corpus-id and a whole-number score between tabs, got '
                f"{shown!r}."
            ) from None
        yield number, query.strip(), document.strip(), value


def _require_images(entries: Iterable[Entry]) -> None:
    for entry in entries:
        if entry.image is not None and not Path(entry.image).is_file():
            raise DataError(f'the image of "{entry.id}" is missing: "{entry.image}" is no file.')


def _digest(qrels_path: Path, documents: Sequence[Entry], queries: Sequence[Entry]) -> str:
    """What the split's numbers depend on, and no more: other splits of the folder may change."""
    whole = hashlib.sha256(qrels_path.read_bytes())
    for entries in (documents, queries):
        for entry in entries:
            image = "" if entry.image is None else hashlib.sha256(Path(entry.image).read_bytes()).hexdigest()
            own = [entry.id, entry.title, entry.text, image, entry.metadata.get("class")]
            whole.update(json.dumps(own).encode() + b"\n")
    return whole.hexdigest()


def write_dataset(
    folder: str | Path,
    documents: Iterable[Entry],
    queries: Iterable[Entry],
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]],
    *,
    candidates: Mapping[str, Iterable[Entry]] | None = None,
) -> Path:
    """Write a folder that :func:`read_split` reads. Images must lie in the folder already.

    Args:
        folder: made when missing.
        documents: of ``corpus.jsonl``.
        queries: of all splits.
        qrels: split to query id to document id to relevance.
        candidates: documents of the splits that have their own.

    Returns:
        The folder.

    Raises:
        DataError: an image lies outside of the folder, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        _write_entries(folder / "corpus.jsonl", documents, folder)
        _write_entries(folder / "queries.jsonl", queries, folder)
        for name, entries in (candidates or {}).items():
            (folder / "corpus").mkdir(exist_ok=True)
            _write_entries(folder / "corpus" / f"{name}.jsonl", entries, folder)
        for name, judgments in qrels.items():
            rows = [_HEADER, *((q, d, str(score)) for q, of in judgments.items() for d, score in of.items())]
            _write(folder / "qrels" / f"{name}.tsv", ["\t".join(row) for row in rows])
    except OSError as error:
        raise DataError(f'data folder "{folder}" cannot be written: {error.strerror or error}.') from error
    return folder


def _write_entries(path: Path, entries: Iterable[Entry], folder: Path) -> None:
    lines = []
    for entry in entries:
        value: dict[str, Any] = {"_id": entry.id, "title": entry.title, "text": entry.text}
        if entry.image is not None:
            try:
                value["image"] = Path(entry.image).relative_to(folder).as_posix()
            except ValueError:
                raise DataError(
                    f'the image of "{entry.id}" must lie in the data folder "{folder}", got "{entry.image}".'
                ) from None
        if entry.metadata:
            value["metadata"] = dict(entry.metadata)
        lines.append(json.dumps(value, ensure_ascii=False))
    _write(path, lines)


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
