"""``twn-kernels bench``: run the suites of a checkout, report on result files, compare two, derive the choice table.

Owns the options, what is printed, and what is written where. Measuring is the checkout's ``bench/``, deriving
:mod:`twn_kernels.benchmarking`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from twn_kernels.benchmarking.results import SUITES
from twn_kernels.cli.values import count, not_negative, one_of
from twn_kernels.errors import MissingDependency, OptionError, ResultError

__all__ = ["ACTIONS", "add"]

_RESULTS = ("bench", "results")
_SCALES = ("full", "tiny")


def add(subparsers) -> argparse.ArgumentParser:
    """Add ``bench`` and its actions; each has ``--json`` and ``--traceback`` like every command."""
    parser = subparsers.add_parser("bench", allow_abbrev=False, help="measure, report, compare")
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    for add_action in ACTIONS.values():
        action = add_action(actions)
        action.set_defaults(parser=action)
        action.allow_abbrev = False
        for name, words in (
            ("--json", "print the report as one JSON document"),
            ("--traceback", "show where it failed"),
        ):
            # Suppressed: a default here would undo the option where it stands before the action.
            action.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=words)
    return parser


def _add_run(actions) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        "run",
        help="the suites under pytest-benchmark, each contender held to the oracle before it is timed",
        description="Without a suite: all. Real shapes where torch sees a GPU, tiny ones on a CPU.",
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", type=one_of(SUITES), help=", ".join(SUITES))
    parser.add_argument("--scale", type=one_of(_SCALES), help="full or tiny; default: full on a GPU, tiny on a CPU")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose id contains this")
    parser.add_argument("--contender", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--layers", type=count, help="decoder layers that the model suite builds at most")
    parser.add_argument("--seconds", type=not_negative, help="for sampling one case")
    parser.add_argument("--out", metavar="FILE", help="result file; default: .benchmarks/twn.json of the checkout")
    parser.set_defaults(run=_run)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    root = _checkout("run")
    for module, name in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(
                f'bench run needs {name}, which is not installed. Run: pip install "twn_kernels[bench]"'
            )
    out = _result_file(Path(arguments.out or root / ".benchmarks" / "twn.json").absolute())
    suites = [str(Path("bench", f"test_{suite}.py")) for suite in dict.fromkeys(arguments.suites or SUITES)]
    command = ["-m", "pytest", "-q", *suites, "--twn-json", str(out)]
    for option, value in (
        ("--scale", arguments.scale),
        ("--layers", arguments.layers),
        ("--seconds", arguments.seconds),
    ):
        command += [] if value is None else [option, str(value)]
    command += [] if arguments.only is None else ["-k", arguments.only]
    for name in arguments.contender or ():
        command += ["--contender", name]
    before = _changed(out)
    code = _run_in_checkout("run", command, arguments)
    if _changed(out) == before:
        raise ResultError(f"pytest ended with {code} and measured nothing; what it printed says why.")
    if arguments.json:
        _print_json({"exit_code": int(code != 0), "result": _summary(out)})
    else:
        print(f"wrote {out}")
    return int(code != 0)


def _result_file(path: Path) -> Path:
    """The path itself, if a result can be written there: pytest would only find out after the last case."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f'--out: the directory "{path.parent}" cannot be made: {error.strerror or error}.') from error
    if path.is_dir():
        raise OptionError(f'--out: "{path}" is a directory. Name a file.')
    return path


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _add_gpu(actions) -> argparse.ArgumentParser:
    # Options that are not its own go to the checkout's command, --help among them.
    parser = actions.add_parser(
        "gpu",
        add_help=False,
        help="check and measure this machine's GPU, as python -m bench.gpu does; its --help says how",
    )
    parser.add_argument("--out")
    parser.set_defaults(run=_gpu, forwarded=[])
    return parser


