"""Every kernel in every configuration, compiled for real architectures: it fits, does not spill, uses tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import triton

from twn_kernels.impl.triton.variants import variants
from twn_kernels.testing import kernel_report
from twn_kernels.testing.aot import AotWorker, compile_kernel

CASES = [(arch, variant.name) for arch in (80, 90, 100) for variant in variants(arch)]
BASELINE = Path(__file__).with_name("static_report.json")
REGENERATE = "python -m twn_kernels.testing.aot --baseline tests/impl/triton/static_report.json"
TENSOR_CORE = {80: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}}


@pytest.mark.parametrize(("arch", "name"), CASES, ids=[f"sm_{arch}-{name}" for arch, name in CASES])
def test_compiles_without_spills_on_tensor_cores(arch, name, aot_worker):
    report = aot_worker.compile(arch, name)
    assert report.spill_bytes == 0 and report.local_accesses == 0, report
    assert 0 < report.registers <= 255, report
    assert report.shared_bytes <= report.shared_limit_bytes, report
    (variant,) = [v for v in variants(arch) if v.name == name]
    if variant.tensor_core:
        assert report.tensor_core and set(report.tensor_core) <= TENSOR_CORE[arch], report
    else:
        # plain fp32 must not become tf32 behind our back
        assert not report.tensor_core, report
    _hold_to_baseline(report)


def _hold_to_baseline(report) -> None:
    """Another Triton allocates registers as it likes; the rules above hold for every version."""
    version, recorded = kernel_report.read_baseline(BASELINE)
    entry = recorded.get(f"sm_{report.arch} {report.variant}")
    if _minor(version) != _minor(triton.__version__) or entry is None:
        return
    assert kernel_report.regressions(report, entry) == [], report
    grown = kernel_report.growth(report, entry)
    if grown is not None:
        warnings.warn(f"{grown}; where that is meant: {REGENERATE}", stacklevel=2)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def test_the_baseline_lists_every_kernel():
    _, recorded = kernel_report.read_baseline(BASELINE)
    names = {f"sm_{arch} {name}" for arch, name in CASES}
    assert set(recorded) == names, f"kernels came or went; write the baseline anew: {REGENERATE}"


@pytest.mark.parametrize(("arch", "wanted"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_the_large_tile_uses_the_instructions_of_its_architecture(arch, wanted, aot_worker):
    name = next(v.name for v in reversed(variants(arch)) if v.name.startswith("gemm-forward-bf16-bf16-128"))
    assert aot_worker.compile(arch, name).tensor_core == (wanted,)


@pytest.mark.parametrize("arch", [89, 120])
def test_the_largest_tiles_fit_the_small_shared_memory(arch, aot_worker):
    for prefix in ("gemm-dx-bf16-bf16-128", "gemm-fanout-bf16-bf16-128", "grad-db-bf16-bf16"):
        for name in (v.name for v in variants(arch) if v.name.startswith(prefix)):
            report = aot_worker.compile(arch, name)
            assert report.shared_bytes <= report.shared_limit_bytes and report.spill_bytes == 0, report


def test_names_are_unique():
    for arch in (80, 90, 100):
        names = [variant.name for variant in variants(arch)]
        assert len(names) == len(set(names))


def test_a_scaling_passed_as_float64_compiles(tmp_path):
    """A compiler that hands Python floats over as fp64 (inductor) must get the same kernel arithmetic."""
    program = """
import dataclasses
from twn_kernels.impl.triton.variants import variants
from twn_kernels.testing import kernel_report
from twn_kernels.testing.aot import compile_kernel
variant = next(v for v in variants(90) if v.name.startswith("shrink-ds-bf16-bf16"))
assert variant.signature["scaling_r"] == variant.signature["scaling_e"] == "fp32"
signature = {**variant.signature, "scaling_r": "fp64", "scaling_e": "fp64"}
report = compile_kernel(variant.kernel, signature, variant.constants, arch=90, num_warps=4, num_stages=2)
print("spills", report.spill_bytes, "tensor cores", *report.tensor_core)
"""
    done = _run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("spills 0 tensor cores H"), done.stdout


def test_sizes_of_one_compile():
    """Triton turns an integer argument of 1 into a constant, which has fewer methods than a value."""
    program = """
from twn_kernels.impl.triton.variants import variants
from twn_kernels.testing import kernel_report
from twn_kernels.testing.aot import compile_kernel
never = {"M", "L", "splits", "tokens_per_split", "features_per_split", "threshold_r", "threshold_e"}
for prefix in ("gemm-forward-bf16", "gemm-fanout-bf16-fp32", "shrink-forward", "grad-da_dropout-bf16", "reduce-s"):
    variant = next(v for v in variants(90) if v.name.startswith(prefix))
    ones = {name for name, kind in variant.signature.items() if kind == "i32"} - never
    signature = {name: kind for name, kind in variant.signature.items() if name not in ones}
    config = variant.config
    compile_kernel(variant.kernel, signature, variant.constants | dict.fromkeys(ones, 1), arch=90,
                   num_warps=config.num_warps, num_stages=config.num_stages)
    print(len(ones) > 3)
"""
    done = _run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 5, done.stdout


def test_a_variant_that_does_not_exist_is_an_error_and_the_worker_lives_on():
    with AotWorker() as worker:
        with pytest.raises(RuntimeError, match="KeyError.*no-such-kernel"):
            worker.compile(90, "no-such-kernel")
        assert worker.compile(90, "reduce-s-bf16-16x64").registers > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_an_interpreting_process_cannot_compile():
    from twn_kernels.errors import ImplUnavailable

    variant = variants(90)[0]
    with pytest.raises(ImplUnavailable, match="AotWorker"):
        compile_kernel(variant.kernel, variant.signature, variant.constants, arch=90, num_warps=4, num_stages=2)


def test_a_cpu_tensor_without_the_interpreter_is_an_error():
    program = """
import torch
from twn_kernels.impl import triton
x = torch.zeros(2, 16)
none = torch.zeros(0, 16)
try:
    triton.forward(x, torch.zeros(8, 16), None, none, torch.zeros(8, 0), none, torch.zeros(8, 0), 1.0, 1.0,
                   torch.zeros(2, dtype=torch.int8), 0, 0.0, 0.0, None)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = _run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('ImplUnavailable impl="triton" needs a CUDA tensor, got one on cpu.'), done.stdout


def _run(program: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
