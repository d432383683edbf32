"""A patched model under the Triton kernels follows every kind of route as it does under the reference."""

from __future__ import annotations

import threading

import pytest
import torch

import twn_kernels
from twn_kernels.errors import PatchError
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import tiny_model


def _model(impl: str, dtype=torch.float32):
    return _filled(twn_kernels.patch(tiny_model("llama", dtype=dtype).eval(), rank=4, impl=impl))


def _filled(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
            elif "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


SPECS = {
    "one name": lambda rows, tokens: "embedding",
    "a name a row": lambda rows, tokens: ["reasoning", "embedding", None][:rows],
    "a route a token": lambda rows, tokens: torch.arange(rows * tokens).remainder(4).to(torch.int8).view(rows, tokens),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_prefill_and_decode_steps(spec, rows):
    ids = torch.randint(3, 150, (rows, 5))
    steps = torch.randint(3, 150, (rows, 2))

    def logits(model):
        out = []
        with torch.no_grad(), twn_kernels.route(model, SPECS[spec](rows, 5)):
            first = model(input_ids=ids, use_cache=True)
            out.append(first.logits)
            cache = first.past_key_values
            for step in range(2):
                out.append(model(input_ids=steps[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
        return torch.cat(out, dim=1)

    truth = logits(_model("reference", torch.float64))
    assert_as_good_as_torch(logits(_model("triton")), truth, logits(_model("reference")))


def test_a_second_thread_is_refused_while_a_scope_is_open():
    model, caught = _model("blas"), []

    def enter():
        try:
            with twn_kernels.route(model, "embedding"):
                pass
        except PatchError as error:
            caught.append(str(error))

    with twn_kernels.route(model, "reasoning"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(caught) == 1 and "entered in a second thread" in caught[0]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(caught) == 1, "another thread may use the model once the scope has ended"


def test_scopes_that_end_out_of_order_leave_nothing_behind():
    model = _model("blas")
    ids = torch.randint(3, 150, (1, 4))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        outer, inner = twn_kernels.route(model, "reasoning"), twn_kernels.route(model, "embedding")
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        with twn_kernels.route(model, "embedding"):
            expected = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        inner.__exit__(None, None, None)
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("step", ["prefill", "decode"])
@torch.no_grad()
def test_a_fused_block(step, in_double):
    """qkv, o, gate_up with SwiGLU as its epilogue, and down: one kernel each, around transformers' own attention."""
    options = {"num_hidden_layers": 1, "vocab_size": 64}
    sites, models = [], []
    for impl in ("triton", "reference"):
        model = _filled(twn_kernels.patch(tiny_model("qwen3_vl", **options), rank=4, impl=impl))
        models.append(model)
    triton, reference = models
    layer = triton.model.language_model.layers[0]
    for site, group in layer.site_groups.items():
        group.run = _noting(site, group.run, sites)
    embeds = torch.randn(3, 5 if step == "prefill" else 1, 64)
    spec = ["reasoning", "embedding", None]
    outs = []
    for model, given in ((triton, embeds), (in_double(reference), embeds.double()), (reference, embeds)):
        with twn_kernels.route(model, spec):
            outs.append(model(inputs_embeds=given, use_cache=False).logits)
    assert_as_good_as_torch(*outs)
    assert sites == [("qkv", False), ("o", False), ("gate_up", True), ("down", False)]


def _noting(site, run, sites):
    def noted(*args, **kwargs):
        sites.append((site, kwargs.get("swiglu", False)))
        return run(*args, **kwargs)

    return noted
