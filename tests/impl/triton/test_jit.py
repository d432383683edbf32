"""The launchers pass the real JIT of Triton, not only its interpreter: binding, specialisation, compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("jit_process.py")


@pytest.mark.parametrize("arch", [80, 90])
def test_every_launcher_compiles_for_a_gpu_that_is_not_there(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[3])
    done = subprocess.run(
        [sys.executable, SCRIPT, str(arch)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launches = Counter(line.split()[0] for line in done.stdout.splitlines())
    # Two batches with tokens, with and without dropout; the empty one launches nothing.
    assert launches["gemm_kernel"] == 4 * 3, "forward, fan-out and dx"
    assert launches["shrink_kernel"] >= 4 * 3
    assert launches["grad_kernel"] >= 4 * 2
    assert launches["produce_kernel"] == 2 * 3 + 1, "each front of a group, and one long sum"
    assert launches["reduce_kernel"] >= 1, "the long sum is split"
    assert launches["group_shrink_kernel"] == launches["group_grad_kernel"] == 2, "only where adapters are present"
    assert launches["group_dx_kernel"] == 2 + 1
