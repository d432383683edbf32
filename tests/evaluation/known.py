"""An embedder whose vectors, gate scores and thoughts the test writes down, and small data for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from twn_kernels.errors import InputError
from twn_kernels.evaluation import Entry, write_dataset
from twn_kernels.pipeline.options import EncodeDetails

TOKENS = 5


class KnownEmbedder:
    """Takes each vector from a table by text.

    Args:
        plain, thoughtful: text to vector; where a text has no thoughtful one, its thought is not closed.
        scores: text to gate score; None: there is no gate.
    """

    config = None

    def __init__(self, plain: dict, thoughtful: dict, scores: dict | None) -> None:
        self.plain, self.thoughtful, self.scores = plain, thoughtful, scores
        self.calls: list[tuple[str, str, int]] = []

    def encode_query(self, inputs, **options):
        return self._encode("query", inputs, **options)

    def encode_document(self, inputs, **options):
        return self._encode("document", inputs, **options)

    def _encode(self, role, inputs, *, think, return_details, think_threshold=None, **options):
        self.calls.append((role, think, len(inputs)))
        vectors, details = [], []
        for index, value in enumerate(inputs):
            text = value["text"]
            if text == "unreadable":
                raise InputError(f"input {index}: it cannot be read.")
            score = None if self.scores is None else self.scores[text]
            thinks = think == "always" or (think == "auto" and score >= think_threshold)
            closed = thinks and text in self.thoughtful
            vectors.append((self.thoughtful if closed else self.plain)[text])
            fallback = "the thought was not closed" if thinks and not closed else None
            details.append(EncodeDetails(score, closed, tokens=TOKENS * thinks, fallback=fallback))
        return np.array(vectors, dtype=np.float32), details


def axis(index: int, width: int = 4) -> list[float]:
    return [float(place == index) for place in range(width)]


def near(index: int, other: int, width: int = 4) -> list[float]:
    """Mostly along one axis, a little along another."""
    vector = np.array(axis(index, width)) * 0.8 + np.array(axis(other, width)) * 0.6
    return vector.tolist()


def write_four(folder: Path) -> tuple[Path, KnownEmbedder]:
    """Four documents on four axes and four queries, one for each thing that a thought can do.

    ``gains`` and ``loses`` swap right and wrong by thinking; ``same`` is right both ways; ``breaks`` never closes its
    thought and stays wrong. The gate sends ``gains`` and ``breaks`` to think at a threshold of 0.5.
    """
    documents = [Entry(f"d{place}", f"document {place}") for place in range(4)]
    names = ("gains", "loses", "same", "breaks")
    kinds = {"gains": "hard", "loses": "easy", "same": "easy", "breaks": "hard"}
    queries = [Entry(f"q-{name}", name, metadata={"class": kinds[name]}) for name in names]
    qrels = {f"q-{name}": {f"d{place}": 1} for place, name in enumerate(names)}
    write_dataset(folder, documents, queries, {"test": qrels})
    vectors = {f"document {place}": axis(place) for place in range(4)}
    plain = {"gains": near(1, 0), "loses": axis(1), "same": axis(2), "breaks": near(0, 3)}
    thoughtful = {"gains": axis(0), "loses": near(0, 1), "same": axis(2)}
    scores = {"gains": 0.9, "loses": 0.2, "same": 0.1, "breaks": 0.7, **dict.fromkeys(vectors, 0.0)}
    return folder, KnownEmbedder(vectors | plain, thoughtful, scores)
