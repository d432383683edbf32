"""Forward, fan-out and every gradient of each implementation against fp64 truth, on odd shapes, routes and strides."""

from __future__ import annotations

import pytest
import torch
from cases import Case, as_dtype, run, tensors

from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear, dual_lora_linear_fanout
from twn_kernels.testing.oracle import assert_as_good_as_torch

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
IMPLS = ("reference", "blas", "triton")

CASES = [
    Case(1, 64, 96, 8, 8, FP32, "reasoning"),
    Case(7, 96, 64, 16, 1, BF16, "mixed"),
    Case(33, 257, 31, 17, 5, FP32, "mixed", bias=False),
    Case(63, 64, 257, 64, 32, FP16, "alternating"),
    Case(65, 96, 96, 1, 16, BF16, "suffix"),
    Case(64, 64, 64, 8, 16, FP16, "base"),
    Case(20, 48, 80, 16, 16, FP32, "both"),
    Case(31, 64, 33, 16, 48, BF16, "segments", bias=False),
    Case(17, 64, 64, 8, 4, BF16, "mixed", adapter_dtype=FP32),
    Case(17, 65, 64, 8, 4, FP16, "embedding", adapter_dtype=FP32),
    Case(19, 64, 32, 8, 8, FP32, "mixed", dropout=(0.25, 0.5)),
    Case(19, 64, 32, 8, 8, BF16, "reasoning", dropout=(0.25, 0.0)),
    Case(5, 1, 1, 1, 1, FP32, "mixed"),
    Case(3, 16, 16, 256, 255, FP32, "mixed"),
    Case(0, 16, 24, 4, 4, FP32, "mixed"),
]


