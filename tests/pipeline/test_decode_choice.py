"""The embedder's ``decode`` option: what each mode runs, why ``auto`` refuses a graph, and where it says so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import twn_kernels
from twn_kernels import TWNEmbedder
from twn_kernels.errors import ImplUnavailable, OptionError, TWNWarning
from twn_kernels.pipeline import decode_choice, static_cache
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_choice import DecodeChoice, choose
from twn_kernels.pipeline.grouped_attention import grouped_attention, grouped_sdpa
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import tiny_config, tiny_model

TEXTS = ["a red flower", "the old temple", "seven"]


@pytest.fixture
def llama(world, monkeypatch):
    this = world("llama", "mean_last")
    config = dataclasses.replace(this.embedder.checkpoint.config, max_think_tokens=6)
    monkeypatch.setattr(this.embedder, "config", config)
    return this


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(decode_choice, "_why_no_device", lambda backbone: None)


def test_every_mode_gives_the_same_thoughts_and_says_which_it_was(llama, decoding):
    embedder = llama.embedder
    assert embedder.decode_choice == DecodeChoice("dynamic", "CUDA graphs need a GPU and the model is on cpu.")
    _, details = embedder.encode(TEXTS, think="always", return_details=True)
    assert {detail.decode for detail in details} == {"dynamic"}
    vectors = []
    for mode, said in (("static", "static"), ("replayed", "cuda_graph")):
        decoding(embedder, mode)
        other, told = embedder.encode(TEXTS, think="always", return_details=True)
        assert {detail.decode for detail in told} == {said} == {embedder.decode_choice.mode}
        assert [detail.text for detail in told] == [detail.text for detail in details]
        vectors.append(other)
    assert np.array_equal(*vectors), "the same step, launched one by one or replayed"
    assert embedder.encode(TEXTS[0], think="never", return_details=True)[1].decode is None


def test_buffers_stay_between_calls_until_they_are_freed(llama, decoding):
    embedder = llama.embedder
    decoding(embedder, "replayed")
    first = embedder.encode(TEXTS, think="always")
    graph = embedder._decoding.graph
    held = graph._steps.keys
    assert graph.bytes > 0 and held
    assert np.array_equal(embedder.encode(TEXTS, think="always"), first) and graph._steps.keys == held
    embedder.free_decode_buffers()
    assert graph.bytes == 0 and not graph._steps.keys
    assert np.array_equal(embedder.encode(TEXTS, think="always"), first)


def test_sampled_thoughts_do_not_depend_on_the_mode(llama, decoding, monkeypatch):
    embedder = llama.embedder
    config = dataclasses.replace(embedder.config, temperature=1.3, top_p=0.9)
    monkeypatch.setattr(embedder, "config", config)
    texts = []
    for mode in ("dynamic", "static", "replayed"):
        decoding(embedder, mode)
        texts.append([detail.text for detail in embedder.encode(TEXTS, think="always", return_details=True)[1]])
    assert texts[0] == texts[1] == texts[2]


def test_a_failed_capture_is_told(llama, decoding, monkeypatch):
    embedder = llama.embedder
    expected = embedder.encode(TEXTS, think="always", return_details=True)[1]
    decoding(embedder, "replayed")
    monkeypatch.setattr(embedder._decoding, "decode", "auto")
    plain = Backbone.logits
    monkeypatch.setattr(Backbone, "logits", lambda self, hidden: plain(self, hidden * float(torch.ones(()) * 1)))
    with pytest.warns(TWNWarning, match="capturing a step failed"):
        details = embedder.encode(TEXTS, think="always", return_details=True)[1]
    assert [detail.text for detail in details] == [detail.text for detail in expected]
    assert {detail.decode for detail in details} <= {"static", "dynamic"}
    mode, reason = embedder.decode_choice
    assert mode == "static" and reason.startswith("capturing a step failed")


def test_no_memory_for_buffers_is_told(llama, decoding, monkeypatch):
    embedder = llama.embedder
    expected = embedder.encode(TEXTS, think="always")
    decoding(embedder, "replayed")

    def none_left(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(static_cache, "_zeros_like", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        embedder.encode(TEXTS, think="always")
    monkeypatch.setattr(embedder._decoding, "decode", "auto")
    with pytest.warns(
        TWNWarning, match="no memory for the buffers of 3 rows and .* tokens; these rows decode on a cache"
    ):
        vectors, details = embedder.encode(TEXTS, think="always", return_details=True)
    assert np.array_equal(vectors, expected) and {detail.decode for detail in details} == {"dynamic"}


def test_wrong_modes(llama):
    with pytest.raises(OptionError, match='decode must be one of "auto", .* got \'graph\'.*Did you mean "cuda_graph"'):
        TWNEmbedder.from_pretrained("nowhere", "nowhere either", decode="graph")
    with pytest.raises(
        ImplUnavailable, match='decode="cuda_graph" was asked for, but CUDA graphs need a GPU .* Or use decode="auto"'
    ):
        TWNEmbedder(llama.embedder.model, llama.embedder.checkpoint, llama.embedder.processor, decode="cuda_graph")


def _tiny(family: str, **overrides) -> Backbone:
    return Backbone(twn_kernels.patch(tiny_model(family, **overrides), rank=2))


def test_an_unknown_family_decodes_on_a_growing_cache(as_if_on_a_gpu):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).eval()
    mode, reason = choose(Backbone(model), "auto")
    assert mode == "dynamic" and reason.startswith('it is not known how a "gpt2" model takes a prepared mask; known')
    with pytest.raises(ImplUnavailable, match='decode="static" was asked for, but it is not known how a "gpt2"'):
        choose(Backbone(model), "static")


def test_what_a_graph_cannot_hold_is_named(as_if_on_a_gpu, monkeypatch):
    base = _tiny("llama")
    assert choose(base, "auto") == DecodeChoice("cuda_graph", "a GPU, and a model with fixed shapes")

    def reason(contained: str, static: bool = True) -> None:
        mode, why = choose(base, "auto")
        assert mode == "dynamic" and contained in why
        assert static == (decode_choice.why_not_static(base) is None)

    base.decoder.layers[0].mlp.train()
    reason("the model is in training mode. Call model.eval().")
    base.decoder.eval()
    hook = base.decoder.norm.register_forward_hook(lambda *_: None)
    reason("a forward hook on LlamaRMSNorm would not run in a replay. Remove it.")
    hook.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    reason("forward hooks on every module would not run in a replay")
    everywhere.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reason("autocast is on")
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with monkeypatch.context() as changed:
        changed.setattr(base.config, "rope_parameters", scaled)
        reason("its rotary embedding (dynamic) reads the positions on the host")
    with monkeypatch.context() as changed:
        changed.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
        reason('attention "flash_attention_2" takes no prepared mask. Load the model with attn_implementation', False)
    with monkeypatch.context() as changed:
        changed.setattr(base.config, "layer_types", ["full_attention", "chunked_attention"], raising=False)
        reason('its layers use "chunked_attention", and masks are prepared for "full_attention"', False)
    base.head.to("meta")
    reason("its layers are spread over cpu, meta. Put the model on one device.", False)


def test_rotary_scalings_of_single_kinds_of_layer_are_seen(as_if_on_a_gpu):
    base = _tiny("gemma3_text")
    assert choose(base, "auto").mode == "cuda_graph"
    base.config.rope_parameters["full_attention"]["rope_type"] = "longrope"
    assert "its rotary embedding (longrope)" in choose(base, "auto").reason


def test_layer_kinds():
    kinds = decode_choice.layer_kinds
    assert kinds(tiny_config("gemma3_text")) == ["sliding_attention", "full_attention"]
    assert kinds(tiny_config("gpt_neox")) == ["full_attention"] * 2
    phi = tiny_config("phi3", sliding_window=8)
    assert set(kinds(phi)) == {"sliding_attention"}
    phi.layer_types, phi.sliding_window, phi.attention_chunk_size = None, None, 4
    assert set(kinds(phi)) == {"chunked_attention"}


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
def test_grouped_attention_is_attention_with_repeated_heads(heads, shared):
    def inputs(dtype):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(3, heads, 1, 16, generator=generator).to(dtype)
        key, value = (torch.randn(3, shared, 9, 16, generator=generator).to(dtype) for _ in range(2))
        mask = torch.zeros(3, 1, 1, 9, dtype=dtype)
        mask[0, ..., :4] = mask[2, ..., 7:] = -torch.inf
        return query, key, value, mask

    def repeated(query, key, value, mask):
        key, value = (tensor.repeat_interleave(heads // shared, dim=1) for tensor in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
        return out.transpose(1, 2)

    got, none = grouped_sdpa(None, *inputs(torch.float32), scaling=0.3)
    assert none is None and got.shape == (3, 1, heads, 16)
    assert_as_good_as_torch(got, repeated(*inputs(torch.float64)), repeated(*inputs(torch.float32)))


def test_grouped_attention_serves_sdpa_alone_and_ends_with_its_block():
    config = tiny_config("llama")
    for own, inside in (("sdpa", "twn_grouped_sdpa"), ("eager", "eager")):
        config._attn_implementation = own
        with pytest.raises(KeyError), grouped_attention(config):
            assert config._attn_implementation == inside
            raise KeyError
        assert config._attn_implementation == own
