"""torch.compile of a patched model: one whole graph, no new one as the number of tokens changes."""

import pytest
import torch

from twn_kernels import patch, route
from twn_kernels.modules import DualLoRALinear
from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model


def _filled(model):
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in ("reasoning", "embedding"):
                layer.lora_B[name].data.normal_(std=0.4)
    return model


@pytest.mark.parametrize("spec", ["both", ["reasoning", None, "embedding"]], ids=str)
@torch.no_grad()
def test_one_graph_for_every_token_count(spec, graphs):
    count, backend = graphs
    model = _filled(patch(tiny_model("llama", num_hidden_layers=1), rank=3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with route(compiled, spec):
        for tokens in (14, 9, 23, 31):
            inputs = tiny_inputs("llama", 3, tokens=tokens)
            assert torch.equal(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    assert len(count) == 1


@torch.no_grad()
def test_routes_change_under_a_compiled_model(graphs):
    _, backend = graphs
    model = _filled(patch(tiny_model("llama", num_hidden_layers=1), rank=3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    inputs = tiny_inputs("llama", 3)
    for spec in (
        "reasoning",
        None,
        ["reasoning", None, "embedding"],
        ["embedding", "reasoning", "reasoning"],
        "reasoning",
    ):
        with route(model, spec):
            assert torch.equal(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)


def test_compiled_training_step(graphs):
    """aot_eager traces forward and backward through the registered op."""
    model = _filled(patch(tiny_model("llama", num_hidden_layers=1), rank=3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs, results = tiny_inputs("llama", 3), []
    for run in (compiled, model):
        with route(model, ["reasoning", None, "embedding"]):
            run(**inputs, use_cache=False).logits.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@torch.no_grad()
def test_a_peft_model_compiles_too(pair, graphs):
    count, backend = graphs
    _, model, _ = pair("llama", targets=["q_proj", "down_proj"])
    patch(model)
    compiled = torch.compile(model.base_model.model, fullgraph=True, dynamic=True, backend=backend)
    model.set_adapter("embedding")
    for tokens in (14, 9, 23):
        inputs = tiny_inputs("llama", 3, tokens=tokens)
        assert torch.equal(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    assert len(count) == 1
