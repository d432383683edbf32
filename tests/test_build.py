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
from small_csrc import copy_small, needs_nvcc, write_nvcc

from twn_kernels.impl.cuda import build, loader

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which(os.environ.get("CXX", "g++"))
ONE_LINE = re.compile(r"^twn_kernels: CUDA extension: .+$", re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of everything that the build reads, with nothing built in it and little to compile."""
    target = tmp_path / "project"
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    shutil.copytree(ROOT / "twn_kernels", target / "twn_kernels", ignore=ignore)
    copy_small(target / "csrc")
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


def python(project: Path, code: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(project)} | variables
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvcc
def test_it_builds_and_loads_into_this_torch(project):
    done = setup(project, "build_ext", "--inplace", TWN_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = ONE_LINE.findall(done.stdout)
    assert re.fullmatch(r"twn_kernels: CUDA extension: built for 8\.0;9\.0a with nvcc \d+\.\d+ in \d+ s", line)
    info = record(project / "twn_kernels")
    assert info["built"] and info["archs"] == "8.0;9.0a" and info["torch"] == torch.__version__
    assert (info["wanted"], info["kernels"], info["sources"]) == ("1", "copy", build.digest(project / "csrc"))
    code = (
        "import torch\n"
        "from twn_kernels.impl.cuda import loader\n"
        "print(loader.build_info())\n"
        "loader.load(); loader.load()\n"
        "try: torch.ops.twn_cuda.probe(torch.ones(3))\n"
        "except RuntimeError as error: print(error)\n"
        "print(loader.unavailable_reason())\n"
    )
    words, device_check, reason = python(project, code).splitlines()
    assert words.startswith("built for 8.0;9.0a with nvcc ") and words.endswith(", in the package")
    assert device_check.startswith("twn_cuda::probe: x must be on a CUDA device")
    assert reason == "None"


def schemas(library: Path) -> list[str]:
    """Of every op that ``library`` registers in a fresh process."""
    code = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('twn_cuda::')]\n"
        "for name in names: print(getattr(torch.ops.twn_cuda, name.split('::')[1]).default._schema)\n"
    )
    return sorted(python(ROOT, code).splitlines())


EXPECTED = sorted(f"twn_cuda::{schema}" for schema in loader.OPS.values())


@needs_nvcc
def test_the_whole_of_csrc_registers_the_ops_that_python_names(tmp_path):
    """This environment's library; only where that one is of other sources, one is built here, for one architecture."""
    info = loader.build_info()
    library = Path(info.path)
    if not info.built or info.sources != build.digest(ROOT / "csrc"):
        library = tmp_path / "_C.abi3.so"
        archs = build.parse_archs("9.0a")
        build.compile_library(ROOT / "csrc", tmp_path / "build", library, archs, build.find_tools())
    assert schemas(library) == EXPECTED


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler: neither $CXX nor g++ is on PATH")
def test_the_bindings_register_the_ops_that_python_names(tmp_path):
    """Without nvcc: the bindings alone, each launcher replaced by nothing, as no op is called."""
    tools = build.Tools(Path(torch.__file__).parent, torch.__version__, "no-nvcc", "13.0", (CXX,))
    every = build.steps(ROOT / "csrc", tmp_path, build.parse_archs(build.DEFAULT_ARCHS), tools)
    steps = [step for step in every if step.source.suffix == ".cpp"]
    for step in steps:
        step.object.parent.mkdir(exist_ok=True)
    done = [subprocess.Popen([*step.command, "-O0"], stderr=subprocess.PIPE, text=True) for step in steps]
    failures = [error for process in done for error in [process.communicate()[1]] if process.returncode]
    assert not failures, failures
    objects = [str(step.object) for step in steps]
    symbols = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
    missing = set(re.findall(r" U (_ZN3twn\w+)", symbols)) - set(re.findall(r" [A-TV-Z] (_ZN3twn\w+)", symbols))
    labels = [f".globl {name}\n{name}:\n" for name in sorted(missing)]
    (tmp_path / "launchers.s").write_text("".join(labels) + '.section .note.GNU-stack,"",@progbits\n')
    library = tmp_path / "_C.abi3.so"
    links = [f"-L{tools.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([CXX, "-shared", *objects, str(tmp_path / "launchers.s"), *links, "-o", str(library)], check=True)
    assert schemas(library) == EXPECTED


@pytest.mark.gpu
def test_its_kernel_runs_on_the_current_stream():
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
    python(ROOT, code)


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
    made = json.loads(files.read("twn_kernels/_build_info.json"))
    assert (made["built"], made["reason"], made["wanted"]) == (False, "TWN_BUILD_CUDA=0 when installing", "0")


@needs_nvcc
def test_a_pure_wheel_holds_what_a_build_on_first_use_needs(project, tmp_path):
    stale = project / "build" / "lib" / "twn_kernels" / "_csrc" / "kernels" / "of_yesterday.cu"
    stale.parent.mkdir(parents=True)
    stale.write_text("no C++\n")
    done = setup(project, "bdist_wheel", TWN_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    shipped, own = installed / "twn_kernels" / "_csrc", project / "csrc"
    files = {path.relative_to(own) for path in own.rglob("*.*")}
    assert {path.relative_to(shipped) for path in shipped.rglob("*.*")} == files
    shutil.rmtree(project)
    code = (
        "from twn_kernels.impl.cuda import first_use, loader\n"
        "first_use.capabilities = lambda: [(8, 0)]\n"
        "print(loader.build_info().first_use)\n"
        "import os; os.environ['TWN_BUILD_CUDA'] = '1'\n"
        "loader.load()\n"
        "print(loader.build_info())\n"
    )
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TWN_BUILD_CUDA": "", "TORCH_CUDA_ARCH_LIST": ""}
    refused, built = python(installed, code, **variables).splitlines()
    assert refused == "not on first use either (TWN_BUILD_CUDA=0 when installing; set TWN_BUILD_CUDA=1)"
    assert (
        built.startswith("built for 8.0 with nvcc ") and f"in the user's cache ({tmp_path}/cache/twn_kernels/" in built
    )


def test_an_old_compiler_is_a_reason_for_auto_and_an_error_when_asked_for(project, tmp_path):
    home = str(write_nvcc(tmp_path / "cuda", version="11.8"))
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
        ({"CXX": "/nonexistent/g++"}, "no C++ compiler: /nonexistent/g++ was not found; install g++ or set CXX"),
        ({"CXX": "false"}, "failed"),
        ({"MAX_JOBS": "many"}, 'MAX_JOBS is "many"; give it a whole number from 1 on'),
    ],
    ids=["misspelt-arch", "unknown-arch", "no-compiler", "broken-compiler", "misspelt-jobs"],
)
def test_a_failed_build_never_fails_an_auto_install(project, variables, reason):
    done = setup(project, "build", **variables)
    assert done.returncode == 0, done.stderr
    (line,) = ONE_LINE.findall(done.stdout)
    assert line.startswith("twn_kernels: CUDA extension: not built (") and reason in line
    (package,) = project.glob("build/lib*/twn_kernels")
    assert not record(package)["built"] and not (package / "_C.abi3.so").exists()
    done = setup(project, "build", TWN_BUILD_CUDA="1", **variables)
    assert done.returncode != 0
    assert reason in done.stderr and done.stderr.rstrip().endswith("Fix it, or set TWN_BUILD_CUDA=0")


def test_the_command_of_the_extension_alone_fails_too_where_it_was_asked_for(project):
    done = setup(project, "build_ext", "--inplace", TWN_BUILD_CUDA="1", CXX="/nonexistent/g++")
    assert done.returncode != 0
    assert "not built (no C++ compiler: /nonexistent/g++ was not found; install g++ or set CXX)" in done.stderr


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
    sources = {str(path.relative_to(project)) for path in project.glob("csrc/**/*.*")}
    assert sources and sources | {"setup.py", "LICENSE", "twn_kernels/impl/cuda/build.py"} <= names


def test_device_code_includes_no_torch():
    files = [path for folder in ("include", "kernels") for path in (ROOT / "csrc" / folder).rglob("*.*")]
    assert files
    for path in files:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
