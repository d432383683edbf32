"""Site groups to pack, and what packed ones must come to."""

from __future__ import annotations

import copy

import torch
from torch import nn

from twn_kernels.modules import DualLoRALinear
from twn_kernels.ops import Norm, Projection, RoutePlan, dual_lora_group
from twn_kernels.testing.oracle import assert_as_good_as_torch

BF16, FP16 = torch.bfloat16, torch.float16
BOTH = {"reasoning": 8, "embedding": 4}


def _linear(in_features, out_features, rank, dtype=BF16, bias=False):
    layer = DualLoRALinear(in_features, out_features, bias, rank=rank, dtype=dtype)
    for name in rank:
        layer.lora_B[name].data.normal_()
        layer.scaling[name] = {"reasoning": 0.5, "embedding": -1.75}[name]
    return layer


def draw_members(form="qkv", dtype=BF16, frozen=False):
    members = _members(form, dtype)
    for member in members:
        member.requires_grad_(not frozen)
    return members


def adapters_of(members):
    return [B for member in members if isinstance(member, DualLoRALinear) for B in member.lora_B.values()]


def _members(form, dtype):
    if form == "qkv":
        return [_linear(48, out, BOTH, dtype, bias=True) for out in (40, 16, 16)]
    if form == "gate_up":
        return [_linear(48, 56, rank, dtype) for rank in (BOTH, {"embedding": 3})]
    if form == "mixed":  # a linear that no adapter touches stands beside two that differ
        linear = nn.Linear(48, 24, dtype=dtype)
        return [_linear(48, 40, {"reasoning": 5}, dtype), linear, _linear(48, 8, BOTH, dtype)]
    return [_linear(48, 40, BOTH, dtype)]


FORMS = ("qkv", "gate_up", "mixed", "down")


def projections_of(members):
    return [
        member.site_projection() if isinstance(member, DualLoRALinear) else Projection(member.weight, member.bias)
        for member in members
    ]


def run(members, packed=(), impl="blas"):
    generator = torch.Generator().manual_seed(3)
    projections = projections_of(members)
    weight = projections[0].weight
    x = torch.randn(9, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    plan = RoutePlan.from_routes((torch.arange(9) % 4).to(weight.device, torch.int8))
    norm = Norm(torch.linspace(0.5, 1.5, weight.shape[1]).to(weight.device, weight.dtype), 1e-6)
    with torch.no_grad():
        return dual_lora_group(x, projections, plan, norm=norm, impl=impl, packed=packed)


def assert_right(members, group, packs=True):
    """Packed is as good as the reference in the same dtype."""
    tensors = group.panels()
    assert bool(tensors) == packs, group.reason
    wide = copy.deepcopy(members)
    for member in wide:
        member.double()
    projections = projections_of(wide)
    norm = Norm(torch.linspace(0.5, 1.5, 48).to(members[0].weight.dtype).double(), 1e-6)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 48, generator=generator).to(members[0].weight.dtype).double()
    plan = RoutePlan.from_routes((torch.arange(9) % 4).to(torch.int8))
    with torch.no_grad():
        truth = dual_lora_group(x, projections, plan, norm=norm, impl="reference")
    for actual, exact, own in zip(run(members, tensors), truth, run(members, impl="reference"), strict=True):
        assert_as_good_as_torch(actual, exact, own)


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
