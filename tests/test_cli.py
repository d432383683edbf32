"""The command line: what each subcommand prints and writes, its exit code, and one line for each way to go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from twn_kernels.cli import embed, main
from twn_kernels.errors import InputError
from twn_kernels.testing.tiny_models import tiny_model
from twn_kernels.testing.twn_directory import write_twn_directory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_twn_directory(tmp_path_factory.mktemp("twn") / "checkpoint", tiny_model("llama"), gate_input="mean")


def failure(capsys, *argv: str) -> str:
    """Run a command that must fail; its one line on stderr."""
    assert main(list(argv)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def report(capsys, *argv: str, code: int = 0) -> dict:
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_it_is_a_module_and_states_its_version():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "twn_kernels", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "twn-kernels 0.1.0\n")


@pytest.mark.parametrize(
    "argv", [[], ["nosuch"], ["env", "--nosuch"], ["inspect"], ["embed", "x", "--thresh", "1"]], ids=" ".join
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: twn-kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspct", "x"], "there is no command 'inspct'; commands: env, doctor, inspect, convert, embed, demo."),
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


def test_a_closed_pipe_is_no_traceback():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"'{sys.executable}' -m twn_kernels env | true"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


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
    assert '--device must be like "cpu", "cuda" or "cuda:1", got "gpu".' in failure(capsys, "doctor", "--device", "gpu")
    assert "torch sees" in failure(capsys, "doctor", "--device", "cuda:99")


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


# --- embed: inputs -----------------------------------------------------------------------------------------------


def test_text_files_are_lines_or_wholes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufefffirst\r\n\r\n  second\u2028still second \n".encode())
    lines = embed.read_inputs([str(path)])
    assert [(source.value, source.line) for source in lines] == [("first", 1), ("  second\u2028still second ", 3)]
    (whole,) = embed.read_inputs([str(path)], whole_files=True)
    assert whole.value.startswith("first") and whole.line is None


def test_jsonl_keeps_strings_and_takes_media_beside_the_file(tmp_path):
    path = tmp_path / "inputs.jsonl"
    messages = [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "a.png"}]}]
    rows = [
        "a text",
        {"text": "a.png", "image": "sub/a.png"},
        {"image": ["a.png", "https://host/b.png", "/abs/c.png"]},
        messages,
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    values = [source.value for source in embed.read_inputs([str(path)])]
    assert values[0] == "a text"
    assert values[1] == {"text": "a.png", "image": str(tmp_path / "sub/a.png")}
    assert values[2] == {"image": [str(tmp_path / "a.png"), "https://host/b.png", "/abs/c.png"]}
    assert values[3][0]["content"] == [
        {"type": "image", "image": str(tmp_path / "b.png")},
        {"type": "text", "text": "a.png"},
    ]


def test_a_folder_gives_its_images_by_name_and_counts_the_rest(tmp_path, capsys):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    sources = embed.read_inputs([str(tmp_path)])
    assert [source.value for source in sources] == [{"image": str(tmp_path / name)} for name in ("a.jpg", "b.PNG")]
    assert "1 files that are no images are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"ok"\n{"text": \n', 'line 2: not JSON: Expecting value at column 10'),
        ("a.jsonl", b'"ok"\n\n7\n', "line 3: expected a string, an object of modalities or a list of messages, got 7."),
        ("a.jsonl", b"null\n", "line 1: expected a string"),
        ("a.jsonl", b'" "\n', "line 1: the input is empty."),
        ("a.jsonl", b"{}\n", "line 1: the input is empty."),
        ("a.jsonl", b'["a", "b"]\n', "line 1: a list must hold chat messages"),
        ("a.jsonl", b"\n\n", "holds no inputs; expected at least one."),
        ("a.txt", b"", "holds no inputs; expected at least one."),
        ("a.txt", b"ok\n\xff\xfe\n", "is not UTF-8 text (byte 3)."),
    ],
)
def test_input_files_that_are_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        embed.read_inputs([str(path)])
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_inputs_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        embed.read_inputs([str(tmp_path / "nowhere.txt")])
    with pytest.raises(InputError, match="holds no images"):
        embed.read_inputs([str(tmp_path)])


# --- embed: options and outputs ----------------------------------------------------------------------------------


def embed_failure(capsys, tmp_path, *options: str, out: str = "out.npy") -> str:
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("a\n")
    places = ["--model", str(tmp_path / "model"), "--checkpoint", str(tmp_path / "twn"), "--out", str(tmp_path / out)]
    return failure(capsys, "embed", str(inputs), *places, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1.5"], "--threshold must be from 0 to 1 (a gate score), got 1.5."),
        (["--threshold", "nan"], "--threshold must be from 0 to 1 (a gate score), got nan."),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0."),
        (["--max-think-tokens", "-1"], "--max-think-tokens must be 1 or more, got -1."),
        (["--truncate-dim", "0"], "--truncate-dim must be 1 or more, got 0."),
        (["--dtype", "bfloat"], 'got "bfloat". Did you mean "bfloat16"?'),
        (["--impl", "tritn"], 'got "tritn". Did you mean "triton"?'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_out_of_range(capsys, tmp_path, options, message):
    assert message in embed_failure(capsys, tmp_path, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.txt"]


def test_outputs_that_cannot_be(capsys, tmp_path):
    assert 'must end in .safetensors or .npy, got "out.csv"' in embed_failure(capsys, tmp_path, out="out.csv")
    assert "does not exist. Create it first." in embed_failure(capsys, tmp_path, out="sub/out.npy")
    (tmp_path / "out.jsonl").write_text("mine")
    assert "exists. Name another file, or replace it with --overwrite." in embed_failure(capsys, tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_the_details_never_replace_an_input(tmp_path, capsys):
    inputs = tmp_path / "data.jsonl"
    inputs.write_text('"a"\n')
    places = ["--model", "m", "--checkpoint", "c", "--out", str(tmp_path / "data.npy"), "--overwrite"]
    assert "would replace the input" in failure(capsys, "embed", str(inputs), *places)
    assert inputs.read_text() == '"a"\n'


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_both_files_are_written_whole(tmp_path, suffix):
    from safetensors.numpy import load_file

    out, details = tmp_path / f"out{suffix}", tmp_path / "out.jsonl"
    vectors = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    embed.write_outputs(out, details, vectors, [{"index": 0, "text": "ü"}, {"index": 1}])
    read = np.load(out) if suffix == ".npy" else load_file(out)["embeddings"]
    assert read.dtype == np.float32 and np.array_equal(read, vectors)
    assert [json.loads(line) for line in details.read_text().splitlines()] == [{"index": 0, "text": "ü"}, {"index": 1}]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path):
    out, details = tmp_path / "out.npy", tmp_path / "out.jsonl"
    out.write_bytes(b"old")
    details.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        embed.write_outputs(out, details, np.zeros((1, 2), np.float32), [{"index": 0}])
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.npy"]
