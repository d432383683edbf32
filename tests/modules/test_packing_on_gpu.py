"""What only a GPU can show of packed groups: real shapes, the refresh in and out of graphs, streams, freed memory."""

import pytest
import torch

from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.packing import PackedGroup
from twn_kernels.ops import Norm, RoutePlan, dual_lora_group
from twn_kernels.testing.oracle import assert_as_good_as_torch

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SITES = {
    "8b-qkv": (4096, (4096, 1024, 1024)),
    "4b-qkv": (2560, (4096, 1024, 1024)),
    "8b-gate_up": (4096, (12288, 12288)),
    "2b-down": (6144, (2048,)),
}


def _members(device, features=256, outputs=(128, 64, 64), ranks=(16, 8)):
    rank = dict(zip(("reasoning", "embedding"), ranks, strict=True))
    with torch.device(device):
        members = [DualLoRALinear(features, out, False, rank=rank, dtype=BF16) for out in outputs]
    for member in members:
        member.requires_grad_(False)
        for B in member.lora_B.values():
            B.normal_()
    return members


def _call(members, x, plan, packed=(), impl="blas"):
    norm = Norm(torch.linspace(0.5, 1.5, x.shape[1], device=x.device).to(x.dtype), 1e-6)
    projections = [member.site_projection() for member in members]
    return torch.cat(dual_lora_group(x, projections, plan, norm=norm, impl=impl, packed=packed), dim=1)


def _wide(members):
    return [type(m).double(_copy(m)) for m in members]


def _copy(member):
    twin = DualLoRALinear(
        member.in_features,
        member.out_features,
        False,
        rank={name: A.shape[0] for name, A in member.lora_A.items()},
        dtype=BF16,
        device=member.weight.device,
    )
    twin.load_state_dict(member.state_dict())
    twin.scaling = dict(member.scaling)
    return twin.requires_grad_(False)


def _settled(group):
    group.panels()
    torch.cuda.synchronize()
    return group.panels()


@pytest.mark.parametrize("ranks", [(64, 64), (64, 32), (48, 96), (16, 16), (5, 3)], ids=str)
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_real_shapes(site, ranks, device):
    members = _members(device, *SITES[site], ranks)
    group, wide = PackedGroup(members), _wide(members)
    assert group.reason is None
    for tokens in (1, 17, 257):
        x = torch.randn(tokens, SITES[site][0], device=device).to(BF16)
        plans = [RoutePlan.uniform(name, tokens, device=device) for name in ("reasoning", "embedding", "both", None)]
        plans.append(RoutePlan.from_routes((torch.arange(tokens, device=device) % 4).to(torch.int8)))
        for plan in plans:
            truth = _call(wide, x.double(), plan, impl="reference")
            own = _call(members, x, plan, impl="reference")
            assert_as_good_as_torch(_call(members, x, plan, _settled(group)), truth, own, f"{site} {plan.present}")


def _capture(members, group, x, plan):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _call(members, x, plan, group.panels())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _call(members, x, plan, group.panels())
    return graph, captured


@torch.no_grad()
def test_replays_follow_adapters_that_change(device):
    members = _members(device)
    group = PackedGroup(members)
    group.unshare()
    x = torch.randn(8, 256, device=device).to(BF16)
    plan = RoutePlan.from_routes((torch.arange(8, device=device) % 4).to(torch.int8))
    graph, captured = _capture(members, group, x, plan)
    edits = (
        lambda B: B.mul_(-2.0),
        lambda B: B.data.mul_(0.5),  # which only the graph itself can see
        lambda B: B[0].fill_(torch.inf),
        lambda B: B.normal_(),
    )
    for edit in edits:
        edit(members[1].lora_B["embedding"])
        group.refresh()
        graph.replay()
        expected = _call(members, x, plan, group.panels())
        assert torch.equal(captured.isfinite(), expected.isfinite())
        assert torch.equal(captured.nan_to_num(), expected.nan_to_num())
        assert expected[plan.routes & 2 == 0].isfinite().all()


