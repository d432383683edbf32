"""The byte counters of a case: what ncu prints is added up and set against the least that the shapes need."""

from __future__ import annotations

import json

import pytest

from bench import bytes as counting
from twn_kernels.benchmarking import suites
from twn_kernels.benchmarking.counters import case_work

CASE = next(case for case in suites.cases("full", ("group",)) if case.pass_ == "decode")
HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Give ``prints(lines, status)``: an ncu on PATH that prints so."""

    def prints(lines, status=0) -> None:
        tool = tmp_path / "ncu"
        text = "\n".join(lines)
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return prints


def counters(read: int, written: int, kernel: str = "decode_kernel") -> list[str]:
    return [
        "==PROF== Profiling ...",
        HEAD,
        f'"0","1","{kernel}","dram__bytes_read.sum","byte","{read:,}"',
        f'"0","1","{kernel}","dram__bytes_write.sum","byte","{written:,}"',
        f'"1","1","{kernel}","dram__bytes_read.sum","byte","1,000"',
        f'"1","1","{kernel}","sm__cycles.sum","cycle","999,999,999,999"',
    ]


@pytest.mark.parametrize(("share", "status"), [(1.04, 0), (1.06, counting.ABOVE)])
def test_bytes_are_judged_by_the_least_that_the_case_needs(share, status, ncu, capsys):
    least = case_work(CASE).bytes
    ncu(counters(int(share * least) - 2000, 1000))
    assert counting.main([CASE.id]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["least_bytes"] == least and report["percent_above"] == pytest.approx(100 * share - 100, abs=0.01)
    assert [name for name, _ in report["kernels"]] == ["decode_kernel"] * 2


def test_nothing_counted_is_no_verdict(ncu, capsys):
    ncu(["==ERROR== no permission to read the counters"], status=1)
    assert counting.main([CASE.id]) == counting.UNKNOWN
    assert "nothing was counted (exit status 1): ==ERROR== no permission" in capsys.readouterr().err


def test_an_unknown_case_or_no_profiler(ncu, monkeypatch, capsys):
    ncu([])
    assert counting.main([CASE.id.replace("qkv", "qvk")]) == counting.UNKNOWN
    said = capsys.readouterr().err
    assert said.startswith("CASE must be the id of a linear or group case, such as group-") and "Did you mean" in said
    monkeypatch.setattr(counting.shutil, "which", lambda *_, **__: None)
    assert counting.main([CASE.id]) == counting.UNKNOWN
    assert capsys.readouterr().err == "ncu is not on PATH or in /usr/local/cuda/bin\n"


def test_the_profiled_call_runs():
    tiny = suites.cases("tiny", ("group",))[0].id
    assert counting.main([tiny, "--scale", "tiny", "--contender", "ours_blas", "--inside"]) == 0
