"""Copies and files of models with packed groups: whole, their own, and no larger than without."""

import copy
import io
import pickle

import pytest
import torch
from packed_groups import BF16, FORMS, assert_right, draw_members, run, storages
from torch import nn

from twn_kernels.impl.blas import panels
from twn_kernels.modules.packing import PackedGroup


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("form", FORMS)
def test_copies_are_whole_and_their_own(form, how):
    members = draw_members(form)
    group = PackedGroup(members)
    expected = run(members, group.panels())
    copied, twin = _copied((members, group), how)
    assert twin.added_bytes == 0 and "copied" in twin.reason
    assert_right(copied, twin)
    assert twin.added_bytes == group.added_bytes
    assert not set(storages(m.weight for m in members)) & set(storages(m.weight for m in copied))
    with torch.no_grad():
        copied[0].weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(expected, run(members, group.panels()), strict=True))
    twin.remove()
    assert all(m.weight.is_contiguous() and not m._state_dict_hooks for m in copied)
    assert all(not m.weight.is_contiguous() and m._state_dict_hooks for m in members)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_that_never_ran_can_be_removed(how):
    members = draw_members()
    copied, twin = _copied((members, PackedGroup(members)), how)
    twin.remove()
    for mine, theirs in zip(members, copied, strict=True):
        assert theirs.weight.is_contiguous() and torch.equal(mine.weight, theirs.weight)
        assert theirs.weight.untyped_storage().nbytes() == theirs.weight.numel() * 2


def _copied(value, how):
    if how == "deepcopy":
        return copy.deepcopy(value)
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_are_contiguous_and_no_larger(form):
    members = nn.ModuleList(draw_members(form))
    plain = copy.deepcopy(members)
    PackedGroup(list(members))
    state = members.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(value.is_contiguous() and torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
    sizes = []
    for model in (plain, members):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        sizes.append(buffer.tell())
    assert sizes[0] == sizes[1]
    kept = members.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in members.named_parameters())


def test_safetensors_saves_and_loads_models(tmp_path):
    from safetensors.torch import load_file, load_model, save_model

    members = nn.ModuleList(draw_members())
    group = PackedGroup(list(members))
    save_model(members, tmp_path / "packed.safetensors")
    saved = load_file(tmp_path / "packed.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in members.named_parameters())
    expected = run(list(members), group.panels())
    with torch.no_grad():
        for parameter in members.parameters():
            parameter.zero_()
    load_model(members, tmp_path / "packed.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(expected, run(list(members), group.panels()), strict=True))


def _groups(model):
    """A packed group for every site of every text layer of a model of the Qwen families."""
    found = []
    for layer in model.modules():
        if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "q_proj"):
            attention, mlp = layer.self_attn, layer.mlp
            sites = ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj])
            found += [PackedGroup(site) for site in (*sites, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])]
    assert len(found) == 8 and all(group.reason is None for group in found)
    return found


def test_transformers_saves_the_base_it_had(tmp_path):
    from safetensors.torch import load_file

    from twn_kernels import patch, unpatch
    from twn_kernels.testing.tiny_models import tiny_model

    plain, model = (tiny_model("qwen2_5_vl", dtype=BF16) for _ in "ab")
    weights = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    groups = _groups(patch(model, rank=4, fuse=False))
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "packed", max_shard_size="60kB")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    written = {k: v for file in sorted((tmp_path / "packed").glob("*.safetensors")) for k, v in load_file(file).items()}
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    for group in groups:
        group.remove()
    unpatch(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in weights.items()}
    assert all(p.is_contiguous() and torch.equal(p, weights[name][1]) for name, p in model.named_parameters())


def test_peft_saves_and_merges_as_before(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from twn_kernels import patch
    from twn_kernels.testing.tiny_models import tiny_model

    config = LoraConfig(r=4, target_modules=r".*(q|k|v|o|gate|up|down)_proj", init_lora_weights=False)
    base = tiny_model("qwen3_vl", dtype=BF16)
    config.target_modules = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(base, config, adapter_name="reasoning", autocast_adapter_dtype=False)
    model.add_adapter("embedding", config, autocast_adapter_dtype=False)
    twin = copy.deepcopy(model)
    groups = _groups(patch(model, fuse=False))
    for name, saved in (("plain", twin), ("packed", model)):
        saved.save_pretrained(tmp_path / name)
    for adapter in ("reasoning", "embedding"):
        plain, packed = (load_file(tmp_path / at / adapter / "adapter_model.safetensors") for at in ("plain", "packed"))
        assert plain.keys() == packed.keys() and all(torch.equal(plain[key], packed[key]) for key in plain)
    state, expected = model.state_dict(), twin.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    for merging in (model, twin):
        merging.merge_adapter(["reasoning"])
    weight = model.base_model.model.model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    theirs = twin.base_model.model.model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, theirs)
    key, panel, *_ = groups[0].panels()
    left = panels.layout_of(key).left
    assert torch.equal(panel[:, left : left + weight.shape[1]], weight), "merged weights are multiplied, too"
