"""``python -m bench.gpu`` and the suites under pytest-benchmark, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import main, parser
from twn_kernels.benchmarking import results

ROOT = Path(__file__).resolve().parent.parent
# Without git the commit is unknown, so that a commit made meanwhile does not end a run.
# pytest-benchmark times nothing in what it takes for a worker of a parallel run.
INHERITED = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
ENVIRONMENT = INHERITED | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}
GPU = [sys.executable, "-m", "bench.gpu", "--minutes", "5"]
# Stages that check the package itself are other tests' business, but one.
TINY = ["--scale", "tiny", "--suite", "linear", "--rounds", "2", "--seconds", "0.05", "--contender", "fused_base"]
TINY += ["--contender", "ours_auto", "--skip", "doctor", "--skip", "build"]


GPU_TESTS = """
import pytest

@pytest.mark.gpu
def test_that_passes(): pass

@pytest.mark.gpu
def test_that_fails(): assert False

@pytest.mark.gpu
def test_that_is_skipped(): pytest.skip("no")

def test_that_needs_no_gpu(): assert False
"""


def run(*command, code=0):
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_every_stage_runs_on_a_cpu_and_a_killed_run_goes_on(tmp_path, capfd):
    """One run that is killed after its first case and resumed: stages, journal, document and table."""
    gpu_tests = tmp_path / "test_on_gpu.py"
    gpu_tests.write_text(GPU_TESTS)
    command = [*GPU, *TINY, "--out", str(tmp_path), "--tests", str(gpu_tests)]
    first = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    journal, deadline = tmp_path / "journal.jsonl", time.monotonic() + 120
    while not (journal.exists() and b'"event": "case"' in journal.read_bytes()):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]

    assert main([*command[3:], "--worker"]) == 2
    assert "holds a run already. Continue it with --resume" in capfd.readouterr().err
    done = run(*command, "--resume", code=1)  # because a test of the tests stage failed
    lines = journal.read_text().splitlines(keepends=True)
    assert lines[: len(before)] == before
    events = [json.loads(line) for line in lines]
    assert [e["name"] for e in events if e["event"] == "stage"] == ["environment", "tests", "roofs"]
    cases = [e["case"] for e in events if e["event"] == "case"]
    assert len(cases) == len(set(cases)) == 3
    tests = next(e["value"] for e in events if e.get("name") == "tests")
    assert [tests[name] for name in ("passed", "failed", "errors", "skipped", "exit_code")] == [1, 1, 0, 1, 1]
    assert tests["finished"] and tests["failures"][0].endswith("::test_that_fails")
    document = results.load(tmp_path / "result.json")
    assert [row.contender for row in document.cases] == ["fused_base", "ours_auto"] * 3
    assert all(row.correct and row.time_us is not None for row in document.cases)
    assert document.roofs["copy_gb_per_s"] > 0 and document.environment["scale"] == "tiny"
    assert document.command.startswith("python -m bench.gpu --minutes 5 --scale tiny")
    assert "--worker" not in document.command
    assert "prefill-8B" in done.stdout and "not measured" in done.stdout
    assert f"document: {tmp_path / 'result.json'}" in done.stdout
    assert "bench/results" not in done.stdout  # tiny shapes are no result to commit
    one = document.cases[0]
    assert one.command.endswith(f"--only {one.case}") and "--scale tiny" in one.command


def test_an_interrupt_ends_with_one_sentence_that_says_how_to_go_on(tmp_path):
    command = [*GPU, *TINY, "--skip", "tests", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell started this in "&"
    )
    journal, deadline = tmp_path / "journal.jsonl", time.monotonic() + 120
    while not (journal.exists() and b'"event": "begin"' in journal.read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == gpu.INTERRUPTED
    assert "Traceback" not in said and said.count(gpu.STOPPED) == 1
    # Nothing is left begun, which a resumed run would take for a death.
    assert json.loads(journal.read_text().splitlines()[-1])["event"] != "begin"


def test_a_measuring_process_that_dies_is_followed_by_one_that_goes_on(tmp_path, monkeypatch):
    """Deaths by signal, by a broken device and by an exception; and one that gets nowhere."""
    argv = ["--minutes", "1", "--out", str(tmp_path)]
    codes, calls = [-11, gpu.BROKEN, gpu.CRASHED, 0], []

    def measuring(arguments):
        calls.append(arguments)
        with (tmp_path / "journal.jsonl").open("a") as journal:
            journal.write('{"event": "begin", "case": "c", "contender": ""}\n' * (len(calls) < 6))
        return codes.pop(0)

    monkeypatch.setattr(gpu, "_measuring", measuring)
    assert main(argv) == 0
    assert ["--resume" in arguments for arguments in calls] == [False, True, True, True]
    assert all("--worker" in arguments and arguments[:4] == argv for arguments in calls)
    codes += [-9, -9, -9]
    assert main(argv) == 1  # the second of these wrote nothing new
    assert codes == [-9]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence_says_so(tmp_path):
    done = run(*GPU, "--out", str(tmp_path / "run"), code=2)
    assert done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr == (
        "python -m bench.gpu needs a GPU, and torch sees none here; --scale tiny runs every stage on the CPU.\n"
    )


def test_wrong_options_are_refused_before_anything_runs(tmp_path):
    right = ["--minutes", "1", "--out", "x"]
    values = (["--minutes=0"], ["--minutes=nan"], ["--rounds=0"], ["--rounds=1.5"], ["--seconds=-1"], ["--layers=0"])
    for wrong in (["--minutes", "1"], *(right + value for value in (*values, ["--suite=groups"], ["--scale=huge"]))):
        with pytest.raises(SystemExit) as raised:
            parser().parse_args(wrong)
        assert raised.value.code == 2
    out = str(tmp_path / "run")
    base = ["--minutes", "1", "--out", out, "--scale", "tiny", "--worker"]
    assert main([*base, "--contender", "our_auto"]) == 2
    assert main([*base, "--only", "no such case"]) == 2
    assert not Path(out).exists()


def test_a_contender_that_a_suite_does_not_have_is_one_sentence_under_pytest(tmp_path):
    done = run(sys.executable, "-m", "pytest", "bench/test_linear.py", "-q", "--contender=our_auto", code=2)
    said = done.stdout + done.stderr
    assert "has no contender 'our_auto'" in said and "conftest.py" not in said


def test_the_suites_run_under_pytest_benchmark_with_its_own_options(tmp_path):
    document, stored = tmp_path / "twn.json", tmp_path / "pytest-benchmark.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/test_linear.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "--scale",
        "tiny",
    ]
    command += ["--rounds=1", "--seconds=0.05", "--contender=fused_base", "--contender=ours_reference"]
    command += ["--contender=merged", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    command += [f"--twn-json={document}", f"--benchmark-json={stored}", "--benchmark-columns=median", "-rs"]
    done = run(*command)
    assert "8 passed, 1 skipped" in done.stdout
    assert "Adapters merged into the weights cannot be trained." in done.stdout
    rows = {row.id: row for row in results.load(document).cases}
    assert len(rows) == 9 and sum(row.time_us is not None for row in rows.values()) == 8
    benchmarks = json.loads(stored.read_text())["benchmarks"]
    assert len(benchmarks) == 8
    for entry in benchmarks:
        info = entry["extra_info"]
        assert info["time_us"]["median"] == rows[info["id"]].time_us.median
        assert entry["group"] == info["case"] and entry["stats"]["rounds"] >= 2
