"""A run from its first stage to its document: stages and cases in order within a time, each recorded as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from twn_kernels.benchmarking import environment
from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.contender import Unavailable
from twn_kernels.benchmarking.journal import Journal
from twn_kernels.benchmarking.measure import DeviceBroken, Options, contenders_of, measure_case, row_of
from twn_kernels.benchmarking.results import Row, Run

__all__ = ["document", "measure_cases", "result_name", "run_stage"]

Say = Callable[[str], None]
_SAVE_SECONDS = 30.0


def run_stage(journal: Journal, name: str, run: Callable[[], Any]) -> Any:
    """What a stage leaves: from the journal where it has run, else by running it.

    A stage that fails leaves ``{"failed": why}``: what it tells is worth less than the measurements after it.

    Raises:
        DeviceBroken: the failure took the device with it.
    """
    if name in journal.stages:
        return journal.stages[name]
    step = f"stage {name}"
    if "" in journal.excluded(step):
        journal.stage(name, {"failed": journal.excluded(step)[""]})
        return journal.stages[name]
    journal.begin(step, "")
    try:
        value = run()
    except KeyboardInterrupt:
        journal.interrupted()
        raise
    except Exception as error:  # as the docstring says
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if _is_broken():
            journal.breaks(step, "", reason)
            raise DeviceBroken(reason) from error
        value = {"failed": reason}
    journal.stage(name, value)
    return value


def measure_cases(
    cases: Iterable[Case], options: Options, journal: Journal, deadline: float, say: Say, save: Callable[[], None]
) -> list[Case]:
    """Measure what the journal does not have yet, until the deadline.

    Args:
        cases: in order of importance.
        options: how.
        journal: records every finished case.
        deadline: of ``time.monotonic()``; a case that has begun is finished.
        say: receives one line a case.
        save: called now and then, to write the document so far.

    Returns:
        The cases that were left for lack of time.

    Raises:
        DeviceBroken: a contender broke the device; a new process can go on without it.
    """
    cases = list(cases)
    left, saved = [], time.monotonic()
    for number, case in enumerate(cases, 1):
        if case.id in journal.rows:
            continue
        if time.monotonic() >= deadline:
            left.append(case)
            continue
        start = time.monotonic()
        rows = _measure(case, options, journal)
        journal.case(case.id, rows)
        say(f"{number}/{len(cases)} {case.id}: {_summary(rows)} ({time.monotonic() - start:.1f} s)")
        if time.monotonic() - saved > _SAVE_SECONDS:
            save()
            saved = time.monotonic()
    return left


def _measure(case: Case, options: Options, journal: Journal) -> list[Row]:
    excluded = journal.excluded(case.id)
    if "" in excluded:
        return _unmeasured(case, options, excluded[""])
    running = [""]

    def begin(contender: str) -> None:
        running[0] = contender
        journal.begin(case.id, contender)

    begin("")
    try:
        return measure_case(case, replace(options, exclude={**options.exclude, **excluded}), begin)
    except KeyboardInterrupt:
        journal.interrupted()
        raise
    except DeviceBroken as error:
        journal.breaks(case.id, running[0], str(error))
        raise
    except (Unavailable, RuntimeError) as error:
        # Before any contender: the case's own tensors do not fit, or its library is missing.
        reason = f"The case cannot be set up: {(str(error).strip().splitlines() or [''])[0]}"
        if _is_broken():
            journal.breaks(case.id, running[0], reason)
            raise DeviceBroken(reason) from error
        return _unmeasured(case, options, reason)


def _unmeasured(case: Case, options: Options, reason: str) -> list[Row]:
    return [row_of(case, contender, options, reason=reason) for contender in contenders_of(case, options)]


def _is_broken() -> bool:
    try:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _summary(rows: list[Row]) -> str:
    timed = [row for row in rows if row.time_us is not None]
    wrong = [row.contender for row in rows if row.correct is False]
    parts = [f"{len(timed)} of {len(rows)} timed"]
    ours = next((row for row in timed if row.contender == "ours_auto"), None)
    if ours is not None:
        parts.append(f"ours {ours.time_us.median:.1f} us")
        if ours.overhead_percent is not None:
            parts.append(f"{ours.overhead_percent:+.1f} % over our base")
    return ", ".join(parts) + (f", WRONG: {', '.join(wrong)}" if wrong else "")


def document(journal: Journal, *, command: str, commit: str, dirty: bool | None) -> Run:
    """The journal as a result document."""
    roofs = journal.stages.get("roofs", {})
    return Run(
        created=environment.now(),
        commit=commit,
        dirty=dirty,
        command=command,
        environment=journal.stages.get("environment", {}),
        roofs={} if "failed" in roofs else roofs,
        peers=environment.peers(),
        cases=journal.all_rows(),
    )


def result_name(run: Run) -> Path:
    """Where a committed result belongs: ``<device>/<date>-<commit>.json``, in letters that every file system takes."""
    device = str(run.environment.get("device", "unknown"))
    folder = "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()
    while "--" in folder:
        folder = folder.replace("--", "-")
    return Path(folder or "unknown") / f"{run.created[:10]}-{run.commit[:12]}{'-dirty' if run.dirty else ''}.json"
