"""Gate, pooling and the front of a prefill on a GPU: real sizes, graph replay, streams, no synchronisation.

The bodies run on tiny sizes without a GPU too, where a stand-in takes the place of the extension.
"""

from __future__ import annotations

import cuda_stand_in
import pytest
import torch

from twn_kernels.impl.cuda import launch
from twn_kernels.impl.reference.group import _input as front_reference
from twn_kernels.ops import gate_scores, pool_queries
from twn_kernels.testing.oracle import assert_as_good_as_torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.gpu
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    cuda_stand_in.install_without_gpu(monkeypatch)


def mlp(device, dtype, *widths, norm=None) -> list:
    """Linear layers from each width to the next, the last down to two logits; a norm in front where asked for."""
    layers = [
        ((torch.randn(out, width) * 1.5 / width**0.5).to(device, dtype), (0.3 * torch.randn(out)).to(device, dtype))
        for width, out in zip(widths, (*widths[1:], 2), strict=True)
    ]
    weight = (1 + 0.1 * torch.randn(widths[0])).to(device, dtype)
    fronts = {None: [], "rms": [(weight, None)], "layer": [(weight, torch.zeros_like(weight))]}
    return fronts[norm] + layers


def check_gate(features, layers, last=None, **options) -> torch.Tensor:
    scores, think = gate_scores(features, layers, last=last, threshold=0.5, impl="cuda", **options)
    wide = [tuple(None if t is None else t.double() for t in layer) for layer in layers]
    truth = gate_scores(features.double(), wide, last=None if last is None else last.double(), **options)
    # Torch's own products on a GPU may be rounded to tf32; a CPU's are not.
    narrow = [tuple(None if t is None else t.cpu() for t in layer) for layer in layers]
    own = gate_scores(features.cpu(), narrow, last=None if last is None else last.cpu(), **options)
    assert_as_good_as_torch(scores, truth, own)
    assert torch.equal(think, scores.double() >= 0.5)
    return scores


def check_pool(states) -> None:
    for pooling in ("mean", "last", "first"):
        for normalize in (True, False):
            options = {"pooling": pooling, "normalize": normalize}
            got, own = (pool_queries(states, **options, impl=impl) for impl in ("cuda", "reference"))
            assert_as_good_as_torch(got, pool_queries(states.double(), **options), own)


def check_front(x, weight) -> None:
    got = launch._op("front")(x, weight, 1e-6, weight is None)
    exact = front_reference(x.double(), None if weight is None else weight.double(), 1e-6, weight is None)
    assert_as_good_as_torch(got, exact, front_reference(x, weight, 1e-6, weight is None))


@gpu
@each_dtype
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 32, 33, 256])
@pytest.mark.parametrize("widths", [(2560, 2560), (4096, 1024, 256), (4096, 4096, 512), (2051, 77)], ids=str)
def test_gate(widths, rows, norm, dtype, device):
    torch.manual_seed(rows)
    layers = mlp(device, dtype, *widths, norm=norm)
    check_gate(torch.randn(rows, 8, widths[0], device=device, dtype=dtype), layers)
    check_gate(torch.randn(rows, widths[0], device=device, dtype=dtype), layers)


@gpu
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_gate_of_long_and_joined_inputs(rows, device, cut_from_nan):
    layers = mlp(device, torch.bfloat16, 32 * 2560, 512)
    check_gate(torch.randn(rows, 32 * 2560, device=device), layers)
    layers = mlp(device, torch.float32, 2 * 2560, 2560)
    queries, last = torch.randn(rows, 16, 2560, device=device).bfloat16(), torch.randn(rows, 2560, device=device)
    expected = check_gate(queries, layers, last)
    assert torch.equal(check_gate(cut_from_nan(queries), layers, cut_from_nan(last)), expected)


@gpu
@each_dtype
@pytest.mark.parametrize("shape", [(1, 8, 2560), (32, 64, 4096), (300, 16, 2048), (5, 3, 8191)], ids=str)
def test_pooling(shape, dtype, device, cut_from_nan):
    states = torch.randn(shape, device=device).to(dtype)
    for view in (states, cut_from_nan(states), states.transpose(0, 2).contiguous().transpose(0, 2)):
        check_pool(view)


