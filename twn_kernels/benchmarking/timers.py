"""Timing calls on a device: CUDA events and graphs on a GPU, the wall clock on a CPU, behind one interface.

A contender is a list of calls that do the same work on different tensors. One sample runs the whole list, so that no
call finds its data in the cache; contenders take turns, in an order that rotates, so that drift meets all alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from twn_kernels.benchmarking.results import Time
from twn_kernels.modules.packing import steady_shadows

__all__ = ["GRAPH_MODES", "CannotCapture", "SampleFailed", "Timed", "Timer", "interleave", "summary"]

GRAPH_MODES = ("always", "where_possible", "never")

Call = Callable[[], object]
_WARMUP = 3
_SAMPLE_US = 200.0  # a graph repeats its calls until a sample takes at least this: events resolve half a microsecond


class CannotCapture(Exception):
    """A contender does something that a CUDA graph cannot hold; the message says what."""


class SampleFailed(Exception):
    """A contender raised while it was sampled."""

    def __init__(self, name: str, error: RuntimeError) -> None:
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


@dataclass
class Timed:
    """A contender made ready to be sampled.

    Attributes:
        run: runs all calls of one sample.
        calls: how many calls one sample makes.
        in_graph: whether ``run`` replays a CUDA graph.
    """

    run: Call
    calls: int
    in_graph: bool


class Timer:
    """The clock of one device.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"

    def prepare(self, calls: Sequence[Call], graph: str) -> Timed:
        """Warm a contender up and, on a GPU, capture it.

        Args:
            calls: equal work on different tensors.
            graph: ``always``, ``where_possible`` (else eager) or ``never``. A CPU has no graphs.

        Raises:
            CannotCapture: ``always`` was asked for and a call cannot be captured.
        """
        for _ in range(_WARMUP if self.on_gpu else 1):
            for call in calls:
                call()
        self.wait()
        if self.on_gpu and graph != "never":
            try:
                return self._captured(calls)
            except CannotCapture:
                if graph == "always":
                    raise
        return Timed(lambda: [call() for call in calls] and None, len(calls), False)

    def sample_us(self, timed: Timed) -> float:
        """Microseconds of one call, from one sample."""
        if not self.on_gpu:
            start = time.perf_counter()
            timed.run()
            return (time.perf_counter() - start) * 1e6 / timed.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / timed.calls

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _captured(self, calls: Sequence[Call]) -> Timed:
        """One graph of all calls, repeated until a replay is long enough for the events."""
        timed = self._capture(calls, 1)
        sample_us = min(self.sample_us(timed) for _ in range(_WARMUP)) * timed.calls
        if sample_us >= _SAMPLE_US:
            return timed
        del timed
        return self._capture(calls, math.ceil(_SAMPLE_US / max(1.0, sample_us)))

    def _capture(self, calls: Sequence[Call], repeats: int) -> Timed:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a tensor that the collector frees during capture would end it
        try:
            # As decode graphs of the product are captured: the host refreshes packed adapters between replays.
            with steady_shadows(), torch.cuda.graph(graph):
                for _ in range(repeats):
                    for call in calls:
                        call()
            graph.replay()
            self.wait()
        except RuntimeError as error:
            self.wait()  # raises where the device is broken for good, and not only the capture
            cause = error.__context__ or error  # ending the capture fails too, and says less
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise CannotCapture(f"No CUDA graph can hold it: {line}") from error
        return Timed(graph.replay, repeats * len(calls), True)


def interleave(timer: Timer, contenders: Mapping[str, Timed], *, seconds: float, rounds: int) -> dict[str, Time]:
    """Sample every contender once a round until ``rounds`` or the time is spent, three rounds at least.

    Args:
        timer: of the device.
        contenders: name to what :meth:`Timer.prepare` gave.
        seconds: for all of them together.
        rounds: at most.

    Returns:
        name to :class:`~twn_kernels.benchmarking.results.Time`, in the order given.

    Raises:
        SampleFailed: a contender raised.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for index in range(rounds):
        if index >= 3 and time.perf_counter() > end:
            break
        shift = index % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            try:
                samples[name].append(timer.sample_us(contenders[name]))
            except RuntimeError as error:
                raise SampleFailed(name, error) from error
    return {name: summary(values) for name, values in samples.items()}


def summary(samples_us: Sequence[float]) -> Time:
    """Median and the 20 % and 80 % quantiles (nearest samples), never below a nanosecond."""
    ordered = sorted(max(1e-3, sample) for sample in samples_us)
    last = len(ordered) - 1
    low, high = ordered[math.floor(0.2 * last)], ordered[math.ceil(0.8 * last)]
    return Time(statistics.median(ordered), low, high, len(ordered))
