"""The fixtures that every other test leans on do what they claim."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def allocate(module: str, expression: str) -> torch.Tensor:
    """Evaluate an allocation as if it stood in ``module``."""
    return eval(expression, {"__name__": module, "torch": torch, "x": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    "expression",
    [
        "torch.empty(4)",
        "torch.empty((2, 2), dtype=torch.bfloat16)",
        "torch.empty_like(x)",
        "torch.empty_strided((2, 2), (3, 1))",
        "x.new_empty(5)",
        "x.new_empty_strided((2, 2), (2, 1))",
    ],
)
def test_what_the_package_allocates_is_nan(expression):
    assert allocate("twn_kernels.impl.blas", expression).isnan().all()


def test_integers_are_poisoned_and_others_are_left_alone():
    assert (allocate("twn_kernels.ops", "torch.empty(4, dtype=torch.int8)") == 127).all()
    assert allocate("twn_kernels.ops", "torch.empty(0)").numel() == 0
    assert allocate("twn_kernels.ops", "torch.empty(3, device='meta')").device.type == "meta"
    marked = allocate("twn_kernels_elsewhere", "torch.empty(3, dtype=torch.int64).fill_(7)")
    assert (marked == 7).all()


def test_a_compiler_may_trace_a_poisoned_allocation():
    namespace = {"__name__": "twn_kernels.modules", "torch": torch}
    exec("def fill(x):\n    out = torch.empty_like(x)\n    out.copy_(x)\n    return out + 1", namespace)
    x = torch.randn(3)
    assert torch.equal(torch.compile(namespace["fill"], fullgraph=True, backend="aot_eager")(x), x + 1)


def test_a_cut_tensor_is_the_same_inside_nan(cut_from_nan):
    tensor = torch.randn(4, 6, requires_grad=True)
    view = cut_from_nan(tensor)
    assert torch.equal(view, tensor) and view.requires_grad and view.is_leaf
    assert view.stride(-1) == 1 and view.stride(0) > 6 and view.storage_offset() > 0
    whole = torch.as_strided(view.detach(), (view.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int(whole.isfinite().sum()) == tensor.numel()


def test_the_seed_follows_the_test(seed):
    first = torch.randn(4)
    torch.manual_seed(seed)
    assert torch.equal(torch.randn(4), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a run without a GPU says")
@pytest.mark.parametrize(
    ("count", "line"), [(1, "1 test needs a GPU and was skipped"), (3, "3 tests need a GPU and were skipped")]
)
def test_a_run_without_a_gpu_counts_what_it_skipped(tmp_path, count, line):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\n  sanitizer: x\n")
    tests = [f"@pytest.mark.gpu\ndef test_{index}(): raise ValueError\n" for index in range(count)]
    (tmp_path / "test_x.py").write_text("import pytest\n" + "".join(tests) + "def test_here(): pass\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "."], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert line in lines
    assert lines[-1].startswith(f"1 passed, {count} skipped")
