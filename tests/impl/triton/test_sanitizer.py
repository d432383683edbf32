"""Every Triton kernel under compute-sanitizer: no access outside a buffer, no race, no barrier that threads miss."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized

ROOT = Path(__file__).resolve().parents[3]
# Races are looked for in our kernels alone: the vendor's synchronise in ways that the tool does not know.
TOOLS = {"memcheck": ("triton", "blas"), "racecheck": ("triton",), "synccheck": ("triton",)}
_FOUND = 86  # the exit status that says the sanitizer found something, and is no one else's


def _command(tool: str) -> list[str]:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer: none on PATH or in /usr/local/cuda/bin (it comes with the CUDA toolkit)")
    return [
        sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND),
        sys.executable, sanitized.__file__, "cuda", *TOOLS[tool],
    ]  # fmt: skip


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", TOOLS)
def test_the_sanitizer_finds_nothing(tool):
    # Each tensor gets an allocation of its own, so that one past its end is outside.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(_command(tool), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "done" in done.stdout.splitlines()


def test_the_program_runs_without_a_sanitizer(capsys):
    """The same program on a CPU; there the interpreter's pointers are checked against their buffers."""
    sanitized.main("cpu", ("triton",))
    assert capsys.readouterr().out == "done\n"
