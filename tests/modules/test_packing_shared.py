"""A ``lora_B`` that lives in its panel: what it saves, what ends it, and that nobody who steps or saves it notices."""

import gc
import weakref

import pytest
import torch
from packed_groups import BF16, FORMS, adapters_of, assert_right, draw_members, projections_of, run
from torch import nn

from twn_kernels.modules.packing import PackedGroup
from twn_kernels.ops import RoutePlan, dual_lora_group


def _is_shared(B, member):
    return B.untyped_storage().data_ptr() == member.weight.untyped_storage().data_ptr()


def _is_its_own(B):
    return B.is_contiguous() and B.untyped_storage().nbytes() == B.nbytes


def _packed(form="qkv"):
    members = draw_members(form, frozen=True)
    group = PackedGroup(members)
    assert group.panels() and not any(_is_its_own(B) for B in adapters_of(members))
    return members, group


@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_moves_and_stays_the_same(form):
    members = draw_members(form, frozen=True)
    before = [(id(B), B.detach().clone(), B._version) for B in adapters_of(members)]
    group = PackedGroup(members)
    for _ in range(2):
        for B, (identity, values, version) in zip(adapters_of(members), before, strict=True):
            assert id(B) == identity and type(B) is nn.Parameter and torch.equal(B, values) and B._version == version
            assert (B.dtype, B.shape, B.requires_grad) == (values.dtype, values.shape, False)
        assert_right(members, group)
        assert group.is_clean and len(group.panels()) == 1 + len(group._plan.panels), (
            "known to be finite from the start"
        )
    assert all(_is_shared(B, m) for m in members for B in getattr(m, "lora_B", {}).values())
    assert set(map(id, group.shadowed())) == set(map(id, adapters_of(members)))
    group.remove()
    assert all(_is_its_own(B) and not B._post_accumulate_grad_hooks for B in adapters_of(members))
    assert all(torch.equal(B, values) for B, (_, values, _) in zip(adapters_of(members), before, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda B, group: B.mul_(-2.0),
        lambda B, group: B.data[3, 2].fill_(torch.nan),
        lambda B, group: B[1].fill_(torch.inf),
        lambda B, group: setattr(B, "data", torch.randn(B.shape).to(BF16)),
        lambda B, group: B.requires_grad_(),
        lambda B, group: nn.Module.load_state_dict(_holding(B), {"B": torch.randn(B.shape).to(BF16)}),
    ],
    ids=["edited", "nan-through-data", "inf", "assigned", "trained", "loaded"],
)
def test_what_ends_it_ends_it_for_good_and_for_one(change):
    members, group = _packed()
    B, added = members[1].lora_B["reasoning"], group.added_bytes
    with torch.no_grad():
        change(B, group)
        values = B.clone()
        group.panels()
    assert _is_its_own(B)
    for _ in range(3):
        group.panels()
        assert B is members[1].lora_B["reasoning"] and _is_its_own(B)
        assert torch.equal(B.view(torch.int16), values.view(torch.int16)), "a value of the parameter was touched"
    assert sum(_is_its_own(other) for other in adapters_of(members)) == 1
    assert group.added_bytes == added + B.nbytes
    if values.isfinite().all():
        assert_right(members, group)
    with torch.no_grad():
        B.nan_to_num_(1.0, 1.0, 1.0)
    assert_right(members, group)
    assert _is_its_own(B.requires_grad_(False))
    group.share()
    assert not _is_its_own(B) and group.added_bytes == added
    assert_right(members, group)


def _holding(B):
    module = nn.Module()
    module.B = B
    return module


@torch.no_grad()
def test_a_value_that_is_not_finite_stays_with_the_rows_that_use_it():
    members, group = _packed()
    used = (torch.arange(9) % 4 & 1) != 0
    clean = run(members, group.panels())
    members[1].lora_B["reasoning"].data[3, 2] = torch.nan
    for before, after in zip(clean, run(members, group.panels()), strict=True):
        assert torch.equal(before[~used], after[~used])
    assert members[1].lora_B["reasoning"].isnan().sum() == 1
    group.share()
    assert _is_its_own(members[1].lora_B["reasoning"]), "only finite values may lie in a panel"


@torch.no_grad()
def test_one_that_was_replaced_keeps_its_values():
    members, group = _packed()
    first = members[1].lora_B["reasoning"]
    values = first.clone()
    members[1].lora_B["reasoning"] = nn.Parameter(torch.randn(first.shape).to(BF16), requires_grad=False)
    assert_right(members, group)
    assert _is_its_own(first) and torch.equal(first, values)
    members[1].lora_B["reasoning"] = first
    assert_right(members, group)


def test_a_panel_that_everything_has_left_is_freed_without_a_call():
    members, group = _packed()
    model = nn.ModuleList(members)
    parameter = weakref.ref(members[1].lora_B["reasoning"])
    gc.disable()
    try:
        model.load_state_dict({n: torch.randn(v.shape).to(BF16) for n, v in model.state_dict().items()}, assign=True)
        assert parameter() is None
    finally:
        gc.enable()
    assert_right(members, group)


