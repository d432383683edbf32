"""When a fused block must not fuse: hooks, wrapped forwards, dropout, autocast, odd layers; and that it says why."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from twn_kernels import patch, route, status, unpatch
from twn_kernels.errors import PatchError
from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.routing import RouteState, UniformSpec
from twn_kernels.modules.site_group import SiteGroup
from twn_kernels.ops import RoutePlan, choice
from twn_kernels.patching import readiness
from twn_kernels.patching.blocks import FusedAttention, FusedLayer
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import VISION_FAMILIES, tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")
BLOCK = ["qkv", "o", "gate_up", "down"]
SPEC = ["reasoning", "embedding"]
# What a hook on each module takes out of the fused calls.
WATCHED = {
    "input_layernorm": {"qkv"},
    "self_attn": {"qkv", "o"},
    "self_attn.q_proj": {"qkv"},
    "self_attn.v_proj": {"qkv"},
    "self_attn.o_proj": {"o"},
    "post_attention_layernorm": {"gate_up", "down"},
    "mlp": {"gate_up", "down"},
    "mlp.up_proj": {"gate_up", "down"},
    "mlp.act_fn": {"gate_up", "down"},
    "mlp.down_proj": {"gate_up", "down"},
}


def _filled(model):
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in NAMES:
                for parameter, size in ((layer.lora_A[name], 0.2), (layer.lora_B[name], 0.3)):
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def _model(family="qwen3_vl", fuse=True, **options):
    return _filled(patch(tiny_model(family, num_hidden_layers=1, **options), rank=3, fuse=fuse))


def _layer(model):
    return model.model.language_model.layers[0]


def _logits(model, spec=SPEC, **inputs):
    inputs = inputs or tiny_inputs("qwen3_vl", 2, images=False)
    with route(model, spec):
        return model(**inputs).logits


def _agree(ours, theirs, truth, name="logits"):
    """As near to fp64 as the linear level; bits may differ, since one GEMM of a group is not several of its parts."""
    if ours.is_floating_point():
        assert_as_good_as_torch(ours, truth, theirs, name)
    else:
        assert torch.equal(ours, theirs), name


def _hook_every_way(module, seen):
    def before(_, args, kwargs):
        seen.append(("before", [t.clone() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]))

    def after(_, args, output):
        seen.append(
            ("after", [t.clone() for t in (output if isinstance(output, tuple) else (output,)) if t is not None])
        )

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


@pytest.mark.parametrize("path", WATCHED)
@torch.no_grad()
def test_a_hook_sees_what_it_would_see_layer_by_layer(path, runs, in_double):
    fused, plain = _model(), _model(fuse=False)
    exact = in_double(plain)
    expected, seen, true = [], [], []
    unhooked = _logits(fused)
    _hook_every_way(_layer(plain).get_submodule(path), expected)
    _hook_every_way(_layer(exact).get_submodule(path), true)
    handles = _hook_every_way(_layer(fused).get_submodule(path), seen)
    runs.clear()
    actual, naive = _logits(fused), _logits(plain)
    assert runs == [site for site in BLOCK if site not in WATCHED[path]]
    _agree(actual, naive, _logits(exact))
    assert [kind for kind, _ in seen] == [kind for kind, _ in expected] == ["before", "after"]
    for (kind, ours), (_, theirs), (_, truths) in zip(seen, expected, true, strict=True):
        assert len(ours) > 0
        for tensors in zip(ours, theirs, truths, strict=True):
            _agree(*tensors, kind)
    shown = {layer.group: (layer.level, layer.level_why) for layer in status(fused).layers}
    for site in BLOCK:
        assert shown[site][0] == ("linear" if site in WATCHED[path] else "block"), site
        if site in WATCHED[path]:
            assert "hooks or a forward of its own on" in shown[site][1]
    for handle in handles:
        handle.remove()
    runs.clear()
    assert torch.equal(_logits(fused), unhooked) and runs == BLOCK


@torch.no_grad()
def test_a_hook_may_change_what_passes():
    fused, plain = _model(), _model(fuse=False)
    for model in (fused, plain):
        _layer(model).self_attn.register_forward_hook(lambda _, __, output: (output[0] * 0.5, output[1]))
        _layer(model).mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert torch.equal(_logits(fused), _logits(plain))


@torch.no_grad()
def test_hooks_on_the_layer_itself_leave_it_fused(runs):
    model, seen = _model(), []
    _layer(model).register_forward_hook(lambda _, __, output: seen.append(output.shape))
    _logits(model)
    assert runs == BLOCK and len(seen) == 1


@torch.no_grad()
def test_hooks_on_every_module_see_every_module(runs):
    from torch.nn.modules.module import register_module_forward_hook

    model, names = _model(), []
    handle = register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        _logits(model)
    finally:
        handle.remove()
    assert runs == [] and names.count("DualLoRALinear") == 7 and "SiLUActivation" in names


@pytest.mark.parametrize("path", ["input_layernorm", "mlp", "mlp.act_fn", "self_attn", "self_attn.q_proj"])
@torch.no_grad()
def test_a_forward_set_on_an_instance_is_called(path, runs, in_double):
    fused, plain, calls = _model(), _model(fuse=False), []
    exact = in_double(plain)
    for model in (fused, plain):
        module = _layer(model).get_submodule(path)
        inner = module.forward

        def wrapped(*args, inner=inner, **kwargs):
            calls.append(path)
            return inner(*args, **kwargs)

        module.forward = wrapped
    _agree(_logits(fused), _logits(plain), _logits(exact))
    assert len(calls) == 2
    assert runs == [site for site in BLOCK if site not in WATCHED[path]]


@torch.no_grad()
def test_a_replaced_module_is_the_one_that_runs(runs):
    model = _model()
    before = _logits(model)
    layer = _layer(model)
    kept = layer.mlp
    layer.mlp = nn.Identity()
    assert not torch.equal(_logits(model), before)
    layer.mlp = kept
    layer.self_attn.k_proj = nn.Linear(64, 32, bias=False)
    runs.clear()
    changed = _logits(model)
    assert not torch.equal(changed, before) and runs == BLOCK
    assert "k_proj" in dict(layer.self_attn.named_children()) and type(layer.self_attn.k_proj) is nn.Linear


@torch.no_grad()
def test_recorded_states_and_attentions_are_transformers_own_and_leave_the_block_fused(runs, in_double):
    inputs = tiny_inputs("qwen3_vl", 2, images=False)
    inputs["attention_mask"].fill_(1)  # in fp64, the attention of a row of padding is NaN
    outs = []
    for model in (_model(), _model(fuse=False), in_double(_model(fuse=False))):
        fuse = not outs
        model.set_attn_implementation("eager")
        with route(model, SPEC):
            outs.append(model(**inputs, output_attentions=True, output_hidden_states=True))
        assert runs == BLOCK
        if fuse:
            assert model.model.language_model.layers[0].self_attn._forward_hooks
    for name in ("attentions", "hidden_states"):
        for tensors in zip(*(getattr(out, name) for out in outs), strict=True):
            _agree(*tensors, name)


@pytest.mark.parametrize("when", ["autocast", "dropout", "float64", "impls", "transform"])
def test_calls_that_run_layer_by_layer(when, runs, with_peft):
    inputs = tiny_inputs("qwen3_vl", 2, images=False)
    fused, plain = _model(), _model(fuse=False)
    outs = []
    for model in (fused, plain):
        torch.manual_seed(0)
        for layer in model.modules():
            if when == "dropout" and isinstance(layer, DualLoRALinear):
                model.train()
                layer.lora_dropout = dict.fromkeys(NAMES, 0.5)
        if when == "float64":
            model.double()
        if when == "impls":
            for name in ("self_attn.k_proj", "mlp.up_proj"):
                _layer(model).get_submodule(name).impl = "reference"
        with torch.autocast("cpu", torch.bfloat16, enabled=when == "autocast"), torch.no_grad():
            if when == "transform":
                model.set_attn_implementation("eager")
                embeds = model.get_input_embeddings()(inputs["input_ids"])
                with route(model, RoutePlan.uniform(None, embeds[..., 0].numel())):
                    outs.append(torch.func.jvp(lambda x, of=model: of(inputs_embeds=x).logits, (embeds,), (embeds,))[1])
            else:
                outs.append(_logits(model))
    assert torch.equal(*outs)
    assert runs == (["o"] if when == "impls" else [])


@torch.no_grad()
def test_peft_states_that_a_block_cannot_stand_for(with_peft, runs):
    model = with_peft(tiny_model("qwen3_vl", num_hidden_layers=1))
    reference, inputs = copy.deepcopy(model), tiny_inputs("qwen3_vl", 2, images=False)
    patch(model)
    names = ["reasoning", "__base__"]
    assert model(**inputs, adapter_names=names).logits.isfinite().all() and runs == []
    for each in (model, reference):
        each.base_model.set_adapter("embedding")
        each.merge_adapter(["reasoning"])
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits) and runs == []
    with route(model, "reasoning"), pytest.raises(PatchError, match="merged into its base weight"):
        model(**inputs)
    assert "merged into its base weight" in str(status(model))
    model.unmerge_adapter()
    model(**inputs)
    assert runs == BLOCK
    model.add_adapter("third", model.peft_config["reasoning"])
    model.base_model.set_adapter("third")
    with pytest.raises(PatchError, match='adapter "third" is active on layer'):
        model(**inputs)
    assert 'adapter "third" is active on layer' in str(status(model))


def _odd_subclass(layer):
    layer.__class__ = type("MyLayer", (type(layer),), {})


def _odd_activation(layer):
    layer.mlp.act_fn = nn.GELU()


def _odd_norm(layer):
    layer.post_attention_layernorm = nn.RMSNorm(64)


def _odd_mlp(layer):
    layer.mlp.forward = lambda x: x


def _wrapped_layer(layer):
    layer.forward = lambda *args, **kwargs: args[0]


ODD = {
    "subclass": (_odd_subclass, "it is MyLayer, not transformers' own Qwen3VLTextDecoderLayer"),
    "activation": (_odd_activation, "its activation is GELU, not SiLU"),
    "norm": (_odd_norm, "its post_attention_layernorm is RMSNorm, not transformers' own Qwen3VLTextRMSNorm"),
    "mlp": (_odd_mlp, "its mlp has a forward set on the instance"),
    "wrapped": (_wrapped_layer, "it has a forward set on the instance"),
}


@pytest.mark.parametrize("kind", ODD)
@torch.no_grad()
def test_an_odd_layer_stays_at_linear_level_with_the_reason(kind, runs, in_double):
    make, reason = ODD[kind]
    models = []
    for fuse in (True, False):
        model = tiny_model("qwen3_vl")
        make(model.model.language_model.layers[1])
        models.append(_filled(patch(model, rank=3, fuse=fuse)))
    fused, plain = models
    exact = in_double(plain)
    _agree(_logits(fused), _logits(plain), _logits(exact))
    assert runs == BLOCK
    shown = status(fused)
    assert shown.level == "block" and f"not fused: model.language_model.layers.1 ({reason}" in shown.level_note
    assert {layer.level for layer in shown.layers if ".layers.1." in layer.layer} == {"linear"}
    assert {layer.level for layer in shown.layers if ".layers.0." in layer.layer} == {"block"}
    unpatch(fused)


def test_another_forward_of_a_class_is_noticed(monkeypatch):
    """A library that replaces transformers' methods, or a release that computes something else."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

    for owner in ("Qwen3VLTextDecoderLayer", "Qwen3VLTextMLP", "Qwen3VLTextRMSNorm", "Qwen3VLTextAttention"):
        owner = getattr(modeling, owner)
        real = owner.forward
        with monkeypatch.context() as patched:
            patched.setattr(owner, "forward", lambda self, *args, real=real, **kwargs: real(self, *args, **kwargs))
            shown = status(patch(tiny_model("qwen3_vl"), rank=3))
        assert shown.level == "linear"
        assert f"the forward of {owner.__name__} is not the one that the block stands for" in shown.level_note
    assert status(patch(tiny_model("qwen3_vl"), rank=3)).level == "block"


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_layers_keep_their_names_and_come_back(family):
    model = tiny_model(family)
    before = {path: (id(module), type(module)) for path, module in model.named_modules()}
    patch(model, rank=2)
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    assert len(layers) == 2 and all(isinstance(layer.self_attn, FusedAttention) for layer in layers)
    for path, module in model.named_modules():
        if path in before:
            identity, plain = before[path]
            assert id(module) == identity
            if isinstance(module, (FusedLayer, FusedAttention)):
                assert isinstance(module, plain) and type(module).__name__ == plain.__name__
    assert type(layers[0]).__name__ in (model.model._no_split_modules or model._no_split_modules)
    unpatch(model)
    assert {path: (id(module), type(module)) for path, module in model.named_modules()} == before