@gpu
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("features", [128, 1024, 1032, 4096, 12288, 2051])
@pytest.mark.parametrize("rows", [1, 7, 65, 4097])
def test_front(rows, features, dtype, device, cut_from_nan):
    x, both = (torch.randn(rows, width, device=device).to(dtype) for width in (features, 2 * features))
    weight = 1 + 0.2 * torch.randn(features, device=device)
    for view in (x, cut_from_nan(x)):
        check_front(view, weight)
        check_front(view, weight.to(dtype))
    for view in (both, cut_from_nan(both)):
        check_front(view, None)


@gpu
def test_offsets_beyond_two_to_the_31(device):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs a GPU with 12 GiB free")
    states = torch.empty(70_001, 2, 16_384, dtype=torch.bfloat16, device=device)[:, :, :128].normal_()
    assert states.stride(0) * (states.shape[0] - 1) > 2**31
    for options in ({"pooling": "mean"}, {"pooling": "last", "normalize": False}):
        got, own = (pool_queries(of, **options, impl="cuda") for of in (states, states.contiguous()))
        assert torch.equal(got, own)
    layers = mlp(device, torch.float32, 128, 8)
    assert torch.equal(*(gate_scores(of, layers, impl="cuda") for of in (states, states.contiguous())))


@gpu
def test_the_same_bits_again_and_in_any_company(device):
    layers, states = mlp(device, torch.float32, 2560, 2560, norm="layer"), torch.randn(64, 8, 2560, device=device)
    first = gate_scores(states, layers, impl="cuda")
    assert all(torch.equal(gate_scores(states, layers, impl="cuda"), first) for _ in range(200))
    states[3] = torch.nan
    others = torch.arange(64, device=device) != 3
    poisoned = gate_scores(states, layers, impl="cuda")
    assert torch.equal(poisoned[others], first[others]) and poisoned[3].isnan()


@gpu
def test_a_captured_graph_reads_what_stands_there_then(device, no_sync):
    layers = mlp(device, torch.bfloat16, 2560, 2560)
    states, last = torch.randn(32, 8, 2560, device=device), torch.randn(32, 2560, device=device)
    wide = mlp(device, torch.bfloat16, 2 * 2560, 512, norm="rms")

    def run():
        return (
            *gate_scores(states, layers, threshold=0.5, impl="cuda"),
            gate_scores(states, wide, last=last, impl="cuda"),
            pool_queries(states, impl="cuda"),
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        states.normal_()
        last.normal_()
        with no_sync():
            graph.replay()
            eager = run()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@gpu
def test_two_streams_do_not_meet(device):
    work = [
        (torch.randn(rows, 4, 2560, device=device), mlp(device, torch.float32, 2560, 2560, 300)) for rows in (32, 5)
    ]
    alone = [gate_scores(*arguments, impl="cuda") for arguments in work]
    streams = [torch.cuda.Stream() for _ in work]
    for _ in range(50):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        together = []
        for stream, arguments in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                together.append(gate_scores(*arguments, impl="cuda"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@gpu
def test_compiled_without_a_break(device):
    layers, states = mlp(device, torch.bfloat16, 256, 64), torch.randn(9, 4, 256, device=device)

    @torch.compile(fullgraph=True)
    def run(states):
        scores, think = gate_scores(states, layers, threshold=0.5, impl="cuda")
        return scores * 2, ~think, pool_queries(states, impl="cuda")

    scores, think = gate_scores(states, layers, threshold=0.5, impl="cuda")
    expected = (scores * 2, ~think, pool_queries(states, impl="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(run(states), expected, strict=True))


@each_dtype
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_the_bodies_by_a_stand_in(dtype, norm, device, cut_from_nan):
    layers = mlp(device, dtype, 24, 16, norm=norm)
    check_gate(torch.randn(33, 4, 24, device=device, dtype=dtype), layers)
    layers = mlp(device, dtype, 24, 7)
    check_gate(torch.randn(33, 8, device=device, dtype=dtype), layers, torch.randn(33, 16, device=device))
    check_pool(cut_from_nan(torch.randn(5, 3, 17, device=device)).to(dtype))
    if dtype != torch.float32:
        x = torch.randn(5, 16, device=device).to(dtype)
        check_front(x, torch.rand(16, device=device))
        check_front(x, None)
