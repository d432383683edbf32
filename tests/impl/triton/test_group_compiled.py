"""What the compiler makes of a site group's product: its launcher through the real JIT, and its machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twn_kernels.impl.triton.group_variants import group_compilations

SCRIPT = Path(__file__).with_name("group_jit_process.py")
# Of one processor: registers, and shared memory with the 1 KiB that each block of threads takes beside its own.
REGISTERS = 65536
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


def _names(arch: int) -> dict[str, tuple]:
    return {fields[0]: fields for fields in group_compilations(arch)}


@pytest.mark.parametrize("arch", [80, 90])
def test_the_launcher_compiles_for_a_gpu_that_is_not_there(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[3])
    done = subprocess.run(
        [sys.executable, SCRIPT, str(arch)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [line.split() for line in done.stdout.splitlines()]
    assert len(launches) == 7, "nothing is launched without tokens"
    decode, prefill, mixed, odd, base, *ones = launches
    if arch == 80:
        assert not any(set(marks[1:]) for marks in launches)
        return
    assert decode[1:] == ["pdl", "waits", "releases", "prefetches"]
    assert prefill[1:] == ["pdl", "descriptors", "waits", "releases"]
    assert mixed[1:] == odd[1:] == ones[0][1:] == ones[1][1:] == ["pdl", "waits", "releases"]
    assert base[1:] == decode[1:]
    assert prefill[0] == "132", "one program a processor walks all tiles"


@pytest.mark.parametrize(("arch", "product"), [(90, "HGMMA"), (100, "UTCHMMA")])
@pytest.mark.parametrize("site", ["qkv", "gate_up"])
def test_prefill_copies_by_descriptor_and_multiplies_on_the_newest_tensor_cores(site, arch, product, aot_worker):
    (name,) = [n for n in _names(arch) if n.startswith(f"group-{site}-bf16-bf16-128x") and "descriptors-all" in n]
    report = aot_worker.compile(arch, name)
    assert report.bulk_copy == ("UTMALDG",) and report.tensor_core == (product,), report


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_programs_of_a_processor_fit(arch, aot_worker):
    checked = 0
    for name, fields in _names(arch).items():
        resident = fields[2].resident
        if resident > 1:
            report = aot_worker.compile(arch, name)
            assert resident * (report.shared_bytes + 1024) <= SHARED_BYTES[arch], report
            assert resident * report.num_warps * 32 * report.registers <= REGISTERS, report
            checked += 1
    assert checked > 0
