"""The vendor-GEMM form of a site group: plain and packed against fp64 truth, isolation, columns, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blas_problems import BF16, FP16, FP32, Problem, converted, eager, packed

from twn_kernels.impl import blas, reference
from twn_kernels.testing.oracle import assert_as_good_as_torch

QKV, MLP = (40, 16, 24), (40, 40)
PROBLEMS = [
    Problem(13, 64, QKV, ((8, 16), (8, 16), (8, 16)), BF16, "mixed", "norm", bias=True),
    Problem(9, 40, QKV, ((5, 0), (0, 3), (1, 2)), BF16, "mixed", "norm"),
    Problem(9, 40, QKV, ((8, 8), (0, 0), (8, 8)), FP16, "mixed", "norm"),
    Problem(1, 64, QKV, ((8, 8),) * 3, BF16, "reasoning", "norm"),
    Problem(6, 64, QKV, ((8, 4), (8, 16), (16, 8)), BF16, "embedding", "norm"),
    Problem(6, 64, MLP, ((16, 8),) * 2, BF16, "both", "norm", "swiglu"),
    Problem(6, 33, MLP, ((1, 1),) * 2, FP16, "suffix", "plain", "swiglu"),
    Problem(11, 64, (24,), ((8, 24),), BF16, "mixed", "gated", "residual"),
    Problem(11, 64, (24,), ((3, 8),), BF16, "embedding", "gated", "residual"),
    Problem(11, 64, (24,), ((8, 0),), BF16, "reasoning", "plain", "residual", bias=True),
    Problem(11, 64, (24,), ((0, 8),), FP16, "reasoning", "gated"),
    Problem(7, 64, QKV, ((8, 8),) * 3, BF16, "base", "norm"),
    Problem(0, 64, MLP, ((8, 8),) * 2, BF16, "mixed", "norm"),
    Problem(12, 48, QKV, ((8, 4), (2, 0), (0, 8)), FP32, "mixed", "norm", bias=True),
    Problem(12, 48, MLP, ((8, 4),) * 2, FP32, "embedding", "gated", "swiglu"),
]
HALF = [problem for problem in PROBLEMS if problem.dtype != FP32]


def _truth(tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return eager(converted(tensors, torch.float64))


def _check(tensors: dict, name: str, **how) -> torch.Tensor:
    y, s = blas.group(**tensors, **how)
    for label, actual, truth, own in zip(("y", "s"), (y, s), _truth(tensors), eager(tensors), strict=True):
        assert_as_good_as_torch(actual, truth, own, f"{name} {label}")
    assert y.is_contiguous()
    return y


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_plain_is_as_good_as_torch(problem, device, cut_from_nan):
    _check(problem.draw(device, cut_from_nan), "plain")


@pytest.mark.parametrize("clean", [False, True], ids=["", "clean"])
@pytest.mark.parametrize("problem", HALF, ids=str)
def test_packed_is_as_good_as_torch(problem, clean, device, cut_from_nan):
    tensors = problem.draw(device, cut_from_nan)
    _check(tensors, "packed", packed=packed(tensors, clean=clean))


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("problem", [p for p in HALF if p.tokens < 12][:9], ids=str)
def test_with_a_fused_producer(problem, pack, device):
    triton = pytest.importorskip("twn_kernels.impl.triton")
    tensors = problem.draw(device)
    _check(tensors, "producer", packed=packed(tensors) if pack else (), produce=triton.produce_)


@pytest.mark.parametrize("problem", [p for p in HALF if p.routes in ("mixed", "reasoning")], ids=str)
def test_an_adapter_that_a_call_leaves_out_may_stay_packed(problem, device):
    """A caller that knows the route passes no embedding adapter at all; its columns in the panels are passed over."""
    tensors = problem.draw(device)
    whole = packed(tensors)
    tensors["A_e"], tensors["B_e"] = [a[:0] for a in tensors["A_e"]], [b[:, :0] for b in tensors["B_e"]]
    tensors["present"] &= 1
    _check(tensors, "left out", packed=whole)


def test_packed_weights_of_other_sizes_or_dtypes_are_not_used(device):
    problem = Problem(5, 32, MLP, ((8, 8),) * 2, BF16)
    tensors = problem.draw(device)
    other = packed(Problem(5, 32, MLP, ((8, 4),) * 2, BF16).draw(device))
    _check(tensors, "other ranks", packed=other)
    for outputs, features in (((40, 48), 32), ((40,), 32), (MLP, 48)):
        foreign = Problem(5, features, outputs, ((8, 8),) * len(outputs), BF16).draw(device)
        _check(tensors, "another group's", packed=packed(foreign))
    _check(converted(tensors, FP16), "other dtype", packed=packed(tensors))
    wide = tensors | {name: converted({name: tensors[name]}, FP32)[name] for name in ("A_r", "B_r", "A_e", "B_e")}
    y, s = blas.group(**wide, packed=packed(tensors))
    assert s.dtype == FP32 and torch.equal(y, blas.group(**wide)[0])
    assert_as_good_as_torch(y, _truth(wide)[0], eager(tensors)[0], "fp32 adapters")


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("routes", ["mixed", "base"])
def test_a_norm_weight_in_fp32(routes, pack, device):
    tensors = Problem(7, 40, QKV, ((4, 4),) * 3, BF16, routes, "norm").draw(device)
    tensors["norm_weight"] = torch.randn(40, device=device)
    y, _ = blas.group(**tensors, packed=packed(tensors) if pack else ())
    own = _rounded_norm(tensors)
    assert_as_good_as_torch(y, eager(converted(tensors, torch.float64))[0], eager(own)[0])


def _rounded_norm(tensors: dict) -> dict:
    """The same problem with the norm done: x as a model's own norm leaves it."""
    h = tensors["x"].float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + tensors["eps"])).to(BF16)
    return tensors | {"x": (tensors["norm_weight"] * h).to(BF16), "norm_weight": None}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["qkv", "gate_up", "down"])
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_base_only_is_torch_bit_for_bit(form, pack, dtype, device):
    problem = {
        "qkv": Problem(7, 40, QKV, ((4, 4),) * 3, dtype, "base", "norm", bias=True),
        "gate_up": Problem(7, 40, MLP, ((4, 4),) * 2, dtype, "base", "norm", "swiglu"),
        "down": Problem(7, 40, (24,), ((4, 4),), dtype, "base", "gated", "residual"),
    }[form]
    tensors = problem.draw(device)
    for name in ("A_r", "B_r", "A_e", "B_e"):
        for tensor in tensors[name]:
            tensor.fill_(torch.nan)
    y, s = blas.group(**tensors, packed=packed(tensors) if pack else ())
    assert not s.any()
    if dtype != FP32 and pack and y.is_cuda:
        clean = converted({**tensors, "A_r": [], "A_e": []}, torch.float64)
        assert_as_good_as_torch(y, _modules(clean), _modules(tensors), "base")
    else:
        assert torch.equal(y, _modules(tensors))


