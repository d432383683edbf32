"""What is read equals what PEFT itself makes of the same files, layer by layer."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from twn_kernels import load_checkpoint
from twn_kernels.checkpoint.adapter_config import AdapterConfig
from twn_kernels.checkpoint.patterns import is_target, pattern_key, pattern_value_before_014
from twn_kernels.errors import TWNWarning
from twn_kernels.testing.tiny_models import tiny_model
from twn_kernels.testing.twn_directory import write_peft_adapter, write_twn_directory

CASES = {
    "list": {"targets": ["q_proj", "down_proj"]},
    "regex": {"targets": r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"},
    "full-paths": {"targets": ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"]},
    "all-linear": {"targets": "all-linear"},
    "rank-pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}},
    "overlapping-patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 3}},
    "anchored": {
        "rank_pattern": {"^model.layers.0.self_attn.k_proj": 2},
        "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 5},
    },
    "alpha-pattern": {"alpha_pattern": {"up_proj": 1, "self_attn.(q|v)_proj": 32}},
    "both-patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "k_proj": 3}},
    "rslora": {"rslora": True},
    "rslora-patterns": {"rslora": True, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 11}},
    "fractional-alpha": {"alpha": 2.5},
    "layers-to-transform": {"targets": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"targets": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}


def peft_deltas(model, directory):
    """``scaling * B @ A`` of each layer as PEFT computes it."""
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory, autocast_adapter_dtype=False)
    return {
        name.removeprefix("base_model.model."): (module.get_delta_weight("default"), module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_layer_equals_pefts_delta(model, tmp_path, case):
    options = dict(CASES[case])
    extra = {k: options.pop(k) for k in ("layers_to_transform", "layers_pattern", "exclude_modules") if k in options}
    for name, rank in (("reasoning", 4), ("embedding", 5)):
        write_peft_adapter(tmp_path / name, model, **{"rank": rank, "seed": rank, **options, **extra})
    checkpoint = load_checkpoint(tmp_path)
    for name in ("reasoning", "embedding"):
        wanted = peft_deltas(model, tmp_path / name)
        layers = checkpoint.adapters[name].layers
        assert set(layers) == set(wanted) and layers
        for module, layer in layers.items():
            delta, scaling = wanted[module]
            assert layer.scaling == scaling
            # PEFT widens the stored weights to the base's dtype, which changes no value.
            assert torch.equal((layer.B.to(delta.dtype) @ layer.A.to(delta.dtype)) * layer.scaling, delta), module
            assert layer.A.dtype == options.get("dtype", torch.float32)
            assert layer.rank == layer.A.shape[0] == layer.B.shape[1]
            assert bool(delta.count_nonzero())


def test_merged_weights_equal_pefts(model, tmp_path):
    write_twn_directory(tmp_path, model, rank_pattern={"q_proj": 2}, rslora=True)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "embedding").merge_and_unload()
    for module, layer in load_checkpoint(tmp_path).adapters["embedding"].layers.items():
        ours = model.get_submodule(module).weight + (layer.B @ layer.A) * layer.scaling
        assert torch.equal(ours, merged.get_submodule(module).weight), module


@pytest.mark.parametrize("family", ["qwen3_vl", "gpt_neox", "phi3"])
def test_other_families(family, tmp_path):
    model = tiny_model(family)
    write_twn_directory(tmp_path, model)
    checkpoint = load_checkpoint(tmp_path)
    wanted = peft_deltas(model, tmp_path / "embedding")
    layers = checkpoint.adapters["embedding"].layers
    assert set(layers) == set(wanted)
    assert all(torch.equal((layer.B @ layer.A) * layer.scaling, wanted[name][0]) for name, layer in layers.items())


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "layers.11.mlp.up_proj", "lm_head"]
PATTERNS = ["q_proj", "layers.1.*", "layers.1", r"layers\.0\.self_attn\.q_proj", "^model.*", "proj", ".*",
            "(q|up)_proj", "lm_head", "model.layers.0.self_attn.q_proj", "self_attn", "head", "_proj"]  # fmt: skip


@given(st.lists(st.sampled_from(PATTERNS), unique=True), st.sampled_from(NAMES))
def test_pattern_key_is_pefts(patterns, module):
    ours = pattern_key(patterns, module)
    assert (module if ours is None else ours) == get_pattern_key(patterns, module)


@given(
    st.one_of(st.lists(st.sampled_from(PATTERNS), min_size=1, unique=True), st.sampled_from(PATTERNS)),
    st.one_of(st.none(), st.lists(st.sampled_from(PATTERNS), unique=True), st.sampled_from(PATTERNS)),
    st.one_of(st.none(), st.lists(st.sampled_from([0, 1, 11]), unique=True)),
    st.sampled_from([None, ["layers"], ["h", "layers"]]),
    st.sampled_from(NAMES),
)
def test_targets_are_pefts(targets, exclude, layers, pattern, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(targets, str):
            layers, pattern = None, None
        if layers is None:
            pattern = None
        config = LoraConfig(
            target_modules=targets, exclude_modules=exclude, layers_to_transform=layers, layers_pattern=pattern
        )
    theirs = bool(check_target_module_exists(config, module))
    ours = is_target(
        module, targets, exclude_modules=exclude, layers_to_transform=layers, layers_pattern=tuple(pattern or ())
    )
    assert ours == theirs


def old_peft(rank_pattern, alpha_pattern, module):
    """The lookup as PEFT 0.9 to 0.13 wrote it."""
    keys = [*rank_pattern, *alpha_pattern]
    found = next(filter(lambda key: re.match(rf".*\.{key}$", module), keys), module)
    return rank_pattern.get(found, 4), alpha_pattern.get(found, 8)


@given(st.lists(st.sampled_from(PATTERNS), unique=True), st.lists(st.sampled_from(PATTERNS), unique=True))
def test_old_lookup(ranks, alphas):
    rank_pattern = {key: index + 1 for index, key in enumerate(ranks)}
    alpha_pattern = {key: index + 1 for index, key in enumerate(alphas)}
    config = AdapterConfig(r=4, lora_alpha=8, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    for module in NAMES:
        old = old_peft(rank_pattern, alpha_pattern, module)
        assert pattern_value_before_014(rank_pattern, alpha_pattern, module, 4, 8) == old
        assert config.before_014(module) == old


def test_old_file_whose_alphas_meant_something_else_warns(twn, edit_config):
    config = twn / "reasoning" / "adapter_config.json"
    edit_config(config, peft_version=..., rank_pattern={"q_proj": 4}, alpha_pattern={"layers.0.self_attn.q_proj": 2})
    with pytest.warns(TWNWarning, match="PEFT before that took other values for: model.layers.0.self_attn.q_proj"):
        layers = load_checkpoint(twn).adapters["reasoning"].layers
    assert layers["model.layers.0.self_attn.q_proj"].scaling == 0.5
    assert layers["model.layers.1.self_attn.q_proj"].scaling == 2.0


def test_files_of_older_peft_with_few_fields(twn):
    path = twn / "reasoning" / "adapter_config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({key: stated[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")}))
    adapter = load_checkpoint(twn).adapters["reasoning"]
    assert adapter.config.assumed == ("lora_dropout", "use_rslora")
    assert len(adapter.layers) == 14
