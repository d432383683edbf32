"""Fused blocks of the Qwen-VL families: the same numbers as layer by layer, under every route, and really fused."""

import copy
import threading

import pytest
import torch

from twn_kernels import patch, route, status, unpatch
from twn_kernels.errors import PatchError
from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.site_group import SiteGroup
from twn_kernels.ops import RoutePlan
from twn_kernels.patching.blocks import FusedAttention, FusedLayer
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import VISION_FAMILIES, tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")
BLOCK = ["qkv", "o", "gate_up", "down"]
PARTIAL = {
    "q-and-v": ["q_proj", "v_proj"],
    "no-mlp": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "down-alone": r".*language_model.*down_proj",
    "one-layer": r".*layers\.1\.(self_attn|mlp)\.[a-z]+_proj",
}


@pytest.fixture(params=VISION_FAMILIES)
def family(request):
    return request.param


def _filled(model, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in NAMES:
                for parameter, size in ((layer.lora_A[name], 0.2), (layer.lora_B[name], 0.3)):
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def _pair(family, **options):
    """The same patched model twice: with blocks, and layer by layer."""
    return tuple(_filled(patch(tiny_model(family), rank=3, fuse=fuse, **options)) for fuse in (True, False))


def _specs(rows, tokens):
    routes = torch.arange(rows * tokens).remainder(4).to(torch.int8)
    return [
        None,
        "reasoning",
        "both",
        ["reasoning", None, "embedding"],
        routes.view(rows, tokens),
        RoutePlan.from_routes(routes.flip(0)),
    ]


@torch.no_grad()
def test_every_route_gives_what_layer_by_layer_gives(family, runs, in_double):
    fused, plain = _pair(family)
    inputs = tiny_inputs(family, 3)
    exact, exact_inputs = in_double(plain), in_double(inputs)
    for spec in _specs(*inputs["input_ids"].shape):
        runs.clear()
        with route(fused, spec), route(plain, spec), route(exact, spec):
            actual, truth, naive = fused(**inputs).logits, exact(**exact_inputs).logits, plain(**inputs).logits
        # Without an adapter a CPU gains nothing by fusing: transformers' own forward runs then.
        assert runs == ([] if spec is None else BLOCK * 2)
        assert_as_good_as_torch(actual, truth, naive, f"{family} {spec}")


@torch.no_grad()
def test_base_only_is_the_unpatched_model_bit_for_bit(family, pair, runs):
    inputs = tiny_inputs(family, 2)
    expected = tiny_model(family)(**inputs).logits
    fused = _filled(patch(tiny_model(family), rank=3))
    assert torch.equal(fused(**inputs).logits, expected)
    plan = RoutePlan.uniform(None, inputs["input_ids"].numel())
    with route(fused, plan):
        assert torch.equal(fused(**inputs).logits, expected)
    assert runs == BLOCK * 2
    _, peft, _ = pair(family)
    patch(peft)
    with peft.disable_adapter():
        assert torch.equal(peft(**inputs).logits, expected)
    assert runs == BLOCK * 4


@torch.no_grad()
def test_an_epilogue_gives_what_a_producer_gives(family, monkeypatch, in_double):
    """SwiGLU where gate and up are made, and where down reads them: the device's implementation decides which."""
    fused, plain = _pair(family)
    inputs = tiny_inputs(family, 3)
    exact, spec = in_double(plain), ["embedding", "both", None]
    with route(exact, spec), route(plain, spec):
        truth, naive = exact(**in_double(inputs)).logits, plain(**inputs).logits
    for epilogue in (True, False):
        monkeypatch.setattr(SiteGroup, "prefers_epilogue", lambda *_, choice=epilogue: choice)
        with route(fused, spec):
            assert_as_good_as_torch(fused(**inputs).logits, truth, naive, f"{family} epilogue {epilogue}")


@pytest.mark.parametrize("targets", PARTIAL)
@torch.no_grad()
def test_partial_targets(targets, family, in_double, runs):
    fused, plain = _pair(family, targets=PARTIAL[targets])
    inputs, spec = tiny_inputs(family, 3), ["embedding", "reasoning", "both"]
    exact = in_double(plain)
    with route(fused, spec), route(plain, spec), route(exact, spec):
        actual = fused(**inputs).logits
        assert_as_good_as_torch(actual, exact(**in_double(inputs)).logits, plain(**inputs).logits, targets)
    layers = 1 if targets == "one-layer" else 2
    assert runs == BLOCK * layers
    assert sum(isinstance(module, FusedLayer) for module in fused.modules()) == layers


@torch.no_grad()
def test_adapters_that_touch_different_layers(with_peft, peft_logits, in_double, runs):
    from peft import LoraConfig

    reference = with_peft(tiny_model("qwen3_vl"), targets=["q_proj", "o_proj", "gate_proj"])
    reference.delete_adapter("embedding")
    reference.add_adapter("embedding", LoraConfig(r=4, lora_alpha=5, target_modules=["v_proj", "o_proj", "down_proj"]))
    for name, parameter in reference.named_parameters():
        if "lora_B.embedding" in name:
            parameter.data.normal_(std=0.3)
    reference.eval()
    fused, inputs = patch(copy.deepcopy(reference)), tiny_inputs("qwen3_vl", 3)
    exact = in_double(reference)
    for spec in ("reasoning", "embedding", "both", ["embedding", None, "reasoning"]):
        with route(fused, spec):
            actual = fused(**inputs).logits
        truth, naive = peft_logits(exact, in_double(inputs), spec), peft_logits(reference, inputs, spec)
        assert_as_good_as_torch(actual, truth, naive, str(spec))
    assert runs == BLOCK * 8


@torch.no_grad()
def test_prefill_and_cached_steps(family, runs, in_double):
    fused, plain = _pair(family)
    exact = in_double(plain)
    ids, steps = torch.randint(3, 150, (3, 6)), torch.randint(3, 150, (3, 2))

    def logits(model):
        with route(model, ["reasoning", "embedding", None]):
            first = model(input_ids=ids, use_cache=True)
            out, cache = [first.logits], first.past_key_values
            for step in range(2):
                out.append(model(input_ids=steps[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
        return torch.cat(out, dim=1)

    assert_as_good_as_torch(logits(fused), logits(exact), logits(plain))
    assert runs == BLOCK * 6


@torch.no_grad()
def test_a_row_of_nan_stays_alone(runs, in_double):
    fused, plain = _pair("qwen3_vl")
    embeds = fused.get_input_embeddings()(torch.randint(3, 150, (3, 5)))
    embeds[1] = float("nan")
    fused.model.language_model.layers[0].mlp.up_proj.lora_A["embedding"][0, 0] = float("inf")
    plain.load_state_dict(fused.state_dict())
    outs = []
    for model in (fused, in_double(plain), plain):
        given = embeds.double() if len(outs) == 1 else embeds
        with route(model, ["reasoning", "reasoning", "embedding"]):
            outs.append(model(inputs_embeds=given).logits)
    assert outs[0][0].isfinite().all() and outs[0][1].isnan().all() and not outs[0][2].isfinite().all()
    assert_as_good_as_torch(*(out[0] for out in outs), "the row beside a NaN")
    assert runs == BLOCK * 2


@torch.no_grad()
def test_another_dtype_after_the_patch(runs, in_double):
    fused, plain = (model.to(torch.bfloat16) for model in _pair("qwen2_5_vl"))
    inputs = tiny_inputs("qwen2_5_vl", 2)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    exact, spec = in_double(plain), ["reasoning", "both"]
    with route(fused, spec), route(plain, spec), route(exact, spec):
        truth = exact(**in_double(inputs)).logits
        assert_as_good_as_torch(fused(**inputs).logits, truth, plain(**inputs).logits)
    assert runs == BLOCK * 2


@torch.no_grad()
def test_packed_weights(family, runs, in_double):
    """Packed by hand, as a GPU's blocks are: same numbers, same state dict, and unpatch gives the weights back."""
    base = tiny_model(family, dtype=torch.bfloat16)
    fused, plain = (_filled(patch(copy.deepcopy(base), rank=3, fuse=fuse)) for fuse in (True, False))
    alone = status(fused).added_bytes
    for layer in fused.model.language_model.layers:
        for site, group in layer.site_groups.items():
            group.pack([layer.get_submodule(path) for path in _members(site)])
    shown = status(fused)
    assert shown.packed_bytes > 0 and shown.added_bytes == alone + shown.packed_bytes
    assert "weights packed beside lora_B" in str(shown)
    assert not fused.model.language_model.layers[0].mlp.up_proj.weight.is_contiguous()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_inputs(family, 3).items()}
    exact = in_double(plain)
    for spec in (None, "embedding", ["reasoning", None, "both"]):
        with route(fused, spec), route(plain, spec), route(exact, spec):
            truth = exact(**in_double(inputs)).logits
            assert_as_good_as_torch(fused(**inputs).logits, truth, plain(**inputs).logits, str(spec))
        copied = copy.deepcopy(fused)
        with route(fused, spec), route(copied, spec):
            assert torch.equal(copied(**inputs).logits, fused(**inputs).logits)
    state, expected = fused.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    unpatch(fused)
    for name, parameter in fused.named_parameters():
        assert parameter.is_contiguous() and torch.equal(parameter, base.get_parameter(name))


def _members(site):
    names = {"qkv": ["q_proj", "k_proj", "v_proj"], "o": ["o_proj"], "gate_up": ["gate_proj", "up_proj"]}
    parent = "self_attn" if site in ("qkv", "o") else "mlp"
    return [f"{parent}.{name}" for name in names.get(site, ["down_proj"])]


@torch.no_grad()
def test_threads_do_not_mix_their_calls():
    """Two threads in the same layers at once, with the very same input tensors."""
    model = _filled(patch(tiny_model("qwen3_vl"), rank=3))
    embeds = [torch.randn(2, 5, 64), torch.randn(2, 5, 64)]
    with route(model, "both"):
        expected = [model(inputs_embeds=each).logits for each in embeds]
        wrong, barrier = [], threading.Barrier(3)

        @torch.no_grad()
        def work(which):
            barrier.wait()
            for _ in range(8):
                if not torch.equal(model(inputs_embeds=embeds[which]).logits, expected[which]):
                    wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not any(m._twn_calls for m in model.modules() if isinstance(m, FusedAttention))


@torch.no_grad()
def test_an_attention_that_reads_its_projections_otherwise_is_never_silently_wrong(monkeypatch):
    model = patch(tiny_model("qwen3_vl"), rank=3)
    attention = model.model.language_model.layers[0].self_attn
    plain, inputs = attention.plain_class, tiny_inputs("qwen3_vl", 1, images=False)
    real = plain.forward

    def cloned(self, hidden_states, **kwargs):
        self.q_proj(hidden_states.clone())
        return real(self, hidden_states, **kwargs)

    def unread(self, hidden_states, **kwargs):
        self.q_proj(hidden_states)
        return hidden_states, None

    for forward, message in ((cloned, "called q_proj on another input"), (unread, "never called k_proj, v_proj")):
        monkeypatch.setattr(plain, "forward", forward)
        with route(model, "both"), pytest.raises(PatchError, match=message):
            model(**inputs)
        assert not attention._twn_calls
    monkeypatch.setattr(plain, "forward", real)
    with route(model, "both"):
        model(**inputs)
