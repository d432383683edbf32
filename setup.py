"""Builds the optional CUDA extension; everything static is in pyproject.toml.

``TWN_BUILD_CUDA=auto`` (the default) builds it where torch, nvcc and a C++ compiler are found, and never fails an
install; ``1`` fails with the fix where it cannot be built; ``0`` leaves it out. How it is built stands in
``twn_kernels/impl/cuda/build.py``. What happened is printed in one line and written to
``twn_kernels/_build_info.json``.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def load_by_path(path: Path):
    # Importing the package would import torch, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_by_path(ROOT / "twn_kernels" / "impl" / "cuda" / "build.py")


def require_if_wanted(reason: str) -> None:
    if WANTED == "1" and reason:
        raise SystemExit(f"twn_kernels: CUDA extension: not built ({reason}). Fix it, or set TWN_BUILD_CUDA=0")


def report(package: Path, built: dict[str, str], reason: str) -> None:
    """One line for the person who installs, and a record for ``env``, ``doctor`` and the errors of ``impl="cuda"``."""
    require_if_wanted(reason)
    record = {"built": bool(built), "reason": reason, "wanted": WANTED, **built}
    (package / "_build_info.json").write_text(json.dumps(record) + "\n")
    words = "for {archs} with nvcc {nvcc} in {seconds} s".format(**built) if built else f"not built ({reason})"
    print("twn_kernels: CUDA extension:", f"built {words}" if built else words)


class BuildPackage(build_py):
    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(str(path.relative_to(ROOT)) for path in CSRC.glob("**/*.*"))]

    def run(self) -> None:
        super().run()
        package = ROOT / "twn_kernels" if self.editable_mode else Path(self.build_lib, "twn_kernels")
        if not self.editable_mode:
            # What a build on first use compiles; in a checkout that is csrc itself.
            shutil.rmtree(package / "_csrc", ignore_errors=True)
            shutil.copytree(CSRC, package / "_csrc")
        if REASON:
            report(package, {}, REASON)


class BuildExtension(build_ext):
    def run(self) -> None:
        require_if_wanted(REASON)  # called by itself, with nothing to build, this command would end well
        super().run()

    # Plain compiler commands: torch's own helper would ask the GPU for its architecture.
    def build_extension(self, ext: Extension) -> None:
        library, built, reason = Path(self.get_ext_fullpath(ext.name)).resolve(), {}, ""
        library.unlink(missing_ok=True)
        # Not in setuptools' own folder, which an editable install throws away: ninja rebuilds only what changed.
        objects = ROOT / "build" / "cuda"
        try:
            archs = build.parse_archs(build.named_archs() or build.DEFAULT_ARCHS)
            built = build.compile_library(CSRC, objects, library, archs, build.find_tools())
        except Exception as error:  # whatever it is, an install that did not ask for the extension goes on
            reason = str(error) or type(error).__name__
        report(library.parent, built, reason)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if not REASON:
            shutil.copy(Path(self.build_lib, "twn_kernels", "_build_info.json"), ROOT / "twn_kernels")


def reason_not_to_build() -> str:
    if WANTED not in build.SWITCHES:
        raise SystemExit(f'twn_kernels: TWN_BUILD_CUDA is "{WANTED}"; expected auto, 0 or 1')
    try:
        return "TWN_BUILD_CUDA=0 when installing" if WANTED == "0" else build.find_tools() and ""
    except build.CannotBuild as error:
        return str(error)


WANTED = os.environ.get("TWN_BUILD_CUDA") or "auto"
REASON = reason_not_to_build()
SOURCES = [str(path.relative_to(ROOT)) for path in build.sources(CSRC)]
setup(
    ext_modules=[] if REASON else [Extension("twn_kernels._C", SOURCES, optional=True, py_limited_api=True)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)
