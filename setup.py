"""Builds the optional CUDA extension; everything static is in pyproject.toml.

``TWN_BUILD_CUDA=auto`` (the default) builds it where torch, nvcc and a C++ compiler are found, and never fails an
install; ``1`` fails with the fix where it cannot be built; ``0`` leaves it out. No GPU and no network is touched: torch
is found, not imported. What happened is printed in one line and written to ``twn_kernels/_build_info.json``.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ["csrc/bindings.cpp", "csrc/kernels/copy.cu"]
DEFAULT_ARCHS = "8.0;8.9;9.0a;9.0+PTX"  # 9.0a code is for Hopper only, so what later cards compile at load is plain 9.0
TARGET_TORCH = "0x020a000000000000"  # stable ABI of torch 2.10: one binary for it and everything later


class CannotBuild(Exception):
    pass  # the message says why, and after a semicolon what to do


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild("no torch when installing; install torch first and pass --no-build-isolation")
    return Path(spec.origin).parent


def find_nvcc() -> tuple[str, str]:
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        raise CannotBuild("no nvcc when installing; install the CUDA toolkit or set CUDA_HOME")
    found = re.search(r"release (\d+)\.(\d+)", subprocess.getoutput(shlex.join([nvcc, "--version"])))
    if found is None or int(found[1]) < 12:
        raise CannotBuild(f"{nvcc} is no nvcc 12.0 or later; install a newer CUDA toolkit")
    return nvcc, f"{found[1]}.{found[2]}"


def arch_flags(archs: str) -> list[str]:
    flags, names = [], re.split(r"[;,\s]+", archs.strip())
    for arch in names:
        found = re.fullmatch(r"(\d+\.\d+)([af]?)(\+PTX)?", arch)
        if found is None:
            raise CannotBuild(f'TORCH_CUDA_ARCH_LIST names "{arch}"; write it like "8.0;9.0a+PTX"')
        name = found[1].replace(".", "") + found[2]
        if found[2] or f"{found[1]}a" not in names:
            flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def jobs() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**31  # one nvcc takes up to 2 GiB
    return int(os.environ.get("MAX_JOBS") or max(1, min(os.cpu_count() or 1, free)))


def compile_and_link(build: Path, library: Path) -> dict[str, str]:
    torch, (nvcc, nvcc_version), cxx = find_torch(), find_nvcc(), shlex.split(os.environ.get("CXX") or "g++")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    device = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC", "-ccbin", cxx[0], *arch_flags(archs)]
    host = [*cxx, "-std=c++17", "-O2", "-fPIC", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", f"-I{torch}/include"]
    library.parent.mkdir(parents=True, exist_ok=True)
    build.mkdir(parents=True, exist_ok=True)
    objects, commands = [], []
    for source in SOURCES:
        objects.append(str(build / f"{Path(source).stem}.o"))
        compiler = device if source.endswith(".cu") else host
        command = shlex.join([*compiler, f"-I{ROOT}/csrc/include", "-c", str(ROOT / source), "-o", objects[-1]])
        commands.append(command)
    if shutil.which("ninja"):
        rules = [f"rule {n}\n  command = {command}\nbuild {objects[n]}: {n}\n" for n, command in enumerate(commands)]
        (build / "build.ninja").write_text("".join(rules))
        commands = [shlex.join(["ninja", "-C", str(build), "-j", str(jobs())])]
    for command in commands:
        run(shlex.split(command))
    links = [f"-L{torch}/lib", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    run([nvcc, "-shared", "-ccbin", cxx[0], *objects, *links, "-o", str(library)])
    return {"archs": archs, "nvcc": nvcc_version, "torch": importlib.metadata.version("torch")}


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("error|fatal", line)]
        raise CannotBuild(f"{Path(command[0]).name} failed: {(lines or [f'exit code {done.returncode}'])[0].strip()}")


def report(package: Path, built: dict[str, str], reason: str) -> None:
    """One line for the person who installs, and a record for ``env``, ``doctor`` and the errors of ``impl="cuda"``."""
    if WANTED == "1" and not built:
        raise SystemExit(f"twn_kernels: CUDA extension: not built ({reason}). Fix it, or set TWN_BUILD_CUDA=0")
    (package / "_build_info.json").write_text(json.dumps({"built": bool(built), "reason": reason, **built}) + "\n")
    print("twn_kernels: CUDA extension:", f"built for {built['archs']}" if built else f"not built ({reason})")


class BuildPackage(build_py):
    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*"))]

    def run(self) -> None:
        super().run()
        if REASON:
            report(ROOT / "twn_kernels" if self.editable_mode else Path(self.build_lib, "twn_kernels"), {}, REASON)


class BuildExtension(build_ext):
    # Plain compiler commands: torch's own helper would ask the GPU for its architecture.
    def build_extension(self, ext: Extension) -> None:
        library, built, reason = Path(self.get_ext_fullpath(ext.name)).resolve(), {}, ""
        library.unlink(missing_ok=True)
        try:
            built = compile_and_link(Path(self.build_temp).resolve(), library)
        except Exception as error:  # whatever it is, an install that did not ask for the extension goes on
            reason = str(error) or type(error).__name__
        report(library.parent, built, reason)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if not REASON:
            shutil.copy(Path(self.build_lib, "twn_kernels", "_build_info.json"), ROOT / "twn_kernels")


def reason_not_to_build() -> str:
    if WANTED not in ("auto", "0", "1"):
        raise SystemExit(f'twn_kernels: TWN_BUILD_CUDA is "{WANTED}"; expected auto, 0 or 1')
    try:
        return "TWN_BUILD_CUDA=0 when installing" if WANTED == "0" else (find_torch(), find_nvcc()) and ""
    except CannotBuild as error:
        return str(error)


WANTED = os.environ.get("TWN_BUILD_CUDA") or "auto"
REASON = reason_not_to_build()
setup(
    ext_modules=[] if REASON else [Extension("twn_kernels._C", SOURCES, optional=True, py_limited_api=True)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)
