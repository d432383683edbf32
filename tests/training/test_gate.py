"""The gate as it is trained: what it scores in the embedder, what it learns, what is told, and what a stop leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from gate_examples import DOCUMENTS, QUERIES, entries, examples, settings, without_gate

from twn_kernels import TWNEmbedder, load_checkpoint
from twn_kernels.checkpoint import save_checkpoint
from twn_kernels.errors import DataError, InputError, OptionError, TWNWarning
from twn_kernels.evaluation.dataset import Entry, write_dataset
from twn_kernels.modules.gate_mlp import GATE_INPUTS, GateMLP
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.training import gate as stage
from twn_kernels.training import gate_labels as labelling
from twn_kernels.training.examples import read_examples
from twn_kernels.training.gate import GateResult, train_gate
from twn_kernels.training.gate_collecting import Collected, collect
from twn_kernels.training.gate_labels import gate_labels
from twn_kernels.training.gate_report import gate_figures


@pytest.fixture
def llama(directories) -> TWNEmbedder:
    return without_gate(directories)


def auc(scores, labels) -> float:
    ones = [s for s, label in zip(scores, labels, strict=True) if label]
    zeros = [s for s, label in zip(scores, labels, strict=True) if not label]
    return sum((a > b) + 0.5 * (a == b) for a in ones for b in zeros) / (len(ones) * len(zeros))


def written_by(embedder: TWNEmbedder, family: str, result: GateResult, directories, folder: Path) -> TWNEmbedder:
    """A new embedder from the saved checkpoint."""
    save_checkpoint(result.checkpoint, folder)
    return TWNEmbedder.from_pretrained(directories(family)[0], folder, device="cpu", prompts=embedder.prompts)


@pytest.mark.parametrize(
    ("gate_input", "family", "graph"),
    list(zip(GATE_INPUTS, ("llama", "qwen3_vl") * 2, ("shared_kv", "shared_kv", "reencode", "reencode"), strict=True)),
)
def test_the_gate_scores_in_the_embedder_as_in_training(gate_input, family, graph, directories, tmp_path):
    embedder = without_gate(directories, family, gate_input=gate_input, graph=graph, think_threshold=0.25)
    result = train_gate(embedder, examples(), tmp_path / "out", settings(hidden=(8, 4)))
    assert list(result.checkpoint.gate) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    found = collect(embedder, examples(), tmp_path / "out", 8)
    loaded = written_by(embedder, family, result, directories, tmp_path / "twn")
    assert loaded.config.gate_input == gate_input and loaded.config.think_threshold == 0.25
    stated = json.loads((tmp_path / "twn" / "twn_config.json").read_text())
    assert stated["gate_input"] == gate_input and stated["think_threshold"] == 0.25
    gate = GateMLP(result.checkpoint.gate, activation=stated["gate_activation"], gate_input=gate_input)
    scores = gate(found.query_states, found.prompt_states)
    details = loaded.encode_query([q.text for q in QUERIES], batch_size=8, think="auto", return_details=True)[1]
    told = torch.tensor([detail.gate_score for detail in details])
    # The states are the same to the bit, but lie elsewhere, where a sum may round otherwise.
    truth = gate(found.query_states.double(), found.prompt_states.double())
    assert_as_good_as_torch(told, truth.detach(), scores.detach())
    assert [detail.thought or detail.fallback is not None for detail in details] == (told.double() >= 0.25).tolist()
    assert told.max() - told.min() > 0.01


def test_defaults_are_stated_once_a_gate_was_trained_for_them(directories, tmp_path):
    embedder = without_gate(directories)
    assert {"gate_input", "think_threshold"} <= set(embedder.config.assumed)
    result = train_gate(embedder, examples(), tmp_path / "out", settings(steps=1))
    save_checkpoint(result.checkpoint, tmp_path / "twn")
    stated = json.loads((tmp_path / "twn" / "twn_config.json").read_text())
    assert stated["gate_input"] == "mean" and stated["think_threshold"] == 0.5 and stated["gate_activation"] == "gelu"


def test_a_gate_that_is_there_is_replaced(directories, tmp_path):
    embedder = without_gate(directories)
    fresh = train_gate(embedder, examples(), tmp_path / "a", settings(steps=2))
    embedder.checkpoint = dataclasses.replace(embedder.checkpoint, gate=load_checkpoint(directories("llama")[1]).gate)
    again = train_gate(embedder, examples(), tmp_path / "b", settings(steps=2))
    assert equal(fresh, again)


def test_what_can_be_learned_is_learned(llama, tmp_path):
    """Two kinds of queries: each of the one kind seeks the document that its thought leads to, each of the other the
    one that it leads away from. So the kind, which the plain states show, decides the label."""
    kinds = ("a red flower", "What is in the picture?")
    queries = entries("q", [f"{kinds[i % 2]} {i}" for i in range(60)])
    documents = entries("d", [f"{a} {b}" for a in ("the temple", "a wall of") for b in "stone page tree bird".split()])
    llama.config = dataclasses.replace(llama.config, think_end=tuple("abcdefghijklmnopqrstuvwxyz0123456789 ."))
    anything = collect(llama, examples(queries, documents, {q.id: ["d0"] for q in queries}), tmp_path / "look", 8)
    gains = []
    for column in torch.eye(8, dtype=torch.bool):
        vectors = (anything.plain, anything.thoughtful, anything.documents, column.expand(60, -1))
        found = gate_labels(*vectors, temperature=0.05, margin=0.0)
        gains.append(found.thoughtful_scores - found.plain_scores)
    gains = torch.stack(gains, dim=1)
    chosen = [gains[i].argmax() if i % 2 else gains[i].argmin() for i in range(60)]
    known = examples(queries, documents, {q.id: [f"d{chosen[i]}"] for i, q in enumerate(queries)})
    result = train_gate(llama, known, tmp_path / "out", settings(steps=60, margin=0.0, save_steps=60))
    rows = [json.loads(line) for line in (tmp_path / "out" / "labels.jsonl").read_text().splitlines()]
    closed = [i for i, row in enumerate(rows) if row["fallback"] is None]
    assert len(closed) > 50 and all(rows[i]["label"] == i % 2 for i in closed)
    assert result.report.auc > 0.95 and result.report.accuracy > 0.9
    assert result.report.bce < 0.5 * result.report.bce_of_rate


@pytest.mark.parametrize("gate_input", GATE_INPUTS)
def test_features_of_any_size_are_learned_from(gate_input, directories, tmp_path, monkeypatch):
    """One small feature says the label; others are large, or stand far from zero, or never change."""
    wanted = torch.arange(400) % 2 == 0
    states, prompt = 40.0 * torch.randn(400, 3, 8), 40.0 * torch.randn(400, 8)
    states[:, 1, 5] = 300 + 2.0 * (wanted.float() - 0.5) + 0.1 * torch.randn(400)
    prompt[:, 4] = 100 - 2.0 * (wanted.float() - 0.5) + 0.1 * torch.randn(400)
    states[:, ::2, 5] = 300.0
    states[..., 6], prompt[:, 6] = 7.0, 7.0
    vectors = torch.eye(2)[wanted.long()]
    made = Collected(
        [f"q{i}" for i in range(400)],
        states,
        prompt,
        torch.eye(2)[:1].expand(400, -1),
        vectors,
        torch.eye(2),
        torch.tensor([[False, True]]).expand(400, -1),
        [{"thought": "", "tokens": 1, "fallback": None}] * 400,
        "made up",
    )
    monkeypatch.setattr(stage, "collect", lambda *_, **__: made)
    embedder, queries = without_gate(directories, gate_input=gate_input), entries("q", ["x"] * 400)
    result = train_gate(embedder, examples(queries), tmp_path, settings(steps=80, batch_size=32, save_steps=80))
    gate = GateMLP(result.checkpoint.gate, gate_input=gate_input)
    scores = gate(states, prompt)
    assert auc(scores.tolist(), wanted.tolist()) > 0.95
    assert result.report.auc > 0.95
    assert ((scores >= 0.5) == wanted).double().mean() > 0.9


def test_all_labels_1_is_said_too(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "gate_labels", lambda *a: labels_of(torch.ones(22, dtype=torch.bool)))
    with pytest.warns(TWNWarning, match="improved all of the 18 queries .* raise gate.margin, or keep more queries"):
        result = train_gate(llama, examples(), tmp_path, settings())
    assert result.report.train_rate == 1 and "raise gate.margin" in result.report.warning


def test_without_a_margin_the_price_of_a_thought_decides(llama, tmp_path):
    """On the queries that are learned from alone; the same labels as with that margin set."""
    made = settings(margin=None, price=0.0)
    result = train_gate(llama, examples(), tmp_path / "a", made)
    margin = result.report.margin
    rows = [json.loads(line) for line in (tmp_path / "a" / "labels.jsonl").read_text().splitlines()]
    gains = [row["thoughtful_score"] - row["plain_score"] for row in rows]
    assert margin >= 0 and [row["label"] for row in rows] == [int(gain > margin) for gain in gains]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TWNWarning)
        again = train_gate(llama, examples(), tmp_path / "b", settings(margin=margin))
        dear = train_gate(llama, examples(), tmp_path / "c", settings(margin=None, price=10.0))
    assert again.report.margin == margin
    gates = (made.checkpoint.gate for made in (result, again))
    assert all(torch.equal(*pair) for pair in zip(*(gate.values() for gate in gates), strict=True))
    # The threshold is the price's too, in place of the configuration's.
    assert again.checkpoint.config.think_threshold == llama.config.think_threshold
    assert result.report.threshold == result.checkpoint.config.think_threshold != llama.config.think_threshold
    assert dear.report.threshold == 1.0
    learned = [gain for gain, row in zip(gains, rows, strict=True) if not row["held_out"]]
    assert dear.report.margin == pytest.approx(max(0.0, *learned)) and dear.report.train_rate == 0
    assert "lower gate.price" in dear.report.warning


def labels_of(labels: torch.Tensor) -> labelling.GateLabels:
    return labelling.GateLabels(labels, torch.zeros(len(labels)), torch.ones(len(labels)))


def test_two_queries_are_enough_to_go_on(llama, tmp_path):
    with pytest.warns(TWNWarning, match="of the 1 queries that the gate learned from"):
        result = train_gate(llama, examples(QUERIES[:2]), tmp_path, settings(steps=2))
    assert result.report.held_out == 1 and math.isfinite(result.report.bce)
    assert all(torch.isfinite(tensor).all() for tensor in result.checkpoint.gate.values())


def test_the_figures_are_those_worked_by_hand():
    scores = torch.tensor([0.05, 0.15, 0.12, 0.62, 0.68, 0.95], dtype=torch.float64)
    labels = torch.tensor([False, False, True, True, False, True])
    told = gate_figures(scores, labels, 0.62)
    assert told["base_rate"] == 0.5 and told["threshold"] == 0.62 and told["think_rate"] == 0.5
    assert told["accuracy"] == pytest.approx(4 / 6)
    logs = [math.log(x) for x in (0.95, 0.85, 0.12, 0.62, 0.32, 0.95)]
    assert told["bce"] == pytest.approx(-sum(logs) / 6)
    assert told["bce_of_rate"] == pytest.approx(math.log(2))
    # Bins: 0.05 | 0.15, 0.12 | 0.62, 0.68 | 0.95
    gaps = [1 * 0.05, 2 * abs(0.135 - 0.5), 2 * abs(0.65 - 0.5), 1 * 0.05]
    assert told["ece"] == pytest.approx(sum(gaps) / 6)
    # Of nine pairs of a 1 and a 0, 0.12 loses to 0.15 and to 0.68, and 0.62 to 0.68.
    assert told["auc"] == pytest.approx(6 / 9)


def test_figures_of_one_class_have_no_auc():
    told = gate_figures(torch.tensor([0.2, 0.4]), torch.tensor([False, False]), 0.5)
    assert told["auc"] is None and told["bce_of_rate"] == 0 and told["accuracy"] == 1
    assert told["ece"] == pytest.approx(0.3)


class Stopped(Exception):
    """Stands for whatever stops a run."""


def stopping_at(step: int):
    def say(line: str) -> None:
        if line.startswith(f"step {step} "):
            raise Stopped

    return say


def equal(first: GateResult, second: GateResult) -> bool:
    same = first.checkpoint.gate.keys() == second.checkpoint.gate.keys() and first.report == second.report
    return same and all(
        torch.equal(first.checkpoint.gate[name], second.checkpoint.gate[name]) for name in first.checkpoint.gate
    )


def test_a_stopped_run_goes_on_to_the_same_bits(llama, tmp_path):
    straight = train_gate(llama, examples(), tmp_path / "a", settings())
    with pytest.raises(Stopped):
        train_gate(llama, examples(), tmp_path / "b", settings(), say=stopping_at(5))
    assert (tmp_path / "b" / "checkpoint-4").is_dir() and not (tmp_path / "b" / "checkpoint-6").exists()
    said = []
    resumed = train_gate(llama, examples(), tmp_path / "b", settings(), resume=True, say=said.append)
    assert equal(straight, resumed)
    assert [line.split()[1] for line in said] == ["5", "6"]  # nothing was embedded, no step was taken twice
    log = [[json.loads(x) for x in (tmp_path / f / "log.jsonl").read_text().splitlines()] for f in ("a", "b")]
    assert [row["loss"] for row in log[0]] == [row["loss"] for row in log[1]]
    other = train_gate(llama, examples(), tmp_path / "c", settings(), seed=1)
    assert not equal(straight, other)


def test_a_run_without_resume_refuses_states_before_it_embeds(llama, tmp_path):
    train_gate(llama, examples(), tmp_path, settings())
    (tmp_path / "labels.safetensors").unlink()
    with pytest.raises(OptionError) as error:
        train_gate(llama, examples(), tmp_path, settings())
    assert str(error.value) == (
        f'"{tmp_path}" holds states of a run, the newest is checkpoint-6. '
        "Resume that run, or train into an empty folder."
    )
    assert not (tmp_path / "labels.safetensors").exists()


def perturbed(embedder: TWNEmbedder) -> None:
    name, parameter = next((n, p) for n, p in embedder.model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter += 0.05 * torch.randn_like(parameter)


def with_longer_thoughts(embedder: TWNEmbedder) -> None:
    embedder.config = dataclasses.replace(embedder.config, max_think_tokens=9)


def with_another_prompt(embedder: TWNEmbedder) -> None:
    embedder.prompts["query"] = "Look for it."


def with_other_queries(embedder: TWNEmbedder) -> None:
    embedder.checkpoint = dataclasses.replace(embedder.checkpoint, queries=embedder.checkpoint.queries * 1.5)
    embedder._queries.queries.data *= 1.5


OTHER_TEXT = [dataclasses.replace(QUERIES[0], text="a red stone"), *QUERIES[1:]]
OTHER_DOCUMENT = [dataclasses.replace(DOCUMENTS[0], text="another page"), *DOCUMENTS[1:]]


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (perturbed, {}),
        (with_longer_thoughts, {}),
        (with_another_prompt, {}),
        (with_other_queries, {}),
        (None, {"queries": OTHER_TEXT}),
        (None, {"documents": OTHER_DOCUMENT}),
    ],
    ids=["weights", "method", "prompt", "learned queries", "a query", "a document"],
)
def test_what_is_stale_is_collected_again(change, known, llama, tmp_path):
    train_gate(llama, examples(), tmp_path / "a", settings())
    if change is not None:
        change(llama)
    said = []
    again = train_gate(llama, examples(**known), tmp_path / "a", settings(), resume=True, say=said.append)
    assert "gate: labels.safetensors is of other weights, another method or other inputs; collecting again" in said
    assert "gate: checkpoint-6 is of other labels or settings; training anew" in said
    assert equal(again, train_gate(llama, examples(**known), tmp_path / "b", settings()))


@pytest.mark.parametrize(
    "change", [{"margin": 0.4}, {"temperature": 0.02}, {"hidden": (4,)}, {"steps": 4}, {"learning_rate": 1e-3}]
)
def test_other_settings_train_anew_on_what_was_collected(change, llama, tmp_path):
    train_gate(llama, examples(), tmp_path / "a", settings())
    said = []
    other = train_gate(llama, examples(), tmp_path / "a", settings(**change), resume=True, say=said.append)
    assert said[0] == "gate: checkpoint-6 is of other labels or settings; training anew"
    assert not any("thinking" in line or "embedding" in line for line in said)
    assert equal(other, train_gate(llama, examples(), tmp_path / "b", settings(**change)))


def test_another_gate_input_trains_anew_on_what_was_collected(directories, tmp_path):
    said = []
    for gate_input in GATE_INPUTS:
        embedder = without_gate(directories, gate_input=gate_input)
        train_gate(embedder, examples(), tmp_path, settings(steps=2), resume=True, say=said.append)
    assert sum("embedding" in line for line in said) == 1
    assert sum("training anew" in line for line in said) == 3


def test_a_finished_gate_is_given_again(llama, tmp_path):
    first = train_gate(llama, examples(), tmp_path, settings())
    said = []
    assert equal(first, train_gate(llama, examples(), tmp_path, settings(), resume=True, say=said.append))
    assert said == []


def test_one_query_is_refused(llama, tmp_path):
    with pytest.raises(DataError) as error:
        train_gate(llama, examples(QUERIES[:1]), tmp_path, settings())
    assert str(error.value) == (
        "the gate needs two queries or more, one to learn from and one to be judged by, got 1. "
        "Raise gate.share, or name a larger gate.split."
    )


def test_an_entry_that_cannot_be_embedded_is_named(llama, tmp_path):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    image = folder / "images" / "one.png"
    image.write_bytes(b"no image")
    queries = [dataclasses.replace(q, metadata={"thought": "so"}) for q in QUERIES[:2]] + [
        Entry("seen", image=str(image))
    ]
    qrels = {"train": {"q0": {"d0": 1}, "q1": {"d1": 1}, "seen": {"d2": 1}}}
    write_dataset(folder, DOCUMENTS, queries, qrels)
    with pytest.raises(InputError, match='^query "seen": '):
        train_gate(llama, read_examples(folder), tmp_path / "out", settings())
    assert not (tmp_path / "out" / "labels.safetensors").exists()
