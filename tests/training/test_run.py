"""A whole run on a small scale: every stage, stopped and gone on with, on the small backbone and on others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import twn_kernels
from twn_kernels.errors import OptionError
from twn_kernels.evaluation.number_task import make_number_task
from twn_kernels.testing import write_tiny_model
from twn_kernels.training.config import parse_config
from twn_kernels.training.run import train

SMALL = {
    "base": {"steps": 3, "batch_size": 4, "save_steps": 2, "log_steps": 1},
    "data": {"train_queries": 30, "copies": 1},
    "method": {"max_think_tokens": 6},
    "joint": {
        "steps": 4,
        "batch_size": 6,
        "chunk_size": 4,
        "rank": 2,
        "num_queries": 2,
        "save_steps": 2,
        "log_steps": 1,
    },
    "policy": {"steps": 2, "batch_size": 2, "group_size": 2, "save_steps": 1, "log_steps": 1},
    "gate": {"steps": 3, "batch_size": 4, "share": 0.3, "hidden": [4], "save_steps": 2, "log_steps": 1},
}


def quiet(line: str) -> None:
    pass


def changed(**sections) -> dict:
    return {name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numbers") / "data"
    return make_number_task(folder, queries=1, train_queries=30, copies=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    train(parse_config(SMALL), out, say=quiet)
    return out


def weights(twn: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(twn)} {name}": tensor
        for path in sorted(twn.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_a_run_leaves_a_model_that_embeds(done):
    embedder = twn_kernels.TWNEmbedder.from_pretrained(done / "base", done / "twn", device="cpu")
    vectors, details = embedder.encode(["half of eight", "forty-two"], return_details=True)
    assert vectors.shape == (2, 128)
    assert all(0 <= detail.gate_score <= 1 for detail in details)


def test_every_stage_tells_what_it_did(done):
    told = json.loads((done / "run.json").read_text())
    assert list(told["stages"]) == ["base", "joint", "policy", "gate"]
    for name, stage in told["stages"].items():
        assert stage["done"] and stage["seconds"] > 0 and stage["figures"], name
    assert {"command", "config", "versions", "machine", "created"} <= set(told)
    for folder in ("teaching", "joint", "policy", "gate"):
        rows = [json.loads(line) for line in (done / folder / "log.jsonl").read_text().splitlines()]
        assert rows and [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        assert (done / folder / "log.svg").read_text().lstrip().startswith("<?xml")


def test_a_run_that_was_stopped_ends_with_the_same_bits(done, tmp_path):
    out = tmp_path / "run"
    for stage in ("base", "joint", "policy"):
        train(parse_config(SMALL), out, until=stage, resume=out.exists(), say=quiet)
    train(parse_config(SMALL), out, resume=True, say=quiet)
    straight, stopped = weights(done / "twn"), weights(out / "twn")
    assert straight.keys() == stopped.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, stopped[name]), name


def test_a_finished_run_is_left_alone(done):
    before = {path: path.stat().st_mtime_ns for path in (done / "gate").rglob("*") if path.is_file()}
    train(parse_config(SMALL), done, resume=True, say=quiet)
    assert before == {path: path.stat().st_mtime_ns for path in (done / "gate").rglob("*") if path.is_file()}


def test_one_adapter_for_both_jobs_is_saved_under_both_names(data, tmp_path):
    sections = changed(joint={"adapters": "one"}, policy={"steps": 0}, data={"folder": str(data)})
    sections["data"] = {"folder": str(data)}
    out = train(parse_config(sections), tmp_path / "run", until="joint", say=quiet)
    checkpoint = twn_kernels.load_checkpoint(out)
    for path, layer in checkpoint.adapters["reasoning"].layers.items():
        other = checkpoint.adapters["embedding"].layers[path]
        assert torch.equal(layer.A, other.A) and torch.equal(layer.B, other.B)
        assert layer.B.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "graph", "dtype"), [("qwen2_5_vl", "reencode", "float32"), ("qwen3_vl", "shared_kv", "bfloat16")]
)
def test_another_backbone_trains_by_its_path(family, graph, dtype, data, tmp_path):
    base = write_tiny_model(tmp_path / "base", family)
    sections = changed(base={"path": str(base), "dtype": dtype}, method={"graph": graph}, policy={"steps": 0})
    sections["data"] = {"folder": str(data)}
    before = load_file(base / "model.safetensors")
    out = train(parse_config(sections), tmp_path / "run", say=quiet)
    embedder = twn_kernels.TWNEmbedder.from_pretrained(base, out, device="cpu")
    assert embedder.encode(["six times seven"]).shape == (1, 64)
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_that_is_taken_is_refused(done, tmp_path):
    with pytest.raises(OptionError, match="holds a run. Go on with it by --resume, or name another folder"):
        train(parse_config(SMALL), done, say=quiet)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="exists and holds no run. Name an empty or a new folder"):
        train(parse_config(SMALL), tmp_path, say=quiet)
    with pytest.raises(OptionError, match="until must be one of .*Did you mean .joint.[?]"):
        train(parse_config(SMALL), tmp_path / "new", until="joiny", say=quiet)


def test_a_run_goes_on_with_its_own_configuration_alone(done):
    other = parse_config(changed(joint={"rank": 3}, gate={"margin": 0.7}))
    with pytest.raises(OptionError, match='different: "gate.margin", "joint.rank". Resume with the same one'):
        train(other, done, resume=True, say=quiet)


def test_a_share_that_leaves_nothing_is_refused(data, tmp_path):
    sections = changed(gate={"share": 0.001}, base={"path": str(write_tiny_model(tmp_path / "base"))})
    sections["data"] = {"folder": str(data)}
    with pytest.raises(OptionError, match="gate.share 0.001 of 30 training queries leaves 30 for joint training and 0"):
        train(parse_config(sections), tmp_path / "run", say=quiet)
