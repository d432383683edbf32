"""The demo: its report is complete and its figures hold together; what it needs is asked for first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twn_kernels import demo
from twn_kernels.errors import MissingDependency

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[dict, list[str]]:
    """Figures and report of one run in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TWN_IMPL": "blas"}
    command = [sys.executable, "-m", "twn_kernels", "demo", "--json", "--directory", str(tmp_path_factory.mktemp("d"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


def test_the_numbers_agree_with_peft(ran):
    peft = ran[0]["peft"]
    assert peft["adapter_effect"] > 1000 * peft["largest_difference"]
    assert peft["greedy_tokens_equal"] == peft["greedy_tokens"] == 64
    assert ran[0]["patch"]["unpatch_restores_modules"] and ran[0]["patch"]["beyond_adapters_percent_of_base"] <= 1


def test_each_mode_tells_who_decided_who_closed_and_who_fell_back(ran):
    figures, lines = ran
    modes = figures["embed"]["modes"]
    assert figures["embed"]["shape"][0] == len(figures["embed"]["gate_scores"]) == 8
    for counts in modes.values():
        assert counts["decided"] == counts["closed"] + counts["fell_back"] and counts["seconds"] > 0
    assert modes["never"]["decided"] == modes["never"]["tokens"] == 0 and modes["always"]["decided"] == 8
    assert 0 < modes["auto"]["decided"] < 8
    shown = {line.split()[0]: line.split()[1:4] for line in lines if line.split()[:1] and line.split()[0] in modes}
    for mode, counts in modes.items():
        assert shown[mode] == [str(counts[name]) for name in ("decided", "closed", "fell_back")]
    assert any(line.strip().startswith("fell back: no closed thought within 24 tokens") for line in lines)


def test_rows_are_called_fused_only_where_a_fused_kernel_ran(ran):
    assert "patched, rows of both adapters" in ran[0]["time"]
    assert not [name for name in ran[0]["time"] if name.startswith("fused")]


def test_no_progress_bar_is_in_the_report(ran):
    assert not [line for line in ran[1] if "%|" in line or "it/s" in line or "Loading weights" in line]
    assert not [line for line in ran[1] if "card" in line.lower()]


def test_what_is_missing_is_said_first_and_at_once(monkeypatch, tmp_path):
    for module in ("peft", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    said: list[str] = []
    with pytest.raises(
        MissingDependency, match="not installed: peft, scikit-learn. Run: pip install peft scikit-learn$"
    ):
        demo.run_demo(tmp_path / "new", say=said.append)
    assert said == [] and not (tmp_path / "new").exists()
