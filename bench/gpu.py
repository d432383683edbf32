"""``python -m bench.gpu --minutes N --out DIR``: build, check and measure this package on a GPU machine.

Stages, each recorded in ``DIR/journal.jsonl`` as it ends: the CUDA extension is built where possible, the machine is
described, ``doctor`` and the GPU tests run, the machine's roofs are measured, then every case of the suites in order of
importance until the minutes are over. ``--resume`` goes on where a run was cut, in the same folder. A contender that
takes the device or the process with it is left out by the process that goes on. ``DIR/result.json`` is the document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "doctor", "tests")
USAGE, BROKEN, CRASHED, INTERRUPTED = 2, 3, 4, 130
STOPPED = "stopped; the same command with --resume goes on from here"
_MAX_PROCESSES = 40
_LAST_WORDS_SECONDS = 10
_TESTS_SHARE = 0.25  # of the minutes; the measurements are what the run is for
# What has run on no other machine comes first, as the time may be over before the rest.
_TESTS = ("tests/ops/test_cuda_on_gpu.py", "tests/ops/test_group_on_gpu.py", "tests")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0: all well, 1: a result of this package or a check is wrong, 2: wrong usage or no GPU, 130: interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    end = time.time() + 60 * options.minutes
    if options.worker:
        return work(options, argv)
    # The measuring process may be taken down by a kernel; this one starts the next and touches no device.
    extra, begun = ["--worker"], 0
    for _ in range(_MAX_PROCESSES):
        left = (end - time.time()) / 60
        code = _measuring([*argv, *extra, f"--minutes-left={left:.4f}"])
        if code in (0, 1, USAGE, INTERRUPTED):
            return code
        before, begun = begun, _begun(Path(options.out))
        if begun == before:
            break
        print(f"the measuring process ended with {code}; going on in a new one", flush=True)
        extra = ["--worker", "--resume"]
    print(f"the measuring process ended with {code} and gets no further", file=sys.stderr)
    return 1


def _measuring(argv: Sequence[str]) -> int:
    """Exit code of a measuring process, which does not outlive this one where that can be helped."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen([sys.executable, "-m", "bench.gpu", *argv], env={**os.environ, "PYTHONPATH": path})
    try:
        return process.wait()
    except KeyboardInterrupt:
        print(f"\n{STOPPED}", file=sys.stderr, flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_WORDS_SECONDS)  # it notes that what it was at is not to blame
        return INTERRUPTED
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    own = argparse.ArgumentParser(
        prog="python -m bench.gpu", allow_abbrev=False, description="Build, check and measure on this machine's GPU."
    )
    own.add_argument("--minutes", type=_minutes, required=True, help="time for all stages together")
    own.add_argument("--out", required=True, metavar="DIR", help="folder of the run: journal.jsonl and result.json")
    own.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    own.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny runs everything on a CPU too")
    own.add_argument("--suite", action="append", choices=("linear", "group", "layer", "model"), help="default: all")
    own.add_argument("--only", metavar="TEXT", help="only cases whose id contains this")
    own.add_argument("--contender", action="append", metavar="NAME", help="default: all that a suite has")
    own.add_argument("--layers", type=count, metavar="N", help="decoder layers that the model suite builds at most")
    own.add_argument("--skip", action="append", default=[], choices=STAGES, help="a stage to leave out")
    own.add_argument("--tests", action="append", metavar="PATH", help="what the tests stage collects; default: tests")
    own.add_argument("--rounds", type=count, default=40, help="samples of each contender at most")
    own.add_argument("--seconds", type=_not_negative, default=4.0, help="for sampling one case")
    own.add_argument("--compile-backend", default="inductor", help="of torch.compile, for the compiled baseline")
    own.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    own.add_argument("--minutes-left", type=float, help=argparse.SUPPRESS)
    return own


