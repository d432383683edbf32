"""What a gate learns from: labels against slow ones, what both passes give, and the file that keeps it."""

from __future__ import annotations

import json
import math

import pytest
import pytrec_eval
import torch
from gate_examples import DOCUMENTS, QUERIES, examples, settings, slow_score, without_gate
from pipeline_runs import ran

from twn_kernels import TWNEmbedder
from twn_kernels.errors import DataError, InputError, OptionError, TWNWarning
from twn_kernels.evaluation.dataset import Entry
from twn_kernels.ops import pool_queries
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.training import gate_labels as labelling
from twn_kernels.training.gate import train_gate
from twn_kernels.training.gate_labels import collect, gate_labels, ndcg, priced_margin, priced_threshold


@pytest.fixture
def llama(directories) -> TWNEmbedder:
    return without_gate(directories)


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_labels_are_those_of_a_slow_recomputation(monkeypatch):
    monkeypatch.setattr(labelling, "_ROWS", 7)  # so that rows are cut, the last piece short
    plain, documents = unit(40, 12), unit(9, 12)
    thoughtful = torch.nn.functional.normalize(plain + 0.3 * torch.randn(40, 12), dim=1)
    positives = torch.rand(40, 9) < 0.3
    positives[torch.arange(40), torch.randint(9, (40,))] = True
    positives[3] = True  # no negative at all
    found = gate_labels(plain, thoughtful, documents, positives, 0.2, 0.15)
    lists = [value.double().tolist() for value in (plain, thoughtful, documents)]
    for row in range(40):
        slow = [slow_score(way[row], lists[2], positives[row].tolist(), 0.2) for way in lists[:2]]
        assert found.plain_scores[row].item() == pytest.approx(slow[0], rel=1e-9, abs=1e-12)
        assert found.thoughtful_scores[row].item() == pytest.approx(slow[1], rel=1e-9, abs=1e-12)
        assert bool(found.labels[row]) == (slow[1] - slow[0] > 0.15), row
    assert 5 < found.labels.sum() < 35 and found.labels.dtype == torch.bool
    assert found.plain_scores[3] == 0 and not found.labels[3]


def test_other_positives_are_masked():
    query, documents = torch.eye(4)[:1], torch.eye(4)
    alone = torch.tensor([[True, False, False, False]])
    score = gate_labels(query, query, documents, alone, 1.0, 0.0).plain_scores.item()
    assert score == pytest.approx(1 - math.log(math.e + 3))
    # A second positive, as near as the first: as a negative it would halve the probability, as a positive it does not.
    twice = torch.cat([documents, query])
    both = torch.tensor([[True, False, False, False, True]])
    assert gate_labels(query, query, twice, both, 1.0, 0.0).plain_scores.item() == pytest.approx(score)
    other = torch.tensor([[True, False, False, False, False]])
    assert gate_labels(query, query, twice, other, 1.0, 0.0).plain_scores.item() < score - 0.3


def test_the_margin_must_be_passed():
    documents, positives = torch.eye(2), torch.tensor([[True, False]])
    plain, thoughtful = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    found = gate_labels(plain, thoughtful, documents, positives, 1.0, 0.0)
    gain = (found.thoughtful_scores - found.plain_scores).item()
    assert gain > 0 and found.labels.item()
    assert not gate_labels(plain, thoughtful, documents, positives, 1.0, gain).labels.item()
    assert gate_labels(plain, thoughtful, documents, positives, 1.0, gain - 1e-9).labels.item()
    assert not gate_labels(plain, plain, documents, positives, 1.0, 0.0).labels.item()


def paid(margin: float, gains, plain, thoughtful, price: float) -> tuple[float, int]:
    """Summed reciprocal rank less the price of the thoughts, and how many there are, one query at a time."""
    total, thoughts = 0.0, 0
    for gain, without, with_it in zip(gains, plain, thoughtful, strict=True):
        thinks = gain > margin
        total, thoughts = total + (with_it - price if thinks else without), thoughts + thinks
    return total, thoughts


