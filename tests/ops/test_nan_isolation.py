"""NaN or Inf in a row, an upstream gradient or an adapter stays with the rows that use it, in mixed tiles too."""

from __future__ import annotations

import pytest
import torch
from cases import Case, run, tensors

from twn_kernels.ops import RoutePlan

IMPLS = ("reference", "blas", "triton")
BAD = (float("nan"), float("inf"), float("-inf"))
TOKENS = 12


def _setup(device, dtype=torch.float32):
    case = Case(TOKENS, 32, 24, 4, 8, dtype, "mixed")
    routes = torch.tensor([1, 2, 0, 3] * 3, dtype=torch.int8, device=device)
    return case, tensors(case, device), RoutePlan.from_routes(routes)


@pytest.mark.parametrize("fanout", [False, True], ids=["linear", "fanout"])
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_row_reaches_no_other_row(impl, bad, fanout, device):
    case, inputs, plan = _setup(device)
    clean = run(case, inputs, plan, impl, fanout=fanout)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][5] = bad
    dirty = run(case, inputs, plan, impl, fanout=fanout)
    others = [row for row in range(TOKENS) if row != 5]
    for name in (name for name in clean if name.startswith("y") or name == "d(x)"):
        assert torch.equal(clean[name][others], dirty[name][others]), name
    # Row 5 is routed to embedding alone, so the gradient of reasoning must not see it.
    for name in ("d(reasoning.A)", "d(reasoning.B)"):
        assert torch.equal(clean[name], dirty[name]), name
    assert all(not torch.isfinite(dirty[name][5]).any() for name in dirty if name.startswith("y"))


@pytest.mark.parametrize("fanout", [False, True], ids=["linear", "fanout"])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_adapter_reaches_no_row_that_does_not_use_it(impl, bad, part, fanout, device):
    case, inputs, plan = _setup(device)
    clean = run(case, inputs, plan, impl, fanout=fanout)
    tensor = getattr(inputs["reasoning"], part).clone()
    tensor[1, 2] = bad
    inputs["reasoning"] = inputs["reasoning"]._replace(**{part: tensor})
    dirty = run(case, inputs, plan, impl, fanout=fanout)
    unused = ((plan.routes & 1) == 0).nonzero()[:, 0].tolist()
    used = [row for row in range(TOKENS) if row not in unused]
    for name in (name for name in clean if name.startswith("y") or name == "d(x)"):
        assert torch.equal(clean[name][unused], dirty[name][unused]), name
    for name in ("d(embedding.A)", "d(embedding.B)"):
        assert torch.equal(clean[name], dirty[name]), name
    hit = "y_reasoning" if fanout else "y"
    assert not torch.isfinite(dirty[hit][used]).all(dim=1).any(), "a bad adapter must show in the rows that use it"
    if fanout:
        assert torch.equal(clean["y_embedding"], dirty["y_embedding"])


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_upstream_gradient_reaches_no_adapter_that_its_row_does_not_use(impl, bad, device):
    case, inputs, plan = _setup(device)
    arguments = _backward_arguments(case, inputs, plan, device)
    backward = _backward_of(impl)
    clean = backward(*arguments)
    arguments[0] = arguments[0].clone()
    arguments[0][5] = bad
    dirty = backward(*arguments)
    others = [row for row in range(TOKENS) if row != 5]
    assert torch.equal(clean[0][others], dirty[0][others])
    assert torch.equal(clean[1], dirty[1]) and torch.equal(clean[2], dirty[2])
    assert not torch.isfinite(dirty[3]).all() and not torch.isfinite(dirty[4]).all()


def _backward_of(impl):
    from twn_kernels.ops.choice import load

    return load(impl).backward


def _backward_arguments(case, inputs, plan, device) -> list:
    reasoning, embedding = inputs["reasoning"], inputs["embedding"]
    loras = (reasoning.A, reasoning.B, embedding.A, embedding.B)
    scalings = (reasoning.scaling, embedding.scaling)
    from twn_kernels.impl import reference

    _, s = reference.forward(
        inputs["x"], inputs["weight"], None, *loras, *scalings, plan.routes, plan.present, 0.0, 0.0, None
    )
    dy = torch.randn(case.tokens, case.out_features, device=device)
    return [
        dy, None, None, inputs["x"], inputs["weight"], *loras, *scalings, s, plan.routes, plan.present,
        0.0, 0.0, None, (True,) * 6,
    ]  # fmt: skip
