"""The table of families, the choice of targets, names of layers, and what status says of them."""

import json

import pytest
import torch
from torch import nn

from twn_kernels import patch, route, status
from twn_kernels.checkpoint.names import collapse
from twn_kernels.patching.specs import FAMILY_SPECS, choose_targets, family_of, follows_rows, in_tower
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_row_that_fits_it(family):
    model = tiny_model(family)
    spec = family_of(model)
    assert family in spec.model_types
    chosen = choose_targets(model, None, spec)
    groups = [spec.group_of(path) for path in chosen]
    for group, names in spec.groups.items():
        assert groups.count(group) == len(names) * model.config.get_text_config().num_hidden_layers
    # What the row leaves out is heads and towers, nothing else.
    left = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path not in chosen]
    assert all(in_tower(path) or path == "lm_head" for path in left)
    assert set(choose_targets(model, None, None)) == set(chosen)


def test_the_text_part_of_a_vision_model_has_the_row_too():
    for family in VISION_FAMILIES:
        assert family_of(tiny_model(family).model.language_model) is family_of(tiny_model(family))


def test_no_model_type_is_in_two_rows():
    types = [name for spec in FAMILY_SPECS for name in spec.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "mlp.down_proj"],
        ["layers.1.self_attn.v_proj"],
        r".*layers\.0\..*(q|k)_proj",
        ["down_proj"],
        "all-linear",
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_targets_mean_what_they_mean_to_peft(family, targets):
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(tiny_model(family), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    theirs = {path for path, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(choose_targets(tiny_model(family), targets, None)) == theirs


@pytest.mark.parametrize(
    ("model_class", "config_class", "options"),
    [
        ("BertModel", "BertConfig", {}),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        ),
        ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("CLIPModel", "CLIPConfig", None),
        ("FalconForCausalLM", "FalconConfig", {}),
        (
            "MixtralForCausalLM",
            "MixtralConfig",
            {"num_local_experts": 2, "intermediate_size": 48, "num_key_value_heads": 2},
        ),
    ],
    ids=lambda value: str(value)[:24],
)
@torch.no_grad()
def test_families_without_a_row(model_class, config_class, options):
    """Any family of nn.Linear patches, gives the base bit for bit, and follows one route or one a row."""
    import transformers

    small = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 50,
        "intermediate_size": 48,
    }
    if options is None:
        part = small | {"max_position_embeddings": 32, "projection_dim": 16}
        options = {
            "text_config": part,
            "vision_config": part | {"image_size": 8, "patch_size": 4},
            "projection_dim": 16,
        }
        small = {}
    config = getattr(transformers, config_class)(**(small | options))
    model = getattr(transformers, model_class)(config).eval()
    ids = torch.randint(3, 50, (3, 7))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if model_class.startswith("T5") else {})
    inputs |= {"pixel_values": torch.randn(2, 3, 8, 8)} if model_class == "CLIPModel" else {}
    expected = model(**inputs)[0]
    patch(model, rank=2)
    shown = status(model)
    assert "not in the table" in shown.level_note and shown.layers
    assert not [layer for layer in shown.layers if in_tower(layer.layer)]
    for layer in model.modules():
        if hasattr(layer, "lora_B") and hasattr(layer, "routing"):
            for name in layer.lora_B:
                layer.lora_B[name].normal_()
    assert torch.equal(model(**inputs)[0], expected)
    rows = [[("reasoning", "embedding")[pattern >> row & 1] for row in range(3)] for pattern in range(1, 7)]
    outs = []
    for spec in ("reasoning", "embedding", *rows):
        with route(model, spec):
            outs.append(model(**inputs)[0])
    if model_class != "CLIPModel":
        assert not torch.equal(outs[0], expected) and not torch.equal(outs[0], outs[1])
        model.config._experts_implementation = "eager"  # grouped products of experts have no fp64 form
        model.double()
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        truths, singles = [], []
        for spec in rows:
            with route(model, spec):
                truths.append(model(**inputs)[0])
            singles.append(torch.stack([outs[name == "embedding"][row] for row, name in enumerate(spec)]))
        mixed, truth, single = (torch.stack(parts) for parts in (outs[2:], truths, singles))
        assert_as_good_as_torch(mixed, truth, single, "one route a row against one for all")


def test_towers_and_experts():
    assert in_tower("model.visual.blocks.0.attn.qkv") and in_tower("vision_tower.encoder.layers.0.mlp.fc1")
    assert in_tower("model.multi_modal_projector.linear_1") and in_tower("audio_tower.layers.0.fc1")
    assert not in_tower("model.language_model.layers.0.mlp.up_proj") and not in_tower("model.decoder.layers.0.fc1")
    assert not follows_rows("model.layers.0.mlp.experts.3.up_proj")
    assert follows_rows("model.layers.0.mlp.shared_expert.up_proj")


def test_collapse():
    paths = ["a.0.q", "a.1.q", "a.3.q", "a.0.k", "b", "c.7.d.2"]
    assert collapse(paths) == ["b", "a.{0-1,3}.q", "a.0.k", "c.7.d.2"]


def test_status_of_a_patched_model(pair):
    model = patch(tiny_model("qwen3_vl", dtype=torch.bfloat16), rank=3)
    shown = status(model)
    assert (shown.patched, shown.family, shown.level, shown.default_route) == (True, "qwen3_vl", "block", "base only")
    layer = shown.layers[0]
    assert (layer.layer, layer.group) == ("model.language_model.layers.0.self_attn.q_proj", "qkv")
    assert layer.ranks == {"reasoning": 3, "embedding": 3} and layer.base_dtype == "bfloat16"
    assert layer.impl == "blas" and "vendor GEMM" in layer.why
    base = sum(p.numel() * 2 for name, p in model.named_parameters() if "lora_" not in name)
    assert shown.base_bytes == base
    assert json.loads(json.dumps(shown.to_dict()))["layers"][0]["adapter_bytes"] == layer.adapter_bytes
    text = str(shown)
    assert "14 layers patched, block level" in text and f"{shown.added_bytes:,}" in text
    assert "model.language_model.layers.{0-1}.mlp.up_proj" in text and "2 decoder layers are fused blocks" in text
    peft = status(patch(pair("llama")[1], fuse=False))
    assert peft.added_bytes == 0 and "PEFT's own state" in peft.default_route == peft.current_route
    assert "were not asked for" in peft.level_note


def test_status_quotes_what_was_built(monkeypatch):
    from twn_kernels.impl import cuda
    from twn_kernels.impl.cuda.loader import BuildInfo

    monkeypatch.setattr(cuda, "build_info", lambda: BuildInfo(False, "no nvcc was found"))
    shown = status(patch(tiny_model("llama"), rank=2))
    assert "not built (no nvcc was found" in shown.extension
    assert f"\n  cuda extension {shown.extension}\n" in str(shown)


def test_status_of_a_plain_model():
    shown = status(tiny_model("llama"))
    assert not shown.patched and str(shown) == "LlamaForCausalLM: not patched" and not shown.layers


def test_status_says_when_adapters_are_cast():
    model = patch(tiny_model("llama"), rank=2)
    model.model.layers[0].mlp.up_proj.lora_A.bfloat16()
    model.model.layers[0].mlp.up_proj.lora_B.bfloat16()
    with route(model, "both"), torch.no_grad():
        model(**tiny_inputs("llama", 1))
    assert "cast in every forward" in str(status(model))