@torch.no_grad()
def test_replays_read_a_shared_adapter_itself(device):
    members = _members(device)
    group = PackedGroup(members)
    x = torch.randn(8, 256, device=device).to(BF16)
    plan = RoutePlan.from_routes((torch.arange(8, device=device) % 4).to(torch.int8))
    graph, captured = _capture(members, group, x, plan)
    B = members[1].lora_B["embedding"]
    assert not B.is_contiguous()
    B.mul_(-2.0)
    graph.replay()
    assert torch.equal(captured, _call(members, x, plan, _settled(group))), (
        "no call was needed for the replay to see it"
    )
    assert B.is_contiguous()
    B.normal_()
    group.panels()
    graph.replay()
    assert torch.equal(captured, _call(members, x, plan, _settled(group)))


def test_training_gives_adapters_memory_of_their_own(device):
    members = _members(device)
    for member in members:
        member.lora_B.requires_grad_()
    group = PackedGroup(members)
    trained = [B for member in members for B in member.lora_B.values()]
    with torch.no_grad():
        assert group.panels() and not any(B.is_contiguous() for B in trained)
    stepper = torch.optim.AdamW(trained, lr=0.1, fused=True)
    x, plan = torch.randn(8, 256, device=device).to(BF16), RoutePlan.uniform("both", 8, device=device)
    weights = [member.weight.clone() for member in members]
    _call(members, x, plan, group.panels()).float().square().sum().backward()
    assert all(B.is_contiguous() for B in trained)
    before = [B.detach().clone() for B in trained]
    stepper.step()
    assert not any(torch.equal(B, values) for B, values in zip(trained, before, strict=True))
    assert all(torch.equal(member.weight, weight) for member, weight in zip(members, weights, strict=True))
    with torch.no_grad():
        truth = _call(_wide(members), x.double(), plan, impl="reference")
        own = _call(members, x, plan, impl="reference")
        assert_as_good_as_torch(_call(members, x, plan, _settled(group)), truth, own)


@torch.no_grad()
def test_the_flags_are_dropped_once_all_is_known_to_be_finite(device, no_sync):
    members = _members(device)
    group = PackedGroup(members)
    with no_sync():
        assert len(group.panels()) == 3, "known since they were packed"
    group.unshare()
    assert len(group.panels()) == 4, "the device has not answered before it was asked"
    torch.cuda.synchronize()
    with no_sync():
        assert len(group.panels()) == 3
    members[0].lora_B["reasoning"][0, 0] = torch.nan
    assert len(_settled(group)) == 4
    members[0].lora_B["reasoning"][0, 0] = 0.0
    with no_sync():
        group.panels()
    assert len(_settled(group)) == 3


@torch.no_grad()
def test_another_stream_waits_for_a_fresh_shadow(device):
    members = _members(device, 1024, (2048, 2048), (64, 64))
    group = PackedGroup(members)
    x, plan = torch.randn(64, 1024, device=device).to(BF16), RoutePlan.uniform("both", 64, device=device)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(10):
        for member in members:
            for B in member.lora_B.values():
                B.normal_()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(2_000_000)  # the fill waits behind it
            group.panels()
        with torch.cuda.stream(second):
            early = _call(members, x, plan, group.panels())
        torch.cuda.synchronize()
        assert torch.equal(early, _call(members, x, plan, _settled(group)))


@torch.no_grad()
def test_moving_a_model_away_frees_its_panels(device):
    members = torch.nn.ModuleList(_members(device, 1024, (1024, 1024)))
    group = PackedGroup(list(members))
    group.panels()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    members.cpu()
    freed = before - torch.cuda.memory_allocated()
    assert freed >= 2 * 1024 * 1024 * 2
    members.to(device)
    x, plan = torch.randn(4, 1024, device=device).to(BF16), RoutePlan.uniform("both", 4, device=device)
    truth = _call(_wide(list(members)), x.double(), plan, impl="reference")
    own = _call(list(members), x, plan, impl="reference")
    assert_as_good_as_torch(_call(list(members), x, plan, group.panels()), truth, own)


@torch.no_grad()
def test_packing_needs_no_second_copy(device):
    members = _members(device, 2048, (8192, 8192), (64, 64))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, requested = torch.cuda.memory_allocated(), _requested_bytes()
    group = PackedGroup(members)
    size = 2 * 8192 * 2048
    assert 0 <= _requested_bytes() - requested - group.added_bytes < 4096
    assert torch.cuda.max_memory_allocated() - before < group.added_bytes + size + size // 8, "one panel at a time"


def _requested_bytes():
    """Of live tensors, without what the allocator rounds up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]
