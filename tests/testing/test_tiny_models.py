"""Tiny models: deterministic, of the real classes, sensitive to their weights, images and padding."""

import pytest
import torch

from twn_kernels.errors import OptionError
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES, tiny_config, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_model_other_seed_other_model(family):
    first, again, other = (tiny_model(family, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_global_generator_is_left_alone(family):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    tiny_inputs(family), tiny_model(family)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_matrix_of_the_layers_moves_the_output(family):
    model, inputs = tiny_model(family), tiny_inputs(family, 1)
    before = model(**inputs).logits
    assert before.std() > 0.3
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            saved = module.weight.clone()
            module.weight.zero_()
            moved = (model(**inputs).logits - before).abs().max()
            module.weight.copy_(saved)
            assert moved > 1e-3, name


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_pixels_move_the_output(family):
    model, inputs = tiny_model(family), tiny_inputs(family, 2)
    before = model(**inputs).logits
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert not torch.allclose(before, model(**inputs).logits, atol=1e-2)


def test_bf16_holds_the_rounded_weights():
    rounded, exact = tiny_model("llama", dtype=torch.bfloat16).state_dict(), tiny_model("llama").state_dict()
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in exact)


def test_overrides_reach_the_right_level():
    config = tiny_config("qwen3_vl", vocab_size=300, num_hidden_layers=3, image_token_id=7, vision_config={"depth": 1})
    assert config.get_text_config().vocab_size == 300
    assert config.get_text_config().num_hidden_layers == 3
    assert (config.image_token_id, config.video_token_id) == (7, 297)
    assert config.vision_config.depth == 1 and config.vision_config.num_heads == 2


def test_unknown_family_is_named():
    with pytest.raises(OptionError, match='family "qwen3-vl" has no tiny model.*Did you mean "qwen3_vl"'):
        tiny_config("qwen3-vl")


def test_images_need_vision_and_room():
    with pytest.raises(OptionError, match='family "llama" has no vision tower'):
        tiny_inputs("llama", images=True)
    with pytest.raises(OptionError, match="tokens must be at least 10"):
        tiny_inputs("qwen3_vl", tokens=9)
