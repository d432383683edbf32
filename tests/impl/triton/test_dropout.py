"""The dropout mask inside the kernels is the reference's, bit for bit, wherever it is drawn again."""

from __future__ import annotations

import pytest
import torch
from triton_problems import BF16, FP32, SCALING, Inputs, Problem

from twn_kernels.impl import triton
from twn_kernels.impl.reference.dropout import keep_mask
from twn_kernels.impl.triton.config import shrink_config
from twn_kernels.testing.oracle import assert_as_good_as_torch

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def _identity_problem(device, dropout, seed, dtype=FP32, tokens=37, features=40) -> Inputs:
    """x of ones and A of the identity: ``s`` is the mask, times scaling / (1 - p)."""
    inputs = Inputs(Problem(tokens, features, 8, (features, features), dtype, "both", dropout=dropout), device)
    inputs.x.fill_(1.0)
    for A in inputs.A:
        A.copy_(torch.eye(features))
    inputs.seed = torch.tensor([seed], device=device)
    return inputs


@pytest.mark.parametrize("dropout", [(0.5, 0.25), (0.0, 0.9), (1e-9, 0.9999999), (0.75, 0.0)], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_shrink_draws_the_reference_mask(seed, dropout, device):
    inputs = _identity_problem(device, dropout, seed)
    s = triton.forward(*inputs.arguments)[1]
    for adapter, part in enumerate(s.split(40, dim=1)):
        keep = keep_mask(inputs.seed, adapter, 37, 40, dropout[adapter])
        value = SCALING[adapter] / (1 - dropout[adapter])
        truth = keep.double() * value
        assert_as_good_as_torch(part, truth, truth.to(part.dtype))
        assert torch.equal(part != 0, keep)


def test_a_split_shrink_draws_the_same_mask(device):
    """Many features, few tokens: each part must count its features from the start of x, not of its part."""
    assert shrink_config(3, 1216, 64, 64, False, 90).splits > 1
    wide = Inputs(Problem(3, 1216, 8, (64, 64), BF16, "both", dropout=(0.5, 0.5)), device)
    wide.x.fill_(1.0)
    for A in wide.A:
        A.zero_()
        A[:, 1152:] = torch.eye(64)
    s = triton.forward(*wide.arguments)[1]
    for adapter, part in enumerate(s.split(64, dim=1)):
        assert torch.equal(part != 0, keep_mask(wide.seed, adapter, 3, 1216, 0.5)[:, 1152:])


@pytest.mark.parametrize("adapter", [0, 1], ids=["reasoning", "embedding"])
def test_dx_draws_the_mask_of_the_forward(adapter, device):
    """No base weight, positive dS and A: dx is zero exactly where the input was dropped."""
    inputs = Inputs(Problem(37, 70, 8, (4, 4), BF16, "both", dropout=(0.4, 0.7)), device)
    inputs.weight.zero_()
    for tensor in (inputs.dy, *inputs.A, *inputs.B):
        tensor.fill_(1.0)
    inputs.routes.fill_(1 << adapter)
    s = triton.forward(*inputs.arguments)[1]
    dx = triton.backward(*inputs.backward_arguments(s))[0]
    assert torch.equal(dx != 0, keep_mask(inputs.seed, adapter, 37, 70, (0.4, 0.7)[adapter]))


@pytest.mark.parametrize("adapter", [0, 1], ids=["reasoning", "embedding"])
def test_dA_sees_the_dropped_input(adapter, device):
    """One token: dA is zero exactly where that token's feature was dropped."""
    inputs = Inputs(Problem(37, 70, 8, (4, 4), BF16, "base", dropout=(0.4, 0.7)), device)
    inputs.problem = Problem(37, 70, 8, (4, 4), BF16, "both", dropout=(0.4, 0.7))
    for tensor in (inputs.x, inputs.dy, *inputs.A, *inputs.B):
        tensor.fill_(1.0)
    inputs.routes[29] = 1 << adapter
    s = triton.forward(*inputs.arguments)[1]
    dA = triton.backward(*inputs.backward_arguments(s))[1 + 2 * adapter]
    keep = keep_mask(inputs.seed, adapter, 37, 70, (0.4, 0.7)[adapter])[29]
    assert torch.equal(dA != 0, keep.expand(4, 70))