@pytest.mark.parametrize("price", [0.0, 0.02, 0.3, 5.0])
@pytest.mark.parametrize("seed", range(8))
def test_the_margin_pays_best_of_all(seed, price):
    draw = torch.Generator().manual_seed(seed)
    gains = (torch.randn(60, generator=draw) * 3).round()  # with ties, and some of them below zero
    plain, thoughtful = (1 / torch.randint(1, 5, (2, 60), generator=draw)).double()
    values = [value.tolist() for value in (gains, plain, thoughtful)]
    found = priced_margin(gains, plain, thoughtful, price)
    got, thoughts = paid(found, *values, price)
    for margin in {0.0, *(gain for gain in values[0] if gain > 0)}:
        other, more = paid(margin, *values, price)
        assert got > other - 1e-9
        if other == pytest.approx(got, abs=1e-12):
            assert thoughts <= more


def test_the_margin_of_queries_that_thinking_never_helps_leaves_none_to_think():
    ranks = torch.ones(3)
    assert priced_margin(torch.tensor([2.0, 0.5, -1.0]), ranks, ranks, 0.02) == 2.0
    assert priced_margin(torch.tensor([-2.0, 0.0, -1.0]), ranks, ranks, 0.02) == 0.0
    worth = priced_margin(torch.tensor([2.0, 0.5, 1.0]), 0.1 * ranks, ranks, 0.02)
    assert worth == 0.0  # each of them pays
    with pytest.raises(OptionError, match=r"^price must be at least 0, got -1\.$|^price must be at least 0, got -1\.0"):
        priced_margin(ranks, ranks, ranks, -1.0)


@pytest.mark.parametrize(("documents", "cutoff"), [(7, 10), (40, 10), (40, 3)])
def test_ndcg_is_the_evaluations(documents, cutoff, monkeypatch):
    """The same as trec_eval's of the same vectors; rows are cut, the last piece short."""
    monkeypatch.setattr(labelling, "_ROWS", 3)
    queries, found, positives = unit(10, 4), unit(documents, 4), torch.rand(10, documents) < 0.4
    positives[torch.arange(10), torch.randint(documents, (10,))] = True
    qrels = {f"q{i}": {f"d{j}": 1 for j in range(documents) if positives[i, j]} for i in range(10)}
    run = {
        f"q{i}": {f"d{j}": float(queries[i].double() @ found[j].double()) for j in range(documents)} for i in range(10)
    }
    name = f"ndcg_cut.{cutoff}"
    told = pytrec_eval.RelevanceEvaluator(qrels, {name}).evaluate(run)
    for row, value in enumerate(ndcg(queries, found, positives, cutoff).tolist()):
        assert value == pytest.approx(told[f"q{row}"][f"ndcg_cut_{cutoff}"], abs=1e-9)


