"""``twn-kernels bench``: what each action prints and writes, its exit codes, and one line for each way to go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import failure, report
from sample_results import CPU, contest, run, saved

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.report import BEGIN, END
from twn_kernels.cli import main
from twn_kernels.ops import choice_table

ROOT = Path(__file__).resolve().parent.parent
CASE = Case("group", "forward", "8B", 4096, "half", site="qkv")
WHOLE = Case("model", "forward", "8B", 4096, "half", layers=36)


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder as a checkout keeps it, with one GPU result."""
    rows = contest(CASE, fused_base=100.0, ours_auto=104.0, ours_blas=104.0, ours_triton=103.0, addmm=110.0)
    rows += contest(WHOLE, fused_base=100.0, ours_auto=104.0, addmm=103.0, plain=130.0)
    saved(run(rows), tmp_path / "bench" / "results" / "h200" / "a.json")
    return tmp_path / "bench" / "results"


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\n{END}\n\nafter\n")
    return path


def wrong_usage(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench"], "the following arguments are required: action"),
        (["bench", "reprot"], "bench has no action 'reprot'; actions: run, gpu, report, compare, choices."),
        (["bench", "reprot"], 'Did you mean "report"?'),
        (["bench", "report", "--readmee", "x"], "bench report does not take '--readmee'. Did you mean \"--readme\"?"),
        (["bench", "compare", "a"], "the following arguments are required: B"),
        (["bench", "compare", "a", "b", "--noise", "-1"], 'must be a number of 0 or more, got "-1"'),
        (["bench", "compare", "a", "b", "--noise", "nan"], 'must be a number of 0 or more, got "nan"'),
        (["bench", "run", "liner"], 'must be one of "linear", "group", "layer", "model", got "liner". Did you mean'),
        (["bench", "run", "--scale", "small"], 'must be one of "full", "tiny", got "small"'),
        (["bench", "run", "--layers", "0"], 'must be a whole number, 1 or more, got "0"'),
    ],
)
def test_wrong_usage(argv, message, capsys):
    assert message in wrong_usage(capsys, *argv)


def test_report_to_stdout_and_as_json(capsys, results):
    assert main(["bench", "report", str(results)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Benchmark report\n") and f"`{CASE.id}-ours_triton`" in printed
    document = report(capsys, "bench", "report", str(results))
    assert document["cases"] == {"NVIDIA H200": 2} and document["written"] == []
    verdicts = {entry["name"]: entry["verdict"] for entry in document["targets"]["NVIDIA H200"]}
    assert (verdicts["model-prefill"], verdicts["less-overhead"], verdicts["memory"]) == (
        "met",
        "missed",
        "not measured",
    )


def test_json_may_stand_before_the_action_too(capsys, results):
    assert main(["bench", "--json", "report", str(results)]) == 0
    assert json.loads(capsys.readouterr().out)["cases"] == {"NVIDIA H200": 2}


def test_report_rewrites_the_readme_and_nothing_else_of_it(capsys, results, readme):
    readme.chmod(0o640)
    assert report(capsys, "bench", "report", str(results), "--readme", str(readme))["written"] == [str(readme)]
    first = readme.read_text()
    assert first.startswith(f"# Title\n\n{BEGIN}\n") and first.endswith(f"{END}\n\nafter\n")
    # Called by its path from the README, not from wherever the command was started.
    assert "`bench/results/h200/a.json`" in first and "1.01 **slower**" in first
    assert main(["bench", "report", str(results / "h200" / "a.json"), "--readme", str(readme)]) == 0
    assert readme.read_text() == first and readme.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in readme.parent.iterdir() if path.name.startswith(".")] == []


def test_report_keeps_line_ends_and_links(capsys, results, readme, tmp_path):
    readme.write_bytes(readme.read_bytes().replace(b"\n", b"\r\n"))
    link = tmp_path / "LINK.md"
    link.symlink_to(readme)
    assert main(["bench", "report", str(results), "--readme", str(link)]) == 0
    assert link.is_symlink()
    assert readme.read_bytes().startswith(b"# Title\r\n\r\n") and readme.read_bytes().endswith(b"\r\n\r\nafter\r\n")


def test_a_result_outside_the_readmes_folder_is_called_relative_to_it(capsys, results, tmp_path):
    readme = tmp_path / "elsewhere" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"{BEGIN}{END}")
    assert main(["bench", "report", str(results), "--readme", str(readme)]) == 0
    assert "in `../bench/results/h200/a.json`" in readme.read_text()


