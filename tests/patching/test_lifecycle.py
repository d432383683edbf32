"""patch and unpatch as a pair: same objects, all or nothing, nothing copied; then copies, files, moves."""

import copy
import io
import pickle

import pytest
import torch

from twn_kernels import patch, route, status, unpatch
from twn_kernels.errors import ImplUnavailable, PatchError
from twn_kernels.modules import DualLoRALinear
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")


def _snapshot(model):
    """Everything that unpatch must bring back: objects, classes, attributes, hooks."""
    return {
        path: (
            id(module),
            type(module),
            set(module.__dict__),
            {k: len(v) for k, v in module.__dict__.items() if "hooks" in k},
        )
        for path, module in model.named_modules()
    }


def _parameters(model):
    return {name: (id(p), p.data_ptr(), p.requires_grad, p.dtype) for name, p in model.named_parameters()}


def _fill_(model):
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in NAMES:
                layer.lora_B[name].data.normal_(std=0.4)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_brings_back_the_same_objects(family):
    model = tiny_model(family)
    model.get_input_embeddings().weight.requires_grad_(False)
    modules, parameters = _snapshot(model), _parameters(model)
    keys = list(model.state_dict())
    assert patch(model, rank=2) is model
    kept = _parameters(model)
    assert {name: kept[name] for name in parameters} == parameters
    assert [key for key in model.state_dict() if ".lora_" not in key] == keys
    assert all(".lora_A." in name or ".lora_B." in name for name in kept if name not in parameters)
    assert unpatch(model) is model
    assert _snapshot(model) == modules
    assert _parameters(model) == parameters


def test_unpatch_brings_back_pefts_objects(pair):
    reference, model, inputs = pair("qwen3_vl")
    modules, parameters = _snapshot(model), _parameters(model)
    patch(model)
    assert _parameters(model) == parameters
    assert list(model.state_dict()) == list(reference.state_dict())
    model.set_adapter("embedding")
    unpatch(model)
    assert _snapshot(model) == modules
    reference.set_adapter("embedding")
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    unpatch(patch(model))
    assert _snapshot(model) == modules


def test_hooks_survive_both_ways():
    model, inputs = tiny_model("llama"), tiny_inputs("llama", 1)
    layer = model.model.layers[0].self_attn.q_proj
    calls = []
    before = layer.register_forward_hook(lambda *_: calls.append("before"))
    patch(model, rank=2)
    assert model.model.layers[0].self_attn.q_proj is layer
    during = layer.register_forward_pre_hook(lambda *_: calls.append("during"))
    model(**inputs)
    assert calls == ["during", "before"]
    unpatch(model)
    model(**inputs)
    assert calls == ["during", "before"] * 2
    before.remove()
    during.remove()
    model(**inputs)
    assert calls == ["during", "before"] * 2


def test_only_adapters_are_added():
    model = tiny_model("qwen2_5_vl")
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    patch(model, rank=3)
    added = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in model.parameters()
        if p.untyped_storage().data_ptr() not in storages
    }
    expected = sum(
        3 * (m.in_features + m.out_features) * 4 * 2 for m in model.modules() if isinstance(m, DualLoRALinear)
    )
    assert sum(added.values()) == expected == status(model).added_bytes
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages | set(added)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama")
    modules, parameters = _snapshot(model), _parameters(model)
    real, count = DualLoRALinear._attach, []

    def failing(self, *args, **kwargs):
        count.append(1)
        if len(count) == 6:
            raise MemoryError("out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DualLoRALinear, "_attach", failing)
    with pytest.raises(MemoryError):
        patch(model, rank=2)
    assert len(count) == 6
    assert _snapshot(model) == modules and _parameters(model) == parameters


def test_a_failure_around_the_layers_leaves_the_model_as_it_was(pair, monkeypatch):
    from twn_kernels.patching.surroundings import Surroundings

    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Surroundings, "wrap_checkpointing", fail)
    for model in (tiny_model("qwen3_vl"), pair("qwen3_vl")[1]):
        modules, parameters = _snapshot(model), _parameters(model)
        with pytest.raises(KeyboardInterrupt):
            patch(model)
        assert _snapshot(model) == modules and _parameters(model) == parameters


def test_equal_arguments_do_nothing_and_others_are_refused():
    model = patch(tiny_model("llama"), rank=2)
    before = _snapshot(model), _parameters(model)
    assert patch(model, rank=2) is model
    assert (_snapshot(model), _parameters(model)) == before
    with pytest.raises(PatchError, match="LlamaForCausalLM is patched already.*rank is 2 and now 3.*unpatch"):
        patch(model, rank=3)
    with pytest.raises(PatchError, match=r"targets is not given and now \('q_proj',\)"):
        patch(model, rank=2, targets=["q_proj"])
    with pytest.raises(PatchError, match="impl is 'auto' and now 'reference'"):
        patch(model, rank=2, impl="reference")
    assert (_snapshot(model), _parameters(model)) == before
    patch(unpatch(model), rank=3)


