"""The embedder equals the slow pipeline: same tokens, vectors and scores as good as torch, in every graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from twn_kernels.testing.oracle import assert_as_good_as_torch

GRAPHS = [("shared_kv", "reasoning"), ("shared_kv", "embedding"), ("shared_kv", None), ("reencode", "reasoning")]
# One kind of gate a family; every kind is met.
WORLDS = [
    ("qwen3_vl", "mean"),
    ("qwen2_5_vl", "concat"),
    ("qwen2_vl", "last"),
    ("llama", "mean_last"),
    ("gemma3_text", "mean"),
]
LIMIT = 7


def _config(world, graph, prefill, **changes):
    config = world.embedder.checkpoint.config
    return dataclasses.replace(config, graph=graph, prefill_adapter=prefill, max_think_tokens=LIMIT, **changes)


def _check(world, config, vectors, details, thinks, indices=None) -> tuple[int, int]:
    """Compare with the reference; returns how many thoughts were closed and how many were broken."""
    indices = list(range(len(world.inputs))) if indices is None else indices
    own, truth = [], []
    for place, index in enumerate(indices):
        own.append(world.reference(index, config, think=thinks[place]))
        truth.append(world.reference(index, config, think=thinks[place], dtype=torch.float64))
        assert own[place].thought_ids == truth[place].thought_ids, "fp32 and fp64 disagree on a token: change the seed"
        detail = details[place]
        assert detail.tokens == len(own[place].thought_ids)
        assert detail.thought == own[place].thoughtful
        assert (detail.fallback is not None) == (thinks[place] and not own[place].thoughtful)
        if detail.text is not None:
            assert own[place].thought_ids and detail.text == _text(world, config, own[place].thought_ids)
    stacked = [torch.stack([result.vector for result in results]) for results in (truth, own)]
    assert_as_good_as_torch(torch.as_tensor(vectors), *stacked, "vectors")
    scores = [torch.tensor([result.score for result in truth], dtype=torch.float64)]
    scores.append(torch.tensor([result.score for result in own]))
    assert_as_good_as_torch(torch.tensor([detail.gate_score for detail in details]), *scores, "gate scores")
    closed = sum(result.thoughtful for result in own)
    return closed, sum(thinks) - closed


def _text(world, config, ids) -> str:
    """The thought without its stop and without special tokens, from the reference's ids."""
    written = world.embedder.processor.text_of(ids)
    return written.split(config.think_end[0])[0]


@pytest.mark.parametrize("decode", ["dynamic", "static"])
@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=lambda v: str(v))
@pytest.mark.parametrize(("family", "gate_input"), WORLDS, ids=lambda v: str(v))
def test_always_thinking_in_one_batch(world, family, gate_input, graph, prefill, decode, decoding, monkeypatch):
    this = world(family, gate_input)
    config = _config(this, graph, prefill)
    monkeypatch.setattr(this.embedder, "config", config)
    decoding(this.embedder, decode)
    vectors, details = this.embedder.encode(this.inputs, think="always", return_details=True)
    closed, broken = _check(this, config, vectors, details, [True] * len(this.inputs))
    assert closed + broken == len(this.inputs)
    assert {detail.decode for detail in details} == {decode}


