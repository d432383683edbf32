"""Make the problems beside these tests importable, and compile ahead of time in one process a test run."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def aot_worker():
    """A process that compiles kernels for real architectures; this one may be interpreting them."""
    from twn_kernels.testing.aot import AotWorker

    with AotWorker() as worker:
        yield worker


@pytest.fixture(autouse=True)
def pointers_stay_inside(monkeypatch):
    """Fail where a kernel in the interpreter loads from, or stores to, memory of none of its arguments, by pointer
    or by tensor descriptor.

    The interpreter reads any address that the process may read, so a missing mask whose garbage lands in columns that
    are never stored would go unseen here and be an illegal access on a GPU.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    spans: list[tuple[int, int]] = []
    bind, builder = interpreter.GridExecutor._init_args_hst, interpreter.InterpreterBuilder

    def collect(self, args, kwargs):
        bound = bind(self, args, kwargs)
        tensors = [getattr(value, "base", value) for value in bound[0]]  # a descriptor's tensor is its base
        spans[:] = [
            (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            for storage in (value.untyped_storage() for value in tensors if hasattr(value, "untyped_storage"))
        ]
        return bound

    def checked(name, mask_at):
        real = getattr(builder, name)

        def access(self, pointers, *rest, **named):
            size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
            used = np.broadcast_to(rest[mask_at].data, pointers.data.shape).astype(bool)
            addresses = pointers.data[used]
            inside = np.zeros(addresses.shape, dtype=bool)
            for start, end in spans:
                inside |= (addresses >= start) & (addresses + np.uint64(size) <= end)
            assert inside.all(), f"{name}: {int((~inside).sum())} addresses lie outside every argument"
            return real(self, pointers, *rest, **named)

        return access

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", collect)
    monkeypatch.setattr(builder, "create_masked_load", checked("create_masked_load", 0))
    monkeypatch.setattr(builder, "create_masked_store", checked("create_masked_store", 1))
    yield
