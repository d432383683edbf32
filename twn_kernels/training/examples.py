"""Examples to train on, from a data folder in BEIR's format, in an order that a seed alone decides.

A query brings its positives by the folder's qrels and, in ``metadata.thought``, the thought that ``reasoning`` learns
to write. Owns the order: which example comes when does not depend on anything that happened before, so a run that was
stopped goes on with the very batch that would have come next.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from twn_kernels.errors import DataError
from twn_kernels.evaluation.dataset import Entry, read_split
from twn_kernels.pipeline.processor import Processor

__all__ = ["Example", "Examples", "Stream", "read_examples", "require_writable"]


class Example(NamedTuple):
    """A query, one of its positives, and what is relevant to it.

    Attributes:
        query, document: entries of the data folder.
        relevant: ids of every positive of the query.
    """

    query: Entry
    document: Entry
    relevant: frozenset[str]

    @property
    def thought(self) -> str:
        """The thought of the query; empty where the data has none."""
        return self.query.metadata.get("thought") or ""


class Examples:
    """The training queries of a folder, by place.

    Args:
        queries: in the folder's order.
        documents: by id.
        relevant: query id to ids of its positives.
        digest: of all that was read, thoughts included; None where it was not read.
    """

    def __init__(
        self,
        queries: Sequence[Entry],
        documents: dict[str, Entry],
        relevant: dict[str, list[str]],
        digest: str | None = None,
    ) -> None:
        self.queries, self.documents, self.digest = list(queries), documents, digest
        self._positives = relevant

    def __len__(self) -> int:
        return len(self.queries)

    def example(self, place: int, choose: random.Random) -> Example:
        """The query at ``place`` with a positive that ``choose`` picks."""
        query = self.queries[place]
        positives = self._positives[query.id]
        return Example(query, self.documents[choose.choice(positives)], frozenset(positives))

    def divided(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """Two disjoint parts, the second with ``share`` of the queries, drawn by ``seed``."""
        places = list(range(len(self)))
        random.Random(f"divided {seed}").shuffle(places)
        border = len(places) - round(len(places) * share)
        parts = (sorted(places[:border]), sorted(places[border:]))
        return tuple(Examples([self.queries[i] for i in part], self.documents, self._positives) for part in parts)


class Stream:
    """Examples without end: each pass over the queries in another order, positives drawn anew.

    Args:
        examples: what is drawn from.
        count: the length that a trainer sees.
        seed: of order and positives.

    Raises:
        DataError: there is nothing to draw from.
    """

    def __init__(self, examples: Examples, count: int, seed: int) -> None:
        if not len(examples):
            raise DataError("a stream of examples needs at least one example to draw from, got none.")
        self.examples, self.count, self.seed = examples, count, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be from 0 to {self.count - 1}, got {index}.")
        turn, place = divmod(index, len(self.examples))
        if self._order[0] != turn:
            order = list(range(len(self.examples)))
            random.Random(f"stream {self.seed}: {turn}").shuffle(order)
            self._order = (turn, order)
        return self.examples.example(self._order[1][place], random.Random(f"example {self.seed}: {index}"))


def require_writable(query: Entry, processor: Processor, stops: Sequence[str | int]) -> list[int]:
    """Token ids of a query's thought, which the model could write at inference; empty where it has none.

    Args:
        query: with or without a thought.
        processor: the model's.
        stops: what ends a thought: strings and token ids.

    Raises:
        DataError: the thought holds a placeholder of an image or a video, or something that ends a thought.
    """
    thought = query.metadata.get("thought") or ""
    ids = processor.token_ids(thought)
    placeholder = processor.placeholder_in(thought)
    if placeholder is not None:
        what = f'"{placeholder}", which stands for pixels in this model'
    else:
        inside = [s for s in stops if (s in thought if isinstance(s, str) else s in ids)]
        if not inside:
            return ids
        shown = inside[0] if isinstance(inside[0], str) else processor.raw_text_of([inside[0]])
        what = f'"{shown}", which ends a thought'
    raise DataError(f'query "{query.id}": metadata.thought holds {what}. Remove it.')


def read_examples(folder: str | Path, split: str = "train", *, taught: bool = True) -> Examples:
    """The queries of a split, its documents and judgments.

    Args:
        folder: in BEIR's format.
        split: of the folder.
        taught: thoughts are learned from these queries, so that one at least must have one.

    Raises:
        DataError: the folder is not whole, a thought is no string, no query of the split has one to learn, or all
            queries have the same positives.
    """
    found = read_split(folder, split)
    for query in found.queries:
        thought = query.metadata.get("thought")
        if thought is not None and not isinstance(thought, str):
            raise DataError(
                f'query "{query.id}" of "{folder}": metadata.thought must be a string or absent, got '
                f"{type(thought).__name__}. Write the thought as text."
            )
    if taught and not any(query.metadata.get("thought") for query in found.queries):
        raise DataError(
            f'split "{split}" of "{folder}" has no thought to learn: no query has metadata.thought. '
            "Write the thoughts there as strings, or train on a folder that has them."
        )
    relevant = {
        query.id: sorted(name for name, score in found.qrels[query.id].items() if score > 0) for query in found.queries
    }
    if len({tuple(names) for names in relevant.values()}) < 2:
        raise DataError(
            f'every query of split "{split}" of "{folder}" has the same positives, so that there is nothing to tell '
            "apart. Add queries that seek other documents."
        )
    thoughts = json.dumps([query.metadata.get("thought") for query in found.queries])
    digest = hashlib.sha256(f"{found.digest} {thoughts}".encode()).hexdigest()
    return Examples(found.queries, {document.id: document for document in found.documents}, relevant, digest)
