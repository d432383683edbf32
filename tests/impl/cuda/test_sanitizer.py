"""Every kernel of the extension under compute-sanitizer: no access outside a buffer, no race, no barrier missed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_stand_in
import pytest
import torch

from twn_kernels.ops import choice

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("sanitized.py")
TOOLS = ("memcheck", "racecheck", "synccheck")
_FOUND = 86  # the exit status that says the sanitizer found something, and is no one else's


def _command(tool: str) -> list[str]:
    reason = choice.unavailable_reason("cuda", torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"needs the CUDA extension: {' '.join(reason.split())}")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer: none on PATH or in /usr/local/cuda/bin (it comes with the CUDA toolkit)")
    # Races are looked for in our own kernels alone: torch's synchronise in ways that the tools do not know.
    own = [] if tool == "memcheck" else ["--kernel-regex", "kns=twn"]
    return [sanitizer, "--tool", tool, *own, "--error-exitcode", str(_FOUND), sys.executable, str(PROGRAM), "cuda"]


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", TOOLS)
def test_the_sanitizer_finds_nothing(tool):
    # Each tensor gets an allocation of its own, so that one past its end is outside.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(_command(tool), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "done" in done.stdout.splitlines()


def test_the_program_runs_without_a_sanitizer(monkeypatch, capsys):
    extension = cuda_stand_in.install(monkeypatch)
    spec = importlib.util.spec_from_file_location("sanitized_cuda", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main("cpu")
    assert capsys.readouterr().out == "done\n"
    small = ("front", "gate_scores", "pool_queries")
    assert {name for name, _ in extension.taken} == {"decode_group", "prefill_group", *small}
