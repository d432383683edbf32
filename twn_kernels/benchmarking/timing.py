"""Wall-clock comparison of functions that do the same work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Timing", "compare"]


class Timing(NamedTuple):
    """Milliseconds of one function over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def compare(functions: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Time every function once a round, in an order that rotates, so that drift of the machine meets all alike.

    Args:
        functions: name to a function without arguments. A CUDA device is synchronised around each call.
        rounds: how many times each is timed.
        warmup: untimed calls of each beforehand.

    Returns:
        name to :class:`Timing`, in the order given.
    """
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            functions[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            _wait()
            start = time.perf_counter()
            functions[name]()
            _wait()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))
