"""What a run does before it measures: build, look at the machine, let the package check itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["build", "doctor", "gpu_tests"]

ROOT = Path(__file__).resolve().parent.parent
_BUILD_SECONDS, _DOCTOR_SECONDS, _LAST_WORDS_SECONDS = 900, 300, 30


def build(wanted: bool) -> dict[str, Any]:
    """Build the CUDA extension in place, for the GPUs that are here, where it is missing or of other sources.

    Args:
        wanted: False on a machine that could not run it.

    Returns:
        ``built`` and ``detail``.
    """
    from twn_kernels.impl.cuda import build as recipe
    from twn_kernels.impl.cuda import first_use
    from twn_kernels.impl.cuda.loader import build_info

    info = build_info()
    if not wanted or (info.built and info.sources == recipe.digest(ROOT / "csrc")):
        return {"built": info.built, "detail": str(info)}
    try:
        archs = first_use.archs_here()
        recipe.find_tools()
    except recipe.CannotBuild as error:
        # A library of other sources is none: it would be measured under this commit's name.
        what = f"{info}; is of other sources" if info.built else str(info)
        return {"built": False, "detail": f"{what} and cannot be built now: {error}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = _run(command, _BUILD_SECONDS, TWN_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST=archs)
    last = (done["output"].strip().splitlines() or [""])[-1]
    return {"built": done["code"] == 0, "detail": last}


def doctor() -> dict[str, Any]:
    """Every op against fp64 truth; ``exit_code`` (0: all is well) and the report's last line."""
    done = _run([sys.executable, "-m", "twn_kernels", "doctor"], _DOCTOR_SECONDS)
    lines = done["output"].strip().splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    return {"exit_code": done["code"], "summary": lines[-1] if lines else "", "failed": failed}


def gpu_tests(paths: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU.

    Args:
        paths: what pytest collects.
        seconds: after which it is asked to stop.

    Returns:
        ``passed``, ``failed``, ``errors``, ``skipped``, ``finished`` (False where the time was over), ``exit_code``,
        ``seconds``, and the names of up to 20 failures.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *paths]
        start = time.monotonic()
        done = _run(command, seconds)
        counts = _counts(report)
    return {
        **counts,
        "finished": not done["timed_out"],
        "exit_code": done["code"],
        "seconds": round(time.monotonic() - start, 1),
    }


def _counts(report: Path) -> dict[str, Any]:
    """What pytest's own report counts; zeros where it could not write one."""
    found: dict[str, Any] = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0) | {"failures": []}
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return found
    for case in cases:
        kinds = {child.tag for child in case}
        kind = next((k for k in ("failure", "error", "skipped") if k in kinds), "passed")
        found[{"failure": "failed", "error": "errors"}.get(kind, kind)] += 1
        if kind in ("failure", "error") and len(found["failures"]) < 20:
            found["failures"].append(f"{case.get('classname')}::{case.get('name')}")
    return found


def _run(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run to the end or, after ``seconds``, to an interrupt, on which pytest still writes its report."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return {"code": process.returncode, "output": output, "timed_out": False}
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    try:
        output, _ = process.communicate(timeout=_LAST_WORDS_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return {"code": process.returncode, "output": output, "timed_out": True}
