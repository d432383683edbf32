"""What a run learns from: divided, checked before anything is taught, and the same when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_work import changed, quiet, small_run

from twn_kernels.errors import DataError, OptionError
from twn_kernels.evaluation.number_task import make_number_task
from twn_kernels.testing import write_tiny_model
from twn_kernels.training import run as training_run
from twn_kernels.training.config import parse_config
from twn_kernels.training.run import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numbers") / "data"
    return make_number_task(folder, queries=1, train_queries=30, copies=1)


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
        told = (out / "run.json").read_bytes()
        with pytest.raises(OptionError, match="the training data is not the one that the run in .* began with"):
            train(parse_config(sections), out, resume=True, say=quiet)
        assert (out / "run.json").read_bytes() == told
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


def test_data_that_was_refused_may_be_mended(data, tmp_path):
    """The run holds to the data that it learned from, and it has learned nothing yet."""
    sections, out = small_run(data, tmp_path)
    queries = tmp_path / "data" / "queries.jsonl"
    whole = queries.read_text()
    queries.write_text(whole.replace('"thought": "', '"thought": "<|im_end|> '))
    with pytest.raises(DataError, match="which ends a thought. Remove it."):
        train(parse_config(sections), out, say=quiet)
    queries.write_text(whole.replace(" is ", " was "))
    run = training_run._Run(parse_config(sections), out, "", quiet)
    run.begin(True)
    assert run.data.digest == json.loads((out / "run.json").read_text())["data"]  # accepted, and nothing learned yet
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
