"""``twn-kernels train``: what it takes, prints, writes and refuses; the stages themselves are tested beside them."""

from __future__ import annotations

import json
import sys

import pytest
from commands import failure, report

import twn_kernels
from twn_kernels.cli import _parse, main, train
from twn_kernels.evaluation import Entry, write_dataset
from twn_kernels.testing import write_tiny_model

TOML = """
seed = 1
[base]
path = "{base}"
device = "cpu"
[data]
folder = "{data}"
[method]
max_think_tokens = 4
[joint]
steps = 2
batch_size = 3
chunk_size = 3
rank = 2
num_queries = 2
[gate]
steps = 2
batch_size = 2
share = 0.3
hidden = [4]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of a tiny text model and a tiny data folder with thoughts."""
    folder = tmp_path_factory.mktemp("train")
    documents = [Entry(f"d{number}", f"number {number}") for number in range(8)]
    queries = [Entry(f"q{number}", f"find {number}", metadata={"thought": f"it is {number}."}) for number in range(8)]
    qrels = {f"q{number}": {f"d{number}": 1} for number in range(8)}
    write_dataset(folder / "data", documents, queries, {"train": qrels})
    base = write_tiny_model(folder / "base", "llama")
    path = folder / "config.toml"
    path.write_text(TOML.format(base=base, data=folder / "data"))
    return path


def test_a_run_prints_what_it_wrote_and_the_result_embeds(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(config), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {out / 'twn'}\n"
    said = printed.err.splitlines()
    assert "twn-kernels train: joint: 2 steps" in said and "twn-kernels train: gate: 2 steps" in said
    embedder = twn_kernels.TWNEmbedder.from_pretrained(config.parent / "base", out / "twn", device="cpu")
    assert embedder.encode("find 3", think="auto").shape == (64,)
    assert main(["train", str(config), "--out", str(out), "--resume", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_json_is_the_run_file(config, tmp_path, capsys):
    out = tmp_path / "run"
    changes = ["--set", "joint.steps=1", "--set", "method.graph=reencode", "--set", "gate.hidden=[3, 2]"]
    told = report(capsys, "train", str(config), "--out", str(out), "--until", "joint", "--quiet", *changes)
    assert told == json.loads((out / "run.json").read_text())
    assert told["config"]["joint"]["steps"] == 1 and told["config"]["gate"]["hidden"] == [3, 2]
    assert told["config"]["method"]["graph"] == "reencode" and told["config"]["seed"] == 1
    assert list(told["stages"]) == ["joint"] and told["commands"][0]["command"].startswith("twn-kernels train ")


def test_the_whole_configuration_can_be_seen_first(capsys):
    assert main(["train", "numbers", "--out", "unused", "--show-config", "--set", "joint.rank=3"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["train", "numbers", "--out", "unused", "--show-config", "--set", "joint.detach=False"]) == 0
    assert json.loads(capsys.readouterr().out)["joint"]["detach"] is False
    assert shown["joint"]["rank"] == 3 and shown["method"]["graph"] == "shared_kv"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.toml"], 'CONFIG must be a TOML file or "numbers", got "absent.toml", which is no file here.'),
        (["numbrs"], 'got "numbrs", which is no file here. Did you mean "numbers"?'),
        (["."], 'configuration "." cannot be read: Is a directory.'),
        (["numbers", "--set", "joint.rnak=2"], '[joint] has no "rnak"; '),
        (["numbers", "--set", "joint.rank"], '--set takes KEY=VALUE, such as joint.steps=100, got "joint.rank".'),
        (["numbers", "--set", "joint.rank=two"], "joint.rank must be a whole number, got 'two'."),
        (["numbers", "--set", "seed.x=1"], "seed must be a whole number, got {'x': 1}."),
        (["numbers", "--set", "gate.hidden=[1"], "--set gate.hidden: [1 is no list, such as [64, 32]."),
        (["numbers", "--threads", "0"], "--threads must be at least 1, got 0."),
    ],
)
def test_what_is_wrong_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, "train", *words, "--out", "run")
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_not_there_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = failure(capsys, "train", "numbers", "--out", str(tmp_path / "run"))
    assert 'training needs accelerate, not installed here. Run: pip install "twn_kernels[train]"' in line


def test_stages_are_those_of_the_package(capsys):
    from twn_kernels.training.run import STAGES

    assert tuple(train._STAGES) == STAGES
    with pytest.raises(SystemExit) as refused:
        _parse(["train", "numbers", "--out", "x", "--until", "joiny"])
    assert refused.value.code == 2