def test_places_where_nothing_can_be_written(capsys, results, readme, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f'--out: "{file}" is a file. Name a folder.' in failure(
        capsys, "bench", "report", str(results), "--out", str(file)
    )
    for out in (tmp_path / "none" / "c.json", file / "c.json"):
        line = failure(capsys, "bench", "choices", str(results), "--out", str(out))
        assert "ResultError: " in line and "cannot be written" in line


def test_report_of_a_cpu_leaves_the_readme_without_numbers(capsys, tmp_path, readme):
    file = saved(run(contest(WHOLE, ours_auto=54321.0), CPU), tmp_path / "cpu.json")
    assert main(["bench", "report", str(file), "--readme", str(readme)]) == 0
    assert "Nothing has been measured on a GPU yet" in readme.read_text() and "54321" not in readme.read_text()


def test_report_with_plots_links_those_that_lie_beside_the_readme(capsys, results, readme, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench" / "figures"
    written = report(capsys, "bench", "report", str(results), "--readme", str(readme), "--out", str(out))["written"]
    assert [Path(path).name for path in written] == ["README.md", "report.md", "roofline-nvidia-h200.svg"]
    assert "![roofline-nvidia-h200](bench/figures/roofline-nvidia-h200.svg)" in readme.read_text()


def test_report_refuses_a_readme_without_markers_before_it_writes(capsys, results, readme, tmp_path):
    readme.write_text("# Title\n")
    line = failure(capsys, "bench", "report", str(results), "--readme", str(readme), "--out", str(tmp_path / "out"))
    assert "OptionError: " in line and 'must hold the lines "<!-- bench:begin -->"' in line
    assert not (tmp_path / "out").exists() and readme.read_text() == "# Title\n"
    assert "nowhere.md" in failure(capsys, "bench", "report", str(results), "--readme", str(tmp_path / "nowhere.md"))


def test_report_refuses_another_schema_and_a_file_that_is_none(capsys, results, tmp_path):
    file = results / "h200" / "a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 9}))
    assert "a.json has schema 9; this version reads schema 1." in failure(capsys, "bench", "report", str(results))
    (tmp_path / "x.json").write_text("[]")
    assert "x.json is no benchmark result" in failure(capsys, "bench", "report", str(tmp_path / "x.json"))


def test_report_names_the_json_that_it_leaves_out(capsys, results):
    (results / "stamp.json").write_text("{}")
    assert main(["bench", "report", str(results)]) == 0
    assert f"{results / 'stamp.json'} is no benchmark result and is left out\n" in capsys.readouterr().err


def test_compare_passes_and_fails_by_its_exit_code(capsys, tmp_path):
    files = [
        str(saved(run(contest(CASE, fused_base=100.0, ours_auto=time)), tmp_path / f"{time}.json"))
        for time in (100.0, 104.0)
    ]
    assert main(["bench", "compare", files[0], files[0]]) == 0
    assert "no regression" in capsys.readouterr().out
    assert main(["bench", "compare", *files]) == 1
    assert f"{CASE.id}-ours_auto: 100 us -> 104 us, +4.0 %, noise 3.0 %" in capsys.readouterr().out
    document = report(capsys, "bench", "compare", *files, code=1)
    assert not document["ok"] and [entry["ratio"] for entry in document["slower"]] == [1.04]
    assert main(["bench", "compare", *files, "--noise", "5"]) == 0
    assert main(["bench", "compare", *reversed(files)]) == 0


def test_compare_refuses_two_devices(capsys, tmp_path):
    rows = contest(CASE, ours_auto=100.0)
    files = [str(saved(run(rows), tmp_path / "a.json")), str(saved(run(rows, CPU), tmp_path / "b.json"))]
    line = failure(capsys, "bench", "compare", *files)
    assert 'ResultError: the runs are of different devices, "NVIDIA H200" and "Some CPU @ 2 GHz"' in line


def test_choices(capsys, results, tmp_path):
    assert main(["bench", "choices", str(results)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "sm_90 bf16 qkv, 4096 to 4096 tokens: triton (1 cases of bench/results/h200/a.json)"
    assert printed[-1] == "1 rows"
    out = tmp_path / "choices.json"
    document = report(capsys, "bench", "choices", str(results), "--out", str(out))
    assert document["undecided"] == [] and document["rows"] == json.loads(out.read_text())["rows"]
    (row,) = choice_table.read(out)
    assert (row.impl, row.cases) == ("triton", (CASE.id,))


def test_an_installation_without_the_suites_says_what_to_do(tmp_path):
    code = (
        "import pathlib, sys, twn_kernels\n"
        "twn_kernels.__file__ = sys.argv[1]\n"
        "from twn_kernels.cli import main\n"
        "sys.exit(main(['bench', *sys.argv[2:]]))\n"
    )
    wheel = tmp_path / "site-packages" / "twn_kernels" / "__init__.py"
    for argv in (["run"], ["gpu", "--minutes", "1", "--out", "x"], ["report"], ["choices"]):
        command = [sys.executable, "-c", code, str(wheel), *argv]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "pip install -e ." in line
        assert f"bench {argv[0]} needs the folder bench/ of a checkout" in line
        assert ("name result files" in line) == (argv[0] in ("report", "choices"))
    assert not (tmp_path / "x").exists()


def test_run_measures_a_suite_and_its_result_can_be_reported(capfd, tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "deep" / "result.json"
    argv = ["linear", "--scale", "tiny", "--only", "T1-reasoning", "--seconds", "0.01", "--out", str(out)]
    contenders = [option for name in ("fused_base", "ours_auto", "addmm") for option in ("--contender", name)]
    document = report(capfd, "bench", "run", *argv, *contenders)
    assert document["exit_code"] == 0 and document["result"]["file"] == str(out)
    assert (document["result"]["rows"], document["result"]["timed"], document["result"]["wrong"]) == (3, 3, [])
    assert main(["bench", "report", str(out)]) == 0
    assert "ours_auto` |" in capfd.readouterr().out


def test_run_refuses_a_place_where_nothing_can_be_written(capsys, tmp_path):
    assert f'--out: "{tmp_path}" is a directory' in failure(capsys, "bench", "run", "--out", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "cannot be made" in failure(capsys, "bench", "run", "--out", str(tmp_path / "file" / "x.json"))


def test_gpu_takes_the_options_of_the_checkouts_command(capfd):
    assert main(["bench", "gpu", "--minutes", "none", "--out", "x"]) == 2
    assert "python -m bench.gpu: error: argument --minutes" in capfd.readouterr().err
    assert main(["bench", "gpu", "--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: python -m bench.gpu")
