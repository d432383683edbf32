"""Packed groups: one copy of each weight, the way back, savers, and everything that may happen to a model meanwhile."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from twn_kernels.impl.blas import panels
from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.packing import PackedGroup
from twn_kernels.ops import Norm, Projection, RoutePlan, dual_lora_group
from twn_kernels.testing.oracle import assert_as_good_as_torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOTH = {"reasoning": 8, "embedding": 4}


def _linear(in_features, out_features, rank, dtype=BF16, bias=False):
    layer = DualLoRALinear(in_features, out_features, bias, rank=rank, dtype=dtype)
    for name in rank:
        layer.lora_B[name].data.normal_()
        layer.scaling[name] = {"reasoning": 0.5, "embedding": -1.75}[name]
    return layer


def _members(form="qkv", dtype=BF16):
    if form == "qkv":
        return [_linear(48, out, BOTH, dtype, bias=True) for out in (40, 16, 16)]
    if form == "gate_up":
        return [_linear(48, 56, rank, dtype) for rank in (BOTH, {"embedding": 3})]
    if form == "mixed":  # a linear that no adapter touches stands beside two that differ
        linear = nn.Linear(48, 24, dtype=dtype)
        return [_linear(48, 40, {"reasoning": 5}, dtype), linear, _linear(48, 8, BOTH, dtype)]
    return [_linear(48, 40, BOTH, dtype)]


FORMS = ("qkv", "gate_up", "mixed", "down")


def _projections(members):
    return [
        member.site_projection() if isinstance(member, DualLoRALinear) else Projection(member.weight, member.bias)
        for member in members
    ]


def _run(members, packed=(), routes=None, x=None):
    generator = torch.Generator().manual_seed(3)
    projections = _projections(members)
    weight = projections[0].weight
    x = torch.randn(9, weight.shape[1], generator=generator).to(weight.device, weight.dtype) if x is None else x
    routes = torch.arange(9) % 4 if routes is None else routes
    plan = RoutePlan.from_routes(routes.to(weight.device, torch.int8))
    norm = Norm(torch.linspace(0.5, 1.5, weight.shape[1]).to(weight.device, weight.dtype), 1e-6)
    with torch.no_grad():
        return dual_lora_group(x, projections, plan, norm=norm, impl="blas", packed=packed)


def _assert_right(members, group, packs=True):
    """Packed equals plain, within the oracle."""
    tensors = group.panels()
    assert bool(tensors) == packs, group.reason
    wide = copy.deepcopy(members)
    for member in wide:
        member.double()
    projections = _projections(wide)
    norm = Norm(torch.linspace(0.5, 1.5, 48).to(members[0].weight.dtype).double(), 1e-6)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 48, generator=generator).to(members[0].weight.dtype).double()
    plan = RoutePlan.from_routes((torch.arange(9) % 4).to(torch.int8))
    with torch.no_grad():
        truth = dual_lora_group(x, projections, plan, norm=norm, impl="reference")
    for actual, exact, own in zip(_run(members, tensors), truth, _run(members), strict=True):
        assert_as_good_as_torch(actual, exact, own)


def _storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _live_bytes():
    gc.collect()
    return sum(_storages(t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)).values())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form, dtype):
    members = _members(form, dtype)
    before = [(id(m.weight), m.weight.detach().clone(), m.weight.requires_grad) for m in members]
    hooks = [len(m._state_dict_hooks) for m in members]
    group = PackedGroup(members)
    assert group.reason is None and all(not m.weight.is_contiguous() for m in members)
    for member, (identity, values, grad) in zip(members, before, strict=True):
        assert id(member.weight) == identity and member.weight.requires_grad == grad
        assert torch.equal(member.weight, values) and member.weight.stride(1) == 1
    _assert_right(members, group)
    group.remove()
    assert group.panels() == () and group.added_bytes == 0 and group.reason == "removed"
    for member, (identity, values, _), count in zip(members, before, hooks, strict=True):
        assert id(member.weight) == identity and torch.equal(member.weight, values) and member.weight.is_contiguous()
        assert member.weight.untyped_storage().nbytes() == values.numel() * values.element_size()
        assert len(member._state_dict_hooks) == count
    group.remove()


@pytest.mark.parametrize("form", FORMS)
def test_there_is_one_copy_of_each_weight(form):
    members = _members(form)
    everything = _live_bytes()
    weights = sum(_storages(m.weight for m in members).values())
    group = PackedGroup(members)
    packed = sum(_storages(m.weight for m in members).values())
    assert packed - weights == group.added_bytes - 2 * group._plan.pitch
    assert _live_bytes() - everything == group.added_bytes
    shadow = sum(m.lora_B[name].numel() * 2 for m in members if isinstance(m, DualLoRALinear) for name in m.lora_B)
    assert group.added_bytes >= shadow
    group.remove()
    assert _live_bytes() == everything


def test_what_a_pitch_costs_on_real_shapes():
    """At rank 64 the layout of an 8B model has no padding: shadow and one line of flags a group are all it adds."""
    for outputs, features in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((12288, 12288), 4096), ((4096,), 12288)):
        plan = panels.layout(features, outputs, ((64, 64),) * len(outputs))
        weights, zeros = sum(outputs) * features, 2 * 1024 * 128 if len(outputs) == 3 else 0
        assert sum(panel.numel for panel in plan.panels) == weights + sum(outputs) * 128 + zeros


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_change_in_place_are_seen(form):
    members = _members(form)
    group = PackedGroup(members)
    group.panels()
    for change in (
        lambda B: B.data.mul_(-2.0),
        lambda B: B.copy_(torch.randn(B.shape)),
        lambda B: setattr(B, "data", torch.randn_like(B)),
    ):
        with torch.no_grad():
            for member in members:
                for B in getattr(member, "lora_B", {}).values():
                    change(B)
        _assert_right(members, group)


@torch.no_grad()
def test_only_what_the_host_sees_is_copied_again(monkeypatch):
    """Off a CPU, an unchanged adapter costs nothing: the shadow is filled when a version or an address changes."""
    members = _members()
    group = PackedGroup(members)
    group.panels()
    fills, real = [], group._update
    monkeypatch.setattr(
        group, "_update", lambda *args: (fills.append(1), real(*args), setattr(group, "_always", False))
    )
    group._always = False
    group.panels()
    assert not fills
    members[1].lora_B["reasoning"].add_(1.0)
    _assert_right(members, group)
    assert len(fills) == 1
    group.panels()
    group.refresh()
    group.panels()
    assert len(fills) == 2


def test_an_optimizer_that_steps_through_data_is_followed(monkeypatch):
    """As some do; the host sees nothing of it, on a CPU neither once the habit of looking is taken away."""
    members = _members()
    group = PackedGroup(members)
    real = group._update
    monkeypatch.setattr(group, "_update", lambda *args: (real(*args), setattr(group, "_always", False)))
    for _ in range(2):
        group.panels()
        members[1].lora_B["reasoning"].data.add_(1.0)
    _assert_right(members, group)
    with torch.no_grad():
        kept = group.panels()[2].clone()
        members[1].lora_B["reasoning"].data.add_(1.0)
        assert torch.equal(group.panels()[2], kept), "between two calls without gradients it is not seen"


def test_adapters_of_another_rank_or_dtype():
    members = _members("gate_up")
    group = PackedGroup(members)
    added = group.added_bytes
    for member in members:
        member.lora_A["embedding"] = nn.Parameter(torch.randn(72, 48).to(BF16))
        member.lora_B["embedding"] = nn.Parameter(torch.randn(56, 72).to(BF16))
    _assert_right(members, group)
    assert group.added_bytes > added
    for member in members:
        member.lora_A.float(), member.lora_B.float()
    _assert_right(members, group, packs=False)
    assert group.reason == "weights and adapters of several dtypes" and group.added_bytes == 0
    for member in members:
        member.lora_A.bfloat16(), member.lora_B.bfloat16()
    _assert_right(members, group)


def test_a_bad_adapter_stays_with_the_rows_that_use_it_and_heals():
    members = _members()
    group = PackedGroup(members)
    clean = _run(members, group.panels())
    assert len(group.panels()) == 3, "key and two panels: all adapters are finite"
    good = members[1].lora_B["reasoning"].detach().clone()
    with torch.no_grad():
        members[1].lora_B["reasoning"][3, 2] = torch.inf
    dirty = _run(members, group.panels())
    used = (torch.arange(9) % 4 & 1) != 0
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[~used], after[~used])
    assert not dirty[1][used].isfinite().any()
    assert torch.equal(clean[0], dirty[0]), "the first linear has a panel of its own"
    with torch.no_grad():
        members[1].lora_B["reasoning"].copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(clean, _run(members, group.panels()), strict=True))


def test_weights_that_were_replaced_are_packed_again():
    members = _members()
    group = PackedGroup(members)
    members[0].weight = nn.Parameter(torch.randn(40, 48).to(BF16))
    _assert_right(members, group)
    members[2].weight.data = torch.randn(16, 48).to(BF16)
    _assert_right(members, group)
    assert not members[2].weight.is_contiguous()


def test_weights_that_lie_in_memory_of_others_are_left_there():
    members = _members("gate_up")
    group = PackedGroup(members)
    flat = torch.randn(2 * 56 * 48).to(BF16)
    for i, member in enumerate(members):
        member.weight.data = flat[i * 56 * 48 : (i + 1) * 56 * 48].view(56, 48)
    _assert_right(members, group, packs=False)
    assert group.reason == "a weight is a view of memory that is not its own"
    flat.zero_()
    assert not any(member.weight.any() for member in members)


def test_values_that_are_loaded_in_place_are_seen():
    members = nn.ModuleList(_members())
    group = PackedGroup(list(members))
    state = {name: torch.randn(value.shape).to(BF16) for name, value in members.state_dict().items()}
    members.load_state_dict(state)
    assert all(torch.equal(members.state_dict()[name], value) for name, value in state.items())
    assert not members[0].weight.is_contiguous()
    _assert_right(list(members), group)


def test_values_that_are_assigned_are_packed_again():
    members = nn.ModuleList(_members())
    group = PackedGroup(list(members))
    members.load_state_dict({n: torch.randn(v.shape).to(BF16) for n, v in members.state_dict().items()}, assign=True)
    _assert_right(list(members), group)


def test_moving_to_another_dtype_and_back_frees_the_panels():
    members = nn.ModuleList(_members())
    group = PackedGroup(list(members))
    packed = set(_storages(m.weight for m in members))
    members.float()
    assert not packed & set(_storages(t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)))
    assert group.panels() == () and group.added_bytes == 0
    assert group.reason == "weights of float32; only 16-bit ones are packed"
    members.half()
    _assert_right(list(members), group)
    members.to("meta")
    assert group.panels() == () and group.reason == "weights without data"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("form", FORMS)
def test_copies_are_whole_and_their_own(form, how):
    members = _members(form)
    group = PackedGroup(members)
    expected = _run(members, group.panels())
    copied, twin = _copied((members, group), how)
    assert twin.added_bytes == 0 and "copied" in twin.reason
    _assert_right(copied, twin)
    assert twin.added_bytes == group.added_bytes
    assert not set(_storages(m.weight for m in members)) & set(_storages(m.weight for m in copied))
    with torch.no_grad():
        copied[0].weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(expected, _run(members, group.panels()), strict=True))
    twin.remove()
    assert all(m.weight.is_contiguous() and not m._state_dict_hooks for m in copied)
    assert all(not m.weight.is_contiguous() and m._state_dict_hooks for m in members)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_that_never_ran_can_be_removed(how):
    members = _members()
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
    members = nn.ModuleList(_members(form))
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

    members = nn.ModuleList(_members())
    group = PackedGroup(list(members))
    save_model(members, tmp_path / "packed.safetensors")
    saved = load_file(tmp_path / "packed.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in members.named_parameters())
    expected = _run(list(members), group.panels())
    with torch.no_grad():
        for parameter in members.parameters():
            parameter.zero_()
    load_model(members, tmp_path / "packed.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(expected, _run(list(members), group.panels()), strict=True))


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


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: [x.float() for x in m], "weights of float32; only 16-bit ones are packed"),
        (lambda m: setattr(m[1], "weight", m[2].weight), "one weight serves two linears"),
        (lambda m: m[0].lora_B.float(), "weights and adapters of several dtypes"),
        (lambda m: m[1].half(), "weights and adapters of several dtypes"),
        (lambda m: [x.to("meta") for x in m], "weights without data"),
        (lambda m: setattr(m[1], "weight", nn.Parameter(torch.randn(16, 32).to(BF16))), "do not read the same input"),
        (lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()), "memory that is not its own"),
        (lambda m: m[0].lora_B.update({"reasoning": torch.randn(40, 7).to(BF16)}), "does not fit its weight"),
    ],
    ids=["fp32", "tied", "fp32-adapters", "two-dtypes", "meta", "in_features", "transposed", "odd-adapter"],
)
def test_what_cannot_be_packed_says_why_and_stays(change, reason):
    members = _members()
    change(members)
    weights = [(m.weight.stride(), m.weight.device.type) for m in members]
    group = PackedGroup(members)
    assert reason in group.reason and group.panels() == () and group.added_bytes == 0
    assert [(m.weight.stride(), m.weight.device.type) for m in members] == weights


def test_no_adapters_no_panels():
    linear = nn.Linear(8, 8, dtype=BF16)
    group = PackedGroup([linear])
    assert group.reason == "no adapters" and group.panels() == () and linear.weight.is_contiguous()


def test_no_memory_leaves_the_group_as_it_was(monkeypatch):
    members = _members()
    real = torch.empty

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", full)
    group = PackedGroup(members)
    monkeypatch.setattr(torch, "empty", real)
    assert group.reason == "no memory for another panel"
    _assert_right(members, group, packs=False)


def test_traced_code_and_modes_get_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    members = _members()
    group = PackedGroup(members)
    seen = []

    def backend(module, _):
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def call(x):
        seen.append(len(group.panels()))
        return x + 1

    call(torch.ones(2))
    assert seen == [0]
    with FakeTensorMode():
        assert group.panels() == ()
    assert torch.func.vmap(lambda x: x + len(group.panels()))(torch.zeros(2)).sum() == 0
    assert group.panels()


def _gradients(members, x, impl, packed=(), then=lambda: None):
    leaves = [x.detach().requires_grad_(), *(p.requires_grad_() for m in members for p in m.parameters())]
    plan = RoutePlan.from_routes((torch.arange(x.shape[0]) % 4).to(torch.int8))
    outputs = dual_lora_group(leaves[0], _projections(members), plan, impl=impl, packed=packed)
    then()
    pulls = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, leaves, pulls)


def test_under_inference_mode_and_later_in_training():
    members = _members("gate_up")
    with torch.inference_mode():
        group = PackedGroup(members)
        _run(members, group.panels())
    x, wide = torch.randn(9, 48).to(BF16), copy.deepcopy(members)
    truth = _gradients([member.double() for member in wide], x.double(), "reference")
    own = _gradients(members, x, "reference")
    # Filling the shadow between forward and backward must not disturb what the backward pass keeps.
    actual = _gradients(members, x, "blas", group.panels(), then=group.panels)
    for grad, exact, torchs in zip(actual, truth, own, strict=True):
        assert_as_good_as_torch(grad, exact, torchs)


def test_adapters_made_in_inference_mode_are_looked_at_in_every_call():
    members = _members("down")
    with torch.inference_mode():
        members[0].lora_B["reasoning"] = nn.Parameter(torch.randn(40, 8).to(BF16), requires_grad=False)
    group = PackedGroup(members)
    with torch.inference_mode():
        members[0].lora_B["reasoning"].mul_(-3.0)
        assert torch.equal(group.panels()[1][:, 56:64], members[0].lora_B["reasoning"])
