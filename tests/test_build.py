"""The optional extension: built by the real compiler, loaded in a fresh process, and every way of not being built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc: none on PATH or in /usr/local/cuda/bin")
ONE_LINE = re.compile(r"^twn_kernels: CUDA extension: .+$", re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of everything that the build reads, with nothing built in it."""
    target = tmp_path / "project"
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("csrc", "twn_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target)
    (target / "README.md").write_text("twn_kernels\n")
    return target


def setup(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("TWN_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=project, env=kept | variables, capture_output=True, text=True)


def record(folder: Path) -> dict:
    return json.loads((folder / "_build_info.json").read_text())


def python(project: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvcc
def test_it_builds_and_loads_into_this_torch(project):
    done = setup(project, "build_ext", "--inplace", TWN_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ONE_LINE.findall(done.stdout) == ["twn_kernels: CUDA extension: built for 8.0;9.0a"]
    info = record(project / "twn_kernels")
    assert info["built"] and info["archs"] == "8.0;9.0a" and info["torch"] == torch.__version__
    code = (
        "import torch\n"
        "from twn_kernels.impl.cuda import loader\n"
        "print(loader.build_info().built)\n"
        "loader.load(); loader.load()\n"
        "print(torch.ops.twn_cuda.probe.default._schema)\n"
        "try: torch.ops.twn_cuda.probe(torch.ones(3))\n"
        "except RuntimeError as error: print(error)\n"
        "print(loader.unavailable_reason())\n"
    )
    built, schema, device_check, reason = python(project, code).splitlines()
    assert built == "True"
    assert schema == "twn_cuda::probe(Tensor x) -> Tensor"
    assert device_check.startswith("twn_cuda::probe: x must be on a CUDA device")
    assert reason == "the extension that is built here holds only twn_cuda::probe, no dual-LoRA kernel yet."


@needs_nvcc
@pytest.mark.gpu
def test_its_kernel_runs_on_the_current_stream(project):
    done = setup(project, "build_ext", "--inplace", TWN_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import torch\n"
        "from twn_kernels.impl.cuda import loader\n"
        "for x in (torch.randn(1000, device='cuda'), torch.arange(7, dtype=torch.int8, device='cuda')[1:]):\n"
        "    assert torch.equal(loader.probe(x), x)\n"
        "assert loader.probe(torch.empty(0, device='cuda')).numel() == 0\n"
        "stream, x = torch.cuda.Stream(), torch.zeros(1 << 20, device='cuda')\n"
        "torch.cuda.synchronize()\n"
        "with torch.cuda.stream(stream):\n"
        "    torch.cuda._sleep(100_000_000); x.fill_(1); y = loader.probe(x)\n"
        "stream.synchronize()\n"
        "assert (y == 1).all()\n"
    )
    python(project, code)


@needs_nvcc
def test_a_wheel_with_it_serves_every_later_python(project):
    done = setup(project, "bdist_wheel", TORCH_CUDA_ARCH_LIST="8.0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    assert {"twn_kernels/_C.abi3.so", "twn_kernels/_build_info.json"} <= set(zipfile.ZipFile(wheel).namelist())


def test_left_out_on_request_the_wheel_is_pure_and_says_why(project):
    done = setup(project, "bdist_wheel", TWN_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert ONE_LINE.findall(done.stdout) == [
        "twn_kernels: CUDA extension: not built (TWN_BUILD_CUDA=0 when installing)"
    ]
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    files = zipfile.ZipFile(wheel)
    assert not [name for name in files.namelist() if name.endswith(".so")]
    assert {"twn_kernels/py.typed", "twn_kernels/ops/choices.json"} <= set(files.namelist())
    assert json.loads(files.read("twn_kernels/_build_info.json"))["reason"] == "TWN_BUILD_CUDA=0 when installing"


def _old_nvcc(folder: Path) -> str:
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    return str(folder / "cuda")


def test_an_old_compiler_is_a_reason_for_auto_and_an_error_when_asked_for(project, tmp_path):
    home = _old_nvcc(tmp_path)
    done = setup(project, "build", CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    (line,) = ONE_LINE.findall(done.stdout)
    assert line.endswith("is no nvcc 12.0 or later; install a newer CUDA toolkit)")
    done = setup(project, "build", CUDA_HOME=home, TWN_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "not built" in done.stderr and "install a newer CUDA toolkit" in done.stderr
    assert "Traceback" not in done.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, 'TORCH_CUDA_ARCH_LIST names "Hopper"; write it like "8.0;9.0a+PTX"'),
        ({"TORCH_CUDA_ARCH_LIST": "99.0"}, "Unsupported gpu architecture"),
        ({"CXX": "/nonexistent/g++"}, "failed"),
        pytest.param(
            {"MAX_JOBS": "many"},
            "invalid literal for int() with base 10: 'many'",
            marks=pytest.mark.skipif(shutil.which("ninja") is None, reason="only ninja is told how many jobs to run"),
        ),
    ],
    ids=["misspelt-arch", "unknown-arch", "no-compiler", "misspelt-jobs"],
)
def test_a_failed_build_never_fails_an_auto_install(project, variables, reason):
    done = setup(project, "build", **variables)
    assert done.returncode == 0, done.stderr
    (line,) = ONE_LINE.findall(done.stdout)
    assert line.startswith("twn_kernels: CUDA extension: not built (") and reason in line
    (package,) = project.glob("build/lib*/twn_kernels")
    assert not record(package)["built"] and not (package / "_C.abi3.so").exists()
    assert setup(project, "build", TWN_BUILD_CUDA="1", **variables).returncode != 0


def test_an_unknown_switch_is_named(project):
    done = setup(project, "build", TWN_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert 'TWN_BUILD_CUDA is "yes"; expected auto, 0 or 1' in done.stderr


def test_the_build_imports_no_torch(project):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['setup.py', '-q', 'build_py']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
        "print('imported' if 'torch' in sys.modules else 'not imported')\n"
    )
    assert python(project, code).splitlines()[-1] == "not imported"


def test_the_source_archive_can_build_it(project):
    done = setup(project, "sdist", TWN_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "dist").glob("*.tar.gz")
    names = {name.split("/", 1)[-1] for name in tarfile.open(archive).getnames()}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")}
    assert sources and sources | {"setup.py", "LICENSE"} <= names


def test_device_code_includes_no_torch():
    files = [path for folder in ("include", "kernels") for path in (ROOT / "csrc" / folder).rglob("*.*")]
    assert files
    for path in files:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
