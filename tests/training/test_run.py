"""A whole run on a small scale: every stage, stopped and gone on with, on the small backbone and on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import twn_kernels
from twn_kernels.errors import CheckpointError, DataError, OptionError
from twn_kernels.evaluation.number_task import make_number_task
from twn_kernels.testing import write_tiny_model
from twn_kernels.training import run as training_run
from twn_kernels.training.config import parse_config
from twn_kernels.training.policy import HeldOut, PolicyResult
from twn_kernels.training.run import train

SMALL = {
    "base": {"steps": 3, "batch_size": 4, "save_steps": 2, "log_steps": 1},
    "data": {"train_queries": 30, "gate_queries": 4, "copies": 1},
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


@pytest.mark.parametrize("change", [{"steps": 0}, {"split": "gate", "share": None}])
def test_what_divides_the_data_may_not_change(done, change):
    with pytest.raises(OptionError, match="was begun with another configuration"):
        train(parse_config(changed(gate=change)), done, resume=True, say=quiet)


def test_a_gate_may_be_trained_anew_on_what_was_learned(done, tmp_path):
    """To try another price takes minutes, not the hours of the stages before; the result is that of a whole run."""
    shutil.copytree(done, tmp_path / "run")
    before = json.loads((done / "run.json").read_text())["commands"]
    sections = changed(gate={"margin": 0.001, "hidden": [3]}, method={"gate_input": "concat"})
    said: list[str] = []
    out = train(parse_config(sections), tmp_path / "run", resume=True, say=said.append)
    assert 'gate: trained anew, as these differ: "gate.hidden", "gate.margin", "method.gate_input"' in said
    assert not any(line.startswith(("base", "joint", "policy", "gate: thinking")) for line in said)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["stages"]["gate"]["done"] and told["commands"][:-1] == before
    assert told["stages"]["gate"]["figures"]["margin"] == told["config"]["gate"]["margin"] == 0.001
    whole = train(parse_config(sections), tmp_path / "whole", say=quiet)
    names = {path.relative_to(whole) for path in whole.rglob("*.safetensors")}
    assert names == {path.relative_to(out) for path in out.rglob("*.safetensors")} and len(names) == 4
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert (whole / "twn_config.json").read_text() == (out / "twn_config.json").read_text()


def test_a_share_that_leaves_nothing_is_refused(data, tmp_path):
    sections = changed(gate={"share": 0.001}, base={"path": str(write_tiny_model(tmp_path / "base"))})
    sections["data"] = {"folder": str(data)}
    with pytest.raises(OptionError) as caught:
        train(parse_config(sections), tmp_path / "run", say=quiet)
    assert str(caught.value) == (
        "gate.share 0.001 of 30 training queries leaves 30 for joint training and policy optimisation and 0 for the "
        "gate; they need 10 and 2. Change gate.share, or train on more queries."
    )
    sections["gate"] = {"share": 0.7}
    with pytest.raises(OptionError, match="leaves 9 for joint training and policy optimisation and 21 for the gate"):
        train(parse_config(sections), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_split_of_the_gates_own_is_its_data(data, tmp_path):
    """All of training is left to joint training, and the gate's thoughts need not be written by anyone."""
    sections, out = small_run(data, tmp_path, gate={"share": None, "split": "gate"})
    queries = tmp_path / "data" / "queries.jsonl"
    rows = [json.loads(line) for line in queries.read_text().splitlines()]
    for row in rows:
        if row["_id"].startswith("gate"):
            del row["metadata"]["thought"]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(parse_config(sections), out, until="joint", say=quiet)
    run = training_run._Run(parse_config(sections), out, "", quiet)
    run.begin(True)
    assert len(run.data.joint) == 30
    assert {query.id for query in run.data.gate.queries} == {"gate-00000", "gate-00001"}
    for split in ("gate", "train"):
        before = queries.read_text()
        row = next(line for line in before.splitlines() if f'"_id": "{split}-00001"' in line)
        queries.write_text(before.replace(row, row.replace('"text": "', '"text": "well, ')))
        with pytest.raises(OptionError, match="the training data is not the one that the run in .* began with"):
            train(parse_config(sections), out, resume=True, say=quiet)
        queries.write_text(before)
    train(parse_config(sections), out, resume=True, say=quiet)
    judged = {json.loads(line)["id"] for line in (out / "gate" / "labels.jsonl").read_text().splitlines()}
    assert judged == {"gate-00000", "gate-00001"}


def test_splits_that_are_no_use_to_a_gate_are_refused(data, tmp_path):
    sections, out = small_run(data, tmp_path, gate={"share": None, "split": "train"})
    with pytest.raises(OptionError) as caught:
        train(parse_config(sections), out, say=quiet)
    assert str(caught.value) == (
        'gate.split "train" and data.split "train" have 30 queries in common, the first is "train-00000": a gate '
        "learns little from what joint training saw. Name splits that share none."
    )
    sections["gate"] |= {"split": "gtae"}
    with pytest.raises(DataError, match='has no split "gtae"; its splits are .* Did you mean "gate"?'):
        train(parse_config(sections), out, say=quiet)
    sections["gate"] |= {"split": "one"}
    qrels = tmp_path / "data" / "qrels"
    first = (qrels / "gate.tsv").read_text().splitlines()
    (qrels / "one.tsv").write_text("\n".join(line for line in first if "gate-00001" not in line) + "\n")
    (tmp_path / "data" / "corpus" / "one.jsonl").write_text((tmp_path / "data" / "corpus" / "gate.jsonl").read_text())
    with pytest.raises(DataError, match="every query of split .one. .* has the same positives"):
        train(parse_config(sections), out, say=quiet)
    assert not out.exists()


