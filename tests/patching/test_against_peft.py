"""A patched model gives what PEFT gives: each adapter, both, none, mixed rows; logits, generated tokens, gradients."""

import copy

import pytest
import torch

from twn_kernels import patch, route, unpatch
from twn_kernels.errors import PatchError, ShapeError
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES, tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")
MIXED = ["reasoning", "embedding", None]
ROUTES = {"reasoning": "reasoning", "embedding": "embedding", "both": "both", "base": None, "mixed": MIXED}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def _cases(reference, patched, inputs, in_double, peft_logits):
    exact, exact_inputs = in_double(reference), in_double(inputs)
    eager = copy.deepcopy(reference)
    eager.base_model.model.set_attn_implementation("eager")
    for name, spec in ROUTES.items():
        truth = peft_logits(exact, exact_inputs, spec)
        naive = _worse(truth, *(peft_logits(model, inputs, spec) for model in (reference, eager)))
        with route(patched, spec):
            yield name, patched(**inputs).logits, truth, naive


def _worse(truth, first, second):
    """Torch's own error in two of the ways that it computes one model: how far a rounding grows hangs on luck."""
    return torch.where((first - truth).abs() < (second - truth).abs(), second, first)


def test_logits_of_every_route_equal_pefts(family, pair, peft_logits, in_double):
    reference, patched, inputs = pair(family)
    patch(patched)
    seen = []
    for name, actual, truth, naive in _cases(reference, patched, inputs, in_double, peft_logits):
        assert_as_good_as_torch(actual, truth, naive, f"{family} {name}")
        seen.append(truth)
    # The adapters matter, and differ, or the equality would say little.
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("upcast", [True, False], ids=["fp32-adapters", "bf16-adapters"])
def test_bf16_base(family, upcast, pair, peft_logits, in_double):
    reference, patched, inputs = pair(family, dtype=torch.bfloat16, autocast_adapter_dtype=upcast)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = torch.float32 if upcast else torch.bfloat16
    assert {p.dtype for n, p in reference.named_parameters() if "lora_" in n} == {wanted}
    patch(patched)
    for name, actual, truth, naive in _cases(reference, patched, inputs, in_double, peft_logits):
        assert actual.dtype == torch.bfloat16
        assert_as_good_as_torch(actual, truth, naive, f"{family} {name}")


def _with_weights_of(reference, plain):
    layers = {path: m for path, m in reference.base_model.model.named_modules() if hasattr(m, "lora_A")}
    for path, theirs in layers.items():
        ours = plain.get_submodule(path)
        for name in NAMES:
            rank = theirs.r[name]
            ours.lora_A[name].zero_()[:rank].copy_(theirs.lora_A[name].weight)
            ours.lora_B[name].zero_()[:, :rank].copy_(theirs.lora_B[name].weight)
            ours.scaling[name] = theirs.scaling[name]
    return plain


@torch.no_grad()
def test_a_plain_model_with_the_same_adapters_gives_the_same(family, pair, peft_logits, in_double):
    """The layers of a plain model, loaded with PEFT's weights by hand, agree with PEFT too."""
    reference, _, inputs = pair(family)
    plain = _with_weights_of(reference, patch(tiny_model(family), rank=5))
    for name, actual, truth, naive in _cases(reference, plain, inputs, in_double, peft_logits):
        assert_as_good_as_torch(actual, truth, naive, f"{family} {name}")


def test_greedy_tokens_equal_pefts(family, pair):
    reference, patched, inputs = pair(family, inputs={"tokens": 12})
    patch(patched)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    rows = ["reasoning", "embedding", "__base__"]
    expected = reference.generate(**inputs, **options, adapter_names=rows)
    with route(patched, MIXED):
        assert torch.equal(patched.generate(**inputs, **options), expected)
    assert torch.equal(patched.generate(**inputs, **options, adapter_names=rows), expected)
    for row, name in enumerate(NAMES):
        reference.set_adapter(name)
        alone = reference.generate(**inputs, **options)
        assert torch.equal(alone[row], expected[row])
        with route(patched, name):
            assert torch.equal(patched.generate(**inputs, **options), alone)
    assert not torch.equal(alone[0], expected[0])


def _grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_both_adapters_equal_pefts(family, pair, in_double):
    reference, patched, inputs = pair(family, batch=2)
    patch(patched)
    exact, exact_inputs = in_double(reference), in_double(inputs)
    models = (patched, inputs), (exact, exact_inputs), (reference, inputs)
    grads = []
    for model, given in models:
        model.base_model.set_adapter(list(NAMES))
        model.train()
        logits = model(**given).logits
        weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape).to(logits.dtype)
        grads.append(_grads(model, (logits * weight).sum()))
    assert set(grads[0]) == set(grads[2]) and any("embedding" in n for n in grads[0])
    assert any("lora_A.reasoning" in n for n in grads[0])
    for name in NAMES:
        whole = [torch.cat([g.flatten() for n, g in sorted(of.items()) if name in n]) for of in grads]
        assert_as_good_as_torch(*whole, f"{family} gradients of {name}")


def test_an_adapter_out_of_route_gets_no_gradient(pair):
    _, patched, inputs = pair("llama", batch=2)
    patch(patched)
    patched.base_model.set_adapter(list(NAMES))
    with route(patched, "embedding"):
        grads = _grads(patched, patched(**inputs).logits.square().sum())
    assert grads and all("embedding" in name for name in grads)


