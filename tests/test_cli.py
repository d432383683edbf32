"""The command line: what each subcommand prints and writes, its exit code, and one line for each way to go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import failure, report

from twn_kernels.cli import main
from twn_kernels.testing.tiny_models import tiny_model
from twn_kernels.testing.twn_directory import write_twn_directory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_twn_directory(tmp_path_factory.mktemp("twn") / "checkpoint", tiny_model("llama"), gate_input="mean")


def test_it_is_a_module_and_states_its_version():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "twn_kernels", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "twn-kernels 0.1.0\n")


@pytest.mark.parametrize(
    "argv",
    [[], ["nosuch"], ["env", "--nosuch"], ["inspect"], ["embed", "x", "--thresh", "1"], ["demo", "--queries", "0"]],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: twn-kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspct", "x"], "no command 'inspct'; commands: env, doctor, inspect, convert, embed, demo, bench, eval, "),
        (["inspct", "x"], 'Did you mean "inspect"?'),
        (["doctor", "--devise=cpu"], "doctor does not take '--devise=cpu'. Did you mean \"--device\"?"),
        (["env", "surplus"], "env does not take 'surplus'."),
    ],
)
def test_a_typo_gets_the_nearest_name(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def in_a_shell(command: str) -> subprocess.CompletedProcess:
    """Run a shell command in which ``TWN`` is the program, its output buffered as it is for users."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    command = f"TWN() {{ '{sys.executable}' -m twn_kernels \"$@\"; }}; {command}"
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("command", "code"), [("env", "1"), ("--help", "0")])
def test_a_closed_pipe_is_no_traceback(command, code):
    done = in_a_shell(f"{{ sleep 0.1; TWN {command}; echo $? >&2; }} | true")
    assert done.stderr == f"{code}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_exit_code_1():
    done = in_a_shell("TWN env > /dev/full")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("twn-kernels env: OSError: ") and "No space left" in line


def test_an_unforeseen_error_is_one_line_unless_the_traceback_is_asked_for(capsys, monkeypatch):
    from twn_kernels import env

    def broken():
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(env, "collect", broken)
    line = failure(capsys, "env")
    assert line == (
        "twn-kernels env: ZeroDivisionError: first line second line. Where it happened: twn-kernels env --traceback ..."
    )
    assert main(["env", "--traceback"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_a_warning_is_one_line_too(checkpoint):
    code = (
        "import sys, warnings\n"
        "from twn_kernels import env, errors\n"
        "from twn_kernels.cli import main\n"
        "def collect():\n"
        "    warnings.warn('first\\nsecond', errors.TWNWarning)\n"
        "    return {'a': 1}\n"
        "env.collect = collect\n"
        "sys.exit(main(['env']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a  1\n")
    assert done.stderr == "twn-kernels env: warning: first second\n"


def test_env(capsys):
    assert main(["env"]) == 0
    assert "libraries.torch" in capsys.readouterr().out
    assert report(capsys, "env")["libraries"]["torch"] == torch.__version__


def test_doctor_passes_and_fails_by_its_exit_code(capsys, monkeypatch):
    from twn_kernels import doctor

    green = doctor.Check("a", doctor.OK)
    red = doctor.Check("b", doctor.FAIL, "off", "repair it")
    for checks, code in (([green], 0), ([green, red], 1)):
        monkeypatch.setattr(doctor, "examine", lambda device, checks=checks: iter(checks))
        assert main(["doctor"]) == code
        assert capsys.readouterr().out.splitlines()[-1] == doctor.render(checks)
        assert report(capsys, "doctor", code=code) == {"ok": code == 0, "checks": [check.to_dict() for check in checks]}


def test_doctor_names_a_device_that_is_not_there(capsys):
    assert 'device must be one torch knows, such as "cuda:0" or "cpu", got \'gpu\'.' in failure(
        capsys, "doctor", "--device", "gpu"
    )
    assert 'OptionError: device "cuda:99" is not there: torch sees' in failure(capsys, "doctor", "--device", "cuda:99")


def test_inspect(capsys, checkpoint):
    assert main(["inspect", str(checkpoint)]) == 0
    assert "loads: yes" in capsys.readouterr().out
    found = report(capsys, "inspect", str(checkpoint))
    assert found["ok"] and set(found["adapters"]) == {"reasoning", "embedding"}


def test_inspect_of_a_broken_one_reports_and_fails(capsys, checkpoint, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "embedding" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = report(capsys, "inspect", str(broken), code=1)
    assert not found["ok"] and found["problems"]
    assert "does not exist" in failure(capsys, "inspect", str(tmp_path / "nowhere"))


def test_convert_a_file_a_directory_and_a_pair(capsys, checkpoint, tmp_path):
    from safetensors.torch import load_file

    gate = checkpoint / "gate_mlp.pt"
    out = tmp_path / "gate.safetensors"
    assert report(capsys, "convert", str(gate), "--out", str(out)) == {"written": [str(out)]}
    expected = torch.load(gate, weights_only=True)
    converted = load_file(out)
    assert set(converted) == set(expected) and all(torch.equal(converted[name], expected[name]) for name in expected)

    pair = tmp_path / "pair"
    adapters = [f"--{name}={checkpoint / name}" for name in ("reasoning", "embedding")]
    parts = [f"--gate={gate}", f"--queries={checkpoint / 'queries.pt'}"]
    assert report(capsys, "convert", *adapters, *parts, "--out", str(pair)) == {"written": [str(pair)]}
    assert report(capsys, "inspect", str(pair))["ok"]

    whole = tmp_path / "whole"
    assert report(capsys, "convert", str(checkpoint), "--out", str(whole))["written"]
    assert not list(whole.rglob("*.pt"))
    assert report(capsys, "inspect", str(whole))["ok"]


def test_convert_says_what_is_missing_or_too_much(capsys, checkpoint):
    assert failure(capsys, "convert", "--reasoning", "a", "--out", "b").endswith("--embedding is missing.")
    assert "got SOURCE and --reasoning" in failure(capsys, "convert", str(checkpoint), "--reasoning", "a")
