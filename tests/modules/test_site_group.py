"""A site group by itself: what may run together, which adapters and dtypes reach the op, when weights are packed."""

import copy

import pytest
import torch
from torch import nn

from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.routing import RouteState, RowSpec, UniformSpec
from twn_kernels.modules.site_group import ReadySite, SiteGroup, fitting_dtype
from twn_kernels.ops import Norm
from twn_kernels.testing.oracle import assert_as_good_as_torch

NAMES = ("reasoning", "embedding")
MIXED = [1, 0, 2]


def _members(dtype=torch.float32, bits=MIXED, impl="auto", plain_second=True):
    """q with both adapters, k without any, v with one: as partial targets leave them."""
    generator = torch.Generator().manual_seed(0)
    state = RouteState(RowSpec(bits) if isinstance(bits, list) else UniformSpec(bits))
    members = []
    for out, rank in ((12, {"reasoning": 3, "embedding": 2}), (4, {}), (6, {"embedding": 4})):
        layer = nn.Linear(16, out) if plain_second and not rank else DualLoRALinear(16, out, rank=rank, impl=impl)
        for _, parameter in sorted(layer.named_parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        if isinstance(layer, DualLoRALinear):
            layer.routing = state
        members.append(layer.to(dtype).requires_grad_(False))
    return members


def _each(members, x, norm=None):
    """The group as its layers give it one by one."""
    if norm is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
        x = norm.weight * n
    return torch.cat([member(x) for member in members], dim=-1)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_runs_what_its_layers_give_one_by_one(dtype, impl):
    members, group = _members(dtype, impl=impl), SiteGroup("qkv")
    x, norm = torch.randn(3, 5, 16, dtype=dtype), Norm(torch.rand(16).to(dtype), 1e-6)
    exact = [copy.deepcopy(member).double() for member in members]
    for layer in exact:
        if isinstance(layer, DualLoRALinear):
            layer.routing = members[0].routing
    ready = group.prepare(members, x)
    assert isinstance(ready, ReadySite) and ready.leader is members[0] and ready.impl == impl
    parts = group.run(ready, x, norm=norm)
    assert [part.shape for part in parts] == [(3, 5, 12), (3, 5, 4), (3, 5, 6)]
    truth = _each(exact, x.double(), Norm(norm.weight.double(), norm.eps))
    assert_as_good_as_torch(torch.cat(parts, dim=-1), truth, _each(members, x, norm))
    (whole,) = group.run(ready, x, norm=norm, split=False)
    assert torch.equal(whole, torch.cat(parts, dim=-1))


def test_an_input_without_a_contiguous_last_dimension():
    members, group = _members(), SiteGroup("qkv")
    x = torch.randn(3, 16, 5).transpose(1, 2)
    parts = group.run(group.prepare(members, x), x)
    assert torch.equal(torch.cat(parts, -1), torch.cat(group.run(group.prepare(members, x), x.contiguous()), -1))


def _other_route(members):
    members[2].routing = RouteState(UniformSpec(1))


def _other_impl(members):
    members[2].impl = "reference"


def _other_rows(members):
    members[2].follows_rows = False


def _dropout(members):
    members[0].lora_dropout = {"reasoning": 0.1, "embedding": 0.0}


def _other_dtype(members):
    members[1].bfloat16()


def _transposed(members):
    members[1].weight = nn.Parameter(torch.randn(16, 4).t())


def _quantised(members):
    class Quantised(torch.Tensor):
        pass

    members[1].weight = nn.Parameter(members[1].weight.data.as_subclass(Quantised), requires_grad=False)


def _other_module(members):
    members[1] = nn.Bilinear(16, 16, 4)


def _own_forward(members):
    members[0].__class__ = type("Loud", (DualLoRALinear,), {"forward": lambda self, x: x})


REFUSED = {
    _other_route: "its linears follow different routes",
    _other_impl: "different impl=",
    _other_rows: "follow rows differently",
    _dropout: "LoRA dropout in training",
    _other_dtype: "differ in dtype or device",
    _transposed: "stored transposed",
    _quantised: "a weight is a Quantised, not a plain tensor",
    _other_module: "Bilinear is no nn.Linear",
    _own_forward: "Loud has a forward of its own",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_linears_that_cannot_run_as_one_say_why(change):
    members, x = _members(), torch.randn(3, 16)
    assert isinstance(SiteGroup("qkv").prepare(members, x), ReadySite)
    change(members)
    refusal = SiteGroup("qkv").prepare(members, x)
    assert isinstance(refusal, str) and REFUSED[change] in refusal


def test_dropout_acts_in_training_alone():
    members = _members()
    _dropout(members)
    members[0].eval()
    assert isinstance(SiteGroup("qkv").prepare(members, torch.randn(3, 16)), ReadySite)


def test_linears_without_adapters_are_the_base():
    linears, x = [nn.Linear(16, 8), nn.Linear(16, 8)], torch.randn(2, 3, 16)
    group = SiteGroup("gate_up", impl="reference")
    ready = group.prepare(linears, x)
    assert ready.leader is None and ready.impl == "reference"
    for part, linear in zip(group.run(ready, x), linears, strict=True):
        assert torch.equal(part, linear(x))


@pytest.mark.parametrize(
    ("dtype", "used", "target"),
    [
        (torch.float32, {torch.float32}, None),
        (torch.float32, set(), None),
        (torch.bfloat16, {torch.float32}, None),
        (torch.bfloat16, {torch.bfloat16}, None),
        (torch.bfloat16, {torch.bfloat16, torch.float32}, torch.float32),
        (torch.bfloat16, {torch.float16}, torch.float32),
        (torch.float32, {torch.bfloat16}, torch.float32),
        (torch.float64, {torch.float32}, torch.float64),
    ],
)
def test_the_dtype_that_adapters_are_cast_to(dtype, used, target):
    assert fitting_dtype(dtype, used) == target


def test_adapters_of_several_dtypes_are_made_to_fit():
    members, group, x = _members(torch.bfloat16), SiteGroup("qkv"), torch.randn(3, 5, 16, dtype=torch.bfloat16)
    members[2].lora_A.float()
    members[2].lora_B.float()
    exact = [copy.deepcopy(member).double() for member in members]
    for layer in (exact[0], exact[2]):
        layer.routing = members[0].routing
    actual = torch.cat(group.run(group.prepare(members, x), x), dim=-1)
    assert_as_good_as_torch(actual, _each(exact, x.double()), _each(members, x))


def test_unused_adapters_stay_out_of_the_call(monkeypatch):
    """An adapter that no token uses may hold anything, of any dtype, and is not cast either."""
    members, group, x = _members(bits=1), SiteGroup("qkv"), torch.randn(3, 5, 16)
    clean = torch.cat(group.run(group.prepare(members, x), x), dim=-1)
    for layer in (members[0], members[2]):
        layer.lora_A["embedding"].data = torch.full_like(layer.lora_A["embedding"], float("nan"), dtype=torch.float16)
        layer.lora_B["embedding"].data = layer.lora_B["embedding"].half()
    assert torch.equal(torch.cat(group.run(group.prepare(members, x), x), dim=-1), clean)


def test_packing_on_a_device_where_it_pays(monkeypatch):
    """Weights move in the first call there, once, unless someone else reads their memory."""
    monkeypatch.setattr(SiteGroup, "packs_on", lambda self, device: True)
    members, group = _members(torch.bfloat16), SiteGroup("qkv")
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    before = torch.cat(group.run(group.prepare(members, x), x), dim=-1)
    assert group.packing is not None and group.packing.reason is None and group.packing.added_bytes > 0
    assert all(member.weight.stride(0) > 16 for member in members)
    packing = group.packing
    again = group.run(group.prepare(members, x), x)
    assert group.packing is packing and torch.equal(torch.cat(again, dim=-1), before)
    exact = [copy.deepcopy(member).double() for member in members]
    for layer in (exact[0], exact[2]):
        layer.routing = members[0].routing
    assert_as_good_as_torch(before, _each(exact, x.double()), _each(_members(torch.bfloat16), x))
    members[1] = nn.Linear(16, 4).to(torch.bfloat16).requires_grad_(False)
    replaced = group.run(group.prepare(members, x), x)
    assert torch.equal(replaced[1], members[1](x)) and members[1].weight.is_contiguous()
    group.unpack()
    assert group.packing is None and members[0].weight.is_contiguous()


def test_weights_that_others_read_are_not_moved(monkeypatch):
    monkeypatch.setattr(SiteGroup, "packs_on", lambda self, device: True)
    members, group = _members(torch.bfloat16), SiteGroup("qkv")
    flat = torch.randn(12 * 16 + 4, dtype=torch.bfloat16)
    members[0].weight.data = flat[: 12 * 16].view(12, 16)
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    group.run(group.prepare(members, x), x)
    assert group.packing is None and members[0].weight.data_ptr() == flat.data_ptr()
    assert group.packing_note == "weights not packed (a weight is a view of memory that is not its own)"


@pytest.mark.parametrize(("dtype", "impl"), [(torch.float32, "auto"), (torch.bfloat16, "reference")], ids=str)
def test_what_is_never_packed(dtype, impl):
    members, group = _members(dtype, impl=impl), SiteGroup("qkv")
    group.pack(members)
    assert group.packing is None and all(member.weight.is_contiguous() for member in members)


def test_the_layout_of_a_real_model_can_be_written_down():
    from twn_kernels.impl.blas import panels

    layout = panels.layout(12288, (4096, 1024, 1024), ((64, 32), (128, 128), (256, 0)))
    assert panels.layout_of(panels.key(layout, torch.empty(0, dtype=torch.bfloat16))) == layout
