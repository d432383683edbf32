"""The build on first use: when it happens, where it goes, that it happens once, and what is said where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_csrc import copy_small, needs_nvcc, write_nvcc

from bench import stages
from twn_kernels import doctor, env
from twn_kernels.errors import ImplUnavailable
from twn_kernels.impl.cuda import build, first_use, loader
from twn_kernels.impl.cuda.build import LIBRARY, CannotBuild
from twn_kernels.ops import choice

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = ("TWN_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_PATH", "CXX", "MAX_JOBS")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An installed package without its extension, an empty cache, a GPU of capability 8.0 and a compiler that fails."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "twn_kernels"
    package.mkdir()
    copy_small(package / "_csrc")
    write_nvcc(tmp_path / "cuda", "echo 'copy.cu(1): error: planted'; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(first_use, "capabilities", lambda: [(8, 0)])
    monkeypatch.setattr(first_use, "_failed", {})
    monkeypatch.setattr(loader, "_PACKAGE", package)
    loader._loaded.cache_clear()
    yield tmp_path
    loader._loaded.cache_clear()


def calls(here: Path) -> int:
    """How often the planted compiler was asked to compile."""
    counted = here / "cuda" / "calls"
    return len(counted.read_text().splitlines()) if counted.exists() else 0


def refusal() -> str:
    with pytest.raises(ImplUnavailable) as caught:
        loader.load()
    return str(caught.value)


def test_looking_builds_nothing(here):
    assert loader.unavailable_reason() is None
    info = loader.build_info()
    assert not info.built
    words = f"first use builds it for 8.0 with nvcc 12.8 in {here}/cache/twn_kernels"
    assert str(info) == f"not built (no record of a build: the package was not installed with pip); {words}"
    expected = 'the extension is not built yet; naming impl="cuda" in a call builds it.'
    assert loader.unavailable_reason(may_build=False) == expected
    assert calls(here) == 0 and not (here / "cache").exists()


def test_reports_build_nothing_and_say_what_a_call_would(here, monkeypatch):
    def on_gpu(impl, *_, may_build=True):
        return loader.unavailable_reason(may_build=may_build) if impl == "cuda" else None

    monkeypatch.setattr(choice, "unavailable_reason", on_gpu)
    monkeypatch.setattr(doctor, "IMPLS", ("auto", "cuda"))
    checks = {check.name: check for check in doctor.examine("cpu")}
    assert not [name for name in checks if ", cuda, " in name]
    assert checks["CUDA extension"].status == checks["cuda on cpu"].status == doctor.NOT_AVAILABLE
    assert "; first use builds it for 8.0 with nvcc 12.8 in " in checks["CUDA extension"].detail
    assert checks["cuda on cpu"].detail.startswith(
        'the extension is not built yet; naming impl="cuda" in a call builds it'
    )
    report = env.collect()
    assert report["implementations"]["cuda"] == "available: the first call builds it"
    assert report["extension"] == str(loader.build_info())
    assert calls(here) == 0


def test_a_failed_build_is_quoted_kept_and_not_tried_again(here, capsys):
    first, count = refusal(), calls(here)
    assert count >= 1
    (log,) = (here / "cache" / "twn_kernels").glob("*.log")
    assert "copy.cu(1): error: planted" in log.read_text()
    assert f"failed: copy.cu(1): error: planted; all of it is in {log}" in first
    assert first.endswith(f"\n  Rebuild: {loader.REBUILD}")
    assert refusal() == first and calls(here) == count
    assert "copy.cu(1): error: planted" in loader.unavailable_reason()
    assert "not on first use either (" in str(loader.build_info())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "twn_kernels: building the CUDA extension for 8.0 with nvcc 12.8 "
        "(2 files, once; TWN_BUILD_CUDA=0 keeps it from that) ..."
    )
    assert lines[1].startswith("twn_kernels: ... failed after ") and len(lines) == 2


def test_another_process_that_waited_for_a_failed_build_does_not_repeat_it(here):
    started = here / "started"
    started.mkdir()
    wait = f"while [ $(ls {started} | wc -l) -lt 3 ]; do sleep 0.1; done; sleep 1"
    write_nvcc(here / "slow", f"{wait}; echo 'copy.cu(1): error: planted'; exit 1")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from twn_kernels.impl.cuda import first_use, loader\n"
        "first_use.capabilities = lambda: [(8, 0)]\n"
        "loader._PACKAGE = Path(sys.argv[1])\n"
        "Path(sys.argv[2], str(os.getpid())).touch()\n"
        "try: loader.load()\n"
        "except loader.ImplUnavailable as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(here / "twn_kernels"), str(started)]
    environment = {**os.environ, "CUDA_HOME": str(here / "slow"), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert {"copy.cu(1): error: planted" in out for out, _ in answers} == {True}
    assert sum("building the CUDA extension" in err for _, err in answers) == 1
    assert (here / "slow" / "calls").read_text().count("called") == 1


@pytest.mark.parametrize(
    ("switch", "recorded", "words"),
    [
        ("0", "auto", "TWN_BUILD_CUDA=0; set TWN_BUILD_CUDA=1"),
        ("0", "", "TWN_BUILD_CUDA=0; set TWN_BUILD_CUDA=1"),
        ("", "0", "TWN_BUILD_CUDA=0 when installing; set TWN_BUILD_CUDA=1"),
        ("yes", "auto", 'TWN_BUILD_CUDA is "yes"; expected auto, 0 or 1'),
        ("", "auto", None),
        ("1", "0", None),
        ("auto", "0", None),
    ],
)
def test_it_can_be_told_not_to(here, monkeypatch, switch, recorded, words):
    monkeypatch.setenv("TWN_BUILD_CUDA", switch)
    record = f'{{"built": false, "reason": "planted", "wanted": "{recorded}"}}'
    (here / "twn_kernels" / "_build_info.json").write_text(record)
    reason = loader.unavailable_reason()
    if words is None:
        assert reason is None
        return
    assert reason == (
        f"the extension is not built (planted), nor can it be on first use ({words}).\n  Rebuild: {loader.REBUILD}  "
    )
    assert f"nor can it be on first use ({words})" in refusal()
    assert str(loader.build_info()) == f"not built (planted); not on first use either ({words})"
    assert calls(here) == 0


@pytest.mark.parametrize(
    ("found", "listed", "archs"),
    [
        ([(9, 0)], None, "9.0a"),
        ([(8, 0), (9, 0)], None, "8.0;9.0a"),
        ([(10, 0), (12, 0)], None, "10.0;12.0"),
        ([(7, 5), (8, 9)], None, "8.9"),
        ([(9, 0)], "8.0 9.0a+PTX", "8.0;9.0a+PTX"),
        ([(9, 0)], " ", "9.0a"),
    ],
)
def test_it_is_built_for_the_gpus_that_are_here(monkeypatch, found, listed, archs):
    monkeypatch.setattr(first_use, "capabilities", lambda: found)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert first_use.archs_here() == archs


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "torch sees no CUDA GPU, and it runs on nothing else"),
        ([(7, 0), (7, 5)], "this GPU's compute capability is 7.5; it needs 8.0 or later"),
    ],
)
def test_without_a_gpu_that_runs_it_nothing_is_built(here, monkeypatch, found, message):
    monkeypatch.setattr(first_use, "capabilities", lambda: found)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(CannotBuild) as caught:
        first_use.archs_here()
    assert str(caught.value) == message
    assert message in loader.unavailable_reason()


def test_a_cache_that_cannot_be_written_is_named(here, monkeypatch):
    (here / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "file"))
    assert f"({here}/file/twn_kernels cannot be written (Not a directory); set XDG_CACHE_HOME)" in refusal()


def test_a_package_without_its_sources_says_so(here, monkeypatch):
    (here / "twn_kernels" / "_csrc").rename(here / "elsewhere")
    words = f"its sources are not in {here}/twn_kernels; install the package again"
    assert words in loader.unavailable_reason()
    (here / "elsewhere").rename(here / "csrc")  # beside the package, as in a checkout
    assert loader.unavailable_reason() is None


def test_another_compiler_gpu_or_source_gets_a_folder_of_its_own(here, monkeypatch):
    def folder() -> Path:
        first_use._digest.cache_clear()
        return first_use.order(loader._PACKAGE, "").folder

    seen = {folder()}
    assert folder() in seen
    monkeypatch.setattr(first_use, "capabilities", lambda: [(9, 0)])
    seen.add(folder())
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(here / "newer", version="13.1")))
    seen.add(folder())
    (here / "twn_kernels" / "_csrc" / "kernels" / "copy.cu").write_text("// changed\n")
    seen.add(folder())
    monkeypatch.setattr(first_use.importlib.metadata, "version", lambda _: "2.99")
    seen.add(folder())
    assert len(seen) == 5


def test_a_build_of_before_serves_also_where_nvcc_is_gone(here, monkeypatch):
    folder = first_use.order(loader._PACKAGE, "").folder
    record = '{"built": true, "reason": "", "archs": "8.0", "nvcc": "12.8", "torch": "2.13.0"}'
    for place in (folder, folder.with_name(f"unfinished-{folder.name}")):
        place.mkdir(parents=True)
        (place / LIBRARY).touch()
        (place / first_use.RECORD).write_text(record)
    expected = f"built for 8.0 with nvcc 12.8 against torch 2.13.0, in the user's cache ({folder / LIBRARY})"
    assert str(loader.build_info()) == expected
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setattr(first_use.build, "_find_nvcc", lambda: (_ for _ in ()).throw(CannotBuild("gone")))
    first_use._tools.cache_clear()
    assert str(loader.build_info()) == expected
    assert "does not load into torch" in refusal() and f"\n  Rebuild: rm -r {folder}, and ask again" in refusal()
    (folder / LIBRARY).unlink()  # the unfinished one beside it does not count
    assert not loader.build_info().built
    first_use._tools.cache_clear()


@needs_nvcc
def test_several_processes_build_once_and_later_ones_not_at_all(here, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    folder = first_use.order(loader._PACKAGE, "").folder
    killed = folder.with_name(f"unfinished-{folder.name}")  # a process that was killed in the midst of it leaves this
    (killed / "objects").mkdir(parents=True)
    (killed / LIBRARY).write_bytes(b"half a library")
    (killed / f"{LIBRARY}.1").write_bytes(b"half a library")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from twn_kernels.impl.cuda import first_use, loader\n"
        "first_use.capabilities = lambda: [(8, 0)]\n"
        "loader._PACKAGE = Path(sys.argv[1])\n"
        "assert loader.unavailable_reason() is None\n"
        "loader.load()\n"
        "import torch\n"
        "print(torch.ops.twn_cuda.probe.default._schema)\n"
        "print(loader.build_info().path)\n"
    )
    command = [sys.executable, "-c", code, str(here / "twn_kernels")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in processes]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}, **pipes) as later:
        answers.append(later.communicate(timeout=300))
    for out, err in answers:
        assert out.splitlines() == ["twn_cuda::probe(Tensor x) -> Tensor", str(folder / LIBRARY)], err
    said = [err.count("building the CUDA extension for 8.0") for _, err in answers]
    assert sorted(said[:2]) == [0, 1] and said[2] == 0
    assert re.search(r"^twn_kernels: \.\.\. done in \d+ s: ", "".join(err for _, err in answers), re.MULTILINE)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert sorted(path.name for path in folder.iterdir()) == [LIBRARY, first_use.RECORD]


def test_a_run_on_a_gpu_machine_builds_what_its_gpus_need_and_only_where_it_must(here, monkeypatch):
    asked = []

    def run(command, seconds, **variables):
        asked.append((command[1:], variables))
        return {"code": 0, "output": "first\nlast\n", "timed_out": False}

    monkeypatch.setattr(stages, "_run", run)
    assert stages.build(False) == {"built": False, "detail": str(loader.build_info())} and asked == []
    assert stages.build(True) == {"built": True, "detail": "last"}
    command = ["setup.py", "build_ext", "--inplace"]
    assert asked == [(command, {"TWN_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"})]
    package = here / "twn_kernels"
    (package / LIBRARY).touch()
    for sources, builds in ((build.digest(ROOT / "csrc"), False), ("of yesterday", True)):
        asked.clear()
        (package / first_use.RECORD).write_text(f'{{"built": true, "reason": "", "sources": "{sources}"}}')
        assert stages.build(True)["built"] and bool(asked) == builds
    monkeypatch.setattr(first_use, "capabilities", list)
    asked.clear()
    found = stages.build(True)
    assert found["detail"].endswith(
        "is of other sources and cannot be built now: torch sees no CUDA GPU, and it runs on nothing else"
    )
    assert asked == []
