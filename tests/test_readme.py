"""The README's blocks run, its targets and extras exist, and no speed is claimed without a result file."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]
SHELL = [line for language, body in BLOCKS if language == "bash" for line in body.splitlines()]
COMMANDS = [line.split("  #")[0].strip() for line in SHELL]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory in which the Python blocks ran, in order, as one script in a fresh process."""
    directory = tmp_path_factory.mktemp("readme")
    script = directory / "blocks.py"
    script.write_text("\n".join(PYTHON))
    done = subprocess.run([sys.executable, script], cwd=directory, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def _environment() -> dict[str, str]:
    import os

    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_python_blocks_run(home):
    assert len(PYTHON) >= 3


def test_shell_blocks_run_or_name_real_targets(home):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    ran = 0
    for command in COMMANDS:
        first, *rest = shlex.split(command)
        if first == "make":
            assert rest[0] in targets, command
        elif first == "twn-kernels":
            command_line = [sys.executable, "-m", "twn_kernels", *rest]
            done = subprocess.run(command_line, cwd=home, capture_output=True, text=True, env=_environment())
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.stdout.strip(), f"{command} printed nothing"
            ran += 1
        elif first == "source":
            assert rest == [".venv/bin/activate"]
        elif first == "printf":
            subprocess.run(["bash", "-c", command], cwd=home, check=True)
        else:
            assert first == "python" and rest[:2] == ["-m", "pytest"], f"no rule for {command!r}"
    assert ran >= 4
    assert (home / "vectors.npy").exists()


def test_extras_exist():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"Extras: (.*?)\.", README, flags=re.DOTALL).group(1)
    assert set(re.findall(r"`(\w+)`", named)) == set(extras)


def test_no_speed_is_claimed_without_a_result_file():
    results = list((ROOT / "bench" / "results").rglob("*.json")) if (ROOT / "bench").exists() else []
    claims = re.findall(r"\d[\d.,]*\s*(?:x faster|times faster|% faster|ms\b|µs|TFLOP|tokens/s)", README)
    assert results or not claims, f"README claims {claims} and bench/results holds no measurement"
