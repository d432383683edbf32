"""The specification is PEFT's mathematics: single, mixed by row, disabled, rsLoRA, fp32 next to bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twn_kernels.impl import reference
from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear
from twn_kernels.testing.oracle import assert_as_good_as_torch

peft = pytest.importorskip("peft")

ADAPTERS = ("reasoning", "embedding")
BF16, FP32 = torch.bfloat16, torch.float32


class _Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = nn.Linear(48, 40, dtype=dtype)

    def forward(self, x):
        return self.proj(x)


def _peft_net(dtype: torch.dtype, *, rslora: bool, autocast_adapter_dtype: bool):
    config = {"target_modules": ["proj"], "use_rslora": rslora, "lora_dropout": 0.0}
    ranks = {"reasoning": 8, "embedding": 4}
    net = peft.get_peft_model(
        _Net(dtype),
        peft.LoraConfig(r=ranks["reasoning"], lora_alpha=12, **config),
        adapter_name="reasoning",
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    net.add_adapter(
        "embedding",
        peft.LoraConfig(r=ranks["embedding"], lora_alpha=20, **config),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    layer = net.base_model.model.proj
    for name in ADAPTERS:
        nn.init.normal_(layer.lora_B[name].weight, std=0.5)
    return net.eval(), layer


def _loras(layer, dtype=None) -> dict[str, LoRA]:
    def cast(t):
        return t.detach() if dtype is None else t.detach().to(dtype)

    return {n: LoRA(cast(layer.lora_A[n].weight), cast(layer.lora_B[n].weight), layer.scaling[n]) for n in ADAPTERS}


def _compare(layer, x, plan, peft_out) -> None:
    base = layer.base_layer
    actual = dual_lora_linear(x, base.weight.detach(), base.bias.detach(), **_loras(layer), plan=plan, impl="reference")
    wide = [t.detach().double() for t in (x, base.weight, base.bias)]
    truth = dual_lora_linear(*wide, **_loras(layer, torch.float64), plan=plan, impl="reference")
    assert_as_good_as_torch(actual, truth, peft_out)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    ("dtype", "upcast"), [(FP32, True), (BF16, False), (BF16, True)], ids=["fp32", "bf16", "bf16-fp32adapters"]
)
@pytest.mark.parametrize("route", ["reasoning", "embedding", None, "both"])
def test_one_route(dtype, upcast, rslora, route):
    net, layer = _peft_net(dtype, rslora=rslora, autocast_adapter_dtype=upcast)
    assert layer.lora_A["reasoning"].weight.dtype == (FP32 if upcast else dtype)
    x = torch.randn(10, 48, dtype=dtype)
    with torch.no_grad():
        if route is None:
            with net.disable_adapter():
                expected = net(x)
        else:
            net.base_model.set_adapter(list(ADAPTERS) if route == "both" else route)
            expected = net(x)
    _compare(layer, x, RoutePlan.uniform(route, 10), expected)


def test_one_adapter_name_a_row():
    net, layer = _peft_net(FP32, rslora=False, autocast_adapter_dtype=True)
    rows = ["embedding", "__base__", "reasoning", "embedding"]
    x = torch.randn(4, 3, 48)
    with torch.no_grad():
        expected = net(x, adapter_names=rows)
    plan = RoutePlan.from_rows([None if row == "__base__" else row for row in rows], 3)
    _compare(layer, x, plan, expected)


def test_gradients_are_peft_s():
    net, layer = _peft_net(FP32, rslora=False, autocast_adapter_dtype=True)
    net.base_model.set_adapter(list(ADAPTERS))
    x = torch.randn(10, 48, requires_grad=True)
    net(x).square().sum().backward()
    leaves = [getattr(layer, part)[n].weight for n in ADAPTERS for part in ("lora_A", "lora_B")]
    base = layer.base_layer

    def fused(dtype):
        own = [t.detach().to(dtype).requires_grad_() for t in (x, *leaves)]
        loras = [LoRA(own[1 + 2 * i], own[2 + 2 * i], layer.scaling[n]) for i, n in enumerate(ADAPTERS)]
        weight, bias = (t.detach().to(dtype) for t in (base.weight, base.bias))
        y = dual_lora_linear(own[0], weight, bias, *loras, RoutePlan.uniform("both", 10), impl="reference")
        y.square().sum().backward()
        return [t.grad for t in own]

    for actual, truth, expected in zip(fused(FP32), fused(torch.float64), (x, *leaves), strict=True):
        assert_as_good_as_torch(actual, truth, expected.grad)


def test_dropout_mask_is_a_pure_function_of_its_counters():
    seed = torch.tensor([-987654321012345678])
    first = reference.dual_lora.keep_mask(seed, 0, 50, 40, 0.3)
    assert torch.equal(first, reference.dual_lora.keep_mask(seed, 0, 50, 40, 0.3))
    # A larger batch leaves the earlier rows and features as they were.
    assert torch.equal(first, reference.dual_lora.keep_mask(seed, 0, 70, 60, 0.3)[:50, :40])
    assert not torch.equal(first, reference.dual_lora.keep_mask(seed, 1, 50, 40, 0.3))
    assert not torch.equal(first, reference.dual_lora.keep_mask(seed + 1, 0, 50, 40, 0.3))
    assert not torch.equal(first, reference.dual_lora.keep_mask(seed + 2**32, 0, 50, 40, 0.3))
    # Rows and columns are uncorrelated to within four standard deviations.
    big = reference.dual_lora.keep_mask(seed, 0, 512, 512, 0.5).double() - 0.5
    for pair in (big[1:] * big[:-1], big[:, 1:] * big[:, :-1]):
        assert abs(pair.mean().item()) < 4 * 0.25 / pair.numel() ** 0.5


def test_blas_draws_the_same_dropout_mask():
    from twn_kernels.impl.blas.dropout import keep_mask

    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789012345):
        for adapter in (0, 1):
            for probability in (0.0001, 0.1, 0.5, 0.999999):
                arguments = (torch.tensor([seed]), adapter, 33, 65, probability)
                assert torch.equal(keep_mask(*arguments), reference.dual_lora.keep_mask(*arguments))
