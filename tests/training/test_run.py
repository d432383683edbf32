"""A whole run on a small scale: every stage, stopped and gone on with, on the small backbone and on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_work import SMALL, changed, quiet, small_run
from safetensors.torch import load_file

import twn_kernels
from twn_kernels.errors import CheckpointError, DataError, OptionError
from twn_kernels.evaluation.number_task import make_number_task
from twn_kernels.testing import write_tiny_model
from twn_kernels.training import run as training_run
from twn_kernels.training.config import parse_config
from twn_kernels.training.policy import HeldOut, PolicyResult
from twn_kernels.training.run import train


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
    assert set(told) == {"commands", "config", "stages", "data"}
    (command,) = told["commands"]
    assert {"command", "versions", "machine", "created", "commit", "dirty"} == set(command)
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
    other = parse_config(changed(joint={"rank": 3}, gate={"margin": 0.7, "share": 0.4}))
    with pytest.raises(OptionError, match='different: "gate.share", "joint.rank". Resume with the same one'):
        train(other, done, resume=True, say=quiet)


@pytest.mark.parametrize(
    ("before", "change", "named"),
    [
        ({}, {"steps": 0}, "gate.steps"),
        ({"steps": 0}, {"steps": 3}, "gate.steps"),
        ({"share": None}, {"split": "gate", "share": None}, "gate.split"),
        ({}, {"share": 0.4}, "gate.share"),
        ({}, {"encode_batch_size": 3}, "gate.encode_batch_size"),
    ],
)
def test_what_divides_the_data_may_not_change(before, change, named, done, tmp_path):
    told = json.loads((done / "run.json").read_text())
    told["config"]["gate"] |= before
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(OptionError, match=f'another configuration; different: "{named}". Resume'):
        train(parse_config(changed(gate=before | change)), tmp_path, resume=True, say=quiet)


def test_how_often_a_state_is_kept_changes_no_gate(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    said: list[str] = []
    train(parse_config(changed(gate={"save_steps": 3, "log_steps": 2})), tmp_path / "run", resume=True, say=said.append)
    assert said == []


def test_a_gate_may_be_trained_anew_on_what_was_learned(done, tmp_path):
    """To try another price takes minutes, not the hours of the stages before; the result is that of a whole run."""
    shutil.copytree(done, tmp_path / "run")
    before = json.loads((done / "run.json").read_text())["commands"]
    sections = changed(gate={"margin": 0.001, "hidden": [3]}, method={"gate_input": "concat"})
    said: list[str] = []
    out = train(parse_config(sections), tmp_path / "run", resume=True, until="policy", say=said.append)
    assert not (out / "gate_mlp.safetensors").exists()  # neither the old one nor yet another
    told = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["gate"]
    assert told["done"] is False and "figures" not in told
    out = train(parse_config(sections), tmp_path / "run", resume=True, say=said.append)
    assert 'gate: to be trained anew, as these differ: "gate.hidden", "gate.margin", "method.gate_input"' in said
    assert not any(line.startswith(("base", "joint", "policy", "gate: thinking")) for line in said)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["stages"]["gate"]["done"] and told["commands"][:-2] == before
    assert told["stages"]["gate"]["figures"]["margin"] == told["config"]["gate"]["margin"] == 0.001
    whole = train(parse_config(sections), tmp_path / "whole", say=quiet)
    names = {path.relative_to(whole) for path in whole.rglob("*.safetensors")}
    assert names == {path.relative_to(out) for path in out.rglob("*.safetensors")} and len(names) == 4
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert (whole / "twn_config.json").read_text() == (out / "twn_config.json").read_text()


def test_what_cannot_be_begun_leaves_the_folder_as_it_was(tmp_path):
    wrong = changed(data={"folder": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match="nowhere"):
        train(parse_config(wrong), tmp_path / "run", say=quiet)
    with pytest.raises(OptionError, match='^device "cuda:7" is not there|^device "cuda:99" is not there'):
        train(parse_config(changed(base={"device": "cuda:99"})), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_going_on_with_nothing_begins_and_says_so(data, tmp_path):
    """So that one command serves a queue that may stop it at any time."""
    sections, out = small_run(data, tmp_path)
    said: list[str] = []
    run = training_run._Run(parse_config(sections), out, "", said.append)
    run.begin(True)
    assert said == [f'"{out}" holds no run to go on with; beginning one'] and (out / "run.json").is_file()
    said.clear()
    training_run._Run(parse_config(sections), out, "", said.append).begin(True)
    assert said == []


def test_a_configuration_may_change_until_something_was_learned(data, tmp_path):
    sections = changed(base={"path": str(tmp_path / "absent")}, policy={"steps": 0})
    sections["data"] = {"folder": str(data)}
    with pytest.raises(CheckpointError):
        train(parse_config(sections), tmp_path / "run", say=quiet)
    sections["base"] = {"path": str(write_tiny_model(tmp_path / "base"))}
    out = train(parse_config(sections), tmp_path / "run", resume=True, until="joint", say=quiet)
    assert (out / "queries.safetensors").is_file()
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(told["commands"]) == 2 and told["config"]["base"]["path"] == sections["base"]["path"]


def test_a_damaged_record_is_refused(tmp_path):
    for place, text in enumerate(("{", "{}", "[]")):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "run.json").write_text(text)
        with pytest.raises(OptionError, match="run.json. is not as a run wrote it .*Name another folder"):
            train(parse_config(SMALL), folder, resume=True, say=quiet)


def test_settings_reach_what_they_are_of(data, tmp_path, monkeypatch):
    """Prompts of queries and documents, the detached interface, the adapters' dtype."""
    sections, out = small_run(data, tmp_path, joint={"detach": False})
    sections["policy"] = SMALL["policy"]
    sections["base"]["adapter_dtype"] = "bfloat16"
    sections["data"] |= {"query_prompt": "Find it.", "document_prompt": "Keep it."}
    seen: dict[str, tuple] = {}

    def watch(name, pick):
        made = getattr(training_run, name)

        def watched(*args, **options):
            seen[name] = pick(args, options)
            return made(*args, **options)

        monkeypatch.setattr(training_run, name, watched)

    watch("JointCollator", lambda args, options: args[3:5])
    watch("train_policy", lambda args, options: options["prompts"])
    watch("TWNEmbedder", lambda args, options: tuple(options["prompts"][name] for name in ("query", "document")))
    watch("Roles", lambda args, options: args)
    train(parse_config(sections), out, say=quiet)
    assert seen.pop("Roles") == ("reasoning", "embedding", False)
    assert seen == dict.fromkeys(("JointCollator", "train_policy", "TWNEmbedder"), ("Find it.", "Keep it."))
    adapters = load_file(out / "joint" / "twn" / "reasoning" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.bfloat16}


