"""Packed groups: one copy of each weight, the way back, and everything that may happen to a model meanwhile."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from packed_groups import (
    BF16,
    FORMS,
    FP16,
    adapters_of,
    assert_right,
    draw_members,
    projections_of,
    run,
    storages,
)
from torch import nn

from twn_kernels.impl.blas import panels
from twn_kernels.modules.packing import PackedGroup
from twn_kernels.ops import RoutePlan, dual_lora_group
from twn_kernels.testing.oracle import assert_as_good_as_torch


def _live_bytes():
    gc.collect()
    return sum(storages(t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)).values())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form, dtype, draw):
    members = draw(form, dtype)
    before = [(id(m.weight), m.weight.detach().clone(), m.weight.requires_grad) for m in members]
    hooks = [len(m._state_dict_hooks) for m in members]
    group = PackedGroup(members)
    assert group.reason is None and all(not m.weight.is_contiguous() for m in members)
    for member, (identity, values, grad) in zip(members, before, strict=True):
        assert id(member.weight) == identity and member.weight.requires_grad == grad
        assert torch.equal(member.weight, values) and member.weight.stride(1) == 1
    assert_right(members, group)
    group.remove()
    assert group.panels() == () and group.added_bytes == 0 and group.reason == "removed"
    for member, (identity, values, _), count in zip(members, before, hooks, strict=True):
        assert id(member.weight) == identity and torch.equal(member.weight, values) and member.weight.is_contiguous()
        assert member.weight.untyped_storage().nbytes() == values.numel() * values.element_size()
        assert len(member._state_dict_hooks) == count
    group.remove()


@pytest.mark.parametrize("form", FORMS)
def test_there_is_one_copy_of_each_weight_and_adapter(form):
    members = draw_members(form, frozen=True)
    everything = _live_bytes()
    group = PackedGroup(members)
    assert _live_bytes() - everything == group.added_bytes == _padding(group)
    group.unshare()
    shadows = sum(B.nbytes for B in adapters_of(members))
    assert _live_bytes() - everything == group.added_bytes == _padding(group) + shadows
    group.remove()
    assert _live_bytes() == everything


def _padding(group):
    """Bytes that a group adds where every ``lora_B`` is shared: zeros between the blocks, and the flags."""
    plan = group._plan
    held = sum(plan.outputs) * plan.in_features
    held += sum(out * sum(ranks) for out, ranks in zip(plan.outputs, plan.ranks, strict=True))
    return 2 * (sum(panel.numel for panel in plan.panels) - held) + 2 * plan.pitch


def test_what_a_pitch_costs_on_real_shapes():
    """At rank 64 the layout of an 8B model has no padding, but for what k and v leave empty beside one another."""
    for outputs, features in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((12288, 12288), 4096), ((4096,), 12288)):
        plan = panels.layout(features, outputs, ((64, 64),) * len(outputs))
        weights, zeros = sum(outputs) * features, 2 * 1024 * 128 if len(outputs) == 3 else 0
        assert sum(panel.numel for panel in plan.panels) == weights + sum(outputs) * 128 + zeros


@pytest.mark.parametrize(
    "hidden, attention, inner",
    [(4096, (4096, 1024, 1024), 12288), (2560, (4096, 1024, 1024), 9728), (2048, (2048, 1024, 1024), 6144)],
    ids=["8B", "4B", "2B"],
)
def test_packing_adds_at_most_one_percent(hidden, attention, inner):
    """Of the bytes of the base weights, beyond the adapters: what ``added_bytes`` counts, on sizes of real models."""
    sites = ((hidden, attention), (attention[0], (hidden,)), (hidden, (inner, inner)), (inner, (hidden,)))
    base = 2 * sum(features * sum(outputs) for features, outputs in sites)
    plans = [panels.layout(features, outputs, ((64, 64),) * len(outputs)) for features, outputs in sites]
    added = sum(_padding(SimpleNamespace(_plan=plan)) for plan in plans)
    assert 0 < added <= base / 100


def _sees_like_off_a_cpu(monkeypatch, group):
    """Take away the habit of looking in every call; returns a list that grows with every look."""
    columns, looks, real = group._columns, [], group._columns.update
    columns.is_blind = False
    monkeypatch.setattr(
        columns, "update", lambda *a, **k: (looks.append(1), real(*a, **k), setattr(columns, "is_blind", False))
    )
    return looks


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_change_in_place_are_seen(form, draw):
    members = draw(form)
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
        assert_right(members, group)


@torch.no_grad()
def test_only_what_the_host_sees_is_copied_again(monkeypatch, draw):
    """Off a CPU, an unchanged adapter costs nothing: the shadow is filled when a version or an address changes."""
    members = draw()
    group = PackedGroup(members)
    group.panels()
    fills = _sees_like_off_a_cpu(monkeypatch, group)
    group.panels()
    assert not fills
    members[1].lora_B["reasoning"].add_(1.0)
    assert_right(members, group)
    assert len(fills) == 1
    group.panels()
    group.refresh()
    group.panels()
    assert len(fills) == 2


def test_an_optimizer_that_steps_through_data_is_followed(monkeypatch):
    """As some do; the host sees nothing of it, on a CPU neither once the habit of looking is taken away."""
    members = draw_members()
    group = PackedGroup(members)
    _sees_like_off_a_cpu(monkeypatch, group)
    for _ in range(2):
        group.panels()
        members[1].lora_B["reasoning"].data.add_(1.0)
    assert_right(members, group)
    members[1].lora_B["reasoning"].data.add_(1.0)
    with torch.no_grad():
        assert_right(members, group)
        kept = group.panels()[2].clone()
        members[1].lora_B["reasoning"].data.add_(1.0)
        assert torch.equal(group.panels()[2], kept), "between two calls without gradients it is not seen"


def test_the_first_training_call_unshares_without_an_edit(monkeypatch):
    members = draw_members(frozen=True)
    group = PackedGroup(members)
    group.panels()
    _sees_like_off_a_cpu(monkeypatch, group)
    trained = members[1].lora_B["reasoning"].requires_grad_()
    with torch.no_grad():
        group.panels()
        assert not trained.is_contiguous(), "nothing tells that it changed, and this call cannot train it"
    group.panels()
    assert [B.is_contiguous() for B in adapters_of(members)].count(True) == 1 and trained.is_contiguous()


def test_adapters_of_another_rank_or_dtype(draw):
    members = draw("gate_up")
    group = PackedGroup(members)
    added = group.added_bytes
    for member in members:
        member.lora_A["embedding"] = nn.Parameter(torch.randn(72, 48).to(BF16))
        member.lora_B["embedding"] = nn.Parameter(torch.randn(56, 72).to(BF16))
    assert_right(members, group)
    assert group.added_bytes > added
    for member in members:
        member.lora_A.float(), member.lora_B.float()
    assert_right(members, group, packs=False)
    assert group.reason == "weights and adapters of several dtypes" and group.added_bytes == 0
    for member in members:
        member.lora_A.bfloat16(), member.lora_B.bfloat16()
    assert_right(members, group)


def test_a_bad_adapter_stays_with_the_rows_that_use_it_and_heals(draw):
    members = draw()
    group = PackedGroup(members)
    clean = run(members, group.panels())
    assert len(group.panels()) == 3, "key and two panels: all adapters are finite"
    good = members[1].lora_B["reasoning"].detach().clone()
    with torch.no_grad():
        members[1].lora_B["reasoning"][3, 2] = torch.inf
    dirty = run(members, group.panels())
    used = (torch.arange(9) % 4 & 1) != 0
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[~used], after[~used])
    assert not dirty[1][used].isfinite().any()
    assert torch.equal(clean[0], dirty[0]), "the first linear has a panel of its own"
    with torch.no_grad():
        members[1].lora_B["reasoning"].copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(clean, run(members, group.panels()), strict=True))


def test_weights_that_were_replaced_are_packed_again(draw):
    members = draw()
    group = PackedGroup(members)
    members[0].weight = nn.Parameter(torch.randn(40, 48).to(BF16))
    assert_right(members, group)
    members[2].weight.data = torch.randn(16, 48).to(BF16)
    assert_right(members, group)
    assert not members[2].weight.is_contiguous()


def test_weights_that_lie_in_memory_of_others_are_left_there(draw):
    members = draw("gate_up")
    group = PackedGroup(members)
    flat = torch.randn(2 * 56 * 48).to(BF16)
    for i, member in enumerate(members):
        member.weight.data = flat[i * 56 * 48 : (i + 1) * 56 * 48].view(56, 48)
    assert_right(members, group, packs=False)
    assert group.reason == "a weight is a view of memory that is not its own"
    flat.zero_()
    assert not any(member.weight.any() for member in members)


def test_values_that_are_loaded_in_place_are_seen(draw):
    members = nn.ModuleList(draw())
    group = PackedGroup(list(members))
    state = {name: torch.randn(value.shape).to(BF16) for name, value in members.state_dict().items()}
    members.load_state_dict(state)
    assert all(torch.equal(members.state_dict()[name], value) for name, value in state.items())
    assert not members[0].weight.is_contiguous()
    assert_right(list(members), group)


def test_values_that_are_assigned_are_packed_again(draw):
    members = nn.ModuleList(draw())
    group = PackedGroup(list(members))
    members.load_state_dict({n: torch.randn(v.shape).to(BF16) for n, v in members.state_dict().items()}, assign=True)
    assert_right(list(members), group)


def test_moving_to_another_dtype_and_back_frees_the_panels(draw):
    members = nn.ModuleList(draw())
    group = PackedGroup(list(members))
    packed = set(storages(m.weight for m in members))
    members.float()
    assert not packed & set(storages(t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)))
    assert group.panels() == () and group.added_bytes == 0
    assert group.reason == "weights of float32; only 16-bit ones are packed"
    members.half()
    assert_right(list(members), group)
    members.to("meta")
    assert group.panels() == () and group.reason == "weights without data"


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
def test_what_cannot_be_packed_says_why_and_stays(change, reason, draw):
    members = draw()
    change(members)
    weights = [(m.weight.stride(), m.weight.device.type) for m in members]
    group = PackedGroup(members)
    assert reason in group.reason and group.panels() == () and group.added_bytes == 0
    assert [(m.weight.stride(), m.weight.device.type) for m in members] == weights


def test_no_adapters_no_panels():
    linear = nn.Linear(8, 8, dtype=BF16)
    group = PackedGroup([linear])
    assert group.reason == "no adapters" and group.panels() == () and linear.weight.is_contiguous()


def test_no_memory_leaves_the_group_as_it_was(monkeypatch, draw):
    members = draw()
    real = torch.empty

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", full)
    group = PackedGroup(members)
    monkeypatch.setattr(torch, "empty", real)
    assert group.reason == "no memory for another panel"
    assert_right(members, group, packs=False)


def test_traced_code_and_modes_get_nothing(draw):
    from torch._subclasses.fake_tensor import FakeTensorMode

    members = draw()
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
    outputs = dual_lora_group(leaves[0], projections_of(members), plan, impl=impl, packed=packed)
    then()
    pulls = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, leaves, pulls)


def test_under_inference_mode_and_later_in_training(draw):
    members = draw("gate_up")
    with torch.inference_mode():
        group = PackedGroup(members)
        run(members, group.panels())
    assert not any(p.is_inference() for m in members for p in m.parameters())
    x, wide = torch.randn(9, 48).to(BF16), copy.deepcopy(members)
    truth = _gradients([member.double() for member in wide], x.double(), "reference")
    own = _gradients(members, x, "reference")
    # Filling the shadow between forward and backward must not disturb what the backward pass keeps.
    actual = _gradients(members, x, "blas", group.panels(), then=group.panels)
    for grad, exact, torchs in zip(actual, truth, own, strict=True):
        assert_as_good_as_torch(grad, exact, torchs)


def test_adapters_made_in_inference_mode_are_looked_at_in_every_call(draw):
    members = draw("down")
    with torch.inference_mode():
        members[0].lora_B["reasoning"] = nn.Parameter(torch.randn(40, 8).to(BF16), requires_grad=False)
    group = PackedGroup(members)
    with torch.inference_mode():
        members[0].lora_B["reasoning"].mul_(-3.0)
        assert torch.equal(group.panels()[1][:, 56:64], members[0].lora_B["reasoning"])