def _modules(t: dict) -> torch.Tensor:
    """The same with torch's and transformers' modules: RMSNorm as they write it, F.linear, silu(gate) * up, a sum."""
    x = t["x"]
    if t["norm_weight"] is not None:
        h = x.to(torch.promote_types(x.dtype, FP32))
        variance = h.pow(2).mean(-1, keepdim=True)
        x = t["norm_weight"] * (h * torch.rsqrt(variance + t["eps"])).to(x.dtype)
    if t["gated"]:
        gate, up = (half.contiguous() for half in x.chunk(2, dim=1))
        x = F.silu(gate) * up
    outputs = [F.linear(x, weight, bias) for weight, bias in zip(t["weights"], t["biases"], strict=True)]
    if t["swiglu"]:
        return F.silu(outputs[0]) * outputs[1]
    y = torch.cat(outputs, dim=1)
    return y if t["residual"] is None else t["residual"] + y


def _kinds(pack: bool, tensors: dict) -> tuple:
    return packed(tensors) if pack else ()


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("side", ["r", "e"])
@pytest.mark.parametrize("form", ["qkv", "down"])
def test_a_bad_adapter_stays_with_the_rows_that_use_it(form, side, part, bad, pack, device):
    problem = {
        "qkv": Problem(12, 32, QKV, ((8, 4), (8, 4), (8, 4)), BF16, "mixed", "norm"),
        "down": Problem(12, 32, (24,), ((4, 8),), BF16, "mixed", "gated", "residual"),
    }[form]
    tensors = problem.draw(device)
    clean, _ = blas.group(**tensors, packed=_kinds(pack, tensors))
    tensors[f"{part}_{side}"][0][1, 2] = bad
    dirty, _ = blas.group(**tensors, packed=_kinds(pack, tensors))
    used = (tensors["routes"] & (1 if side == "r" else 2)) != 0
    assert torch.equal(clean[~used], dirty[~used])
    assert not dirty[used][:, : problem.outputs[0]].isfinite().all(dim=1).any()


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("routes", ["reasoning", "embedding", "both"])
def test_a_bad_adapter_shows_where_every_row_uses_it(routes, pack, device):
    problem = Problem(5, 32, MLP, ((8, 8),) * 2, BF16, routes)
    tensors = problem.draw(device)
    clean, _ = blas.group(**tensors, packed=_kinds(pack, tensors))
    for side, bit in (("r", 1), ("e", 2)):
        ill = tensors | {f"B_{side}": [b.clone() for b in tensors[f"B_{side}"]]}
        ill[f"B_{side}"][1][3, 0] = torch.inf
        dirty, _ = blas.group(**ill, packed=_kinds(pack, ill))
        if problem.present & bit:
            assert not dirty[:, MLP[0] :].isfinite().all(dim=1).any()
        else:
            assert torch.equal(clean, dirty)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_a_bad_row_stays_alone(pack, device):
    problem = Problem(12, 32, QKV, ((8, 4),) * 3, BF16, "mixed", "norm")
    tensors = problem.draw(device)
    clean, clean_s = blas.group(**tensors, packed=_kinds(pack, tensors))
    tensors["x"][5] = torch.nan
    dirty, s = blas.group(**tensors, packed=_kinds(pack, tensors))
    others = [row for row in range(12) if row != 5]
    assert torch.equal(clean[others], dirty[others]) and torch.equal(clean_s[others], s[others])
    assert not dirty[5].isfinite().any()
    unused = torch.cat([torch.arange(8, 12) + 12 * i for i in range(3)])
    assert not s[5, unused].any(), "row 5 is routed to reasoning alone; embedding's shrink of it is zero"


