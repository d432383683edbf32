"""How ``csrc`` becomes one library: which sources, for which architectures, by which commands.

Imports the standard library only and nothing of the package, since ``setup.py`` loads this file by its path before
there is a package; :mod:`.first_use` imports it as a module. No GPU and no network is touched: torch is found, not
imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "DEFAULT_ARCHS", "LIBRARY", "SWITCHES", "Arch", "CannotBuild", "Step", "Tools", "compile_library", "digest",
    "find_tools", "jobs", "named_archs", "parse_archs", "sources", "steps",
]  # fmt: skip

LIBRARY = "_C.abi3.so"
SWITCHES = ("auto", "0", "1")  # of TWN_BUILD_CUDA
DEFAULT_ARCHS = "8.0;8.9;9.0a;9.0+PTX"  # 9.0a code is for Hopper only, so what later cards compile at load is plain 9.0

_TARGET_TORCH = "0x020a000000000000"  # stable ABI of torch 2.10: one binary for it and everything later
_OLDEST_ARCH = (8, 0)  # bf16 tensor cores begin there
_OLDEST_NVCC = 12  # 9.0a begins there
_BYTES_PER_JOB = 2**31  # one nvcc takes up to 2 GiB
_SOURCES = ("bindings.cpp", "bindings/*.cpp", "kernels/*.cu")


class CannotBuild(Exception):
    """There will be no library; the message says why and, after a semicolon, what to do."""


class Tools(NamedTuple):
    """What a build uses: the torch whose headers it reads, and two compilers."""

    torch: Path
    torch_version: str
    nvcc: str
    nvcc_version: str
    cxx: tuple[str, ...]


class Arch(NamedTuple):
    """One entry of an architecture list: ``9.0a+PTX`` is ``((9, 0), "a", True)``."""

    number: tuple[int, int]
    suffix: str
    ptx: bool

    def __str__(self) -> str:
        return f"{self.number[0]}.{self.number[1]}{self.suffix}{'+PTX' * self.ptx}"


class Step(NamedTuple):
    """The compilation of one source."""

    source: Path
    object: Path
    command: list[str]


def find_tools() -> Tools:
    """Torch, nvcc and the C++ compiler of this environment.

    Raises:
        CannotBuild: one of them is missing or too old.
    """
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"it is built on Linux alone, not on {sys.platform}")
    torch, (nvcc, nvcc_version) = _find_torch(), _find_nvcc()
    cxx = tuple(shlex.split(os.environ.get("CXX") or "g++"))
    if shutil.which(cxx[0]) is None:
        raise CannotBuild(f"no C++ compiler: {cxx[0]} was not found; install g++ or set CXX")
    return Tools(torch, importlib.metadata.version("torch"), nvcc, nvcc_version, cxx)


def _find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild("no torch when installing; install torch first and pass --no-build-isolation")
    return Path(spec.origin).parent


def _find_nvcc() -> tuple[str, str]:
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        raise CannotBuild("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")
    found = re.search(r"release (\d+)\.(\d+)", subprocess.getoutput(shlex.join([nvcc, "--version"])))
    if found is None or int(found[1]) < _OLDEST_NVCC:
        raise CannotBuild(f"{nvcc} is no nvcc {_OLDEST_NVCC}.0 or later; install a newer CUDA toolkit")
    return nvcc, f"{found[1]}.{found[2]}"


def named_archs() -> str | None:
    """The list that the user asks for; None where there is none."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or None


def parse_archs(text: str) -> list[Arch]:
    """The architectures of ``text`` that the kernels have code for: 8.0 and later.

    Raises:
        CannotBuild: an entry is misspelt, or none is left.
    """
    archs = []
    for name in filter(None, re.split(r"[;,\s]+", text)):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            raise CannotBuild(f'TORCH_CUDA_ARCH_LIST names "{name}"; write it like "8.0;9.0a+PTX"')
        archs.append(Arch((int(found[1]), int(found[2])), found[3], bool(found[4])))
    archs = [arch for arch in archs if arch.number >= _OLDEST_ARCH]
    if not archs:
        raise CannotBuild(f'TORCH_CUDA_ARCH_LIST is "{text}"; name one of 8.0 or later')
    return archs


