"""Builds the extension where the installer did not: once for a user and a GPU, when ``impl="cuda"`` is first asked for.

The library goes into ``$XDG_CACHE_HOME/twn_kernels`` (``~/.cache/twn_kernels``), in a folder that is named by all it
was made of, so that another torch, nvcc, GPU or release of this package gets another. Looking never builds; several
processes that ask at once build once. ``TWN_BUILD_CUDA=0`` keeps it from building, as it does when it was set while
installing and is not set now.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from twn_kernels.impl.cuda import build
from twn_kernels.impl.cuda.build import LIBRARY, CannotBuild
from twn_kernels.settings import ENV_BUILD_CUDA

__all__ = ["RECORD", "Order", "archs_here", "capabilities", "find", "make", "order"]

RECORD = "_build_info.json"

_failed: dict[Path, str] = {}  # by folder: what failed is not tried again in this process
_one_at_a_time = threading.Lock()


class Order(NamedTuple):
    """A build that can be made here.

    Attributes:
        csrc: the sources.
        archs: architectures of the GPUs that are here.
        tools: what would build it.
        folder: where the library and its record go.
    """

    csrc: Path
    archs: str
    tools: build.Tools
    folder: Path


def order(package: Path, wanted: str) -> Order:
    """What asking for the extension would build; builds nothing.

    Args:
        package: folder of the installed package.
        wanted: ``TWN_BUILD_CUDA`` as it was when installing; empty where that is not known.

    Raises:
        CannotBuild: it would build nothing; the message says why.
    """
    switch = os.environ.get(ENV_BUILD_CUDA) or ("0 when installing" if wanted == "0" else "auto")
    if switch.startswith("0"):
        raise CannotBuild(f"{ENV_BUILD_CUDA}={switch}; set {ENV_BUILD_CUDA}=1")
    if switch not in build.SWITCHES:
        raise CannotBuild(f'{ENV_BUILD_CUDA} is "{switch}"; expected auto, 0 or 1')
    archs, csrc, tools = archs_here(), _csrc(package), _tools(*_what_tools_depend_on())
    folder = _folder(csrc, archs, tools.nvcc_version)
    if folder in _failed:
        raise CannotBuild(_failed[folder])
    return Order(csrc, archs, tools, folder)


def find(package: Path) -> Path | None:
    """The folder of an earlier build that fits what is here now; None where there is none.

    Where nvcc is gone, a library that any version of it made serves.
    """
    try:
        csrc, archs = _csrc(package), archs_here()
        try:
            folders = [_folder(csrc, archs, _tools(*_what_tools_depend_on()).nvcc_version)]
        except CannotBuild:
            any_version = _folder(csrc, archs, "*")
            folders = sorted(any_version.parent.glob(any_version.name))
    except (CannotBuild, OSError):
        return None
    return next((folder for folder in folders if (folder / LIBRARY).is_file() and (folder / RECORD).is_file()), None)


def make(made: Order) -> Path:
    """Build, or wait for the process that does; the folder that then holds the library.

    Raises:
        CannotBuild: it failed, here and now or earlier in this process.
    """
    with _one_at_a_time:
        if made.folder in _failed:
            raise CannotBuild(_failed[made.folder])
        try:
            return _make(made)
        except (CannotBuild, OSError) as error:
            _failed[made.folder] = str(error)
            raise CannotBuild(_failed[made.folder]) from error


def _make(made: Order) -> Path:
    asked = time.time()
    try:
        made.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = Path(f"{made.folder}.lock").open("w")
    except OSError as error:
        raise CannotBuild(f"{made.folder.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error
    failure, unfinished = Path(f"{made.folder}.failed"), made.folder.with_name(f"unfinished-{made.folder.name}")
    with lock, _locked(lock):
        if (made.folder / LIBRARY).is_file():
            return made.folder
        with contextlib.suppress(OSError):
            if failure.stat().st_mtime >= asked:  # the process that was waited for has tried just now
                raise CannotBuild(failure.read_text())
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(made.folder, ignore_errors=True)
        try:
            _build(made, unfinished)
        except CannotBuild as error:
            failure.write_text(str(error))
            raise
        failure.unlink(missing_ok=True)
        unfinished.rename(made.folder)
        return made.folder


def _build(made: Order, folder: Path) -> None:
    archs = build.parse_archs(made.archs)
    files = len(build.steps(made.csrc, folder, archs, made.tools))
    _say(
        f"building the CUDA extension for {made.archs} with nvcc {made.tools.nvcc_version} "
        f"({files} files, once; {ENV_BUILD_CUDA}=0 keeps it from that) ..."
    )
    start = time.monotonic()
    objects = folder / "objects"
    try:
        record = build.compile_library(made.csrc, objects, folder / LIBRARY, archs, made.tools)
    except CannotBuild as error:
        log = Path(f"{made.folder}.log")
        with contextlib.suppress(OSError):
            shutil.copy(objects / "build.log", log)
        shutil.rmtree(folder, ignore_errors=True)
        _say(f"... failed after {time.monotonic() - start:.0f} s; what the compilers said is in {log}")
        raise CannotBuild(str(error).replace(str(objects / "build.log"), str(log))) from error
    shutil.rmtree(objects)
    (folder / RECORD).write_text(json.dumps({"built": True, "reason": "", **record}) + "\n")
    _say(f"... done in {time.monotonic() - start:.0f} s: {made.folder}")


def _say(text: str) -> None:
    print(f"twn_kernels: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(file):
    import fcntl  # of Unix; no other system gets here

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("waiting for another process that builds the CUDA extension ...")
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file unlocks it


def capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that torch sees here, each once."""
    import torch

    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def archs_here() -> str:
    """What a build for this machine is for: ``TORCH_CUDA_ARCH_LIST``, else the GPUs that are here.

    Raises:
        CannotBuild: there is no GPU that the kernels run on, or the list is misspelt.
    """
    found = capabilities()
    if not found:
        raise CannotBuild("torch sees no CUDA GPU, and it runs on nothing else")
    here = [f"{major}.{minor}{'a' * ((major, minor) == (9, 0))}" for major, minor in found if (major, minor) >= (8, 0)]
    if not here:
        raise CannotBuild(f"this GPU's compute capability is {found[-1][0]}.{found[-1][1]}; it needs 8.0 or later")
    return ";".join(map(str, build.parse_archs(build.named_archs() or ";".join(here))))


def _csrc(package: Path) -> Path:
    """The sources: inside an installed package, beside it in a checkout."""
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise CannotBuild(f"its sources are not in {package}; install the package again")


def _folder(csrc: Path, archs: str, nvcc_version: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "twn_kernels"
    parts = (_digest(csrc), archs, importlib.metadata.version("torch"), os.environ.get("CXX") or "")
    return cache.absolute() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}-nvcc-{nvcc_version}"


@functools.lru_cache(maxsize=4)
def _digest(csrc: Path) -> str:
    return build.digest(csrc)


def _what_tools_depend_on() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "PATH", "CXX"))


@functools.lru_cache(maxsize=4)
def _tools(*_environment: str | None) -> build.Tools:
    # nvcc is started to ask for its version: once is enough.
    return build.find_tools()
