"""``python -m bench.bytes CASE``: whether what serves a case moves the bytes that it must, by the GPU's own counters.

Nsight Compute counts the DRAM traffic of every kernel of one call, on cold caches; the least that the case needs is
:func:`twn_kernels.benchmarking.counters.case_work`'s: weights, adapters and activations, each once. The exit status
is 0 within the limit, 1 above it, and 2 where nothing could be counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABOVE, UNKNOWN = 1, 2
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
LIMIT = 5.0  # percent above the least: what is left for routes, flags and S between the blocks of a launch


def main(argv: Sequence[str] | None = None) -> int:
    """Count, compare, print one JSON line."""
    options = parser().parse_args(argv)
    if options.inside:
        return run_once(options.case, options.contender, options.scale)
    case, command = _case(options.case, options.scale), _command(options)
    if case is None or command is None:
        words = _unknown(options) if case is None else "ncu is not on PATH or in /usr/local/cuda/bin"
        print(words, file=sys.stderr)
        return UNKNOWN
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    kernels = counted(done.stdout.splitlines())
    if done.returncode or not kernels:
        last = (done.stdout + done.stderr).strip()[-2000:]
        print(f"nothing was counted (exit status {done.returncode}): {last}", file=sys.stderr)
        return UNKNOWN
    return _judged(case, options, kernels)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    own = argparse.ArgumentParser(prog="python -m bench.bytes", description=__doc__.split("\n", 1)[0])
    own.add_argument("case", metavar="CASE", help="id, such as group-8B-qkv-decode-T8-half-r64x64-bf16")
    own.add_argument("--contender", default="ours_cuda")
    own.add_argument("--scale", choices=("full", "tiny"), default="full")
    own.add_argument("--limit", type=float, default=LIMIT, help="percent above the least, default: %(default)s")
    own.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return own


def counted(lines: Iterable[str]) -> list[tuple[str, float]]:
    """``(kernel, bytes)`` in order of launch, from ``ncu --csv``; whatever else was printed is passed over."""
    lines = list(lines)
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, list] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") in METRICS:
            entry = found.setdefault(row["ID"], [row["Kernel Name"], 0.0])
            entry[1] += float(row["Metric Value"].replace(",", ""))
    return [(name, size) for name, size in found.values()]


def run_once(case_id: str, contender: str, scale: str) -> int:
    """One call of the contender between the marks that the profiler looks for."""
    import torch

    from twn_kernels.benchmarking.group_contenders import GROUP_CONTENDERS
    from twn_kernels.benchmarking.problem import Problem

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem.build(_case(case_id, scale), device, cache_bytes=0, compile_backend="eager")
    calls = GROUP_CONTENDERS[contender].build(problem).calls
    calls[0]()
    if device.type == "cuda":
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            calls[0]()
            torch.cuda.synchronize()
    return 0


def _cases(scale: str) -> dict:
    from twn_kernels.benchmarking import suites

    return {case.id: case for case in suites.cases(scale, ("linear", "group"))}


def _case(case_id: str, scale: str):
    return _cases(scale).get(case_id)


def _unknown(options: argparse.Namespace) -> str:
    from twn_kernels.errors import did_you_mean

    known = _cases(options.scale)
    example, near = next(iter(known)), did_you_mean(options.case, known)
    return f"CASE must be the id of a linear or group case, such as {example}, got {options.case!r}.{near}"


def _command(options: argparse.Namespace) -> list[str] | None:
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        return None
    return [
        ncu, "--csv", "--print-units", "base", "--profile-from-start", "off", "--cache-control", "all",
        "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.bytes", options.case,
        "--contender", options.contender, "--scale", options.scale, "--inside",
    ]  # fmt: skip


def _judged(case, options: argparse.Namespace, kernels: list[tuple[str, float]]) -> int:
    from twn_kernels.benchmarking.counters import case_work

    least, moved = case_work(case).bytes, sum(size for _, size in kernels)
    percent = 100 * (moved / least - 1)
    report = {
        "case": case.id, "contender": options.contender, "bytes": moved, "least_bytes": least,
        "percent_above": round(percent, 3), "limit": options.limit, "kernels": kernels,
    }  # fmt: skip
    print(json.dumps(report))
    return 0 if percent <= options.limit else ABOVE


if __name__ == "__main__":
    sys.exit(main())
