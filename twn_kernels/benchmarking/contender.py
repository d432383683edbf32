"""What a contender is: a name and a way to build its calls for one problem, or a sentence that says why it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Built", "Contender", "Unavailable"]


class Unavailable(Exception):
    """A contender does not exist for this case or on this machine; the message is the sentence that says why."""


@dataclass
class Built:
    """A contender for one problem.

    Attributes:
        calls: one for each set of inputs; each does the whole case and returns the results by name (``y``, and after
            a backward pass ``dx``, ``dA0.1`` for the A of adapter 0 on projection 1, and so on).
        impl: which implementation of this package serves it; None for what is not this package.
        memory_added_bytes: held beyond the base weights, for one set of inputs.
    """

    calls: list[Callable[[], Mapping[str, Tensor]]]
    impl: str | None = None
    memory_added_bytes: int | None = None


@dataclass(frozen=True)
class Contender:
    """One way to do a case.

    Attributes:
        name: as it stands in results.
        build: problem to :class:`Built`; raises :class:`Unavailable`.
        is_baseline: what a user would run instead of this package.
        base_only: computes the base alone, and is held to the base's truth.
        graph: whether it is timed in a CUDA graph (:data:`~twn_kernels.benchmarking.timers.GRAPH_MODES`); None: as the
            case's pass says.
        passes: those that it belongs to; None: all.
    """

    name: str
    build: Callable[[Any], Built]
    is_baseline: bool = True
    base_only: bool = False
    graph: str | None = None
    passes: tuple[str, ...] | None = None