def work(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Everything, in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    left = options.minutes if options.minutes_left is None else options.minutes_left
    deadline = time.monotonic() + 60 * left
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        if options.scale != "tiny":
            print(
                "python -m bench.gpu needs a GPU, and torch sees none here; --scale tiny runs every stage on the CPU.",
                file=sys.stderr,
            )
            return USAGE
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported
    from twn_kernels.benchmarking.measure import DeviceBroken
    from twn_kernels.errors import TWNError

    try:
        return _run(options, device, _command(argv), deadline)
    except DeviceBroken as error:
        print(f"the device answers no more: {error}", file=sys.stderr, flush=True)
        return BROKEN
    except TWNError as error:
        print(f"python -m bench.gpu: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:  # the terminal sends it to the process that started this one too, which says so
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASHED


def _run(options: argparse.Namespace, device, command: str, deadline: float) -> int:
    from bench import stages
    from twn_kernels.benchmarking import environment, results, roofs, session, suites
    from twn_kernels.benchmarking.journal import Journal
    from twn_kernels.benchmarking.measure import Options, contenders_of
    from twn_kernels.errors import OptionError

    cases = suites.cases(options.scale, options.suite or results.SUITES, layers=options.layers)
    cases = [case for case in cases if options.only is None or options.only in case.id]
    if not cases:
        raise OptionError(f"--only {options.only!r} is in the id of no case of this scale and these suites.")
    names = None if options.contender is None else tuple(options.contender)
    how = Options(
        device,
        contenders=names,
        seconds=options.seconds,
        rounds=options.rounds,
        compile_backend=options.compile_backend,
        command=f"{_command_of(options)} --only {{case}}",
    )
    for case in cases:
        contenders_of(case, how)  # a name that a suite does not have is an error before anything runs
    commit, dirty = environment.commit_of(ROOT)
    identity = {
        "device": environment.device_name(device), "commit": commit, "dirty": dirty, "scale": options.scale,
        "layers": options.layers, "compile_backend": options.compile_backend,
    }  # fmt: skip
    journal = Journal(options.out, identity, resume=options.resume)
    path = Path(options.out) / "result.json"

    def save():
        return results.save(session.document(journal, command=command, commit=commit, dirty=dirty), path)

    def stage(name, run):
        if name in options.skip:
            return None
        value = session.run_stage(journal, name, run)
        if name != "environment":
            shown = {key: entry for key, entry in value.items() if key != "pitched_gemm"}
            print(f"{name}: {json.dumps(shown)}", flush=True)
        return value

    on_gpu = device.type == "cuda"
    stage("build", lambda: stages.build(on_gpu))
    stage("environment", lambda: environment.stamp(device) | {"scale": options.scale})
    checks = [stage("doctor", stages.doctor)]
    seconds = _TESTS_SHARE * 60 * options.minutes
    checks.append(stage("tests", lambda: stages.gpu_tests(options.tests or _TESTS, seconds)))
    measured = stage("roofs", lambda: roofs.measure(device, seconds=10.0 if on_gpu else 0.5))
    how = _with(how, roofs={} if "failed" in measured else measured)
    left = session.measure_cases(cases, how, journal, deadline, lambda line: print(line, flush=True), save)
    run = session.document(journal, command=command, commit=commit, dirty=dirty)
    results.save(run, path)
    _report(run, path, left)
    return 1 if _wrong(run) or not all(map(_is_well, checks)) else 0


def _with(options, **changes):
    from dataclasses import replace

    return replace(options, **changes)


def _report(run, path: Path, left) -> None:
    """The short table, last."""
    from twn_kernels.benchmarking import session
    from twn_kernels.benchmarking.digest import Source, devices
    from twn_kernels.benchmarking.targets import judge

    print(f"\n{len({row.case for row in run.cases})} cases measured, {len(left)} left for lack of time")
    for row in _wrong(run):
        print(f"WRONG  {row.id}: {row.reason}")
    found = devices([Source(run, str(path))])
    verdicts = judge(found[0] if found else None)
    width = max(len(verdict.name) for verdict in verdicts)
    for verdict in verdicts:
        value = "" if verdict.value is None else f"{verdict.value:.2f} {verdict.unit}"
        print(f"{verdict.name:<{width}}  target {verdict.limit:<9}  {value:>12}  {verdict.verdict}")
    print(f"\ndocument: {path}")
    if run.environment.get("device_type") == "cuda" and run.environment.get("scale") == "full":
        print(f"to commit it, copy it to bench/results/{session.result_name(run)}")


def _wrong(run) -> list:
    return [row for row in run.cases if row.correct is False and not row.is_baseline]


def _is_well(check) -> bool:
    """Whether a check passed, was left out, or (tests) found nothing that needs a GPU, or no failure in its time."""
    if check is None or "exit_code" not in check:
        return check is None
    in_time = check.get("finished", True)
    return check["exit_code"] in (0, 5) if in_time else not check["failures"]


def _command(argv: Sequence[str]) -> str:
    hidden = {"--worker", *(a for a in argv if a.startswith("--minutes-left"))}
    return shlex.join(["python", "-m", "bench.gpu", *(a for a in argv if a not in hidden)])


def _command_of(options: argparse.Namespace) -> str:
    """What repeats one case of this run."""
    words = ["python -m bench.gpu --minutes 5 --out DIR"]
    words += ["--scale tiny"] if options.scale == "tiny" else []
    words += [f"--layers {options.layers}"] if options.layers is not None else []
    words += [f"--compile-backend {options.compile_backend}"] if options.compile_backend != "inductor" else []
    return " ".join([*words, *(f"--skip {name}" for name in STAGES)])


def _begun(folder: Path) -> int:
    """Steps that the journal says were begun."""
    try:
        return (folder / "journal.jsonl").read_bytes().count(b'{"event": "begin"')
    except OSError:
        return 0


def _minutes(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
