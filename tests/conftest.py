"""What every test gets: the interpreter switch, a seed from its own name, poisoned buffers, and the count of GPU skips.

The environment variables below are read by libraries while they are imported, so they are set before torch is.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import sys
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when @triton.jit runs. A test that compiles for a real target starts a process without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

NEEDS_GPU = "needs a GPU: torch.cuda.is_available() is False here"
PACKAGE = "twn_kernels"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu") or item.get_closest_marker("sanitizer"):
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("needs a GPU" in str(report.longrepr) for report in skipped)
    if count == 1:
        terminalreporter.write_line("1 test needs a GPU and was skipped")
    elif count:
        terminalreporter.write_line(f"{count} tests need a GPU and were skipped")
    elif not HAS_GPU:
        terminalreporter.write_line("0 tests need a GPU and were skipped")


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU (Triton kernels then run in its interpreter)."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's own id, so that a test gives the same numbers alone and in any order."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor or tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


def _poisoned(real):
    def allocate(*args, **kwargs):
        # A compiler that traces the package must see the plain allocation: frames mean nothing to it.
        if torch.compiler.is_compiling():
            return real(*args, **kwargs)
        out = real(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(out) if caller == PACKAGE or caller.startswith(PACKAGE + ".") else out

    return allocate


@pytest.fixture(scope="session")
def compiler_knows_torch() -> None:
    """The compiler lists torch's functions once; after that, it must not mistake what poisoning put in their place."""
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch, compiler_knows_torch: None) -> None:
    """Whatever the package allocates uninitialised is NaN (or the largest integer), so an unwritten element shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def cut_from_nan():
    """Give a function that returns its tensor's values as a view into a larger buffer of NaN.

    The view keeps a contiguous last dimension, has a wider row stride, and starts neither at the buffer's beginning nor
    at an aligned address, so that a kernel which reads outside its tensor reads NaN.
    """

    def cut(tensor: torch.Tensor, *, rows: int = 3, columns: int = 5) -> torch.Tensor:
        if tensor.dim() == 0 or not tensor.is_floating_point():
            raise TypeError(f"cut_from_nan needs a floating tensor of one or more dimensions, got {tensor.dtype}")
        shape = [size + 2 * rows for size in tensor.shape[:-1]] + [tensor.shape[-1] + 2 * columns]
        buffer = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
        inner = [slice(rows, rows + size) for size in tensor.shape[:-1]]
        view = buffer[(*inner, slice(columns, columns + tensor.shape[-1]))]
        view.copy_(tensor.detach())
        return view.requires_grad_(tensor.requires_grad)

    return cut


@pytest.fixture
def no_sync():
    """Give a context manager under which a CUDA synchronisation by torch is an error; it does nothing on a CPU."""

    @contextlib.contextmanager
    def guard():
        if not HAS_GPU:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return guard


@pytest.fixture(autouse=True)
def impls_never_sync(monkeypatch: pytest.MonkeyPatch, no_sync) -> None:
    """On a GPU, run every implementation's forward and backward functions under the guard against synchronisation."""
    if not HAS_GPU:
        return
    for name in ("blas", "triton", "cuda"):
        module = importlib.import_module(f"{PACKAGE}.impl.{name}")
        for function in ("forward", "fanout", "backward", "group", "group_backward"):
            monkeypatch.setattr(module, function, _guarded(getattr(module, function), no_sync))


def _guarded(function, no_sync):
    def run(*args, **kwargs):
        with no_sync():
            return function(*args, **kwargs)

    return run
