"""What a gate learns from, collected: every query embedded plainly and with the thought that the model itself writes.

Owns both passes over the queries and the file that keeps what they gave; an interrupted pass goes on where it stopped.
What counts as an improvement is :mod:`twn_kernels.training.gate_labels`'.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twn_kernels.evaluation.dataset import Entry
from twn_kernels.evaluation.embedding import encode_entries, errors_naming
from twn_kernels.ops import pool_queries
from twn_kernels.patching.record import find_record
from twn_kernels.pipeline import TWNEmbedder
from twn_kernels.training.examples import Examples
from twn_kernels.training.gate_labels import GateLabels

__all__ = ["GATE_FIELDS", "LABELS_FILE", "THOUGHTS_FILE", "Collected", "collect", "write_thoughts"]

LABELS_FILE = "labels.safetensors"
THOUGHTS_FILE = "labels.jsonl"
GATE_FIELDS = ("gate_input", "gate_activation", "think_threshold")  # of the method; no vector depends on them

_PART_FILE = "thinking.safetensors"  # of a pass that is under way
_MOST_DOCUMENTS = 10_000  # bounds the time that a large corpus takes to embed; only negatives are left out
_DIGESTS = "sha256"
_BATCHES = 8  # between two lines of progress, and as many as a pass that is stopped may lose


@dataclass(frozen=True)
class Collected:
    """What both passes over the queries gave, in the order of the examples.

    Attributes:
        ids: of the queries.
        query_states: ``[queries, num_queries, hidden]``, of the plain pass, in the model's dtype.
        prompt_states: ``[queries, hidden]``, of the last prompt token.
        plain, thoughtful: fp32 unit vectors ``[queries, hidden]``, equal where the thought was not closed. ``plain`` is
            pooled from ``query_states``.
        documents: fp32 unit vectors ``[documents, hidden]``, embedded plainly.
        positives: bool ``[queries, documents]``.
        thoughts: of each query ``thought``, ``tokens`` and ``fallback`` (why the thought was not closed, or None).
        source: digest of everything that this depends on.
    """

    ids: list[str]
    query_states: Tensor
    prompt_states: Tensor
    plain: Tensor
    thoughtful: Tensor
    documents: Tensor
    positives: Tensor
    thoughts: list[dict[str, Any]]
    source: str


def collect(
    embedder: TWNEmbedder,
    examples: Examples,
    out: Path,
    batch_size: int,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Collected:
    """Embed the queries both ways and the documents plainly, or read what an earlier call wrote.

    What was collected is kept in ``labels.safetensors`` with a digest of all weights, of the method, the prompts and
    the inputs. Where the digest differs, or the file is damaged, everything is collected again.

    Args:
        embedder: writes the thoughts; prompts named ``"query"`` and ``"document"`` are used.
        examples: their queries; of their documents all positives and others, drawn by ``seed`` where there are more
            than ten thousand.
        out: folder of the file.
        batch_size: inputs that run together.
        seed: of the draw of documents.
        say: receives lines of progress.

    Raises:
        InputError: a query or a document cannot be embedded; the message names it.
    """
    places = range(len(examples))
    relevant = [examples.example(place, random.Random(0)).relevant for place in places]
    documents = _candidates(examples, relevant, seed)
    source = _source(embedder, examples.queries, documents, batch_size)
    kept = _read(out / LABELS_FILE, source, say)
    if kept is None:
        part = _Part(out / _PART_FILE, source, say)
        kept = _embedded(embedder, examples.queries, documents, batch_size, part, say)
        _write(out / LABELS_FILE, kept, source)
    (out / _PART_FILE).unlink(missing_ok=True)
    thoughts = _unpacked(kept.pop("thoughts"))
    place_of = {entry.id: place for place, entry in enumerate(documents)}
    positives = torch.zeros(len(examples), len(documents), dtype=torch.bool)
    for row, names in enumerate(relevant):
        positives[row, [place_of[name] for name in names]] = True
    return Collected(
        ids=[query.id for query in examples.queries], positives=positives, thoughts=thoughts, source=source, **kept
    )


def _candidates(examples: Examples, relevant: Sequence[Iterable[str]], seed: int) -> list[Entry]:
    needed = {name for names in relevant for name in names}
    others = [name for name in examples.documents if name not in needed]
    room = max(0, _MOST_DOCUMENTS - len(needed))
    if len(others) > room:
        others = random.Random(f"gate documents {seed}").sample(others, room)
    needed.update(others)
    return [entry for name, entry in examples.documents.items() if name in needed]


class _Part:
    """The thoughtful pass, as far as it has come.

    Attributes:
        vectors: fp32 ``[queries done, hidden]``; None before the first.
        told: of each ``thought``, ``tokens`` and ``fallback``.
    """

    def __init__(self, path: Path, source: str, say: Callable[[str], None]) -> None:
        self.path, self.source = path, source
        kept = _read(path, source, say) or {}
        self.vectors: Tensor | None = kept.get("vectors")
        self.told: list[dict[str, Any]] = _unpacked(kept["thoughts"]) if kept else []

    def add(self, vectors: Tensor, told: Sequence[dict[str, Any]]) -> None:
        """Keep what one more step gave."""
        self.vectors = vectors if self.vectors is None else torch.cat([self.vectors, vectors])
        self.told += told
        _write(self.path, {"vectors": self.vectors, "thoughts": _packed(self.told)}, self.source)


def _embedded(
    embedder: TWNEmbedder, queries: Sequence[Entry], documents: Sequence[Entry], batch_size: int, part: _Part, say
) -> dict[str, Tensor]:
    """Everything of :class:`Collected` that takes long, as tensors; ``thoughts`` are the bytes of their JSON."""
    # What may be refused comes first: thoughts take longest by far.
    with errors_naming(queries, "query"):
        query_states, prompt_states = embedder.gate_states(
            [query.input for query in queries], prompt=embedder.prompts.get("query"), batch_size=batch_size
        )
    plain = pool_queries(query_states, pooling=embedder.config.pooling, normalize=True).float()
    say(f"gate: embedding {len(documents)} documents")
    document_vectors = encode_entries(embedder, documents, "document", think="never", batch_size=batch_size)[0]
    step = _BATCHES * batch_size
    for start in range(len(part.told), len(queries), step):
        say(f"gate: thinking, {start} of {len(queries)} queries done")
        own = queries[start : start + step]
        vectors, details = encode_entries(embedder, own, "query", think="always", batch_size=batch_size)[:2]
        told = [{"thought": of.text, "tokens": of.tokens, "fallback": of.fallback} for of in details]
        part.add(torch.from_numpy(vectors).float(), told)
    closed = torch.tensor([told["fallback"] is None for told in part.told])
    return {
        "query_states": query_states,
        "prompt_states": prompt_states,
        "plain": plain,
        "thoughtful": torch.where(closed[:, None], part.vectors, plain),
        "documents": torch.from_numpy(document_vectors).float(),
        "thoughts": _packed(part.told),
    }


def _packed(told: Sequence[dict[str, Any]]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)


def _unpacked(thoughts: Tensor) -> list[dict[str, Any]]:
    return json.loads(thoughts.numpy().tobytes())


def write_thoughts(out: Path, collected: Collected, labels: GateLabels, held_out: Iterable[int]) -> None:
    """Write ``labels.jsonl``, for people: one line a query with id, label, both scores, thought, and whether it is held
    out of training."""
    held, rows = set(held_out), []
    for place, (name, thought) in enumerate(zip(collected.ids, collected.thoughts, strict=True)):
        label, plain, thoughtful = (values[place].item() for values in labels)
        row = {"id": name, "label": int(label), "plain_score": plain, "thoughtful_score": thoughtful}
        rows.append(json.dumps(row | thought | {"held_out": place in held}, ensure_ascii=False) + "\n")
    _replace(out / THOUGHTS_FILE, lambda path: path.write_text("".join(rows), encoding="utf-8", newline="\n"))


def _source(embedder: TWNEmbedder, queries: Sequence[Entry], documents: Sequence[Entry], batch_size: int) -> str:
    """Digest of all that the vectors and the states depend on."""
    whole = hashlib.sha256()
    for name, tensor in sorted(embedder.model.state_dict().items()):
        _update(whole, name, tensor)
    _update(whole, "queries", embedder.checkpoint.queries)
    record = find_record(embedder.model)
    scalings = (
        {} if record is None else {name: repr(getattr(layer, "scaling", None)) for name, layer in record.layers.items()}
    )
    method = {name: value for name, value in embedder.config.values().items() if name not in GATE_FIELDS}
    told = [scalings, method, embedder.prompts, embedder.seed, batch_size]
    whole.update(json.dumps(told, sort_keys=True).encode())
    for entry in (*queries, None, *documents):
        media = entry is not None and entry.image is not None and Path(entry.image).is_file()
        image = hashlib.sha256(Path(entry.image).read_bytes()).hexdigest() if media else ""
        whole.update(json.dumps(None if entry is None else [entry.id, entry.title, entry.text, image]).encode())
    return whole.hexdigest()


def _update(whole: Any, name: str, tensor: Tensor) -> None:
    whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _content(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _update(whole, name, tensor)
    return whole.hexdigest()


def _read(path: Path, source: str, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """What :func:`_write` wrote for this source; None where there is nothing, or nothing that may be used."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(_DIGESTS, "{}"))
            # Copies lie in memory as the tensors did when they were collected, so that sums give the same bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if told.get("source") != source:
            say(f"gate: {path.name} is of other weights, another method or other inputs; collecting again")
            return None
        if told.get("content") == _content(tensors):
            return tensors
    except (SafetensorError, OSError, ValueError):
        pass  # the same as a digest that is wrong
    say(f"gate: {path.name} is damaged; collecting again")
    return None


def _write(path: Path, tensors: dict[str, Tensor], source: str) -> None:
    told = {_DIGESTS: json.dumps({"source": source, "content": _content(tensors)})}
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda staged: save_file(held, staged, metadata=told))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file elsewhere, then move it into place: a run that is stopped leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    write(staged)
    os.replace(staged, path)