def sources(csrc: Path) -> list[Path]:
    """What is compiled of ``csrc``, in a fixed order; nothing is listed by hand."""
    return sorted(path for pattern in _SOURCES for path in csrc.glob(pattern))


def digest(csrc: Path) -> str:
    """Changes with every file that a build of ``csrc`` depends on, and with this file's own flags."""
    total = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in csrc.rglob("*.*") if path.is_file()):
        total.update(f"{path.relative_to(csrc)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def steps(csrc: Path, build: Path, archs: Sequence[Arch], tools: Tools) -> list[Step]:
    """How each source is compiled into ``build``.

    ``NAME_smXY.cu`` gets the architectures from X.Y on, up to those of a newer sibling of that ``NAME``.
    ``NAME_smXYa.cu`` gets X.Ya alone, where the list has X.Y in any form. A source that gets none is left out; where
    it gets one, every source sees the macro ``TWN_SMXY`` (``TWN_SMXYA``).
    """
    found = sources(csrc)
    chosen = {source: _archs_of(source, archs, found) for source in found}
    macros = sorted({f"-DTWN_SM{_part(source).upper()}" for source in chosen if _part(source) and chosen[source]})
    shared = ["-std=c++17", *macros, f"-I{csrc / 'include'}"]
    device = [tools.nvcc, *shared, "-O3", "-lineinfo", "-Xcompiler=-fPIC", "-ccbin", tools.cxx[0]]
    host = [*tools.cxx, *shared, "-O2", "-fPIC", f"-DTORCH_TARGET_VERSION={_TARGET_TORCH}", f"-I{tools.torch}/include"]
    found = []
    for source, own in chosen.items():
        if not own:
            continue
        target = build / source.relative_to(csrc).parent / f"{source.name}.o"
        compiler = [*device, *_arch_flags(own)] if source.suffix == ".cu" else host
        dependencies = ["-MD", "-MF", f"{target}.d"]
        found.append(Step(source, target, [*compiler, *dependencies, "-c", str(source), "-o", str(target)]))
    return found


def _part(source: Path) -> str:
    """``"90a"`` of ``prefill_sm90a.cu``; nothing where a source is for every architecture."""
    found = re.search(r"_sm(\d{2,3}[af]?)$", source.stem) if source.suffix == ".cu" else None
    return found[1] if found else ""


def _archs_of(source: Path, archs: Sequence[Arch], everything: Iterable[Path]) -> list[Arch]:
    if not _part(source):
        return list(archs)
    number, suffix = _named(source)
    if suffix:
        return [Arch(number, suffix, False)] if any(arch.number == number for arch in archs) else []
    name = source.stem.rpartition("_sm")[0]
    siblings = [_named(other) for other in everything if _part(other) and other.stem.rpartition("_sm")[0] == name]
    end = min((other for other, letter in siblings if not letter and other > number), default=(sys.maxsize, 0))
    return [arch for arch in archs if number <= arch.number < end]


def _named(source: Path) -> tuple[tuple[int, int], str]:
    """``((9, 0), "a")`` of ``prefill_sm90a.cu``."""
    part = _part(source)
    digits = part.rstrip("af")
    return (int(digits[:-1]), int(digits[-1])), part[len(digits) :]


def _arch_flags(archs: Sequence[Arch]) -> list[str]:
    flags = []
    for arch in archs:
        name = f"{arch.number[0]}{arch.number[1]}{arch.suffix}"
        if arch.suffix or not any(other.number == arch.number and other.suffix == "a" for other in archs):
            flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if arch.ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def compile_library(csrc: Path, build: Path, library: Path, archs: Sequence[Arch], tools: Tools) -> dict[str, str]:
    """Compile and link; the library appears whole or not at all, and all that the compilers say stands in a log.

    Args:
        csrc: the sources.
        build: folder for objects and ``build.log``. One that was used before saves what has not changed (with ninja).
        library: what to make.

    Returns:
        The record of the build: ``archs``, ``nvcc``, ``torch``, ``kernels``, ``sources``, ``seconds``.

    Raises:
        CannotBuild: a compiler failed.
    """
    build.mkdir(parents=True, exist_ok=True)
    with _alone_in(build):
        return _compile_library(csrc, build, library, archs, tools)


def _compile_library(csrc: Path, build: Path, library: Path, archs: Sequence[Arch], tools: Tools) -> dict[str, str]:
    start, identity, plan = time.monotonic(), digest(csrc), steps(csrc, build, archs, tools)
    for folder in {library.parent, *(step.object.parent for step in plan)}:
        folder.mkdir(parents=True, exist_ok=True)
    log, unfinished = build / "build.log", library.with_name(f"{library.name}.{os.getpid()}")
    log.write_text("")
    ninja = _ninja()
    if ninja:
        (build / "build.ninja").write_text("".join(map(_ninja_rule, range(len(plan)), plan)))
        _run([[*ninja, "-C", str(build), "-j", str(jobs())]], log)
    else:
        _run([step.command for step in plan], log, jobs())
    links = [f"-L{tools.torch}/lib", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    objects = [str(step.object) for step in plan]
    try:
        # Without --no-undefined, a launcher that nobody wrote would show only when the library is loaded.
        link = [tools.nvcc, "-shared", "-Xlinker=--no-undefined", "-ccbin", tools.cxx[0], *objects, *links]
        _run([[*link, "-o", str(unfinished)]], log)
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)
    return {
        "archs": ";".join(map(str, archs)),
        "nvcc": tools.nvcc_version,
        "torch": tools.torch_version,
        "kernels": " ".join(step.source.stem for step in plan if step.source.suffix == ".cu"),
        "sources": identity,
        "seconds": f"{time.monotonic() - start:.0f}",
    }


@contextlib.contextmanager
def _alone_in(folder: Path):
    """One build at a time: of two, one takes the other's notes on headers, and an object would be kept for ever."""
    import fcntl  # of Unix; no other system gets here

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def jobs() -> int:
    """How many compilers run at once: ``MAX_JOBS``, else as many as cores and memory allow."""
    named = os.environ.get("MAX_JOBS")
    if named:
        if not named.isdecimal() or int(named) < 1:
            raise CannotBuild(f'MAX_JOBS is "{named}"; give it a whole number from 1 on')
        return int(named)
    return max(1, min(len(os.sched_getaffinity(0)), _free_bytes() // _BYTES_PER_JOB))


def _free_bytes() -> int:
    """Memory that can still be had: of the machine and, where a container is given less, of the container."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    if available:
        found = [int(available[1]) * 1024]
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min(found)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _ninja() -> list[str] | None:
    """The command of ninja, also where its package is installed and its folder is not on PATH."""
    found = shutil.which("ninja")
    if found:
        return [found]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def _ninja_rule(number: int, step: Step) -> str:
    def escaped(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    command, depfile = (text.replace("$", "$$") for text in (shlex.join(step.command), f"{step.object}.d"))
    rule = f"rule {number}\n  command = {command}\n  depfile = {depfile}\n  deps = gcc\n"
    return f"{rule}build {escaped(step.object)}: {number} {escaped(step.source)}\n"


def _run(commands: Iterable[list[str]], log: Path, at_once: int = 1) -> None:
    def one(command: list[str]) -> tuple[list[str], int, str]:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        return command, done.returncode, done.stdout

    with ThreadPoolExecutor(at_once) as pool, log.open("a") as file:
        results = list(pool.map(one, commands))
        for command, _, output in results:
            file.write(f"{shlex.join(command)}\n{output}\n")
    for command, code, output in results:
        if code:
            tool = "ninja" if command[1:3] == ["-m", "ninja"] else Path(command[0]).name
            raise CannotBuild(f"{tool} failed: {_complaint(output) or f'exit code {code}'}; all of it is in {log}")


def _complaint(output: str) -> str:
    """The first line in which a compiler or the linker says what is wrong; command lines are none of theirs."""
    pattern = re.compile(r"error|fatal|undefined reference|cannot find")
    lines = [line.strip() for line in output.splitlines() if pattern.search(line) and " -o " not in line]
    return lines[0] if lines else ""
