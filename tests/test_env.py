"""The environment report: complete, honest about what it could not learn, and harmless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twn_kernels import env

ROOT = Path(__file__).resolve().parent.parent
KEYS = [
    "twn_kernels", "python", "os", "cpu", "libraries", "torch", "gpus", "nvcc", "extension", "implementations",
    "choices", "peers", "variables", "cuda_libraries",
]  # fmt: skip


def fake_driver(folder: Path, monkeypatch, output: str, code: int = 0) -> None:
    """Put a driver tool first on PATH that prints ``output``: there is no other way to have two GPUs here."""
    (folder / "output").write_text(output)
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat '{folder}/output'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_report_is_complete_and_fits_json_and_lines():
    report = env.collect()
    assert list(report) == KEYS
    assert json.loads(json.dumps(report)) == report
    unknown = [line for line in env.render(report).splitlines() if "unknown: " in line]
    assert unknown == []
    assert report["libraries"]["torch"] == __import__("torch").__version__
    assert set(report["implementations"]) == {"auto", "blas", "cuda", "reference", "triton"}
    assert report["implementations"]["reference"] == "available"


def test_every_probe_is_guarded(monkeypatch):
    def broken(*_, **__):
        raise OSError("broken on purpose")

    probes = [name for name in vars(env) if name.startswith("_") and callable(getattr(env, name))]
    probes = [name for name in probes if name not in ("_guarded", "_cell") and not name.startswith("__")]
    assert len(probes) >= 9
    for name in probes:
        monkeypatch.setattr(env, name, broken)
    report = env.collect()
    assert list(report) == KEYS
    for name in (
        "os",
        "torch",
        "gpus",
        "nvcc",
        "extension",
        "implementations",
        "choices",
        "variables",
        "cuda_libraries",
    ):
        assert report[name] == "unknown: OSError: broken on purpose"
    assert "unknown: OSError: broken on purpose" in env.render(report)


def test_gpus_are_read_from_the_driver(tmp_path, monkeypatch):
    rows = ("NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 570.1", "NVIDIA L4, 8.9, 23034 MiB, 570.1")
    fake_driver(tmp_path, monkeypatch, "\n".join(rows) + "\n")
    assert env.collect_gpus() == [
        {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory": "81559 MiB", "driver": "570.1"},
        {"name": "NVIDIA L4", "capability": "8.9", "memory": "23034 MiB", "driver": "570.1"},
    ]


def test_a_broken_driver_is_quoted(tmp_path, monkeypatch):
    fake_driver(tmp_path, monkeypatch, "Failed to initialize NVML: Driver/library version mismatch", code=18)
    assert env.collect_gpus() == "unknown: RuntimeError: Failed to initialize NVML: Driver/library version mismatch"


def test_our_variables_are_listed_and_a_misspelt_one_is_pointed_out(monkeypatch):
    monkeypatch.setenv("TWN_IMPL", "blas")
    misspelt = "TWN_" + "IMPLEMENTATION"
    monkeypatch.setenv(misspelt, "triton")
    variables = env.collect()["variables"]
    assert variables["TWN_IMPL"] == "blas"
    assert variables[misspelt] == "triton (not read: no such variable)"


def test_the_override_shows_in_what_auto_takes(monkeypatch):
    monkeypatch.setenv("TWN_IMPL", "reference")
    assert env.collect()["implementations"]["auto"].startswith("reference (")
    monkeypatch.setenv("TWN_IMPL", "foo")
    report = env.collect()
    assert report["implementations"]["auto"].startswith("fails: ") and "foo" in report["implementations"]["auto"]
    assert report["implementations"]["blas"] == "available"
    assert report["variables"]["TWN_IMPL"] == "foo (no known name; there are auto, blas, cuda, reference, triton)"


def test_the_table_of_measurements_is_shown_range_by_range(monkeypatch):
    from twn_kernels.ops import choice_table

    def row(low, high, impl, site="qkv"):
        source = "bench/results/nvidia-h200/a.json"
        return choice_table.Row("sm_90", "bf16", site, low, high, impl, source, ("c",), {"c": {impl: 1.0}})

    monkeypatch.setattr(
        choice_table, "packaged", lambda: (row(64, 99, "blas"), row(1, 63, "triton"), row(1, 8, "cuda", "o"))
    )
    assert env.collect()["choices"] == {
        "rows": "3",
        "sm_90 bf16 qkv": "triton at 1 to 63 tokens, blas at 64 to 99 tokens",
        "sm_90 bf16 o": "cuda at 1 to 8 tokens",
    }
    monkeypatch.setattr(choice_table, "packaged", tuple)
    assert env.collect()["choices"] == {"rows": "0; nothing was measured yet: auto takes blas on every GPU"}


def test_peers_are_named_with_their_version_or_as_absent(monkeypatch):
    real = env.importlib.metadata.version
    monkeypatch.setattr(env.importlib.metadata, "version", lambda name: "9.9" if name == "vllm" else real(name))
    report = env.collect()
    assert report["peers"]["vllm"] == "9.9" and report["peers"]["punica-kernels"] is None
    assert "peers.punica-kernels" in env.render(report) and "not installed" in env.render(report)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mapped_cuda_libraries_are_found(monkeypatch):
    maps = (
        "7f00-7f01 r-xp 00000000 00:01 5   /opt/my libs/libcudart-9f2.so.12\n"
        "7f01-7f02 r-xp 00000000 00:01 6   /usr/lib/libc.so.6\n"
        "7f02-7f03 r-xp 00000000 00:01 7   /usr/lib/libcublasLt.so.13.0.1\n"
        "7f03-7f04 rw-p 00000000 00:00 0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: maps)
    assert env._cuda_libraries() == ["/opt/my libs/libcudart-9f2.so.12", "/usr/lib/libcublasLt.so.13.0.1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a report names the GPU, so it asks the driver")
def test_reporting_leaves_cuda_alone():
    code = "import torch\nfrom twn_kernels import env\nenv.collect()\nraise SystemExit(torch.cuda.is_initialized())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