def test_peft_api_keeps_its_meaning(pair, peft_logits, in_double):
    reference, patched, inputs = pair("qwen3_vl")
    exact, exact_inputs = in_double(reference), in_double(inputs)
    patch(patched)
    for name, spec in ROUTES.items():
        logits = [peft_logits(*of, spec) for of in ((patched, inputs), (exact, exact_inputs), (reference, inputs))]
        assert_as_good_as_torch(*logits, name)
    assert [n for n, _ in patched.named_parameters()] == [n for n, _ in reference.named_parameters()]


@torch.no_grad()
def test_merged_layers_run_merged_and_refuse_routes(pair, in_double):
    reference, patched, inputs = pair("llama")
    patch(patched)
    for model in (reference, patched):
        model.merge_adapter(["reasoning"])
    assert torch.equal(patched(**inputs).logits, reference(**inputs).logits)
    with (
        route(patched, "embedding"),
        pytest.raises(PatchError, match=r'"reasoning" merged into its base weight.*unmerge'),
    ):
        patched(**inputs)
    for model in (reference, patched):
        model.unmerge_adapter()
    truth = in_double(reference)(**inputs).logits
    assert_as_good_as_torch(patched(**inputs).logits, truth, reference(**inputs).logits)


@torch.no_grad()
def test_names_of_their_own(with_peft, in_double):
    model = with_peft(tiny_model("llama"), names=("think", "embed"))
    inputs = tiny_inputs("llama", 2)
    model.set_adapter("embed")
    truth, naive = in_double(model)(**inputs).logits, model(**inputs).logits
    patch(model, adapters=("think", "embed"))
    model.set_adapter("think")
    for name in ("embed", "embedding"):
        with route(model, name):
            assert_as_good_as_torch(model(**inputs).logits, truth, naive, name)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_adapters_that_transformers_put_in(in_double):
    """``model.add_adapter`` of transformers: PEFT's layers without a PeftModel around them."""
    from peft import LoraConfig

    model, inputs = tiny_model("llama"), tiny_inputs("llama", 2)
    for rank, name in enumerate(NAMES, 2):
        model.add_adapter(LoraConfig(r=rank, target_modules=["q_proj", "up_proj"], init_lora_weights=False), name)
    truth, naive = {}, {}
    for name in NAMES:
        model.set_adapter(name)
        model.eval()
        truth[name], naive[name] = in_double(model)(**inputs).logits, model(**inputs).logits
    patch(model)
    for name in NAMES:
        with route(model, name):
            assert_as_good_as_torch(model(**inputs).logits, truth[name], naive[name], name)
    model.set_adapter("reasoning")
    assert_as_good_as_torch(model(**inputs).logits, truth["reasoning"], naive["reasoning"])


@torch.no_grad()
def test_inside_and_around_a_peft_model_are_one_patch(pair):
    _, model, inputs = pair("llama")
    inner = model.get_base_model()
    patch(inner)
    assert patch(model) is model
    with route(model, "embedding"):
        expected = inner(**inputs).logits
    with route(inner, "embedding"):
        assert torch.equal(model(**inputs).logits, expected)
    unpatch(model)
    assert not [m for m in model.modules() if type(m).__name__ == "DualPeftLinear"]


def test_beams_of_an_encoder_and_decoder(with_peft):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0, eos_token_id=49
    )
    reference = with_peft(T5ForConditionalGeneration(config), targets=["q", "v", "k", "wo"])
    patched = patch(copy.deepcopy(reference))
    inputs = {"input_ids": torch.randint(3, 49, (2, 7)), "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    expected = reference.generate(**inputs, adapter_names=["reasoning", "embedding"])
    with route(patched, ["reasoning", "embedding"]):
        assert torch.equal(patched.generate(**inputs), expected)


@torch.no_grad()
def test_adapters_on_different_layers(with_peft, peft_logits, in_double):
    """A linear touched by one adapter only follows the other's route as a plain linear."""
    from peft import LoraConfig

    reference = with_peft(tiny_model("llama"), targets=["q_proj", "down_proj"])
    reference.delete_adapter("embedding")
    reference.add_adapter("embedding", LoraConfig(r=3, lora_alpha=4, target_modules=["v_proj", "down_proj"]))
    for name, parameter in reference.named_parameters():
        if "lora_B.embedding" in name:
            parameter.data.normal_(std=0.5)
    patched, inputs = patch(copy.deepcopy(reference)), tiny_inputs("llama", 3)
    for name, actual, truth, naive in _cases(reference, patched, inputs, in_double, peft_logits):
        assert_as_good_as_torch(actual, truth, naive, name)


@torch.no_grad()
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_adapter_on_the_tower_follows_one_route(family, with_peft, peft_logits, in_double):
    reference = with_peft(tiny_model(family), targets=r".*visual\.blocks.*attn\.qkv|.*layers.*q_proj")
    patched, inputs = patch(copy.deepcopy(reference)), tiny_inputs(family, 3)
    exact, exact_inputs = in_double(reference), in_double(inputs)
    for spec in ("reasoning", "embedding", None):
        truth, naive = peft_logits(exact, exact_inputs, spec), peft_logits(reference, inputs, spec)
        with route(patched, spec):
            assert_as_good_as_torch(patched(**inputs).logits, truth, naive, str(spec))
    with (
        route(patched, MIXED),
        pytest.raises(ShapeError, match=r"visual\.blocks\.0\.attn\.qkv.* do not belong to one row"),
    ):
        patched(**inputs)