@torch.no_grad()
@pytest.mark.parametrize("ends", ["refresh", "unshare", "repacked", "refused"])
def test_requests_end_it_for_all(ends):
    members, group = _packed()
    if ends == "repacked":
        group.unshare()
        members[0].weight = nn.Parameter(torch.randn(40, 48).to(BF16))
        assert_right(members, group)
        assert all(_is_shared(B, m) for m in members for B in m.lora_B.values()), "packed anew, shared anew"
        return
    if ends == "refused":
        members[0].half()
        assert group.panels() == ()
    else:
        getattr(group, ends)()
        assert_right(members, group)
    assert all(_is_its_own(B) for B in adapters_of(members))


@pytest.mark.parametrize("case", ["tied", "a view", "transposed", "inference", "trainable", "has a gradient"])
def test_what_cannot_be_shared_keeps_its_memory(case):
    members = draw_members(frozen=True)
    layer, other = members[1], members[2]
    B = layer.lora_B["reasoning"]
    if case == "tied":
        other.lora_B["reasoning"] = B
    elif case == "a view":
        B.data = torch.randn(2, *B.shape).to(BF16)[1]
    elif case == "transposed":
        B.data = B.data.t().contiguous().t()
    elif case == "inference":
        with torch.inference_mode():
            B = layer.lora_B["reasoning"] = nn.Parameter(torch.randn(B.shape).to(BF16), requires_grad=False)
    elif case == "trainable":
        B.requires_grad_()
    else:
        B.grad = torch.zeros_like(B)
    place = (B.data_ptr(), B.stride())
    group = PackedGroup(members)
    assert_right(members, group)
    assert (B.data_ptr(), B.stride()) == place and _is_shared(members[0].lora_B["embedding"], members[0])


def test_models_whose_parameters_are_swapped_still_move():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        members = draw_members(frozen=True)
        group = PackedGroup(members)
        assert_right(members, group)
        for member in members:
            member.half()
        assert_right(members, group)
        assert all(_is_its_own(B) for B in adapters_of(members))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("path", ["packed", "layer by layer", "autograd.grad"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_made_before_the_first_training_call(optimizer, path):
    members, group = _packed("gate_up")
    trained = adapters_of(members)
    stepper, twins = OPTIMIZERS[optimizer](trained), []
    for B in trained:
        B.requires_grad_()
    x, plan = torch.randn(9, 48).to(BF16), RoutePlan.from_routes((torch.arange(9) % 4).to(torch.int8))
    weights = [m.weight.clone() for m in members]
    for _ in range(2):
        if path == "layer by layer":  # which never asks the group for its panels
            outputs = [member(x, plan) for member in members]
        else:
            outputs = dual_lora_group(x, projections_of(members), plan, impl="blas", packed=group.panels())
        loss = sum(y.float().square().sum() for y in outputs)
        if path == "autograd.grad":
            for B, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                B.grad = grad
        else:
            loss.backward()
        if not twins:
            twins = [nn.Parameter(B.detach().clone(memory_format=torch.contiguous_format)) for B in trained]
            again = OPTIMIZERS[optimizer](twins)
        for twin, B in zip(twins, trained, strict=True):
            twin.grad = B.grad.clone()
        stepper.step(), again.step()
        stepper.zero_grad()
    assert all(torch.equal(B, twin) for B, twin in zip(trained, twins, strict=True))
    assert all(torch.equal(m.weight, weight) for m, weight in zip(members, weights, strict=True))
    assert_right(members, group)


def test_memory_that_a_user_gave_it_is_left_to_the_user():
    members, _ = _packed("down")
    B = members[0].lora_B["reasoning"].requires_grad_()
    flat = torch.randn(2 * B.numel()).to(BF16)
    B.data = flat[: B.numel()].view(B.shape)
    members[0](torch.randn(9, 48).to(BF16), RoutePlan.uniform("both", 9)).sum().backward()
    assert B.data_ptr() == flat.data_ptr()


def test_compiled_training():
    members, group = _packed("down")
    layer = members[0]
    trained = adapters_of(members)
    for B in trained:
        B.requires_grad_()
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, plan = torch.randn(9, 48).to(BF16), RoutePlan.uniform("both", 9)
    for _ in range(2):
        call(x, plan).float().square().sum().backward()
        expected = torch.autograd.grad(layer(x, plan).float().square().sum(), trained)
        assert all(torch.equal(B.grad, grad) for B, grad in zip(trained, expected, strict=True))
        assert all(_is_its_own(B) for B in trained)
        for B in trained:
            B.grad = None
    assert_right(members, group)


def test_a_step_between_forward_and_backward_is_still_refused():
    """Moving a parameter hides no edit from autograd."""
    members, group = _packed("down")
    for B in adapters_of(members):
        B.requires_grad_()
    x = torch.randn(9, 48).to(BF16).requires_grad_()
    y = members[0](x, RoutePlan.uniform("both", 9))
    with torch.no_grad():
        members[0].lora_B["reasoning"].mul_(2.0)
        group.panels()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_model_that_nobody_holds_is_freed_at_once():
    members, group = _packed()
    parameter = weakref.ref(members[1].lora_B["reasoning"])
    gc.collect()
    gc.disable()
    try:
        del members, group
        assert parameter() is None
    finally:
        gc.enable()
