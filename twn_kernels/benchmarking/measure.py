"""One case from its tensors to its rows: build every contender, hold it to the oracle, and time those that passed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from twn_kernels.benchmarking.cases import Case, check_case
from twn_kernels.benchmarking.contender import Built, Contender, Unavailable
from twn_kernels.benchmarking.counters import case_work, roof_us
from twn_kernels.benchmarking.environment import cache_bytes
from twn_kernels.benchmarking.results import Row, Time
from twn_kernels.benchmarking.timers import CannotCapture, SampleFailed, Timed, Timer, interleave
from twn_kernels.benchmarking.truth import Truth, worst_ratio
from twn_kernels.errors import OptionError, did_you_mean, quoted

__all__ = ["BASE", "DeviceBroken", "Options", "PreparedCase", "contenders_of", "measure_case", "row_of"]

BASE = "fused_base"  # the denominator of overhead_percent


class DeviceBroken(Exception):
    """The device answers no more (a kernel accessed memory that is not its own, say): only a new process helps."""


@dataclass(frozen=True)
class Options:
    """How cases are measured.

    Attributes:
        device: where.
        contenders: names to run; None: all that the suite has, but the reference where others are timed.
        exclude: contender name to the sentence why it must not run.
        seconds: for sampling one case, all contenders together.
        rounds: samples of each contender at most.
        compile_backend: of ``torch.compile``.
        roofs: of :func:`twn_kernels.benchmarking.roofs.measure`, for percentages.
        command: reproduces a case; ``{case}`` stands for its id.
    """

    device: torch.device
    contenders: tuple[str, ...] | None = None
    exclude: dict[str, str] = field(default_factory=dict)
    seconds: float = 4.0
    rounds: int = 40
    compile_backend: str = "inductor"
    roofs: dict[str, Any] = field(default_factory=dict)
    command: str = "python -m bench.gpu --only {case}"


@dataclass
class _Entry:
    """One contender on its way through a case."""

    contender: Contender
    built: Built | None = None
    timed: Timed | None = None
    correct: bool | None = None
    ratio: float | None = None
    reason: str | None = None


def contenders_of(case: Case, options: Options) -> list[Contender]:
    """The contenders of a case, in the order in which they run.

    Raises:
        OptionError: an option names a contender that the suite does not have.
    """
    if case.suite in ("linear", "group"):
        from twn_kernels.benchmarking.group_contenders import GROUP_CONTENDERS as known
    else:
        from twn_kernels.benchmarking.model_contenders import MODEL_CONTENDERS as known
    names = options.contenders
    if names is None:
        names = [n for n in known if n != "ours_reference"]
    for name in names:
        if name not in known:
            raise OptionError(
                f'suite "{case.suite}" has no contender {name!r}; it has {quoted(known)}.{did_you_mean(name, known)}'
            )
    return [c for c in map(known.get, names) if c.passes is None or case.pass_ in c.passes]


def measure_case(
    case: Case,
    options: Options,
    begin: Callable[[str], None] = lambda name: None,
    contenders: Sequence[Contender] | None = None,
) -> list[Row]:
    """Measure one case and let go of what it took.

    Args:
        case: what.
        options: how.
        begin: told the name of each contender before it first touches the device.
        contenders: instead of the suite's own.

    Returns:
        One row for each contender, in order; a contender that is wrong, absent or broken has a reason and no time.

    Raises:
        DeviceBroken: nothing more can be measured in this process.
    """
    prepared = PreparedCase(case, options, begin, contenders)
    begin("")
    rows = prepared.rows()
    prepared.free()
    return rows


class PreparedCase:
    """A case whose contenders are built, held to the oracle, and those that passed ready to be timed.

    Args:
        case, options, begin, contenders: as in :func:`measure_case`, which is the way to measure one.

    Attributes:
        timed: name to what a timer samples, of the contenders that passed.
    """

    def __init__(
        self,
        case: Case,
        options: Options,
        begin: Callable[[str], None] = lambda name: None,
        contenders: Sequence[Contender] | None = None,
    ) -> None:
        self.case, self.options = check_case(case), options
        self._entries = [_Entry(c) for c in (contenders_of(case, options) if contenders is None else contenders)]
        self.timer = Timer(options.device)
        problem = _problem(case, options)
        truths: dict[bool, Any] = {}
        exclude = _too_slow_to_build(case, options) | options.exclude
        for entry in self._entries:
            if entry.contender.name in exclude:
                entry.reason = exclude[entry.contender.name]
                continue
            begin(entry.contender.name)
            _make_ready(entry, problem, truths, self.timer)

    @property
    def timed(self) -> dict[str, Timed]:
        return {entry.contender.name: entry.timed for entry in self._entries if entry.timed is not None}

    def rows(self) -> list[Row]:
        """Sample the contenders in turns; one row for each, those without a time too."""
        times = _sampled(self.timer, self._entries, self.options)
        return [
            row_of(
                self.case,
                entry.contender,
                self.options,
                reason=entry.reason,
                correct=entry.correct,
                ratio=entry.ratio,
                time=times.get(entry.contender.name),
                in_graph=None if entry.timed is None else entry.timed.in_graph,
                base=times.get(BASE),
                built=entry.built,
            )
            for entry in self._entries
        ]

    def free(self) -> None:
        """Let go of the device's memory."""
        self._entries = []
        _free(self.timer)


def _problem(case: Case, options: Options) -> Any:
    if case.suite in ("linear", "group"):
        from twn_kernels.benchmarking.problem import Problem

        return Problem.build(
            case, options.device, cache_bytes=cache_bytes(options.device), compile_backend=options.compile_backend
        )
    from twn_kernels.benchmarking.model_problem import ModelProblem

    return ModelProblem.build(case, options.device, compile_backend=options.compile_backend)