def test_a_training_split_that_is_too_little_is_refused(data, tmp_path):
    sections, out = small_run(data, tmp_path, gate={"share": None, "split": "gate"})
    sections["data"] |= {"split": "test"}
    make_number_task(tmp_path / "few", queries=4, train_queries=2, copies=1)
    sections["data"] |= {"folder": str(tmp_path / "few")}
    sections["policy"] = {"steps": 2}
    with pytest.raises(OptionError) as caught:
        train(parse_config(sections), out, say=quiet)
    assert str(caught.value) == (
        'data.split "test" has 4 queries, and joint training and policy optimisation need 10. Add queries, or name '
        "another split."
    )
    sections["gate"] |= {"steps": 0}
    with pytest.raises(OptionError, match='^data.split "test" has 4 queries, and joint training and policy'):
        train(parse_config(sections), out, say=quiet)


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


def test_data_that_was_refused_may_be_mended(data, tmp_path):
    """The run holds to the data that it learned from, and it has learned nothing yet."""
    sections, out = small_run(data, tmp_path)
    queries = tmp_path / "data" / "queries.jsonl"
    whole = queries.read_text()
    queries.write_text(whole.replace('"thought": "', '"thought": "<|im_end|> '))
    with pytest.raises(DataError, match="which ends a thought. Remove it."):
        train(parse_config(sections), out, say=quiet)
    queries.write_text(whole)
    train(parse_config(sections), out, resume=True, until="joint", say=quiet)


def test_made_data_is_of_the_configuration(tmp_path):
    """Also where another one was made before anything was learned; a split that it has not is said before teaching."""
    sections = changed(policy={"steps": 0})
    sections["gate"] = {"split": "gtae", "steps": 3, "batch_size": 4}
    with pytest.raises(DataError, match='has no split "gtae"'):
        train(parse_config(sections), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run" / "base").exists()
    sections["gate"] |= {"split": "gate"}
    sections["data"] = {"train_queries": 12, "gate_queries": 6, "copies": 1}
    run = training_run._Run(parse_config(sections), tmp_path / "run", "", quiet)
    run.begin(True)
    read = run._read()
    assert (len(read.joint), len(read.gate)) == (12, 6)


def test_a_damaged_record_is_refused(tmp_path):
    for place, text in enumerate(("{", "{}", "[]")):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "run.json").write_text(text)
        with pytest.raises(OptionError, match="run.json. is not as a run wrote it .*Name another folder"):
            train(parse_config(SMALL), folder, resume=True, say=quiet)


def small_run(data: Path, folder: Path, **sections) -> tuple[dict, Path]:
    """Sections of a run on a tiny backbone and on data that may be changed, and its folder."""
    own = folder / "data"
    if not own.exists():
        shutil.copytree(data, own)
    made = changed(policy={"steps": 0}, **sections)
    made |= {"data": {"folder": str(own)}, "base": {"path": str(write_tiny_model(folder / "base"))}}
    return made, folder / "run"


def test_other_data_is_refused_when_a_run_goes_on(data, tmp_path):
    """Queries that joint training learned from would judge the gate."""
    sections, out = small_run(data, tmp_path)
    train(parse_config(sections), out, until="joint", say=quiet)
    queries = tmp_path / "data" / "queries.jsonl"
    queries.write_text(queries.read_text().replace(" is ", " was ", 1))
    with pytest.raises(OptionError, match="the training data is not the one that the run in .* began with"):
        train(parse_config(sections), out, resume=True, say=quiet)


def test_the_gate_learns_from_other_queries_than_joint_training(data, tmp_path, monkeypatch):
    sections, out = small_run(data, tmp_path)
    learned, made = set(), training_run.JointTrainer

    def watched(trainee, folder, settings, stream, *rest, **options):
        learned.update(query.id for query in stream.examples.queries)
        return made(trainee, folder, settings, stream, *rest, **options)

    monkeypatch.setattr(training_run, "JointTrainer", watched)
    train(parse_config(sections), out, say=quiet)
    judged = {json.loads(line)["id"] for line in (out / "gate" / "labels.jsonl").read_text().splitlines()}
    assert len(learned) == 21 and len(judged) == 9 and not learned & judged


def test_without_a_gate_every_query_is_learned_from(data, tmp_path):
    sections, out = small_run(data, tmp_path, gate={"steps": 0})
    run = training_run._Run(parse_config(sections), out, "", quiet)
    run.begin(False)
    assert [len(run.data.joint), len(run.data.gate)] == [30, 0]


def test_thoughts_that_no_model_writes_are_said_before_training(data, tmp_path):
    sections, out = small_run(data, tmp_path)
    queries, said = tmp_path / "data" / "queries.jsonl", []
    train(parse_config(sections), out, until="joint", say=said.append)
    assert any("21 of 21 thoughts are longer than method.max_think_tokens 6, so that" in line for line in said)
    assert any("warning: joint.warmup_steps 50 leaves no step at the full learning rate" in line for line in said)
    queries.write_text(queries.read_text().replace('"thought": "', '"thought": "<|im_end|> '))
    with pytest.raises(DataError, match='metadata.thought holds "<|im_end|>", which ends a thought. Remove it.'):
        train(parse_config(sections), tmp_path / "other", say=quiet)


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
