"""Training a patched model: checkpointed blocks, autocast, dropout, inference mode, gradients that stay apart."""

import copy

import pytest
import torch

from twn_kernels import patch, route
from twn_kernels.errors import PatchError
from twn_kernels.modules import DualLoRALinear
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")
SPECS = ["reasoning", "both", ["reasoning", "embedding", None]]


def _model(family, seed=0):
    model = patch(tiny_model(family, seed=seed), rank=3)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in NAMES:
                A, B = layer.lora_A[name].data, layer.lora_B[name].data
                A.copy_(torch.randn(A.shape, generator=generator) * 0.2)
                B.copy_(torch.randn(B.shape, generator=generator) * 0.4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


def _grads(model):
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("when", ["enabled-before-patch", "enabled-after-patch"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["qwen3_vl", "llama", "gpt_neox"])
def test_activation_checkpointing_replays_the_route_of_its_forward(family, use_reentrant, when):
    """Two forwards under different routes, backward outside of every scope: the gradients are those without it."""
    inputs = tiny_inputs(family, 3)
    options = {"use_reentrant": use_reentrant}
    results = []
    for checkpointed in (False, True):
        model = tiny_model(family)
        if checkpointed and when == "enabled-before-patch":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        patch(model, rank=3)
        model.load_state_dict(_model(family).state_dict())
        model.train()
        model.get_input_embeddings().weight.requires_grad_(True)
        if checkpointed and when == "enabled-after-patch":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        loss = 0.0
        for spec in SPECS:
            with route(model, spec):
                loss = loss + model(**inputs).logits.square().mean()
        loss.backward()
        results.append(_grads(model))
    plain, replayed = results
    assert plain.keys() == replayed.keys() and len(plain) > 20
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_of_a_peft_model(use_reentrant, pair):
    results = []
    for checkpointed in (False, True):
        _, model, inputs = pair("llama", targets=["q_proj", "down_proj"])
        patch(model).train()
        model.base_model.set_adapter(list(NAMES))
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        loss = model(**inputs).logits.square().mean()
        with route(model, ["reasoning", "embedding", None]):
            loss = loss + model(**inputs).logits.square().mean()
        loss.backward()
        results.append(_grads(model))
    assert results[0].keys() == results[1].keys() and len(results[0]) == 16
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_checkpointing_of_ones_own_is_never_silently_wrong():
    from torch.utils.checkpoint import checkpoint

    model, inputs = _model("llama"), tiny_inputs("llama", 2)
    layer = model.model.layers[0].mlp
    x = torch.randn(2, 14, 64, requires_grad=True)
    with route(model, "reasoning"):
        out = checkpoint(layer, x, use_reentrant=False).sum()
        out.backward()
    expected = _grads(model)
    with route(model, "reasoning"):
        out = checkpoint(layer, x, use_reentrant=False).sum()
    with pytest.raises(
        PatchError, match=r"recomputed .* under another route \(base only\) than the last forward's \(reas"
    ):
        out.backward()
    model.zero_grad()
    with route(model, "reasoning"):
        out = checkpoint(layer, x, use_reentrant=False).sum()
    with route(model, "reasoning"):
        out.backward()
    again = _grads(model)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    model(**inputs)


def test_unpatch_gives_the_blocks_their_checkpoint_function_back():
    from twn_kernels import unpatch

    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    function = model.model.layers[0]._gradient_checkpointing_func
    patch(model, rank=2)
    assert model.model.layers[0]._gradient_checkpointing_func is not function
    unpatch(model)
    assert all(layer._gradient_checkpointing_func is function for layer in model.model.layers)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_autocast(spec, in_double):
    model, inputs = _model("qwen3_vl"), tiny_inputs("qwen3_vl", 3)
    exact, naive = copy.deepcopy(model).double(), copy.deepcopy(model)
    for layer in naive.modules():
        if isinstance(layer, DualLoRALinear):
            layer.impl = "reference"
    outs, grads = [], []
    for of, given, cast in ((model, inputs, True), (exact, in_double(inputs), False), (naive, inputs, True)):
        with route(of, spec), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            logits = of(**given).logits
        logits.square().mean().backward()
        outs.append(logits.detach())
        grads.append(torch.cat([g.flatten() for _, g in sorted(_grads(of).items())]))
    assert outs[0].dtype == torch.bfloat16 and grads[0].dtype == torch.float32
    assert_as_good_as_torch(*outs, "logits")
    assert torch.isfinite(grads[0]).all() and grads[0].abs().max() > 0


def test_dropout_acts_in_training_and_only_there(with_peft):
    model = patch(with_peft(tiny_model("llama"), dropout=0.5))
    inputs = tiny_inputs("llama", 2)
    model.set_adapter("reasoning")
    quiet = model(**inputs).logits
    assert torch.equal(quiet, model(**inputs).logits)
    model.train()
    torch.manual_seed(1)
    first = model(**inputs).logits
    assert not torch.equal(first, quiet)
    assert not torch.equal(first, model(**inputs).logits)
    torch.manual_seed(1)
    assert torch.equal(first, model(**inputs).logits)
    with model.disable_adapter():
        base = model(**inputs).logits
        assert torch.equal(base, model.eval()(**inputs).logits)


def test_dropout_keeps_the_mean():
    """Averaged over many masks, a layer with dropout gives what it gives without."""
    layer = DualLoRALinear(64, 4, bias=False, rank=2, dropout=0.4)
    layer.lora_B["reasoning"].data.normal_()
    from twn_kernels.ops import RoutePlan

    x, plan = torch.randn(1, 64), RoutePlan.uniform("reasoning", 20_000)
    with torch.no_grad():
        many = layer.train()(x.expand(20_000, 64).contiguous(), plan)
        once = layer.eval()(x, RoutePlan.uniform("reasoning", 1))
    error = many.std(0) / 20_000**0.5
    assert ((many.mean(0) - once).abs() < 5 * error).all() and (error > 0).all()


def test_plans_made_in_inference_mode_serve_training():
    model, inputs = _model("llama"), tiny_inputs("llama", 3)
    with route(model, ["reasoning", "embedding", None]):
        with torch.inference_mode():
            quiet = model.eval()(**inputs).logits
        logits = model.train()(**inputs).logits
        logits.square().mean().backward()
    assert torch.equal(logits.detach(), quiet)
    assert all(grad.abs().max() > 0 for name, grad in _grads(model).items() if "lora_A" in name)


def test_a_model_patched_in_inference_mode_trains(tmp_path):
    from twn_kernels.testing.twn_directory import write_twn_directory

    directory = write_twn_directory(tmp_path, tiny_model("llama"))
    for options in ({"rank": 2}, {"checkpoint": directory}):
        model, inputs = tiny_model("llama"), tiny_inputs("llama", 2, tokens=1, padded=False)
        with torch.inference_mode():
            patch(model, **options)
            scope = route(model, ["reasoning", "embedding"])
            scope.__enter__()
            model(**inputs)
        model(**inputs).logits.square().mean().backward()
        scope.__exit__(None, None, None)
        assert all(grad.isfinite().all() for grad in _grads(model).values())


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"], ids=["linear-level", "block-level"])
def test_each_row_trains_its_own_adapter_alone(family):
    """The gradient of an adapter is that of its own rows: the other rows may as well not be there."""
    model, inputs = _model(family), tiny_inputs(family, 2, padded=False)
    with route(model, ["reasoning", "embedding"]):
        model(**inputs).logits[0].square().sum().backward()
    grads = _grads(model)
    assert all(grad.abs().max() == 0 for name, grad in grads.items() if "embedding" in name)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora_B.reasoning" in name)


def test_a_few_steps_of_training_fit_one_adapter_and_leave_the_other():
    model, inputs = patch(tiny_model("llama"), rank=4), tiny_inputs("llama", 2, padded=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        with route(model, "embedding"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".embedding" in key for key in changed)
