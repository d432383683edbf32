"""The backward pass of a site group against autograd through the specification in fp64, and its isolation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from group_problems import SCALING_E, SCALING_R, GroupInputs, GroupProblem
from triton_problems import BF16, FP16, FP32, FP64

from twn_kernels.impl import reference, triton
from twn_kernels.impl.triton import group_grad, launch, produce_config
from twn_kernels.testing.oracle import assert_as_good_as_torch

NAN = float("nan")
LISTS = ("dA_r", "dB_r", "dA_e", "dB_e", "dbias")
QKV = ((16, 8), (16, 8), (16, 8))

PROBLEMS = [
    GroupProblem(1, 40, (33, 20, 17), QKV, BF16, "both"),
    GroupProblem(9, 70, (48, 33, 20), ((16, 8), (0, 17), (3, 1)), FP32),
    GroupProblem(17, 33, (50,), ((48, 100),), FP16, "alternating"),
    GroupProblem(66, 40, (33, 20), ((16, 0), (0, 17)), BF16),
    GroupProblem(70, 72, (64, 16, 16), QKV, BF16, "suffix"),
    GroupProblem(65, 40, (30, 31), ((0, 0), (8, 9)), FP32, "reasoning"),
    GroupProblem(65, 40, (30, 31), ((5, 3), (8, 9)), FP16, "embedding"),
    GroupProblem(33, 40, (24, 40), ((5, 3), (8, 9)), BF16, "unused"),
    GroupProblem(35, 40, (33, 20, 17), ((16, 8), (0, 5), (2, 0)), BF16, adapter_dtype=FP32),
    GroupProblem(300, 12, (8, 4), ((4, 1), (2, 2)), FP16, "suffix"),  # a stretch without embedding
]


def _s(inputs: GroupInputs) -> torch.Tensor:
    return reference.group(*inputs.arguments)[1]


def _arguments(inputs: GroupInputs, dy, s, needs=None) -> tuple:
    count = len(inputs.weights)
    needs = needs or (True, *([[True] * count] * 5))
    return (
        dy, inputs.x, inputs.weights, inputs.A_r, inputs.B_r, inputs.A_e, inputs.B_e, list(SCALING_R[:count]),
        list(SCALING_E[:count]), s, inputs.routes, inputs.problem.present, needs,
    )  # fmt: skip


def _named(results) -> dict[str, torch.Tensor]:
    dx, *lists = results
    named = {f"{name}{i}": grad for name, grads in zip(LISTS, lists, strict=True) for i, grad in enumerate(grads)}
    return {"dx": dx} | named


def _run(inputs: GroupInputs, dy, needs=None) -> dict[str, torch.Tensor]:
    return _named(triton.group_backward(*_arguments(inputs, dy, _s(inputs), needs)))


def _truth(inputs: GroupInputs, dy) -> dict[str, torch.Tensor]:
    """Autograd through the forward pass of the specification, in fp64."""
    wide = inputs.to(FP64)
    wide.biases = [torch.zeros(weight.shape[0], dtype=FP64, device=weight.device) for weight in wide.weights]
    lists = (wide.A_r, wide.B_r, wide.A_e, wide.B_e, wide.biases)
    leaves = [t.requires_grad_() for t in (wide.x, *(t for values in lists for t in values))]
    y = reference.group(*wide.arguments)[0]
    grads = torch.autograd.grad(y, leaves, dy.double(), allow_unused=True, materialize_grads=True)
    count = len(inputs.weights)
    return _named((grads[0], *(grads[1 + i * count : 1 + (i + 1) * count] for i in range(5))))


def _dy(inputs: GroupInputs) -> torch.Tensor:
    p = inputs.problem
    return torch.randn(p.tokens, sum(p.widths)).to(inputs.x.device, p.dtype)


def _check(inputs: GroupInputs, dy=None) -> dict[str, torch.Tensor]:
    dy = _dy(inputs) if dy is None else dy
    actual, truth = _run(inputs, dy), _truth(inputs, dy)
    baseline = _named(reference.group_backward(*_arguments(inputs, dy, _s(inputs))))
    assert set(actual) == set(baseline)
    for name, value in actual.items():
        assert value.dtype == baseline[name].dtype and value.is_contiguous(), name
        assert_as_good_as_torch(value, truth[name], baseline[name], name)
    return actual


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_as_good_as_torch(problem, device):
    _check(GroupInputs(problem, device))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_operands_cut_from_larger_buffers_of_nan(dtype, device, cut_from_nan):
    _check(GroupInputs(GroupProblem(19, 45, (33, 20), ((8, 3), (0, 17)), dtype), device, cut_from_nan))


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 is interpreted only: no tile is chosen for it")
def test_float64_is_exact():
    _check(GroupInputs(GroupProblem(6, 9, (7, 5), ((2, 1), (3, 0)), FP64), "cpu"))


@pytest.mark.parametrize("adapters", [None, FP32], ids=["bf16_adapters", "fp32_adapters"])
def test_the_tiles_for_unaligned_operands(adapters, device, monkeypatch):
    monkeypatch.setattr(launch, "_aligned", lambda *tensors: False)
    _check(GroupInputs(GroupProblem(35, 24, (33, 20), ((16, 8), (3, 17)), BF16, adapter_dtype=adapters), device))


@pytest.mark.parametrize("routes", ["suffix", "reasoning", "embedding"])
def test_sums_that_are_split(routes, device, monkeypatch):
    """dS over outputs, dA over tokens; the last parts are empty or without a row of an adapter."""
    inputs = GroupInputs(GroupProblem(130, 16, (150, 40), ((4, 3), (2, 0)), BF16, routes), device)
    for name, changes in (("group_shrink_config", {"splits": 4}), ("grad_config", {"splits": 4, "stretch": 64})):
        choose = getattr(group_grad, name)
        monkeypatch.setattr(group_grad, name, lambda *a, _c=choose, _n=changes, **k: replace(_c(*a, **k), **_n))
    dy = _dy(inputs)
    first = _check(inputs, dy)
    for name, value in _run(inputs, dy).items():
        assert torch.equal(first[name], value), name


def test_few_tokens_or_few_features_split_the_sums():
    assert produce_config.group_shrink_config(7, 4096, 16, False, 90).splits > 1
    assert produce_config.group_shrink_config(16384, 4096, 64, False, 90).splits == 1
    assert group_grad.grad_config(16384, 4096, 16, 16, False, 90).splits > 1


def test_as_the_backward_passes_of_its_linears(device):
    """Gradients of adapters and biases are those of each linear alone, ``dx`` is their sum."""
    inputs = GroupInputs(GroupProblem(40, 48, (40, 24, 8), ((16, 8), (0, 5), (3, 0)), FP32), device)
    dy, s = _dy(inputs), _s(inputs)
    together, truth = _run(inputs, dy), _truth(inputs, dy)
    dx, column, row = torch.zeros_like(inputs.x), 0, 0
    for i, (width, ranks) in enumerate(zip(inputs.problem.widths, inputs.problem.ranks, strict=True)):
        grads = triton.backward(
            dy[:, row : row + width], None, None, inputs.x, inputs.weights[i], inputs.A_r[i], inputs.B_r[i],
            inputs.A_e[i], inputs.B_e[i], SCALING_R[i], SCALING_E[i], s[:, column : column + sum(ranks)],
            inputs.routes, 3, 0.0, 0.0, None, (True,) * 6,
        )  # fmt: skip
        dx += grads[0]
        for name, grad in zip(LISTS, grads[1:], strict=True):
            assert_as_good_as_torch(together[f"{name}{i}"], truth[f"{name}{i}"], grad, f"{name}{i}")
        column, row = column + sum(ranks), row + width
    assert_as_good_as_torch(together["dx"], truth["dx"], dx, "dx")


def test_base_rows_only(device):
    """Nothing is present: NaN adapters are not read, their gradients are zero."""
    inputs = GroupInputs(GroupProblem(21, 40, (33, 20), ((16, 8), (3, 0)), BF16, "both"), device)
    inputs.problem = replace(inputs.problem, routes="base")
    for adapter in (*inputs.A_r, *inputs.A_e, *inputs.B_r, *inputs.B_e):
        adapter.fill_(NAN)
    dy, s = _dy(inputs), torch.zeros(21, 27, dtype=BF16, device=device)
    for routes in (inputs.routes, None):
        inputs.routes = routes
        grads = _named(triton.group_backward(*_arguments(inputs, dy, s)))
        weight = torch.cat(inputs.weights)
        assert_as_good_as_torch(grads["dx"], dy.double() @ weight.double(), (dy @ weight), "dx")
        for name, grad in grads.items():
            assert name.startswith(("dx", "dbias")) or (grad == 0).all(), name


def test_an_adapter_that_cannot_occur_is_never_read(device):
    """``present`` decides: routes that name the other adapter, and its NaN weights, change nothing."""
    inputs = GroupInputs(GroupProblem(19, 24, (16, 12), ((4, 3), (2, 2)), FP32, "reasoning"), device)
    dy, s = _dy(inputs), _s(inputs)
    expected = _named(triton.group_backward(*_arguments(inputs, dy, s)))
    inputs.routes = inputs.routes | 2
    for adapter in (*inputs.A_e, *inputs.B_e):
        adapter.fill_(NAN)
    for name, grad in _named(triton.group_backward(*_arguments(inputs, dy, s))).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("present", [1, 3])
def test_no_routes_means_every_row_takes_what_is_present(present, device):
    inputs = GroupInputs(
        GroupProblem(19, 40, (33, 20), ((16, 8), (3, 0)), FP32, {1: "reasoning", 3: "both"}[present]), device
    )
    dy, s = _dy(inputs), _s(inputs)
    expected = _named(triton.group_backward(*_arguments(inputs, dy, s)))
    inputs.routes = None
    for name, grad in _named(triton.group_backward(*_arguments(inputs, dy, s))).items():
        assert torch.equal(grad, expected[name]), name


def test_no_tokens(device):
    inputs = GroupInputs(GroupProblem(0, 40, (33, 20), ((16, 8), (3, 0)), BF16), device)
    expected = _named(reference.group_backward(*_arguments(inputs, _dy(inputs), _s(inputs))))
    for name, grad in _run(inputs, _dy(inputs)).items():
        assert grad.shape == expected[name].shape and grad.dtype == expected[name].dtype, name
        assert (grad == 0).all(), name


def test_only_the_gradients_that_are_needed(device):
    inputs = GroupInputs(GroupProblem(20, 24, (16, 12), ((4, 3), (2, 0)), FP32), device)
    dy = _dy(inputs)
    everything = _run(inputs, dy)
    nothing = (False, *([[False] * 2] * 5))
    for name in ("dx", "dA_r1", "dB_e0", "dbias1"):
        needs = [name == "dx", *([name == f"{kind}{i}" for i in range(2)] for kind in LISTS)]
        alone = _run(inputs, dy, tuple(needs))
        assert [other for other, grad in alone.items() if grad is not None] == [name]
        assert torch.equal(alone[name], everything[name]), name
    assert all(grad is None for grad in _run(inputs, dy, nothing).values())


# numpy, which the interpreter multiplies with, warns about NaN
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("problem", "bad"),
    [
        (GroupProblem(20, 24, (16, 12, 8), ((4, 3), (2, 5), (3, 3)), BF16), NAN),
        (GroupProblem(12, 24, (16, 12), ((4, 3), (2, 2)), BF16), float("-inf")),
        (GroupProblem(12, 24, (16, 12), ((4, 3), (2, 2)), FP16, adapter_dtype=FP32), NAN),
    ],
    ids=str,
)
def test_what_is_not_finite_stays_with_its_row_or_its_adapter(problem, bad, device):
    inputs = GroupInputs(problem, device)
    inputs.routes = (torch.arange(problem.tokens, device=device) % 4).to(torch.int8)
    dy = _dy(inputs)
    clean = _run(inputs, dy)
    row, others = 5, torch.arange(problem.tokens, device=device) != 5  # route 1: reasoning alone
    broken = dy.clone()
    broken[row, 17] = bad  # a column of the second projection
    grads = _run(inputs, broken)
    assert torch.equal(grads["dx"][others], clean["dx"][others]) and not grads["dx"][row].isfinite().any()
    for i in range(len(problem.widths)):
        same = {f"dA_e{i}", f"dB_e{i}"} | ({f"dA_r{i}", f"dB_r{i}", f"dbias{i}"} if i != 1 else set())
        for name in same:
            assert torch.equal(grads[name], clean[name]), name
    assert not grads["dA_r1"].isfinite().any() and not grads["dB_r1"].isfinite().all()
    good = inputs.x[row].clone()
    inputs.x[row] = bad
    grads = _run(inputs, dy)
    inputs.x[row] = good
    assert torch.equal(grads["dx"], clean["dx"]) and not grads["dA_r0"].isfinite().any()
    for name in (f"{kind}{i}" for i in range(len(problem.widths)) for kind in ("dA_e", "dB_e", "dbias")):
        assert torch.equal(grads[name], clean[name]), name
    for matrices in ("A_r", "A_e", "B_r", "B_e"):
        uses = (inputs.routes & (1 if matrices.endswith("r") else 2)) != 0
        value = getattr(inputs, matrices)[1][1, 1].clone()
        s = _s(inputs)
        getattr(inputs, matrices)[1][1, 1] = bad
        grads = _named(triton.group_backward(*_arguments(inputs, dy, s)))
        getattr(inputs, matrices)[1][1, 1] = value
        assert torch.equal(grads["dx"][~uses], clean["dx"][~uses]), matrices
        columns = torch.ones(problem.features, dtype=torch.bool, device=device)
        if matrices[0] == "A":  # one feature of dx; every feature where B made a column of dS bad
            columns[:] = False
            columns[1] = True
        assert not grads["dx"][uses][:, columns].isfinite().any(), matrices
        assert torch.equal(grads["dx"][:, ~columns], clean["dx"][:, ~columns]), matrices
        for name, grad in grads.items():
            if name != "dx" and name != f"dA_{matrices[-1]}1":
                assert torch.equal(grad, clean[name]), (matrices, name)