def test_a_failure_while_blocks_are_made_leaves_the_model_as_it_was(monkeypatch):
    model, real = tiny_model("qwen3_vl"), FusedLayer.adopt.__func__

    def failing(cls, layer, path, *args):
        if path.endswith("layers.1"):
            raise MemoryError("out of memory")
        return real(cls, layer, path, *args)

    before = {path: (type(module), set(module.__dict__)) for path, module in model.named_modules()}
    monkeypatch.setattr(FusedLayer, "adopt", classmethod(failing))
    with pytest.raises(MemoryError):
        patch(model, rank=2)
    assert {path: (type(module), set(module.__dict__)) for path, module in model.named_modules()} == before


def test_unpatch_refuses_a_block_that_something_wrapped_since():
    model = patch(tiny_model("qwen3_vl"), rank=2)
    layer = model.model.language_model.layers[1]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(PatchError, match=r"fused blocks got a forward .*: model\.language_model\.layers\.1\. Remove"):
        unpatch(model)
    del layer.__dict__["forward"]
    unpatch(model)


def test_families_without_blocks_say_so():
    for family in ("llama", "gpt_neox"):
        shown = status(patch(tiny_model(family), rank=2))
        assert shown.level == "linear" and "qwen2_vl, qwen2_5_vl, qwen3_vl alone" in shown.level_note
    shown = status(patch(tiny_model("qwen3_vl"), rank=2, fuse=False))
    assert shown.level == "linear" and "were not asked for" in shown.level_note
    assert not [m for m in patch(tiny_model("qwen3_vl"), fuse=False).modules() if isinstance(m, FusedLayer)]