def _widths(monkeypatch, tensors: dict) -> list[int]:
    """How many columns each product runs over."""
    seen, real = [], torch.mm

    def mm(a, b, **options):
        assert a.shape[1] == b.shape[0]
        if "out" in options:
            seen.append(a.shape[1])
        return real(a, b, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", mm)
        blas.group(**tensors, packed=packed(tensors))
    return seen


@pytest.mark.parametrize(
    "outputs, routes, extra",
    [
        (QKV, "reasoning", [16, 16 + 16]),
        # Reasoning's columns lie between the input and embedding's where there are several projections.
        (QKV, "embedding", [16 + 8, 2 * (16 + 8)]),
        (QKV, "mixed", [16 + 8, 2 * (16 + 8)]),
        (MLP, "reasoning", [16, 16]),
        (MLP, "both", [24, 24]),
        ((24,), "reasoning", [16]),
        ((24,), "embedding", [8]),
        ((24,), "mixed", [24]),
    ],
    ids=str,
)
def test_products_run_over_the_columns_that_the_route_needs(outputs, routes, extra, monkeypatch, device):
    problem = Problem(6, 64, outputs, ((16, 8),) * len(outputs), BF16, routes)
    assert _widths(monkeypatch, problem.draw(device)) == [64 + more for more in extra]


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "producer"])
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("routes", ["mixed", "embedding", "base"])
def test_shrinks_that_nobody_reads_are_not_gathered(routes, pack, fused, device):
    tensors = Problem(5, 32, MLP, ((8, 4),) * 2, BF16, routes, "norm").draw(device)
    how = {"packed": _kinds(pack, tensors)}
    if fused:
        how["produce"] = pytest.importorskip("twn_kernels.impl.triton").produce_
    y, s = blas.group(**tensors, **how)
    alone, nothing = blas.group(**tensors, **how, needs_s=False)
    assert s.shape == (5, 24) and nothing is None and torch.equal(y, alone)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("routes", ["mixed", "reasoning", "base"])
def test_no_data_is_read_on_the_host(routes, pack):
    """Tensors without data: whatever asked for a value, or for a shape that depends on one, would raise."""
    problem = Problem(9, 64, QKV, ((8, 4), (4, 0), (3, 8)), BF16, routes, "norm", bias=True)
    tensors = problem.draw("meta")
    y, s = blas.group(**tensors, packed=packed(tensors) if pack else ())
    assert (y.shape, s.shape, y.device.type) == ((9, 80), (9, 27), "meta")
    names = ("weights", "A_r", "B_r", "A_e", "B_e", "scaling_r", "scaling_e")
    needs = (True, *([True] * 3 for _ in range(5)))
    dx, *_ = blas.group_backward(
        y, tensors["x"], *(tensors[name] for name in names), s, tensors["routes"], tensors["present"], needs
    )
    assert dx.shape == (9, 64)


