"""Copies and files of models with packed groups: whole, their own, and no larger than without."""

import copy
import io
import pickle

import pytest
import torch
from packed_groups import BF16, FORMS, adapters_of, assert_right, run, storages
from torch import nn

from twn_kernels.impl.blas import panels
from twn_kernels.modules.packing import PackedGroup


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("form", FORMS)
def test_copies_are_whole_and_their_own(form, how, draw):
    members = draw(form)
    group = PackedGroup(members)
    expected = run(members, group.panels())
    copied, twin = _copied((members, group), how)
    assert twin.added_bytes == 0 and "copied" in twin.reason
    assert_right(copied, twin)
    assert twin.added_bytes == group.added_bytes
    mine, theirs = (storages(p for m in many for p in m.parameters()) for many in (members, copied))
    assert not mine.keys() & theirs.keys() and sum(mine.values()) == sum(theirs.values())
    with torch.no_grad():
        for p in (copied[0].weight, *adapters_of(copied)):
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(expected, run(members, group.panels()), strict=True))
    twin.remove()
    assert all(p.is_contiguous() for m in copied for p in m.parameters())
    assert not any(module._state_dict_hooks for m in copied for module in m.modules())
    assert all(not m.weight.is_contiguous() and m._state_dict_hooks for m in members)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_that_never_ran_can_be_removed(how, draw):
    members = draw()
    copied, twin = _copied((members, PackedGroup(members)), how)
    twin.remove()
    for mine, theirs in zip(members, copied, strict=True):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert other.is_contiguous() and torch.equal(one, other)
            assert other.untyped_storage().nbytes() == other.numel() * 2


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
def test_state_dicts_are_contiguous_and_no_larger(form, draw):
    members = nn.ModuleList(draw(form))
    plain = copy.deepcopy(members)
    group = PackedGroup(list(members))
    assert members[0].lora_B.state_dict().keys() == members[0].lora_B._parameters.keys()
    assert all(value.is_contiguous() for value in members[0].lora_B.state_dict().values())
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
    group.remove()
    assert not any(module._state_dict_hooks for module in members.modules())


def test_safetensors_saves_and_loads_models(tmp_path, draw):
    from safetensors.torch import load_file, load_model, save_model

    members = nn.ModuleList(draw())
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
    groups = _groups(patch(model, rank=4, fuse=False).requires_grad_(False))
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
    model.requires_grad_(False)
    twin = copy.deepcopy(model)
    groups = _groups(patch(model, fuse=False))
    assert all(
        not p.is_contiguous() for name, p in model.named_parameters() if "language_model" in name and "lora_B" in name
    )
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


@torch.no_grad()
def test_copies_for_a_checkpoint_are_the_model():
    """As without packing, what ``adapters_of`` gives is the model's memory, and saves."""
    from twn_kernels import Checkpoint, patch
    from twn_kernels.patching import adapters_of as exported
    from twn_kernels.testing.tiny_models import tiny_model

    model = patch(tiny_model("qwen2_5_vl", dtype=BF16), rank=4).requires_grad_(False)
    block = model.model.language_model.layers[0]
    layer = block.mlp.up_proj
    block.site_groups["gate_up"].pack([block.mlp.gate_proj, layer])
    assert not layer.lora_B["reasoning"].is_contiguous()
    adapters = exported(model)
    path = next(path for path in adapters["reasoning"].layers if path.endswith("layers.0.mlp.up_proj"))
    Checkpoint(adapters)
    layer.lora_B["reasoning"].fill_(3.0)
    block.site_groups["gate_up"].packing.panels()
    assert adapters["reasoning"].layers[path].B.eq(3.0).all()
    layer.lora_B["reasoning"].fill_(4.0)
    assert adapters["reasoning"].layers[path].B.eq(4.0).all()
