"""Training and compiling fused blocks: gradients, checkpointing, wrappers, whole graphs."""

import pytest
import torch

from twn_kernels import patch, route
from twn_kernels.modules import DualLoRALinear
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import VISION_FAMILIES, tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")
BLOCK = ["qkv", "o", "gate_up", "down"]
SPECS = ["reasoning", "both", ["reasoning", "embedding", None]]


@pytest.fixture(params=VISION_FAMILIES)
def family(request):
    return request.param


def _model(family, fuse=True, **options):
    model = patch(tiny_model(family, **options), rank=3, fuse=fuse)
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in NAMES:
                for parameter, size in ((layer.lora_A[name], 0.2), (layer.lora_B[name], 0.4)):
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


def _grads(model):
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def _flat(grads):
    return torch.cat([grad.flatten() for _, grad in sorted(grads.items())])


def test_gradients_are_those_of_layer_by_layer(family, in_double, runs):
    """Adapters, and what a user may unfreeze beside them: norms, biases, a base weight, the embeddings."""
    models = [_model(family), _model(family, fuse=False)]
    models.append(in_double(models[1]))
    inputs, grads = tiny_inputs(family, 3), []
    for model in models:
        layer = model.model.language_model.layers[0]
        unfrozen = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, layer.self_attn.k_proj.weight]
        unfrozen += [p for p in (layer.self_attn.q_proj.bias, model.get_input_embeddings().weight) if p is not None]
        for parameter in unfrozen:
            parameter.requires_grad_(True)
        given = in_double(inputs) if model is models[2] else inputs
        with route(model, SPECS[2]):
            model(**given).logits.square().mean().backward()
        grads.append(_grads(model))
    assert runs == BLOCK * 2
    actual, naive, truth = grads
    assert actual.keys() == naive.keys() == truth.keys() and len(actual) > 30
    for kind in ("lora_A", "lora_B", "norm", "k_proj.weight", "embed"):
        parts = [_flat({n: g for n, g in of.items() if kind in n}) for of in (actual, truth, naive)]
        assert parts[0].abs().max() > 0
        assert_as_good_as_torch(*parts, f"{family} {kind}")


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_replays_blocks_under_their_routes(family, use_reentrant, runs):
    inputs, results = tiny_inputs(family, 3), []
    for checkpointed in (False, True):
        model = _model(family)
        model.get_input_embeddings().weight.requires_grad_(True)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        loss = 0.0
        for spec in SPECS:
            with route(model, spec):
                loss = loss + model(**inputs).logits.square().mean()
        runs.clear()
        loss.backward()
        assert len(runs) == (len(BLOCK) * 2 * len(SPECS) if checkpointed else 0)
        results.append(_grads(model))
    plain, replayed = results
    assert plain.keys() == replayed.keys() and len(plain) > 20
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_base_only_training_reaches_the_base():
    """Outside of routes a patched model trains as the plain one does, base weights included."""
    model, plain = patch(tiny_model("qwen3_vl"), rank=2).train(), tiny_model("qwen3_vl").train()
    inputs, grads = tiny_inputs("qwen3_vl", 2), []
    for each in (model, plain):
        each(**inputs).logits.square().mean().backward()
        grads.append(_grads(each))
    assert grads[0].keys() == grads[1].keys() and len(grads[1]) > 30
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


def test_inside_a_wrapper_that_copies(runs):
    """The wrapper's copy is fused, follows routes given through the wrapper, and trains by itself."""
    alone, inputs = _model("qwen3_vl", num_hidden_layers=1), tiny_inputs("qwen3_vl", 2)
    wrapped = torch.optim.swa_utils.AveragedModel(alone)
    grads = []
    for of, call in ((alone, alone), (wrapped.module, wrapped)):
        with route(call, "both"):
            call(**inputs).logits.square().mean().backward()
        grads.append(_grads(of))
    assert runs == BLOCK * 2
    assert len(grads[0]) == 28 and grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_one_graph_for_every_token_count(family, graphs):
    count, backend = graphs
    model = _model(family, num_hidden_layers=1).eval().model.language_model
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with route(model, ["reasoning", None, "embedding"]):
        for tokens in (14, 9):
            ids = torch.randint(3, 150, (3, tokens))
            given = {"position_ids": torch.arange(tokens).expand(3, 3, tokens), "use_cache": False}
            actual = compiled(input_ids=ids, **given).last_hidden_state
            assert torch.equal(actual, model(input_ids=ids, **given).last_hidden_state)
    assert len(count) == 1
    called = [str(node.target) for node in count[0].graph.nodes if "dual_lora_group" in str(node.target)]
    assert len(called) == len(BLOCK)


@torch.no_grad()
def test_routes_and_hooks_change_under_a_compiled_block(graphs, runs):
    _, backend = graphs
    model = _model("qwen3_vl", num_hidden_layers=1).eval().model.language_model
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    ids, given = torch.randint(3, 150, (3, 7)), {"position_ids": torch.arange(7).expand(3, 3, 7), "use_cache": False}
    for spec in ("reasoning", None, "both"):
        with route(model, spec):
            actual = compiled(input_ids=ids, **given).last_hidden_state
            assert torch.equal(actual, model(input_ids=ids, **given).last_hidden_state)
    handle = model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, output: output * 0.5)
    with route(model, "both"):
        torch._dynamo.reset()
        halved = compiled(input_ids=ids, **given).last_hidden_state
        assert torch.equal(halved, model(input_ids=ids, **given).last_hidden_state)
        assert not torch.equal(halved, actual)
    handle.remove()


def test_compiled_training_step(graphs):
    model = _model("qwen3_vl", num_hidden_layers=1).model.language_model
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    embeds, results = torch.randn(3, 7, 64), []
    given = {"position_ids": torch.arange(7).expand(3, 3, 7), "use_cache": False}
    for run in (compiled, model):
        with route(model, SPECS[2]):
            run(inputs_embeds=embeds, **given).last_hidden_state.square().mean().backward()
        results.append(_grads(model))
    assert results[0].keys() == results[1].keys() and len(results[0]) == 28
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
