"""A part of ``csrc`` that compiles in seconds and makes a whole library: for tests of building, not of kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc: none on PATH or in /usr/local/cuda/bin")


def copy_small(target: Path) -> Path:
    """The headers, the library's definition and the copy kernel, in ``target``."""
    shutil.copytree(CSRC / "include", target / "include")
    for header in sorted(CSRC.glob("bindings/*.h")):
        (target / "bindings").mkdir(exist_ok=True)
        shutil.copy(header, target / "bindings")
    (target / "kernels").mkdir()
    shutil.copy(CSRC / "bindings.cpp", target)
    shutil.copy(CSRC / "kernels" / "copy.cu", target / "kernels")
    return target


def write_nvcc(folder: Path, body: str = "exit 1", version: str = "12.8") -> Path:
    """A compiler that says its version and, asked to compile, counts itself in ``calls`` and runs ``body``."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    says = f"echo 'Cuda compilation tools, release {version}, V{version}.0'"
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then {says}; exit 0; fi\necho called >>{folder}/calls\n{body}\n'
    )
    nvcc.chmod(0o755)
    return folder
