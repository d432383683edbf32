"""The edges of the registered ops: second derivatives, transforms, export, meta tensors, strides, autocast."""

from __future__ import annotations

import pytest
import torch
from cases import Case, as_dtype, run, tensors

from twn_kernels.errors import DtypeError, OptionError
from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear, dual_lora_linear_fanout
from twn_kernels.testing.oracle import assert_as_good_as_torch

IMPLS = ("reference", "blas", "triton")
CASE = Case(9, 32, 24, 4, 8, torch.float32, "mixed")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused_rather_than_wrong(impl, device):
    inputs, plan = tensors(CASE, device), CASE.plan(device)
    x = inputs["x"].detach().requires_grad_()
    y = dual_lora_linear(**inputs | {"x": x}, plan=plan, impl=impl)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="dual_lora_linear has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_a_bias_of_any_stride(impl, bias, device):
    inputs, plan = tensors(CASE, device), CASE.plan(device)
    values = torch.randn(24, 2, device=device)[:, 0] if bias == "strided" else torch.randn(1, device=device).expand(24)
    expected = dual_lora_linear(
        **inputs | {"bias": values.clone(memory_format=torch.contiguous_format)}, plan=plan, impl=impl
    )
    assert torch.equal(dual_lora_linear(**inputs | {"bias": values}, plan=plan, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_lazy_negation_is_not_lost(impl, device):
    inputs, plan = tensors(CASE, device), CASE.plan(device)
    expected = dual_lora_linear(**inputs | {"x": -inputs["x"]}, plan=plan, impl=impl)
    assert torch.equal(dual_lora_linear(**inputs | {"x": torch._neg_view(inputs["x"])}, plan=plan, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_is_refused_rather_than_dropped(impl, device):
    import torch.autograd.forward_ad as forward_ad

    inputs, plan = tensors(CASE, device), CASE.plan(device)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            dual_lora_linear(**inputs | {"x": x}, plan=plan, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_strides_are_those_that_the_fake_predicts(impl, device):
    inputs = tensors(CASE, device)
    loras = []
    for name in ("reasoning", "embedding"):
        loras += [t.t().contiguous().t() for t in inputs[name][:2]]
    routes = torch.full((9,), 1, dtype=torch.int8, device=device)
    dy, s = torch.randn(9, 24, device=device), torch.randn(9, 12, device=device)
    arguments = (
        dy, None, None, inputs["x"], inputs["weight"], *loras, 0.5, 2.0, s, routes, 1, False, 0.0, 0.0, None,
        [True] * 6, impl,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.twn.dual_lora_linear_backward.default, arguments, test_utils=checks)


def test_meta_tensors_have_shapes():
    inputs = tensors(CASE, "cpu")

    def to_meta(value):
        return (
            LoRA(value.A.to("meta"), value.B.to("meta"), value.scaling) if isinstance(value, LoRA) else value.to("meta")
        )

    meta = {name: to_meta(value) for name, value in inputs.items()}
    y = dual_lora_linear(**meta, plan=RoutePlan.uniform("both", 9, device="meta"))
    assert y.shape == (9, 24) and y.device.type == "meta"


def test_export_keeps_the_token_count_free():
    inputs = tensors(CASE, "cpu")

    class Layer(torch.nn.Module):
        def forward(self, x, routes):
            return dual_lora_linear(**inputs | {"x": x}, plan=RoutePlan(routes))

    tokens = torch.export.Dim("tokens", min=2, max=512)
    example = (inputs["x"], torch.ones(9, dtype=torch.int8))
    program = torch.export.export(Layer(), example, dynamic_shapes=({0: tokens}, {0: tokens})).module()
    x, routes = torch.randn(31, 32), torch.randint(0, 4, (31,), dtype=torch.int8)
    assert torch.equal(program(x, routes), Layer()(x, routes))


@pytest.mark.parametrize("fanout", [False, True], ids=["linear", "fanout"])
@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_backward_under_autocast_keeps_its_precision(impl, fanout, device):
    inputs, plan = tensors(CASE, device), CASE.plan(device)
    weight = inputs["weight"].detach().requires_grad_()
    truth = run(CASE, as_dtype(inputs, torch.float64), plan, "reference", fanout=fanout)
    own = run(CASE, inputs, plan, "reference", fanout=fanout)
    op = dual_lora_linear_fanout if fanout else dual_lora_linear
    x = inputs["x"].detach().requires_grad_()
    out = op(**inputs | {"x": x, "weight": weight}, plan=plan, impl=impl)
    out = out if fanout else (out,)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=generator).to(device) for y in out]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.autograd.backward(out, pulls)
    assert_as_good_as_torch(x.grad, truth["d(x)"], own["d(x)"])
    whole = sum(pulls).double().t() @ inputs["x"].double()
    assert_as_good_as_torch(weight.grad, whole.cpu(), (sum(pulls).t() @ inputs["x"]).cpu(), "d(weight)")


def test_a_plan_made_in_inference_mode_serves_training():
    inputs = tensors(CASE, "cpu")
    with torch.inference_mode():
        plans = [
            RoutePlan.uniform("both", 9),
            RoutePlan.from_segments([4, 5], ["reasoning", None]),
            RoutePlan.from_routes(torch.ones(9, dtype=torch.int8)),
        ]
    for plan in plans:
        x = inputs["x"].detach().requires_grad_()
        dual_lora_linear(**inputs | {"x": x}, plan=plan).sum().backward()
        assert x.grad is not None
    plans[2].refresh_(torch.zeros(9, dtype=torch.int8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, DtypeError, "x must be a torch tensor, got list"),
        ({"reasoning": (1, 2, 3)}, DtypeError, r"reasoning must be LoRA\(A, B, scaling\) .* got tuple"),
        ({"embedding": LoRA(None, None)}, DtypeError, "embedding must be LoRA"),
        ({"dropout": 0.5}, OptionError, "dropout must be two probabilities, one an adapter, got 0.5"),
    ],
)
def test_other_kinds_are_named(change, error, message):
    with pytest.raises(error, match=message):
        dual_lora_linear(**tensors(CASE, "cpu") | {"plan": CASE.plan("cpu")} | change)


def test_scaling_must_be_a_number():
    inputs = tensors(CASE, "cpu")
    lora = inputs["reasoning"]._replace(scaling=torch.tensor(1.0))
    with pytest.raises(DtypeError, match="reasoning.scaling must be a Python number .* got Tensor"):
        dual_lora_linear(**inputs | {"reasoning": lora}, plan=CASE.plan("cpu"))


@pytest.mark.parametrize(
    "routes",
    [
        torch.zeros(9, dtype=torch.int64),
        torch.zeros(3, 3, dtype=torch.int8),
        torch.zeros(1, dtype=torch.int8).expand(9),
    ],
    ids=["int64", "two-dimensional", "expanded"],
)
def test_a_plan_built_by_hand_is_checked(routes):
    with pytest.raises(DtypeError, match=r"plan.routes must be a contiguous int8 tensor \[tokens\]"):
        dual_lora_linear(**tensors(CASE, "cpu"), plan=RoutePlan(routes))
