"""What the embedder gives for inputs, query states and thought ids included, which ``encode`` keeps to itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Ran(NamedTuple):
    """Of one call in one batch: the vectors of ``encode``, the query states that they were pooled from, and the ids of
    each closed thought (empty where there is none)."""

    vectors: Tensor
    states: Tensor
    thoughts: list[list[int]]


def ran(embedder, inputs: list, think: str, threshold: float | None = None) -> Ran:
    """Encode ``inputs`` as one batch."""
    results, run = [], embedder._run

    def recorded(*args):
        results.append(run(*args))
        return results[-1]

    embedder._run = recorded
    try:
        vectors = embedder.encode(
            inputs, think=think, think_threshold=threshold, batch_size=len(inputs), convert_to_tensor=True
        )
    finally:
        del embedder._run
    (result,) = results
    closed = {place: thought.ids for place, thought in result.thoughts.items() if thought.broken is None}
    return Ran(vectors, result.states, [closed.get(place, []) for place in range(len(inputs))])


def rows_of(embedder, inputs: list, thoughts: list[list[int]] | None):
    """The same inputs as rows of a trainee."""
    from twn_kernels.training.sequences import Rows

    processor = embedder.processor
    batch = processor.batch([processor.parse(value, index) for index, value in enumerate(inputs)])
    return Rows(batch, thoughts)