@pytest.mark.parametrize(("impl", "bits", "own"), [("auto", 0, True), ("auto", 1, False), ("blas", 0, False)], ids=str)
def test_base_only_on_a_gpu_is_left_to_torch_until_something_was_measured(impl, bits, own, monkeypatch):
    """Named, the vendor GEMM borrows a producer; taken for want of a measurement, it would repeat torch's own ops."""
    monkeypatch.setattr(choice, "_usable", lambda *_: ([], []))
    groups = {site: SiteGroup(site, impl) for site in BLOCK}
    block = readiness.Block("layers.0", RouteState(UniformSpec(bits)), groups, nn.Module, nn.Module, nn.Module)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=torch.Size([2, 3, 64]))
    assert readiness.gains_nothing(block, on_gpu) is own


@torch.no_grad()
def test_a_status_line_for_each_condition():
    text = str(status(_model()))
    for part in ("hooks", "autocast", "LoRA dropout in training", "float64", "adapter_names=", "merged adapters"):
        assert part in text
    assert "one call for q, k and v" in text and "not fused" not in text


@torch.no_grad()
def test_the_oracle_would_notice_a_missing_norm(in_double):
    """The comparisons above can fail: without the folded norm, or the residual, nothing agrees."""
    fused, plain = _model(), _model(fuse=False)
    inputs = tiny_inputs("qwen3_vl", 2, images=False)
    exact = in_double(plain)
    truth, naive = _logits(exact), _logits(plain)
    _layer(fused).input_layernorm.variance_epsilon = 1.0
    with pytest.raises(AssertionError, match="worse than torch"):
        assert_as_good_as_torch(_logits(fused, **inputs), truth, naive)
