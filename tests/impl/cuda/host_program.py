"""Compiles the half of ``csrc`` that needs no instruction of a GPU, with the plain C++ compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INCLUDE = ROOT / "csrc" / "include"
HOST = Path(__file__).with_name("host")
CXX = shutil.which(os.environ.get("CXX", "g++"))

needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler: neither $CXX nor g++ is on PATH")


def program(name: str, *flags: str) -> Path:
    """The program made of ``host/<name>.cpp``, compiled once for its text, its headers' and ``flags``."""
    return _compiled(name, ("-O2", "-pthread", *flags), "program")


def library(name: str, *flags: str) -> ctypes.CDLL:
    """The shared library made of ``host/<name>.cpp``; its functions are declared ``extern "C"`` there."""
    return ctypes.CDLL(str(_compiled(name, ("-O2", "-pthread", "-fPIC", "-shared", *flags), "library")))


def run(path: Path, *arguments: object, seconds: float = 120, **variables: str) -> str:
    """What the program prints; fails with its output where it does not end with 0."""
    command = [str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env={**os.environ, **variables})
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _compiled(name: str, flags: tuple[str, ...], kind: str) -> Path:
    source = HOST / f"{name}.cpp"
    texts = [source, *sorted(HOST.glob("*.h")), *sorted(INCLUDE.rglob("*.h"))]
    digest = hashlib.sha256(repr((CXX, flags, kind, [path.read_bytes() for path in texts])).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"twn_kernels-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{name}-{digest}.{'so' if kind == 'library' else 'exe'}"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")  # two processes may want it at once
        command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}", *flags]
        done = subprocess.run([*command, str(source), "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(target)
    return target