def _gpu(arguments: argparse.Namespace) -> int:
    # The command runs in the checkout, and its folder is meant to lie where this one was started.
    out = [] if arguments.out is None else ["--out", os.path.abspath(arguments.out)]
    code = _run_in_checkout("gpu", ["-m", "bench.gpu", *arguments.forwarded, *out], arguments)
    if arguments.json and code in (0, 1) and out:
        _print_json({"exit_code": code, "result": _summary(Path(out[1]) / "result.json")})
    return code


def _run_in_checkout(action: str, command: list[str], arguments: argparse.Namespace) -> int:
    """Run Python there; with ``--json`` what it prints goes to stderr, so that stdout holds the document alone."""
    import subprocess

    root = _checkout(action)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        stdout=2 if arguments.json else None,
    )
    return done.returncode


def _summary(path: Path) -> dict:
    """What a run left, in short."""
    from twn_kernels.benchmarking.digest import Source, device_of, devices
    from twn_kernels.benchmarking.results import load
    from twn_kernels.benchmarking.targets import judge

    run = load(path)
    found = devices([Source(run, str(path))])
    return {
        "file": str(path),
        "device": device_of(run),
        "rows": len(run.cases),
        "timed": sum(row.time_us is not None for row in run.cases),
        "wrong": [row.id for row in run.cases if row.correct is False],
        "targets": [verdict.to_dict() for verdict in judge(found[0] if found else None)],
    }


def _add_report(actions) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        "report",
        help="tables and plots of result files; the README's measured section",
        description="Without --readme and --out the report goes to stdout. The README only takes results of a GPU.",
    )
    parser.add_argument("results", nargs="*", metavar="FILE|DIR", help="default: bench/results of this checkout")
    parser.add_argument("--readme", help="rewrite the measured section of this file, between its markers")
    parser.add_argument("--out", help="folder for report.md and the plots (needs matplotlib: extra bench)")
    parser.set_defaults(run=_report)
    return parser


def _report(arguments: argparse.Namespace) -> None:
    from twn_kernels.benchmarking import report
    from twn_kernels.benchmarking.digest import devices
    from twn_kernels.benchmarking.targets import judge

    readme = None if arguments.readme is None else _readable(Path(arguments.readme))
    sources = _sources("report", arguments.results, Path(arguments.readme).parent if readme is not None else None)
    if readme is not None:
        report.replace_section(readme, "", arguments.readme)  # a missing marker must show before anything is written
    if arguments.out is not None and Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise OptionError(f'--out: "{arguments.out}" is a file. Name a folder.')
    written = [] if arguments.out is None else report.write_report(sources, arguments.out)
    if readme is not None:
        section = report.readme_section(sources, _figures(written, Path(arguments.readme).parent))
        _write(Path(arguments.readme), report.replace_section(readme, section, arguments.readme))
        written = [Path(arguments.readme), *written]
    if arguments.json:
        verdicts = {device.name: [v.to_dict() for v in judge(device)] for device in devices(sources)}
        counted = {device.name: len(device.contests) for device in devices(sources)}
        paths = [str(path) for path in written]
        _print_json({"results": [s.name for s in sources], "cases": counted, "targets": verdicts, "written": paths})
    elif written:
        print("\n".join(f"wrote {path}" for path in written))
    else:
        print(report.full_report(sources), end="")


def _figures(written: Sequence[Path], folder: Path) -> list[str]:
    """Plots as the README links them; those outside its folder would be broken links for everyone else."""
    inside = []
    for path in written:
        if path.suffix == ".svg" and path.resolve().is_relative_to(folder.resolve()):
            inside.append(path.resolve().relative_to(folder.resolve()).as_posix())
    return inside


