"""The built library, kernel by kernel: no spills, 16-byte words, and the instructions that each kernel is made for."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from twn_kernels.impl.cuda import build, loader
from twn_kernels.testing import cuda_report, kernel_report

BASELINE = Path(__file__).with_name("static_report.json")
REGENERATE = "python -m twn_kernels.testing.cuda_report --baseline tests/impl/cuda/static_report.json"
# Part of a kernel's name, and what its code must hold.
PROMISED = {
    "decode_kernelI": {"HMMA", "LDG", "LDS"},
    "CopyPipe": {"LDGSTS"},
    "BulkPipe": {"UBLKCP"},
    "prefill_kernelI": {"HGMMA", "UTMALDG", "LDS"},
    "gate_kernelI": {"LDG"},
    "pool_kernelE": {"LDG", "STG"},
    "gated_kernelI": {"LDG", "STG"},
    "rows_kernelI": {"LDG", "STG"},
    "copy_kernelI5uint4": {"LDG", "STG"},
}


@pytest.fixture(scope="module")
def reports():
    info = loader.build_info()
    if not info.built:
        pytest.skip(f"needs the CUDA extension, which is {info}")
    return cuda_report.report(info.path)


def test_no_kernel_spills(reports):
    assert [f"sm_{r.arch} {r.variant}" for r in reports if r.spill_bytes or r.local_accesses] == []


def test_every_kernel_holds_the_instructions_that_it_is_made_for(reports):
    seen = set()
    for kernel in reports:
        code = {*kernel.tensor_core, *kernel.bulk_copy, *kernel.wide}
        for part, promised in PROMISED.items():
            if part in kernel.variant:
                seen.add(part)
                assert promised <= code, kernel
    kernels = loader.build_info().kernels.split()
    of = {"BulkPipe": "decode_sm90", "prefill_kernelI": "prefill_sm90a"}
    absent = {part for part, source in of.items() if source not in kernels}
    assert seen == PROMISED.keys() - absent


def test_the_build_is_no_worse_than_the_baseline(reports):
    """Another nvcc allocates registers as it likes; what stands above holds for every one."""
    version, recorded = cuda_report.read_baseline(BASELINE)
    info = loader.build_info()
    if info.nvcc != version:
        pytest.skip(f"the baseline is of nvcc {version}, the build of {info.nvcc}")
    for kernel in reports:
        entry = recorded.get(f"sm_{kernel.arch} {kernel.variant}")
        if entry is None:
            continue
        assert kernel_report.regressions(kernel, entry) == [], kernel
        if (grown := kernel_report.growth(kernel, entry)) is not None:
            warnings.warn(f"{grown}; where that is meant: {REGENERATE}", stacklevel=1)


def test_the_baseline_lists_every_kernel(reports):
    if loader.build_info().archs != build.DEFAULT_ARCHS:
        pytest.skip("built for other architectures than those of the baseline")
    _, recorded = cuda_report.read_baseline(BASELINE)
    names = {f"sm_{kernel.arch} {kernel.variant}" for kernel in reports}
    assert set(recorded) == names, f"kernels came or went; write the baseline anew: {REGENERATE}"
