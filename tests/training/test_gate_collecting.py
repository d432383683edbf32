"""What a gate learns from is collected once: both passes, the file that keeps them, and a pass that is stopped."""

from __future__ import annotations

import json

import pytest
import torch
from gate_examples import DOCUMENTS, QUERIES, examples, settings, slow_score, without_gate
from pipeline_runs import ran

from twn_kernels import TWNEmbedder
from twn_kernels.errors import InputError, OptionError, TWNWarning
from twn_kernels.evaluation.dataset import Entry
from twn_kernels.ops import pool_queries
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.training import gate_collecting as collecting
from twn_kernels.training.gate import train_gate
from twn_kernels.training.gate_collecting import collect


@pytest.fixture
def llama(directories) -> TWNEmbedder:
    return without_gate(directories)


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
    monkeypatch.setattr(collecting, "_MOST_DOCUMENTS", 5)
    few = examples(QUERIES[:2], DOCUMENTS, {"q0": ["d1", "d6"], "q1": ["d3"]})
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        ids = [entry.id for entry in collecting._candidates(few, [{"d1", "d6"}, {"d3"}], seed)]
        assert len(ids) == 5 and {"d1", "d3", "d6"} <= set(ids) and ids == sorted(ids)
        drawn.append(ids)
    assert drawn[0] == drawn[1] and any(ids != drawn[0] for ids in drawn)
    found = collect(llama, few, tmp_path, 8, seed=0)
    assert found.documents.shape[0] == 5
    for row, wanted in zip(found.positives, ({"d1", "d6"}, {"d3"}), strict=True):
        assert {drawn[0][column] for column in row.nonzero()[:, 0].tolist()} == wanted
    monkeypatch.setattr(collecting, "_MOST_DOCUMENTS", 2)
    assert [entry.id for entry in collecting._candidates(few, [{"d1", "d6"}, {"d3"}], 0)] == ["d1", "d3", "d6"]


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


def test_a_pass_that_was_stopped_goes_on_where_it_stopped(llama, tmp_path, monkeypatch):
    """Thoughts of thousands of queries may take hours; those that were written are not written again."""
    monkeypatch.setattr(collecting, "_BATCHES", 1)
    whole = collect(llama, examples(), tmp_path / "whole", 3)
    encode, calls = collecting.encode_entries, []

    def stopped(embedder, entries, role, **options):
        if role == "document":
            return encode(embedder, entries, role, **options)
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append([entry.id for entry in entries])
        return encode(embedder, entries, role, **options)

    monkeypatch.setattr(collecting, "encode_entries", stopped)
    with pytest.raises(KeyboardInterrupt):
        collect(llama, examples(), tmp_path / "cut", 3)
    monkeypatch.setattr(collecting, "encode_entries", encode)
    said: list[str] = []
    again = collect(llama, examples(), tmp_path / "cut", 3, say=said.append)
    assert calls == [[query.id for query in QUERIES[:3]]]
    assert said[1] == f"gate: thinking, 3 of {len(QUERIES)} queries done"
    assert torch.equal(again.thoughtful, whole.thoughtful) and again.thoughts == whole.thoughts
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()} == {"labels.safetensors"}
    assert (tmp_path / "cut" / "labels.safetensors").read_bytes() == (
        tmp_path / "whole" / "labels.safetensors"
    ).read_bytes()


def test_a_part_of_another_model_is_not_gone_on_with(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "_BATCHES", 1)
    part = collecting._Part(tmp_path / "thinking.safetensors", "another source", print)
    part.add(torch.zeros(3, 4), [{"thought": "", "tokens": 0, "fallback": None}] * 3)
    said: list[str] = []
    found = collect(llama, examples(), tmp_path, 3, say=said.append)
    assert said[0] == "gate: thinking.safetensors is of other weights, another method or other inputs; collecting again"
    assert said[2].startswith("gate: thinking, 0 of ") and found.thoughtful.any(dim=1).all()


def test_what_cannot_be_embedded_is_said_before_anything_is_thought(llama, tmp_path):
    image = tmp_path / "one.png"
    image.write_bytes(b"no image")
    documents, said = [*DOCUMENTS[:-1], Entry(DOCUMENTS[-1].id, image=str(image))], []
    with pytest.raises(InputError, match=f'^document "{DOCUMENTS[-1].id}": '):
        collect(llama, examples(documents=documents), tmp_path, 3, say=said.append)
    assert not any("thinking" in line for line in said)
