"""What only a GPU can show: real shapes, graph replay with other routes, offsets beyond 2**31, streams, no syncs."""

from __future__ import annotations

import pytest
import torch
from cases import Case, as_dtype, tensors

from twn_kernels.ops import dual_lora_linear, dual_lora_linear_fanout
from twn_kernels.testing.oracle import assert_as_good_as_torch

pytestmark = pytest.mark.gpu

IMPLS = ("blas", "triton")
BF16 = torch.bfloat16
# in_features, out_features of one linear of each site of Qwen3-VL.
SITES = {
    "8b-q": (4096, 4096),
    "8b-gate": (4096, 12288),
    "8b-down": (12288, 4096),
    "4b-k": (2560, 1024),
    "2b-o": (2048, 2048),
}


def _check(case: Case, impl: str, device) -> None:
    inputs, plan = tensors(case, device), case.plan(device)
    truth = dual_lora_linear(**as_dtype(inputs, torch.float64), plan=plan, impl="reference")
    own = dual_lora_linear(**inputs, plan=plan, impl="reference")
    assert_as_good_as_torch(dual_lora_linear(**inputs, plan=plan, impl=impl), truth, own, f"{impl} {case}")


@pytest.mark.parametrize("ranks", [(64, 64), (64, 32), (48, 96), (16, 16), (128, 128)], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 257, 1000])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("impl", IMPLS)
def test_real_shapes(impl, site, tokens, ranks, device):
    for routes in ("reasoning", "suffix", "alternating", "mixed", "base"):
        _check(Case(tokens, *SITES[site], *ranks, BF16, routes, bias=False), impl, device)


@pytest.mark.parametrize("fanout", [False, True], ids=["linear", "fanout"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_captured_graph_follows_refreshed_routes(impl, fanout, device):
    op = dual_lora_linear_fanout if fanout else dual_lora_linear
    case = Case(32, 2048, 1024, 64, 32, BF16, "mixed")
    inputs, plan = tensors(case, device), case.plan(device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            op(**inputs, plan=plan, impl=impl)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(**inputs, plan=plan, impl=impl)
        for value in (0, 1, 2, 3):
            plan.refresh_(torch.full((32,), value, dtype=torch.int8, device=device))
            inputs["x"].normal_()
            graph.replay()
            eager = op(**inputs, plan=plan, impl=impl)
            for got, expected in zip(*(v if fanout else (v,) for v in (captured, eager)), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_synchronisation_forward_or_backward(impl, device, no_sync):
    case = Case(64, 512, 256, 16, 8, BF16, "mixed")
    inputs, plan = tensors(case, device), case.plan(device)
    x = inputs["x"].detach().requires_grad_()
    lora = inputs["reasoning"]
    lora = lora._replace(A=lora.A.detach().requires_grad_(), B=lora.B.detach().requires_grad_())
    arguments = inputs | {"x": x, "reasoning": lora, "plan": plan, "impl": impl, "dropout": (0.1, 0.0)}
    dual_lora_linear(**arguments).sum().backward()  # compiles outside the guard
    with no_sync():
        dual_lora_linear(**arguments).sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_beyond_two_to_the_31(impl, device):
    tokens, features, pitch = 70_001, 64, 32_768
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs a GPU with 8 GiB free")
    case = Case(tokens, features, 96, 16, 8, BF16, "alternating")
    inputs, plan = tensors(case, device), case.plan(device)
    buffer = torch.empty(tokens, pitch, dtype=BF16, device=device)
    pitched = buffer[:, :features]
    pitched.copy_(inputs["x"])
    assert pitched.stride(0) * (tokens - 1) > 2**31
    own = dual_lora_linear(**inputs, plan=plan, impl=impl)
    assert torch.equal(dual_lora_linear(**inputs | {"x": pitched}, plan=plan, impl=impl), own)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_streams_do_not_meet(impl, device):
    cases = [Case(129, 512, 384, 16, 8, BF16, routes) for routes in ("mixed", "alternating")]
    work = [(tensors(case, device), case.plan(device)) for case in cases]
    alone = [dual_lora_linear(**inputs, plan=plan, impl=impl) for inputs, plan in work]
    streams = [torch.cuda.Stream() for _ in work]
    for _ in range(20):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        together = []
        for stream, (inputs, plan) in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                together.append(dual_lora_linear(**inputs, plan=plan, impl=impl))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