def test_unpatch_needs_a_patched_model():
    with pytest.raises(PatchError, match="unpatch needs a patched model, but LlamaForCausalLM is not patched"):
        unpatch(tiny_model("llama"))


def test_an_impl_that_cannot_run_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model("llama")
    modules = _snapshot(model)
    with pytest.raises(ImplUnavailable, match='impl="triton" was asked for'):
        patch(model, impl="triton")
    assert _snapshot(model) == modules


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_copies_are_whole_and_their_own(how, pair):
    inputs = tiny_inputs("qwen3_vl", 2)
    for model in (_fill_(patch(tiny_model("qwen3_vl"), rank=2)), patch(pair("qwen3_vl")[1])):
        with route(model, "embedding"):
            expected = model(**inputs).logits
            copied = _copy(model, how)
            # A copy made inside a scope is still under it; it is not bound to the original's.
            with route(copied, None):
                assert torch.equal(model(**inputs).logits, expected)
        with route(copied, "embedding"):
            assert torch.equal(copied(**inputs).logits, expected)
            tokens = copied.generate(**inputs, max_new_tokens=3, num_beams=2)
        with route(model, "embedding"):
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, num_beams=2), tokens)
        shared = {id(m) for m in model.modules()} & {id(m) for m in copied.modules()}
        assert not shared
        unpatch(copied)
        assert not status(copied).patched and status(model).patched
        assert not [m for m in copied.modules() if "_twn_patch" in m.__dict__]
        with route(model, "embedding"):
            assert torch.equal(model(**inputs).logits, expected)


def _copy(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.no_grad()
def test_moving_to_another_dtype(in_double):
    model, inputs = _fill_(patch(tiny_model("llama"), rank=2)), tiny_inputs("llama", 2)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with route(half, ["reasoning", "embedding"]):
        actual = half(**inputs).logits
    truth_model, naive = copy.deepcopy(half).double(), copy.deepcopy(half)
    for layer in naive.modules():
        if isinstance(layer, DualLoRALinear):
            layer.impl = "reference"
    with route(truth_model, ["reasoning", "embedding"]), route(naive, ["reasoning", "embedding"]):
        assert_as_good_as_torch(actual, truth_model(**inputs).logits, naive(**inputs).logits)
    unpatch(half)
    assert torch.equal(half(**inputs).logits, tiny_model("llama", dtype=torch.bfloat16)(**inputs).logits)


def test_train_and_eval_reach_the_layers_and_come_back():
    model = patch(tiny_model("llama"), rank=2)
    model.train()
    unpatch(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_writes_the_plain_base(family, tmp_path, caplog):
    from safetensors.torch import load_file

    plain, patched = tiny_model(family), _fill_(patch(tiny_model(family), rank=2))
    plain.save_pretrained(tmp_path / "plain")
    patched.save_pretrained(tmp_path / "patched")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("patched", "plain"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "patched" / name).read_text() == (tmp_path / "plain" / name).read_text()
    loaded, report = type(plain).from_pretrained(tmp_path / "patched", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = tiny_inputs(family, 2)
    assert torch.equal(loaded(**inputs).logits, patched(**inputs).logits)
    # The rule is gone with the patch, and a part of the model saves itself alike.
    part = patched.base_model
    part.save_pretrained(tmp_path / "part")
    assert not [key for key in load_file(tmp_path / "part" / "model.safetensors") if "lora" in key]
    unpatch(patched)
    assert not patched._keys_to_ignore_on_save


def test_state_dict_is_a_training_checkpoint():
    model = _fill_(patch(tiny_model("qwen3_vl"), rank=2))
    state = copy.deepcopy(model.state_dict())
    other = patch(tiny_model("qwen3_vl", seed=5), rank=2)
    other.load_state_dict(state)
    inputs = tiny_inputs("qwen3_vl", 2)
    for spec in (None, "both"):
        with route(model, spec), route(other, spec):
            assert torch.equal(model(**inputs).logits, other(**inputs).logits)


def test_peft_models_save_as_before(pair, tmp_path):
    from safetensors.torch import load_file

    reference, model, _ = pair("llama")
    patch(model)
    reference.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for name in NAMES:
        a, b = (load_file(tmp_path / at / name / "adapter_model.safetensors") for at in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_tied_weights_and_heads_are_left_alone():
    model = patch(tiny_model("gemma3_text"), rank=2)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