@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=lambda v: str(v))
def test_the_gate_splits_the_batch_and_order_is_kept(world, graph, prefill, monkeypatch):
    this = world("qwen3_vl", "mean")
    config = _config(this, graph, prefill)
    monkeypatch.setattr(this.embedder, "config", config)
    scores = [d.gate_score for d in this.embedder.encode(this.inputs, think="never", return_details=True)[1]]
    threshold = sorted(scores)[len(scores) // 2]
    vectors, details = this.embedder.encode(this.inputs, think="auto", think_threshold=threshold, return_details=True)
    thinks = [score >= threshold for score in scores]
    assert 0 < sum(thinks) < len(thinks)
    assert [d.tokens > 0 for d in details] == thinks
    _check(this, config, vectors, details, thinks)


@pytest.mark.parametrize(
    ("batch_size", "decode"), [(1, "dynamic"), (2, "dynamic"), (4, "dynamic"), (4, "static"), (2, "replayed")]
)
def test_batches_do_not_matter(world, batch_size, decode, decoding, monkeypatch):
    this = world("qwen3_vl", "mean")
    decoding(this.embedder, decode)
    config = _config(this, "shared_kv", "reasoning")
    monkeypatch.setattr(this.embedder, "config", config)
    order = [5, 0, 3, 1, 4, 2]
    inputs = [this.inputs[index] for index in order]
    vectors, details = this.embedder.encode(inputs, think="always", batch_size=batch_size, return_details=True)
    _check(this, config, vectors, details, [True] * len(order), order)


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_pooling(world, pooling, monkeypatch):
    this = world("llama", "mean_last")
    config = _config(this, "shared_kv", "reasoning", pooling=pooling)
    monkeypatch.setattr(this.embedder, "config", config)
    vectors, details = this.embedder.encode(this.inputs, think="never", return_details=True)
    _check(this, config, vectors, details, [False] * len(this.inputs))


def test_thresholds_0_and_1_are_always_and_never(world, monkeypatch):
    this = world("qwen3_vl", "mean")
    monkeypatch.setattr(this.embedder, "config", _config(this, "shared_kv", "reasoning"))
    encode = this.embedder.encode
    assert (encode(this.inputs, think_threshold=0.0) == encode(this.inputs, think="always")).all()
    assert (encode(this.inputs, think_threshold=1.0) == encode(this.inputs, think="never")).all()


def test_some_thoughts_close_and_some_hit_the_cap(world, monkeypatch):
    """The other tests mean little unless both ends of a thought occur in them."""
    this = world("qwen3_vl", "mean")
    monkeypatch.setattr(this.embedder, "config", _config(this, "shared_kv", "reasoning"))
    _, details = this.embedder.encode(this.inputs, think="always", return_details=True)
    assert any(d.thought for d in details) and any(d.fallback for d in details)


def _wide_vector(embedder, value) -> torch.Tensor:
    """The fp64 vector of an fp64 embedder; ``encode`` itself returns fp32."""
    rounded = embedder.encode(value, think="always", convert_to_tensor=True)
    return rounded.double()


def test_adapters_on_the_vision_tower(tmp_path, world, monkeypatch):
    from twn_kernels import TWNEmbedder
    from twn_kernels.pipeline import loading
    from twn_kernels.testing.twn_directory import write_twn_directory

    known = world("qwen3_vl", "mean")
    plain = loading.base_model(known.base, torch.float32, "cpu", {})
    targets = r".*(visual\.blocks\.\d+\.mlp\.linear_fc1|language_model\.layers\.\d+\.self_attn\.q_proj)"
    twn = write_twn_directory(tmp_path / "twn", plain, targets=targets, num_queries=3)
    embedder = TWNEmbedder.from_pretrained(known.base, twn, dtype="float32", device="cpu")
    wide = TWNEmbedder.from_pretrained(known.base, twn, dtype=torch.float64, device="cpu")
    assert loading.routes_media(embedder.model)
    inputs = [known.inputs[3], "a red flower"]
    vectors = {}
    for adapter in ("reasoning", None):
        for one in (embedder, wide):
            one.config = dataclasses.replace(one.config, max_think_tokens=4, prefill_adapter=adapter)
        vectors[adapter] = torch.as_tensor(embedder.encode(inputs, think="always")[0])
        alone = torch.as_tensor(embedder.encode(inputs[0], think="always"))
        assert_as_good_as_torch(vectors[adapter], _wide_vector(wide, inputs[0]), alone)
    assert (vectors["reasoning"] - vectors[None]).abs().max() > 1e-3