def test_the_gate_is_of_the_policy_that_was_kept(data, tmp_path, monkeypatch):
    """Also where the run goes on in another process: the newest adapters are loaded."""
    sections, out = small_run(data, tmp_path)
    sections["policy"] = SMALL["policy"]

    def bettered(trainee, *rest, **options):
        for name, parameter in trainee.model.named_parameters():
            if name.removesuffix(".weight").endswith("lora_B.reasoning"):
                parameter.data.fill_(0.25)
        same = HeldOut(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return PolicyResult(same, same, "trained", 2)

    monkeypatch.setattr(training_run, "train_policy", bettered)
    train(parse_config(sections), out, until="policy", say=quiet)
    train(parse_config(sections), out, resume=True, say=quiet)
    checkpoint = twn_kernels.load_checkpoint(out / "twn")
    assert all((layer.B == 0.25).all() for layer in checkpoint.adapters["reasoning"].layers.values())
    assert not all((layer.B == 0.25).all() for layer in checkpoint.adapters["embedding"].layers.values())


def test_a_backbone_that_a_run_taught_brings_its_record(done, data, tmp_path):
    sections = changed(base={"path": str(done / "base")}, policy={"steps": 0})
    sections["data"] = {"folder": str(data)}
    train(parse_config(sections), tmp_path / "run", until="joint", say=quiet)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    whole = json.loads((done / "run.json").read_text())
    assert told["base"]["stages"] == {"base": whole["stages"]["base"]} and "base" not in told["stages"]
    assert told["base"]["commands"] == whole["commands"] and told["base"]["config"]["base"]["steps"] == 3
