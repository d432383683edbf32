"""CUDA graphs of one function, kept by the shape they were captured for, and what happens where capture fails."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from twn_kernels.errors import ImplUnavailable, TWNWarning

__all__ = ["CapturedSteps"]

_KEPT = 64  # graphs of other shapes; the oldest goes first


class CapturedSteps:
    """Runs a step, from its graph where it can be captured.

    A step reads and writes tensors of fixed address and leaves nothing behind in the graphs' memory, so all graphs
    share one pool and may be replayed in any order.

    Args:
        active: whether to capture; otherwise every step runs eagerly.
        demanded: raise where capture fails, instead of running eagerly from then on.
        failure: why nothing is captured, where ``active`` is False.

    Attributes:
        active, failure: as given; a failed capture turns off the one and fills in the other.
    """

    def __init__(self, active: bool, *, demanded: bool = False, failure: str | None = None) -> None:
        self.active, self.failure, self._demanded = active, failure, demanded
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = self._stream = None

    @property
    def keys(self) -> list:
        """Of the graphs held now, oldest first."""
        return list(self._graphs)

    def forget(self) -> None:
        """Drop all graphs."""
        if self._graphs and self._stream is not None:
            torch.cuda.synchronize(self._stream.device)  # a replay may be running still
        self._graphs.clear()
        self._pool = self._stream = None

    def run(self, key: Hashable, step: Callable[[], None], counters: Sequence[Tensor]) -> None:
        """Run ``step`` once.

        Args:
            key: of everything about the step that its tensors do not say.
            step: reads and writes tensors of fixed address alone.
            counters: tensors that the step advances; warming up leaves them as they were.

        Raises:
            ImplUnavailable: capture was demanded and failed.
        """
        if self.active and key not in self._graphs:
            self._add(key, step, counters)
        if self.active:
            self._graphs[key].replay()
        else:
            step()

    def _add(self, key: Hashable, step: Callable[[], None], counters: Sequence[Tensor]) -> None:
        try:
            graph = self.capture(step, counters)
        except (RuntimeError, ValueError) as error:  # what a forward may raise when it touches the host
            cause = error.__context__ or error  # ending the broken capture fails too, and says less
            line = (str(cause).strip().splitlines() or ["no message"])[0]
            self.give_up(f"capturing a step failed: {line.rstrip('.')}.", error)
            return
        if len(self._graphs) >= _KEPT:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph

    def give_up(self, reason: str, error: Exception | None = None) -> None:
        """Run eagerly from now on, and say why.

        Args:
            reason: a sentence.
            error: what it comes from, where it was one.

        Raises:
            ImplUnavailable: capture was demanded.
        """
        if self._demanded:
            fix = 'Decode without a graph: capture=None, or decode="static" in the embedder.'
            raise ImplUnavailable(f"{reason} {fix}") from error
        self.forget()
        self.active, self.failure = False, reason
        warnings.warn(f"{reason} Decode steps run eagerly from here on.", TWNWarning, stacklevel=6)

    def capture(self, step: Callable[[], None], counters: Sequence[Tensor]):
        """The step's graph, captured and not yet run."""
        with torch.cuda.device(counters[0].device):
            if self._pool is None:
                # A stream of its own: torch's default one belongs to the device that first captured anything.
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            _warm_up(step, counters, self._stream)
            graph = torch.cuda.CUDAGraph()
            gc.collect()  # a graph or event that the collector frees during capture would break it
            # Other threads (data loading) may go on using the device meanwhile.
            options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **options):
                step()
        return graph


def _warm_up(step: Callable[[], None], counters: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
    """Run the step twice on the stream that will capture it, so that a capture compiles, tunes and sets up nothing."""
    before = [counter.clone() for counter in counters]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            for counter, value in zip(counters, before, strict=True):
                counter.copy_(value)
    torch.cuda.current_stream().wait_stream(stream)