def _add_compare(actions) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        "compare",
        help="two results of one device; 1 where a row is slower beyond noise, broken or missing",
        description="Rows are paired by id. Noise: half of each run's p20-p80 spread, added, but at least --noise.",
    )
    parser.add_argument("before", metavar="A", help="result file, or a folder that holds one")
    parser.add_argument("after", metavar="B", help="result file, or a folder that holds one")
    parser.add_argument("--noise", type=not_negative, metavar="PERCENT", help="change that is always noise; default 3")
    parser.set_defaults(run=_compare)
    return parser


def _compare(arguments: argparse.Namespace) -> int:
    from twn_kernels.benchmarking.comparing import FLOOR, compare_runs, render
    from twn_kernels.benchmarking.files import load_pair

    before, after = load_pair(arguments.before, arguments.after)
    floor = FLOOR if arguments.noise is None else arguments.noise / 100
    found = compare_runs(before.run, after.run, floor=floor)
    _print_json(found.to_dict()) if arguments.json else print(render(found))
    return int(not found.ok)


def _add_choices(actions) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        "choices",
        help='rows of the table that impl="auto" follows, from results of GPUs',
        description="A token count gets a row where one implementation was right and fastest in every case.",
    )
    parser.add_argument("results", nargs="*", metavar="FILE|DIR", help="default: bench/results of this checkout")
    parser.add_argument("--out", help="write the table there, such as twn_kernels/ops/choices.json")
    parser.set_defaults(run=_choices)
    return parser


def _choices(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from twn_kernels.benchmarking.choosing import choose
    from twn_kernels.ops import choice_table

    found = choose(_sources("choices", arguments.results, None))
    text = json.dumps(found.table(), indent=2) + "\n"
    choice_table.parse(text, "the derived table")
    if arguments.out is not None:
        _write(Path(arguments.out), text)
    if arguments.json:
        _print_json({**found.table(), "undecided": [asdict(entry) for entry in found.undecided]})
        return
    for row in found.rows:
        where = f"{row.arch} {row.dtype} {row.site}, {row.min_tokens} to {row.max_tokens} tokens"
        print(f"{where}: {row.impl} ({len(row.cases)} cases of {row.source})")
    for entry in found.undecided:
        print(f"{entry.arch} {entry.dtype} {entry.site}, {entry.tokens} tokens: none; {entry.why}")
    print(f"{len(found.rows)} rows" + ("" if arguments.out is None else f": wrote {arguments.out}"))


def _sources(action: str, paths: Sequence[str], relative_to: Path | None) -> list:
    from twn_kernels.benchmarking.files import find

    if not paths:
        folder = _checkout(action, " Or name result files.").joinpath(*_RESULTS)
        paths = [str(folder)] if any(folder.rglob("*.json")) else []
    found = find(paths, relative_to)
    for path in found.left_out:
        print(f"twn-kernels bench: {path} is no benchmark result and is left out", file=sys.stderr)
    return found.sources


def _checkout(action: str, otherwise: str = "") -> Path:
    """The root of the checkout that this package is imported from; its ``bench/`` is no part of a wheel."""
    import twn_kernels

    root = Path(twn_kernels.__file__).resolve().parent.parent
    if not (root / "bench").is_dir():
        raise OptionError(
            f"bench {action} needs the folder bench/ of a checkout, and this installation at {root} has none. Clone "
            f"the repository, run pip install -e . there, and use that.{otherwise}"
        )
    return root


def _readable(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:  # line ends stay as they are
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f'--readme: "{path}" cannot be read: {error}.') from error


def _write(path: Path, text: str) -> None:
    """Replace a file, whole or not at all; what a link points to, not the link."""
    path = path.resolve()
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(staged, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        if path.exists():
            staged.chmod(path.stat().st_mode & 0o777)
        os.replace(staged, path)
    except OSError as error:
        raise ResultError(f'"{path}" cannot be written: {error.strerror or error}.') from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def _print_json(document) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


ACTIONS: dict[str, Callable] = {
    "run": _add_run,
    "gpu": _add_gpu,
    "report": _add_report,
    "compare": _add_compare,
    "choices": _add_choices,
}