def _too_slow_to_build(case: Case, options: Options) -> dict[str, str]:
    """What a run over all cases leaves out: compiling takes ten times as long as measuring the rest of a group."""
    shown = case.suite != "group" or (case.routes == "half" and case.ranks == (64, 64) and case.tokens in (8, 4096))
    if shown or options.contenders is not None or options.compile_backend != "inductor":
        return {}
    reason = "Compiling it takes longer than the whole case; it is measured at 8 and 4096 tokens, rank 64, routes half."
    return {"peft_compiled": f"{reason} Ask for it here with --contender peft_compiled."}


def _make_ready(entry: _Entry, problem: Any, truths: dict, timer: Timer) -> None:
    """Build, gate and capture one contender; whatever stops it is written into the entry."""
    contender = entry.contender
    try:
        entry.built = contender.build(problem)
        _gate(entry, problem, truths)
        if entry.correct:
            entry.timed = timer.prepare(entry.built.calls, _graph_mode(problem.case, contender))
    except (Unavailable, CannotCapture) as error:
        entry.reason = str(error)
    except torch.cuda.OutOfMemoryError as error:
        entry.reason = f"It does not fit the device's memory: {_first_line(error)}"
    except Exception as error:  # whatever breaks is this contender's result; the others must still be measured
        entry.reason = f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, AssertionError):
            entry.correct = False
        _check_alive(timer, error)
    if entry.timed is None:
        entry.built = None if entry.built is None else Built([], entry.built.impl, entry.built.memory_added_bytes)
        _free(timer)


def _gate(entry: _Entry, problem: Any, truths: dict) -> None:
    base_only = entry.contender.base_only
    if base_only not in truths:
        truths[base_only] = _truth(problem, base_only)
    ratio, worst = worst_ratio(truths[base_only], entry.built.calls[0]())
    entry.correct = ratio <= 1
    entry.ratio = ratio if ratio != float("inf") else None
    if not entry.correct:
        shown = "is not finite, of another shape or missing" if entry.ratio is None else f"{ratio:.3g} times the budget"
        entry.reason = f"Wrong result, so it is not timed: the error of {worst} {shown} of the oracle."
        if entry.ratio is None:
            entry.reason = f"Wrong result, so it is not timed: {worst} {shown}."


def _truth(problem: Any, base_only: bool) -> Any:
    if problem.case.suite in ("linear", "group"):
        return Truth(problem, base_only=base_only)
    from twn_kernels.benchmarking.model_truth import ModelTruth

    return ModelTruth(problem, base_only=base_only)


def _graph_mode(case: Case, contender: Contender) -> str:
    if contender.graph is not None:
        return contender.graph
    if case.pass_ == "decode":
        return "always"
    # A single op's launches would hide behind the others' in a model, so a graph shows what it costs there; a whole
    # layer or model is timed as it is called.
    return "where_possible" if case.pass_ == "forward" and case.suite in ("linear", "group") else "never"


def _sampled(timer: Timer, entries: list[_Entry], options: Options) -> dict[str, Time]:
    """Times by name; a contender that fails while it is sampled leaves the others to another try."""
    ready = {entry.contender.name: entry for entry in entries if entry.timed is not None}
    while ready:
        timed = {name: entry.timed for name, entry in ready.items()}
        try:
            return interleave(timer, timed, seconds=options.seconds, rounds=options.rounds)
        except SampleFailed as failure:
            _check_alive(timer, failure.error)
            reason = f"It failed while it was timed: {_first_line(failure.error)}"
            ready[failure.name].reason, ready[failure.name].timed = reason, None
            del ready[failure.name]
    return {}


def _check_alive(timer: Timer, error: BaseException) -> None:
    try:
        timer.wait()
    except RuntimeError:
        raise DeviceBroken(f"{type(error).__name__}: {_first_line(error)}") from error


def _free(timer: Timer) -> None:
    if timer.on_gpu:  # modules hold each other in cycles, which only the collector ends
        gc.collect()
        torch.cuda.empty_cache()


def row_of(
    case: Case,
    contender: Contender,
    options: Options,
    *,
    reason: str | None = None,
    correct: bool | None = None,
    ratio: float | None = None,
    time: Time | None = None,
    in_graph: bool | None = None,
    base: Time | None = None,
    built: Built | None = None,
) -> Row:
    """A row of a case; ``base`` is the time that overheads refer to, and the rest is as the row's own fields."""
    work = case_work(case, base_only=contender.base_only)
    least = roof_us(work, options.roofs)
    return Row(
        id=f"{case.id}-{contender.name}",
        case=case.id,
        suite=case.suite,
        pass_=case.pass_,
        model=case.model,
        site=case.site,
        layers=case.layers,
        layers_full=None if case.layers is None else case.shape.layers,
        tokens=case.tokens,
        context=case.context,
        routes=case.routes,
        ranks=case.ranks,
        dtype=case.dtype,
        contender=contender.name,
        impl=None if built is None else built.impl,
        is_baseline=contender.is_baseline,
        correct=correct,
        error_ratio=ratio,
        time_us=time,
        reason=None if time is not None else reason or "It was not sampled.",
        in_graph=None if time is None else in_graph,
        ideal_bytes=work.bytes,
        ideal_flops=work.flops,
        percent_of_roof=None if time is None or least is None else 100 * least / time.median,
        overhead_percent=None if time is None or base is None else 100 * (time.median / base.median - 1),
        memory_added_bytes=None if built is None else built.memory_added_bytes,
        command=options.command.format(case=case.id),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
