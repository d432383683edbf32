"""Names: PEFT's prefix, wrappers, adapter names, and the places where releases hang the decoder."""

from __future__ import annotations

import pytest

from twn_kernels import load_checkpoint
from twn_kernels.checkpoint import match_modules
from twn_kernels.checkpoint.keys import parse_key

MODULE = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{MODULE}.lora_A.weight",
        f"{MODULE}.lora_A.weight",
        f"base_model.model.{MODULE}.lora_A.default.weight",
        f"module.base_model.model.{MODULE}.lora_A.weight",
        f"_orig_mod.base_model.model.{MODULE}.lora_A.weight",
        "base_model.model.model.language_model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
        f"base_model.model._fsdp_wrapped_module.{MODULE}.lora_A.weight",
    ],
)
def test_prefixes(key):
    parsed = parse_key(key)
    assert (parsed.module, parsed.side) == (MODULE, "A")


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{MODULE}.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        f"base_model.model.{MODULE}.lora_B.bias",
        "base_model.model.lm_head.weight",
        f"base_model.model.{MODULE}.base_layer.lora_A.weight",
        "lora_A.weight",
    ],
)
def test_what_is_no_factor(key):
    assert parse_key(key) is None


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("model.layers.0.self_attn.q_proj", MODULE),
        ("language_model.model.layers.0.self_attn.q_proj", MODULE),
        ("model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
    ],
)
def test_releases_disagree_on_the_holder(layer, module):
    others = ["model.visual.merger.linear_fc1", "lm_head"]
    assert match_modules([layer], [*others, module]) == {layer: module}


def test_an_equal_name_wins_and_two_candidates_are_none():
    names = ["model.layers.0.q", "model.language_model.layers.0.q"]
    assert match_modules(["model.layers.0.q"], names) == {"model.layers.0.q": "model.layers.0.q"}
    assert match_modules(["layers.0.q"], names) == {"layers.0.q": None}
    assert match_modules(["layers.1.q"], names) == {"layers.1.q": None}


@pytest.mark.parametrize("rename", ["no prefix", "adapter name", "wrapped"])
def test_directories_with_other_prefixes_load(twn, edit_weights, rename):
    change = {
        "no prefix": lambda key: key.removeprefix("base_model.model."),
        "adapter name": lambda key: key.replace(".weight", ".reasoning.weight"),
        "wrapped": lambda key: "module._orig_mod." + key,
    }[rename]
    wanted = load_checkpoint(twn).adapters["reasoning"].layers
    edit_weights(twn / "reasoning" / "adapter_model.safetensors", lambda t: {change(k): v for k, v in t.items()})
    layers = load_checkpoint(twn).adapters["reasoning"].layers
    assert set(layers) == set(wanted)
    assert all(bool((layers[name].A == wanted[name].A).all()) for name in wanted)