@pytest.mark.parametrize("fanout", [False, True], ids=["linear", "fanout"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_as_good_as_torch(case, impl, fanout, device, cut_from_nan):
    inputs, plan = tensors(case, device, cut_from_nan), case.plan(device)
    truth = run(case, as_dtype(inputs, FP64), plan, "reference", fanout=fanout)
    torch_own = _eager_torch(case, inputs, plan, fanout) if not any(case.dropout) else None
    actual = run(case, inputs, plan, impl, fanout=fanout)
    torch_own = torch_own or run(case, inputs, plan, "reference", fanout=fanout)
    for name, value in actual.items():
        assert_as_good_as_torch(value, truth[name], torch_own[name], f"{impl} {name}")


def _eager_torch(case, inputs, plan, fanout) -> dict:
    """What a user would write in eager torch, in the dtypes as they are: autograd does the backward."""
    x = inputs["x"].detach().requires_grad_()
    bias = None if inputs["bias"] is None else inputs["bias"].detach().requires_grad_()
    loras = {
        name: LoRA(
            inputs[name].A.detach().requires_grad_(), inputs[name].B.detach().requires_grad_(), inputs[name].scaling
        )
        for name in ("reasoning", "embedding")
    }
    base = torch.nn.functional.linear(x, inputs["weight"], bias)
    terms = {}
    for bit, (name, lora) in zip((1, 2), loras.items(), strict=True):
        delta = (x.to(lora.A.dtype) @ lora.A.T) @ lora.B.T * lora.scaling
        terms[name] = torch.where(((plan.routes & bit) != 0)[:, None], delta, 0.0)
    if fanout:
        outputs = {f"y_{name}": (base + term).to(x.dtype) for name, term in terms.items()}
    else:
        outputs = {"y": (base + terms["reasoning"] + terms["embedding"]).to(x.dtype)}
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs.values()]
    torch.autograd.backward(list(outputs.values()), pulls)
    grads = {"d(x)": x.grad} | ({} if bias is None else {"d(bias)": bias.grad})
    for name, lora in loras.items():
        grads |= {f"d({name}.A)": lora.A.grad, f"d({name}.B)": lora.B.grad}
    return outputs | {name: grad if grad is not None else torch.zeros(()) for name, grad in grads.items()}


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_shapes_and_strides(impl, device):
    case = Case(24, 32, 40, 4, 8, FP32)
    inputs, plan = tensors(case, device), case.plan(device)
    flat = dual_lora_linear(**inputs, plan=plan, impl=impl)
    cube = dual_lora_linear(**inputs | {"x": inputs["x"].view(2, 3, 4, 32)}, plan=plan, impl=impl)
    assert cube.shape == (2, 3, 4, 40)
    assert torch.equal(cube.view(24, 40), flat)
    every_second = torch.zeros(48, 32, device=device)
    every_second[::2] = inputs["x"]
    assert torch.equal(dual_lora_linear(**inputs | {"x": every_second[::2]}, plan=plan, impl=impl), flat)
    transposed_weight = inputs["weight"].t().contiguous().t()
    truth = run(case, as_dtype(inputs, FP64), plan, "reference")["y"]
    pitched = dual_lora_linear(**inputs | {"weight": transposed_weight}, plan=plan, impl=impl)
    assert_as_good_as_torch(pitched, truth, flat, "transposed weight")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("absent", ["reasoning", "embedding", "both"])
def test_an_absent_adapter_adds_nothing(impl, absent, device):
    case = Case(12, 32, 24, 4, 8, FP32)
    inputs, plan = tensors(case, device), RoutePlan.uniform("both", 12, device=device)
    zeroed = dict(inputs)
    for name in ("reasoning", "embedding"):
        if absent in (name, "both"):
            zeroed[name] = inputs[name]._replace(B=torch.zeros_like(inputs[name].B))
            inputs[name] = None
    truth = dual_lora_linear(**as_dtype(zeroed, FP64), plan=plan, impl="reference")
    own = dual_lora_linear(**zeroed, plan=plan, impl="reference")
    assert_as_good_as_torch(dual_lora_linear(**inputs, plan=plan, impl=impl), truth, own)


@pytest.mark.parametrize("impl", IMPLS)
def test_fanout_without_a_plan_serves_both_adapters_everywhere(impl, device):
    case = Case(9, 32, 24, 4, 8, FP32)
    inputs = tensors(case, device)
    y_r, y_e = dual_lora_linear_fanout(**inputs, impl=impl)
    for name, y in (("reasoning", y_r), ("embedding", y_e)):
        plan = RoutePlan.uniform(name, 9, device=device)
        truth = dual_lora_linear(**as_dtype(inputs, FP64), plan=plan, impl="reference")
        assert_as_good_as_torch(y, truth, dual_lora_linear(**inputs, plan=plan, impl="reference"), name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_base_weight_that_trains_gets_its_gradient(impl, device):
    case = Case(9, 32, 24, 4, 8, FP32, "mixed")
    inputs, plan = tensors(case, device), case.plan(device)
    weight = inputs["weight"].detach().requires_grad_()
    dual_lora_linear(**inputs | {"weight": weight}, plan=plan, impl=impl).sum().backward()
    truth = torch.ones(24, 9, dtype=FP64) @ inputs["x"].double().cpu()
    assert_as_good_as_torch(weight.grad, truth, (torch.ones(24, 9) @ inputs["x"].cpu()))


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_keeps_the_stated_share_and_differs_by_adapter_and_call(impl, device):
    tokens, features = 40, 64
    eye = torch.eye(features, device=device)
    lora = LoRA(eye, eye, 1.0)
    x, weight = torch.ones(tokens, features, device=device), torch.zeros(features, features, device=device)
    y_r, y_e = dual_lora_linear_fanout(x, weight, None, lora, lora, dropout=(0.25, 0.25), impl=impl)
    again, _ = dual_lora_linear_fanout(x, weight, None, lora, lora, dropout=(0.25, 0.25), impl=impl)
    kept = (y_r != 0).double().mean().item()
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / y_r.numel()) ** 0.5
    kept = torch.full_like(y_r[y_r != 0], 4 / 3)
    assert_as_good_as_torch(y_r[y_r != 0], torch.full_like(kept, 4 / 3, dtype=torch.float64), kept)
    for other in (y_e, again):
        agreement = ((y_r != 0) == (other != 0)).double().mean().item()
        assert abs(agreement - (0.75**2 + 0.25**2)) < 0.05


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bitwise_equal(impl, device):
    case = Case(33, 64, 48, 8, 16, BF16)
    inputs, plan = tensors(case, device), case.plan(device)
    first, second = run(case, inputs, plan, impl), run(case, inputs, plan, impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_autocast_casts_like_a_linear_layer(impl, device):
    case = Case(11, 32, 24, 4, 8, FP32)
    inputs, plan = tensors(case, device), case.plan(device)
    with torch.autocast(device.type, dtype=BF16):
        y = dual_lora_linear(**inputs, plan=plan, impl=impl)
    assert y.dtype == BF16
    narrow = as_dtype(inputs, BF16)
    truth = dual_lora_linear(**as_dtype(narrow, FP64), plan=plan, impl="reference")
    assert_as_good_as_torch(y, truth, dual_lora_linear(**narrow, plan=plan, impl="reference"))
