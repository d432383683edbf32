"""Which files are compiled, for what and how: the plan of a build, without a compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_csrc import copy_small, needs_nvcc, write_nvcc

from twn_kernels.impl.cuda import build

TOOLS = build.Tools(Path("/torch"), "2.13.0", "/cuda/bin/nvcc", "13.0", ("g++",))
FILES = (
    "bindings.cpp", "bindings/decode.cpp", "kernels/decode.cu", "kernels/decode_sm80.cu", "kernels/decode_sm90.cu",
    "kernels/prefill_sm90a.cu",
)  # fmt: skip


@pytest.fixture
def csrc(tmp_path):
    for name in (*FILES, "bindings/common.h", "include/twn/group.h", "kernels/notes.txt"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "csrc"


def plan(csrc: Path, archs: str) -> dict[str, list[str]]:
    """Of each source that is compiled, the command."""
    found = build.steps(csrc, Path("/build"), build.parse_archs(archs), TOOLS)
    return {str(step.source.relative_to(csrc)): step.command for step in found}


def targets(command: list[str]) -> list[str]:
    return [word.rpartition("code=")[2] for word in command if word.startswith("-gencode")]


def macros(command: list[str]) -> set[str]:
    return {word for word in command if word.startswith("-DTWN_")}


def test_sources_are_found(csrc):
    assert sorted(str(path.relative_to(csrc)) for path in build.sources(csrc)) == sorted(FILES)


def test_each_file_gets_the_architectures_that_its_name_asks_for(csrc):
    found = plan(csrc, build.DEFAULT_ARCHS)
    every = ["sm_80", "sm_89", "sm_90a", "compute_90"]
    assert targets(found["kernels/decode.cu"]) == every
    assert targets(found["kernels/decode_sm80.cu"]) == ["sm_80", "sm_89"]  # the rest has code of its own
    assert targets(found["kernels/decode_sm90.cu"]) == ["sm_90a", "compute_90"]
    assert targets(found["kernels/prefill_sm90a.cu"]) == ["sm_90a"]
    assert targets(found["bindings.cpp"]) == []
    assert set(found) == set(FILES)
    for command in found.values():
        assert macros(command) == {"-DTWN_SM80", "-DTWN_SM90", "-DTWN_SM90A"}


@pytest.mark.parametrize(
    ("archs", "left_out", "defined"),
    [
        ("8.0", {"kernels/decode_sm90.cu", "kernels/prefill_sm90a.cu"}, {"-DTWN_SM80"}),
        ("8.6;9.0", set(), {"-DTWN_SM80", "-DTWN_SM90", "-DTWN_SM90A"}),
        ("10.0", {"kernels/decode_sm80.cu", "kernels/prefill_sm90a.cu"}, {"-DTWN_SM90"}),
        ("9.0a", {"kernels/decode_sm80.cu"}, {"-DTWN_SM90", "-DTWN_SM90A"}),
    ],
)
def test_what_the_list_has_no_place_for_is_left_out_and_every_source_knows(csrc, archs, left_out, defined):
    found = plan(csrc, archs)
    assert set(FILES) - set(found) == left_out
    assert all(macros(command) == defined for command in found.values())


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("9.0;9.0a", ["sm_90a"]),  # a card of 9.0 runs both: one is enough
        ("9.0+PTX 9.0a", ["compute_90", "sm_90a"]),
        ("8.0, 8.6;12.0+PTX", ["sm_80", "sm_86", "sm_120", "compute_120"]),
        ("7.5;8.0", ["sm_80"]),
        ("10.0f", ["sm_100f"]),
    ],
)
def test_flags_of_a_list(csrc, archs, expected):
    assert targets(plan(csrc, archs)["kernels/decode.cu"]) == expected


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("Hopper", 'TORCH_CUDA_ARCH_LIST names "Hopper"; write it like "8.0;9.0a+PTX"'),
        ("8.0;90", 'TORCH_CUDA_ARCH_LIST names "90"; write it like "8.0;9.0a+PTX"'),
        ("7.0;7.5", 'TORCH_CUDA_ARCH_LIST is "7.0;7.5"; name one of 8.0 or later'),
    ],
)
def test_a_list_that_cannot_be_built(archs, message):
    with pytest.raises(build.CannotBuild) as caught:
        build.parse_archs(archs)
    assert str(caught.value) == message


def test_who_names_hopper_gets_what_is_for_hopper_alone(csrc):
    """An environment that presets a list writes 9.0; the letter is what the code needs, not what a user means."""
    for archs in ("9.0", "9.0a", "8.0;9.0+PTX"):
        assert targets(plan(csrc, archs)["kernels/prefill_sm90a.cu"]) == ["sm_90a"]


def test_objects_of_one_stem_do_not_collide(csrc):
    objects = [step.object for step in build.steps(csrc, Path("/build"), build.parse_archs("8.0"), TOOLS)]
    assert len(set(objects)) == len(objects) == 4


def test_the_digest_follows_every_file(csrc):
    seen = {build.digest(csrc)}
    for name in (*FILES, "bindings/common.h", "include/twn/group.h"):
        (csrc / name).write_text("// changed\n")
        seen.add(build.digest(csrc))
    (csrc / "kernels" / "more_sm80.cu").touch()
    seen.add(build.digest(csrc))
    assert len(seen) == len(FILES) + 4


def test_jobs_follow_cores_memory_and_the_user(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for free, jobs in ((2**40, 16), (2**33, 4), (2**30, 1), (0, 1)):
        monkeypatch.setattr(build, "_free_bytes", lambda free=free: free)
        assert build.jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    for wrong in ("many", "0", "-1"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(build.CannotBuild, match=f'MAX_JOBS is "{wrong}"; give it a whole number from 1 on'):
            build.jobs()


def test_memory_of_a_container_counts(monkeypatch):
    texts = {"/proc/meminfo": "MemAvailable:  8388608 kB\n"}
    monkeypatch.setattr(build, "_read", lambda path: texts.get(path, ""))
    assert build._free_bytes() == 2**33
    texts |= {"/sys/fs/cgroup/memory.max": f"{2**32}\n", "/sys/fs/cgroup/memory.current": f"{2**31}\n"}
    assert build._free_bytes() == 2**31
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert build._free_bytes() == 2**33


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "[1/2] nvcc\nFAILED: a.o\nnvcc x.cu -o error.o\nx.cu(3): error: no\nx.cu(4): error: more",
            "x.cu(3): error: no",
        ),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal   : Unsupported gpu architecture"),
        ("x.o: undefined reference to `twn::f()'\ncollect2", "x.o: undefined reference to `twn::f()'"),
        ("Killed", ""),
    ],
)
def test_the_line_that_is_quoted_of_a_compiler(output, line):
    assert build._complaint(output) == line


def test_ninja_is_found_where_only_its_package_is(monkeypatch):
    pytest.importorskip("ninja", reason="needs the package ninja")
    monkeypatch.setenv("PATH", "/nonexistent")
    command = build._ninja()
    assert command == [sys.executable, "-m", "ninja"]
    assert subprocess.run([*command, "--version"], capture_output=True).returncode == 0


def test_a_path_with_spaces_survives_ninja(tmp_path):
    ninja = build._ninja()
    if ninja is None:
        pytest.skip("needs ninja")
    folder = tmp_path / "a folder: $x"
    folder.mkdir()
    source, target = folder / "in.cu", folder / "out.o"
    source.write_text("text")
    script = f"cp {shlex.quote(str(source))} {shlex.quote(str(target))}; echo '{target.name}: in.cu' >\"$0\""
    rule = build._ninja_rule(0, build.Step(source, target, ["sh", "-c", script, f"{target}.d"]))
    (folder / "build.ninja").write_text(rule)
    done = subprocess.run([*ninja, "-C", str(folder)], capture_output=True, text=True)
    assert target.exists() and target.read_text() == "text", done.stdout


def test_missing_and_old_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "old", version="11.8")))
    with pytest.raises(build.CannotBuild, match=r"nvcc is no nvcc 12\.0 or later; install a newer CUDA toolkit"):
        build.find_tools()
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "new")))
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(
        build.CannotBuild, match="no C.. compiler: /nonexistent/g.. was not found; install g.. or set CXX"
    ):
        build.find_tools()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(build.CannotBuild, match="no nvcc was found; install the CUDA toolkit or set CUDA_HOME"):
        build.find_tools()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(build.CannotBuild, match="it is built on Linux alone, not on darwin"):
        build.find_tools()


@needs_nvcc
@pytest.mark.parametrize("ninja", [True, False])
def test_a_launcher_that_nobody_wrote_fails_the_build_and_not_the_load(tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(build, "_ninja", lambda: None)
    csrc = copy_small(tmp_path / "csrc")
    (csrc / "kernels" / "copy.cu").write_text("// empty\n")
    library = tmp_path / "_C.abi3.so"
    with pytest.raises(build.CannotBuild, match=r"nvcc failed: .*undefined reference to .*launch_copy.*build\.log"):
        build.compile_library(csrc, tmp_path / "build", library, build.parse_archs("8.0"), build.find_tools())
    assert list(tmp_path.glob("_C.abi3.so*")) == []
    assert "undefined reference" in (tmp_path / "build" / "build.log").read_text()


@needs_nvcc
def test_only_what_a_header_reaches_is_compiled_again(tmp_path):
    if build._ninja() is None:
        pytest.skip("needs ninja")
    csrc, objects, library = copy_small(tmp_path / "csrc"), tmp_path / "build", tmp_path / "_C.abi3.so"

    def times() -> dict[str, int]:
        record = build.compile_library(csrc, objects, library, build.parse_archs("8.0"), build.find_tools())
        assert record["kernels"] == "copy" and record["sources"] == build.digest(csrc)
        return {path.name: path.stat().st_mtime_ns for path in objects.rglob("*.o")}

    first = times()
    assert set(first) == {"bindings.cpp.o", "copy.cu.o"}
    header = csrc / "include" / "twn" / "copy.cuh"
    header.write_text(header.read_text() + "\n")
    second = times()
    assert {name for name in first if first[name] != second[name]} == {"copy.cu.o"}


def test_one_folder_is_built_in_by_one_at_a_time(tmp_path, monkeypatch):
    inside, most = [], []

    def slow(*arguments):
        inside.append(arguments)
        most.append(len(inside))
        time.sleep(0.1)
        inside.pop()
        return {}

    monkeypatch.setattr(build, "_compile_library", slow)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(build.compile_library, tmp_path, tmp_path / "build", tmp_path / "library", [], TOOLS)
    assert most == [1, 1, 1, 1]
