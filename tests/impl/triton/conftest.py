"""Make the problems beside these tests importable, and compile ahead of time in one process a test run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def aot_worker():
    """A process that compiles kernels for real architectures; this one may be interpreting them."""
    from twn_kernels.testing.aot import AotWorker

    with AotWorker() as worker:
        yield worker