@pytest.mark.parametrize("price", [0.0, 0.05, 0.4, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_pays_best_of_all(seed, price):
    draw = torch.Generator().manual_seed(seed)
    scores = (torch.rand(50, generator=draw) * 11).round() / 12  # with ties
    plain, thoughtful = torch.rand(2, 50, generator=draw, dtype=torch.float64)
    found = priced_threshold(scores, plain, thoughtful, price)

    def paid(threshold: float) -> float:
        thinks = scores.double() >= threshold
        return float((torch.where(thinks, thoughtful - price, plain)).sum())

    others = [place / 24 for place in range(25)]
    assert 0 <= found <= 1 and paid(found) >= max(map(paid, others)) - 1e-9
    assert price < 2 or found == 1.0


@pytest.mark.parametrize(
    ("temperature", "margin", "message"),
    [
        (0.0, 0.1, "temperature must be above 0, got 0.0."),
        (float("nan"), 0.1, "temperature must be above 0, got nan."),
        (0.1, -0.5, "margin must be at least 0, got -0.5."),
        (0.1, float("nan"), "margin must be at least 0, got nan."),
    ],
)
def test_labels_refuse_settings_out_of_range(temperature, margin, message):
    with pytest.raises(OptionError) as error:
        gate_labels(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2).bool(), temperature, margin)
    assert str(error.value) == message


def test_labels_refuse_a_query_without_a_positive():
    positives = torch.tensor([[True, False], [False, False]])
    with pytest.raises(DataError, match="1 of 2 queries have no positive among the documents, the first is at place 1"):
        gate_labels(torch.eye(2), torch.eye(2), torch.eye(2), positives, 0.1, 0.1)


# -- what is collected -------------------------------------------------------------------------------------------------


def test_what_is_collected_is_what_the_embedder_gives(llama, tmp_path):
    found = collect(llama, examples(), tmp_path, 8)
    texts = [query.text for query in QUERIES]
    always, details = llama.encode_query(texts, think="always", batch_size=8, return_details=True)
    closed = torch.tensor([detail.thought for detail in details])
    assert 0 < closed.sum() < len(closed)
    plain = torch.from_numpy(llama.encode_query(texts, think="never", batch_size=8))
    states = llama.gate_states([query.input for query in QUERIES], prompt="Find it.", batch_size=8)
    assert torch.equal(found.query_states, states[0]) and torch.equal(found.prompt_states, states[1])
    # The mean over the queries is taken of states that lie elsewhere, hence not to the bit.
    truth = pool_queries(found.query_states.double(), pooling=llama.config.pooling, normalize=True)
    assert_as_good_as_torch(found.plain, truth, plain)
    assert torch.equal(found.thoughtful[closed], torch.from_numpy(always)[closed])
    assert torch.equal(found.thoughtful[~closed], found.plain[~closed])
    assert ((found.thoughtful - found.plain)[closed].abs().amax(dim=1) > 1e-3).all()
    documents = llama.encode_document([entry.text for entry in DOCUMENTS], think="never", batch_size=8)
    assert torch.equal(found.documents, torch.from_numpy(documents))
    assert found.ids == [query.id for query in QUERIES]
    told = [{"thought": d.text, "tokens": d.tokens, "fallback": d.fallback} for d in details]
    assert found.thoughts == told and any(thought["thought"] for thought in told)
    for place, row in enumerate(found.positives):
        assert {f"d{column}" for column in row.nonzero()[:, 0].tolist()} == {f"d{place % 7}", f"d{place % 5}"}


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_gate_states_are_what_the_method_gives_to_a_gate(family, directories, inputs_of, monkeypatch):
    base, twn = directories(family)
    embedder, inputs = TWNEmbedder.from_pretrained(base, twn, device="cpu"), inputs_of(family)
    read = []
    monkeypatch.setattr(embedder._gate, "forward", lambda *states: read.append(states) or torch.zeros(len(inputs)))
    embedder.encode(inputs, think="auto", batch_size=len(inputs))
    states, prompt_states = embedder.gate_states(inputs, batch_size=len(inputs))
    assert torch.equal(states, read[0][0]) and torch.equal(prompt_states, read[0][1])
    assert torch.equal(states, ran(embedder, inputs, "never").states)
    asked, _ = embedder.gate_states(inputs, prompt="Find it.", batch_size=2)
    assert asked.shape == states.shape and (asked - states).abs().max() > 1e-3
    nothing = embedder.gate_states([])
    assert [value.shape for value in nothing] == [(0, *states.shape[1:]), (0, states.shape[2])]
    with pytest.raises(InputError, match="^input 1: "):
        embedder.gate_states(["a", 7], batch_size=1)
    with pytest.raises(OptionError, match="batch_size must be a whole number of at least 1, got 0"):
        embedder.gate_states(["a"], batch_size=0)


def test_broken_thoughts_are_labelled_0(directories, tmp_path):
    embedder = without_gate(directories, think_end=("never written",))
    with pytest.warns(TWNWarning, match="thinking improved none of the 18 queries that the gate learned from by more"):
        result = train_gate(embedder, examples(), tmp_path, settings(margin=0.0))
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [0] * len(QUERIES)
    assert all(row["plain_score"] == row["thoughtful_score"] and row["fallback"] for row in rows)
    assert result.report.closed_rate == 0 and result.report.train_rate == 0 and result.report.base_rate == 0
    assert result.report.auc is None and "lower gate.margin" in result.report.warning


def test_labels_of_the_folder_are_those_of_the_vectors(llama, tmp_path):
    result = train_gate(llama, examples(), tmp_path, settings())
    found = collect(llama, examples(), tmp_path, 8)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    documents = found.documents.double().tolist()
    for place, row in enumerate(rows):
        relevant = found.positives[place].tolist()
        plain = slow_score(found.plain[place].double().tolist(), documents, relevant, 0.05)
        thoughtful = slow_score(found.thoughtful[place].double().tolist(), documents, relevant, 0.05)
        assert row["id"] == f"q{place}" and row["label"] == int(thoughtful - plain > 0.1)
        assert [row["plain_score"], row["thoughtful_score"]] == pytest.approx([plain, thoughtful], rel=1e-9)
    held = [row for row in rows if row["held_out"]]
    assert len(held) == result.report.held_out == 4 and result.report.queries == 22
    assert result.report.base_rate == sum(row["label"] for row in held) / 4
    assert result.report.train_rate == sum(row["label"] for row in rows if not row["held_out"]) / 18
    assert result.report.closed_rate == sum(row["fallback"] is None for row in rows) / 22
    assert 0 < sum(row["label"] for row in rows) < 22


def test_a_large_corpus_is_sampled_and_keeps_every_positive(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "_MOST_DOCUMENTS", 5)
    few = examples(QUERIES[:2], DOCUMENTS, {"q0": ["d1", "d6"], "q1": ["d3"]})
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        ids = [entry.id for entry in labelling._candidates(few, [{"d1", "d6"}, {"d3"}], seed)]
        assert len(ids) == 5 and {"d1", "d3", "d6"} <= set(ids) and ids == sorted(ids)
        drawn.append(ids)
    assert drawn[0] == drawn[1] and any(ids != drawn[0] for ids in drawn)
    found = collect(llama, few, tmp_path, 8, seed=0)
    assert found.documents.shape[0] == 5
    for row, wanted in zip(found.positives, ({"d1", "d6"}, {"d3"}), strict=True):
        assert {drawn[0][column] for column in row.nonzero()[:, 0].tolist()} == wanted
    monkeypatch.setattr(labelling, "_MOST_DOCUMENTS", 2)
    assert [entry.id for entry in labelling._candidates(few, [{"d1", "d6"}, {"d3"}], 0)] == ["d1", "d3", "d6"]


def test_the_images_of_queries_are_part_of_what_was_collected(directories, tmp_path):
    from PIL import Image

    path = tmp_path / "image.png"
    pictured = Entry("q0", "which number", image=str(path))
    Image.new("RGB", (32, 32), "red").save(path)
    embedder, said = without_gate(directories, "qwen3_vl"), []
    few = examples([pictured, *QUERIES[1:3]])
    before = collect(embedder, few, tmp_path, 8)
    assert torch.equal(before.plain, collect(embedder, few, tmp_path, 8, say=said.append).plain) and not said
    Image.new("RGB", (32, 32), "blue").save(path)
    assert not torch.equal(before.plain, collect(embedder, few, tmp_path, 8, say=said.append).plain)
    assert "other inputs; collecting again" in said[0]


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied"])
def test_a_damaged_file_is_collected_again(harm, llama, tmp_path):
    found = collect(llama, examples(), tmp_path, 8)
    path, said = tmp_path / "labels.safetensors", []
    whole = path.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    path.write_bytes({"flipped": flipped, "cut": whole[: len(whole) // 2], "emptied": b""}[harm])
    again = collect(llama, examples(), tmp_path, 8, say=said.append)
    assert said[0] == "gate: labels.safetensors is damaged; collecting again"
    assert torch.equal(again.thoughtful, found.thoughtful) and again.thoughts == found.thoughts
    assert path.read_bytes() == whole