GRADIENTS = [
    Problem(13, 24, QKV, ((8, 4), (3, 0), (0, 5)), FP32, "mixed"),
    Problem(13, 24, QKV, ((8, 4), (8, 4), (8, 4)), BF16, "mixed"),
    Problem(7, 32, MLP, ((8, 8), (4, 16)), FP16, "suffix"),
    Problem(7, 32, MLP, ((8, 8), (4, 16)), BF16, "embedding"),
    Problem(7, 32, (24,), ((8, 8),), FP32, "both"),
    Problem(7, 32, (24,), ((8, 8),), BF16, "base"),
    Problem(0, 32, MLP, ((8, 8),) * 2, FP32, "mixed"),
]
_NAMES = ("dA_r", "dB_r", "dA_e", "dB_e", "dbias")


def _backward(implementation, tensors: dict, dy, needs) -> dict:
    names = ("x", "weights", "A_r", "B_r", "A_e", "B_e", "scaling_r", "scaling_e")
    routes, present = tensors["routes"], tensors["present"]
    if routes is None and implementation is reference:
        routes = torch.full((dy.shape[0],), present, dtype=torch.int8, device=dy.device)
    _, s = eager(tensors)
    dx, *lists = implementation.group_backward(dy, *(tensors[name] for name in names), s, routes, present, needs)
    named = {f"{name}{i}": g for name, grads in zip(_NAMES, lists, strict=True) for i, g in enumerate(grads)}
    return {"dx": dx} | named


@pytest.mark.parametrize("problem", GRADIENTS, ids=str)
def test_gradients_are_the_references(problem, device, cut_from_nan):
    tensors = problem.draw(device, cut_from_nan)
    dy = torch.randn(problem.tokens, sum(problem.outputs), device=device).to(problem.dtype)
    needs = (True, *([True] * len(problem.outputs) for _ in range(5)))
    actual = _backward(blas, tensors, dy, needs)
    truth = _backward(reference, converted(tensors, torch.float64), dy.double(), needs)
    own = _backward(reference, tensors, dy, needs)
    storages = [grad.untyped_storage().data_ptr() for grad in actual.values() if grad.numel()]
    assert len(set(storages)) == len(storages), "two gradients share memory"
    for name, value in actual.items():
        assert value.dtype == own[name].dtype
        assert_as_good_as_torch(value, truth[name], own[name], name)


@pytest.mark.parametrize("only", ["dx", "dA_r1", "dB_e0", "dbias1"])
def test_only_wanted_gradients_are_computed(only, device):
    problem = Problem(9, 16, MLP, ((4, 4), (2, 4)), FP32, "mixed")
    tensors = problem.draw(device)
    dy = torch.randn(9, sum(MLP), device=device)
    needs = (only == "dx", *([f"{name}{i}" == only for i in range(2)] for name in _NAMES))
    everything = (True, *([True, True] for _ in _NAMES))
    truth = _backward(reference, converted(tensors, torch.float64), dy.double(), everything)
    own = _backward(reference, tensors, dy, everything)
    for name, value in _backward(blas, tensors, dy, needs).items():
        assert (value is not None) == (name == only)
        if name == only:
            assert_as_good_as_torch(value, truth[name], own[name], name)


def test_a_bad_adapter_or_row_reaches_no_other_gradient(device):
    problem = Problem(12, 24, MLP, ((4, 8),) * 2, FP32, "mixed")
    tensors = problem.draw(device)
    dy = torch.randn(12, sum(MLP), device=device)
    needs = (True, *([True, True] for _ in _NAMES))
    clean = _backward(blas, tensors, dy, needs)
    tensors["A_r"][0].fill_(torch.nan)
    tensors["B_r"][1][0, 0] = torch.inf
    tensors["x"][6] = dy[6] = torch.nan  # route 2: embedding alone
    dirty = _backward(blas, tensors, dy, needs)
    kept = [row for row in range(12) if row % 4 in (0, 2) and row != 6]
    assert torch.equal(clean["dx"][kept], dirty["dx"][kept])
    assert not dirty["dx"][1].isfinite().any()
    # Embedding's rows are those of route 2 and 3; that the bad row is among them shows in its dA, and nowhere else.
    for name in ("dA_r0", "dB_r1"):
        assert torch.equal(clean[name], dirty[name]), name
    assert not dirty["dA_e0"].isfinite().any() and not dirty["dB_e0"].isfinite().all()
