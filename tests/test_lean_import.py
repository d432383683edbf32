"""``import twn_kernels`` is cheap and touches nothing that a laptop may lack."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MS = 50
RUNS = 5
HEAVY = ("PIL", "matplotlib", "peft", "safetensors", "sklearn", "torchvision", "tqdm", "transformers", "triton")

MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import {module}
elapsed_ms = (time.perf_counter() - start) * 1000
print(json.dumps({{
    "ms": elapsed_ms,
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}}))
"""


def measure(module: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", MEASURE.format(module=module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def heavy(modules: list[str]) -> list[str]:
    return [name for name in modules if name.split(".")[0] in HEAVY]


def test_the_import_costs_little_and_brings_nothing_heavy():
    runs = [measure("twn_kernels") for _ in range(RUNS)]
    assert statistics.median(run["ms"] for run in runs) < LIMIT_MS
    assert heavy(runs[0]["new"]) == []
    assert not any(run["cuda"] for run in runs)


def test_the_ops_bring_nothing_heavy_either():
    run = measure("twn_kernels.ops")
    assert heavy(run["new"]) == []
    assert not run["cuda"]


def test_the_import_needs_no_torch():
    code = "import sys, twn_kernels, twn_kernels.env, twn_kernels.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
