"""What a gate learns from: what it reads of each query, and whether thinking improved that query's own retrieval.

Owns both passes over the queries, with thoughts that the model itself writes as at inference, the file that keeps what
they gave, and the labels. Nothing here knows how the gate learns.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twn_kernels.errors import DataError, OptionError
from twn_kernels.evaluation.dataset import Entry
from twn_kernels.evaluation.embedding import encode_entries
from twn_kernels.ops import pool_queries
from twn_kernels.patching.record import find_record
from twn_kernels.pipeline import TWNEmbedder
from twn_kernels.training.examples import Examples

__all__ = [
    "LABELS_FILE",
    "THOUGHTS_FILE",
    "Collected",
    "GateLabels",
    "collect",
    "gate_labels",
    "ndcg",
    "priced_margin",
    "priced_threshold",
    "write_thoughts",
]

LABELS_FILE = "labels.safetensors"
THOUGHTS_FILE = "labels.jsonl"

_MOST_DOCUMENTS = 10_000  # bounds the time that a large corpus takes to embed; only negatives are left out
_ROWS = 512  # queries scored at once, so that their similarities to 10,000 documents take 40 MB
_DIGESTS = "sha256"
_BATCHES = 8  # between two lines of progress
_GATE_FIELDS = ("gate_input", "gate_activation", "think_threshold")  # of the configuration; no vector depends on them


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


class GateLabels(NamedTuple):
    """Labels of queries and the scores behind them.

    Attributes:
        labels: bool ``[queries]``: thinking improved the score by more than the margin.
        plain_scores, thoughtful_scores: fp64 ``[queries]``.
    """

    labels: Tensor
    plain_scores: Tensor
    thoughtful_scores: Tensor


def gate_labels(
    plain: Tensor, thoughtful: Tensor, documents: Tensor, positives: Tensor, temperature: float, margin: float
) -> GateLabels:
    """Label the queries that thinking improved.

    A query's score is the log probability of a positive among that positive and all documents that are none, so other
    positives are masked; the mean over its positives where it has several.

    Args:
        plain, thoughtful: unit vectors ``[queries, width]``. Where a thought was not closed they are the same, hence
            the label is 0.
        documents: unit vectors ``[documents, width]``.
        positives: bool ``[queries, documents]``: which documents are relevant to which query; one or more to each.
        temperature: of the softmax, above 0.
        margin: at least 0.

    Raises:
        OptionError: ``temperature`` or ``margin`` is out of range.
        DataError: a query has no positive.
    """
    if not 0 < temperature < float("inf"):
        raise OptionError(f"temperature must be above 0, got {temperature!r}.")
    if not 0 <= margin < float("inf"):
        raise OptionError(f"margin must be at least 0, got {margin!r}.")
    without = (~positives.any(dim=1)).nonzero()[:, 0].tolist()
    if without:
        raise DataError(
            f"{len(without)} of {len(positives)} queries have no positive among the documents, the first is at place "
            f"{without[0]}. Give every query at least one positive."
        )
    scores = [_scores(vectors, documents, positives, temperature) for vectors in (plain, thoughtful)]
    return GateLabels(scores[1] - scores[0] > margin, *scores)


def priced_margin(gains: Tensor, plain: Tensor, thoughtful: Tensor, price: float) -> float:
    """The margin that pays best when a thought costs a price.

    Thinking exactly where the gain is above a margin retrieves with some mean quality and writes some number of
    thoughts. The margin returned has the highest mean quality less ``price`` a thought; of equally good ones the
    largest, which thinks least.

    Args:
        gains: of the score by thinking, ``[queries]``.
        plain, thoughtful: quality of retrieval without and with a thought, ``[queries]``, as :func:`ndcg` gives it.
        price: the quality that a thought must bring on average, at least 0.

    Raises:
        OptionError: ``price`` is out of range.

    >>> priced_margin(torch.tensor([5.0, 0.5, -1.0]), torch.tensor([0.1, 1, 1]), torch.tensor([1.0, 1, 1]), 0.02)
    0.5
    """
    if not 0 <= price < float("inf"):
        raise OptionError(f"price must be at least 0, got {price!r}.")
    ordered, places = gains.double().sort()
    # What it brings not to think, summed from the query that gains least by thinking.
    saved = (plain.double() - thoughtful.double() + price)[places].cumsum(0)
    last = torch.ones(len(ordered), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]  # equal gains fall on one side of any margin
    allowed = last & (ordered > 0)
    at_zero = saved[ordered <= 0][-1].item() if (ordered <= 0).any() else 0.0
    if not allowed.any() or saved[allowed].max() < at_zero:
        return 0.0
    best = saved[allowed].max()
    return ordered[allowed][saved[allowed] == best][-1].item()


def priced_threshold(scores: Tensor, plain: Tensor, thoughtful: Tensor, price: float) -> float:
    """The threshold of a gate's scores that pays best when a thought costs a price; arguments as above.

    A thought that is missing costs far more than one too many, so that the best threshold is rarely a half. It lies
    halfway between two scores; of equally good ones it is the highest.
    """
    ordered, places = scores.double().sort()
    saved = (plain.double() - thoughtful.double() + price)[places].cumsum(0)
    saved = torch.cat([saved.new_zeros(1), saved])
    edges = torch.cat([ordered.new_zeros(1), (ordered[:-1] + ordered[1:]) / 2, ordered.new_ones(1)])
    allowed = torch.ones(len(edges), dtype=torch.bool)
    allowed[1:-1] = ordered[:-1] != ordered[1:]
    return edges[allowed][saved[allowed] == saved[allowed].max()][-1].item()


def ndcg(queries: Tensor, documents: Tensor, positives: Tensor, cutoff: int = 10) -> Tensor:
    """fp64 ``[queries]``: nDCG at a cutoff, all positives worth the same; other arguments as in :func:`gate_labels`."""
    places = min(cutoff, len(documents))
    discounts = 1.0 / torch.arange(2, places + 2, dtype=torch.float64, device=queries.device).log2()
    found = [queries.new_empty(0, dtype=torch.float64)]
    for start in range(0, len(queries), _ROWS):
        own = positives[start : start + _ROWS].double()
        nearest = (queries[start : start + _ROWS].double() @ documents.double().T).topk(places, dim=1).indices
        ideal = discounts.cumsum(0)[own.sum(dim=1).long().clamp(1, places) - 1]
        found.append((own.gather(1, nearest) * discounts).sum(dim=1) / ideal)
    return torch.cat(found)


def _scores(queries: Tensor, documents: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """fp64 ``[queries]``; arguments as in :func:`gate_labels`."""
    found, columns = [queries.new_empty(0, dtype=torch.float64)], documents.double().T
    for start in range(0, len(queries), _ROWS):
        own = positives[start : start + _ROWS]
        similarities = queries[start : start + _ROWS].double() @ columns / temperature
        negatives = similarities.masked_fill(own, -torch.inf).logsumexp(dim=1, keepdim=True)
        # exp(s) / (exp(s) + sum over negatives) is the sigmoid of the difference; 1 where there are no negatives.
        found.append(F.logsigmoid(similarities - negatives).masked_fill(~own, 0.0).sum(dim=1) / own.sum(dim=1))
    return torch.cat(found)


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
        kept = _embedded(embedder, examples.queries, documents, batch_size, say)
        _write(out / LABELS_FILE, kept, source)
    thoughts = json.loads(kept.pop("thoughts").numpy().tobytes())
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


def _embedded(
    embedder: TWNEmbedder, queries: Sequence[Entry], documents: Sequence[Entry], batch_size: int, say
) -> dict[str, Tensor]:
    """Everything of :class:`Collected` that takes long, as tensors; ``thoughts`` are the bytes of their JSON."""
    say(f"gate: embedding {len(documents)} documents")
    document_vectors = encode_entries(embedder, documents, "document", think="never", batch_size=batch_size)[0]
    vectors, details, step = [], [], _BATCHES * batch_size
    for start in range(0, len(queries), step):
        say(f"gate: thinking, {start} of {len(queries)} queries done")
        part = encode_entries(embedder, queries[start : start + step], "query", think="always", batch_size=batch_size)
        vectors.append(torch.from_numpy(part[0]).float())
        details += part[1]
    query_states, prompt_states = embedder.gate_states(
        [query.input for query in queries], prompt=embedder.prompts.get("query"), batch_size=batch_size
    )
    plain = pool_queries(query_states, pooling=embedder.config.pooling, normalize=True).float()
    closed = torch.tensor([detail.thought for detail in details])
    told = [{"thought": detail.text, "tokens": detail.tokens, "fallback": detail.fallback} for detail in details]
    return {
        "query_states": query_states,
        "prompt_states": prompt_states,
        "plain": plain,
        "thoughtful": torch.where(closed[:, None], torch.cat(vectors), plain),
        "documents": torch.from_numpy(document_vectors).float(),
        "thoughts": torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8),
    }


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
    method = {name: value for name, value in embedder.config.values().items() if name not in _GATE_FIELDS}
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
