"""The dual-LoRA layer by itself: its arithmetic, its life as an nn.Linear, its edges."""

import copy

import pytest
import torch
from torch import nn

from twn_kernels.errors import DtypeError, OptionError, PatchError, ShapeError
from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.dual_lora_linear import LayerAdapter
from twn_kernels.modules.routing import PlanSpec, RouteState, RowSpec, TokenSpec, UniformSpec
from twn_kernels.ops import RoutePlan
from twn_kernels.testing.oracle import assert_as_good_as_torch

NAMES = ("reasoning", "embedding")


def _layer(in_features=24, out_features=16, rank=None, **options):
    layer = DualLoRALinear(in_features, out_features, rank=rank or {"reasoning": 5, "embedding": 3}, **options)
    for name in layer.scaling:
        layer.lora_B[name].data.normal_()
        layer.scaling[name] = {"reasoning": 0.7, "embedding": 1.9}[name]
    return layer


def _obvious(layer, x, routes, dtype):
    """One token at a time."""
    weight, bias, x = (None if t is None else t.detach().to(dtype) for t in (layer.weight, layer.bias, x))
    rows = []
    for token, bits in zip(x, routes.tolist(), strict=True):
        y = weight @ token if bias is None else weight @ token + bias
        for bit, name in ((1, "reasoning"), (2, "embedding")):
            if bits & bit and name in layer.scaling:
                A, B = layer.lora_A[name].detach().to(dtype), layer.lora_B[name].detach().to(dtype)
                y = y + layer.scaling[name] * (B @ (A @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("ranks", [{"reasoning": 5, "embedding": 3}, {"reasoning": 4}, {"embedding": 2}, {}], ids=str)
@torch.no_grad()
def test_each_token_by_hand(ranks, bias, dtype):
    layer = DualLoRALinear(24, 16, bias, rank=ranks, dtype=dtype)
    for name in ranks:
        layer.lora_B[name].data.normal_()
        layer.scaling[name] = 0.7
    x, routes = torch.randn(11, 24).to(dtype), torch.randint(0, 4, (11,), dtype=torch.int8)
    actual = layer(x, RoutePlan.from_routes(routes))
    assert_as_good_as_torch(actual, _obvious(layer, x, routes, torch.float64), _obvious(layer, x, routes, dtype))


@torch.no_grad()
def test_fp32_adapters_beside_a_bf16_weight():
    layer = _layer().bfloat16()
    layer.lora_A.float()
    layer.lora_B.float()
    x, plan = torch.randn(6, 24).bfloat16(), RoutePlan.uniform("both", 6)
    truth = _obvious(layer, x, plan.routes, torch.float64)
    assert_as_good_as_torch(layer(x, plan), truth, _obvious(layer, x, plan.routes, torch.float32).bfloat16())


@pytest.mark.parametrize("stored", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_adapters_of_unlike_dtypes_still_run(dtype, stored):
    layer = _layer().to(dtype)
    for name, kept in zip(NAMES, stored, strict=True):
        layer.lora_A[name].data, layer.lora_B[name].data = layer.lora_A[name].to(kept), layer.lora_B[name].to(kept)
    x, plan = torch.randn(6, 24).to(dtype), RoutePlan.uniform("both", 6)
    naive = _obvious(layer, x, plan.routes, torch.float32).to(dtype)
    if dtype == torch.float64:
        naive = naive.copy_(_obvious(layer, x, plan.routes, torch.float64))
    assert_as_good_as_torch(layer(x, plan), _obvious(layer, x, plan.routes, torch.float64), naive)


@torch.no_grad()
def test_without_a_route_it_is_the_linear():
    layer, x = _layer(), torch.randn(2, 3, 24)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, RoutePlan.uniform(None, 6)), expected)


@torch.no_grad()
def test_strides_and_empty_inputs():
    layer = _layer()
    x = torch.randn(24, 6).T
    plan = RoutePlan.uniform("both", 6)
    assert x.stride(-1) != 1
    assert torch.equal(layer(x, plan), layer(x.contiguous(), plan))
    assert layer(torch.randn(0, 24), RoutePlan.uniform("both", 0)).shape == (0, 16)
    layer.routing.enter(RowSpec([1, 2]))
    assert layer(torch.randn(2, 0, 24)).shape == (2, 0, 16)


def test_gradients_reach_both_adapters_and_the_input():
    layer, x = _layer().double(), torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    plan = RoutePlan.from_routes(torch.tensor([0, 1, 2, 3, 1, 2, 0], dtype=torch.int8))
    layer.weight.requires_grad_(False)
    parameters = [x, *(layer.lora_A[n] for n in NAMES), *(layer.lora_B[n] for n in NAMES), layer.bias]

    def run(x, A_r, A_e, B_r, B_e, bias):
        values = {"lora_A.reasoning": A_r, "lora_A.embedding": A_e, "lora_B.reasoning": B_r, "lora_B.embedding": B_e}
        return torch.func.functional_call(layer, values | {"bias": bias}, (x, plan))

    assert torch.autograd.gradcheck(run, parameters)


def test_a_fresh_layer_equals_its_base_and_trains():
    layer = DualLoRALinear(24, 16, rank=4)
    x, plan = torch.randn(5, 24), RoutePlan.uniform("both", 5)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_as_good_as_torch(layer(x, plan), truth, base)
    assert layer.lora_A["reasoning"].abs().max() > 0 and layer.lora_B["reasoning"].abs().max() == 0
    bound = 24**-0.5  # kaiming_uniform_ with a = sqrt(5), as PEFT draws A
    assert 0.5 * bound < layer.lora_A["reasoning"].abs().max() <= bound


def test_names_in_the_state_dict():
    layer = DualLoRALinear(8, 4, rank={"embedding": 2})
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.embedding", "lora_B.embedding"]
    assert layer.lora("reasoning") is None
    assert "rank={'embedding': 2}" in repr(layer)


def test_adopt_and_release_keep_the_object():
    linear = nn.Linear(8, 4)
    attributes, weight = set(linear.__dict__), linear.weight
    adapters = {"embedding": LayerAdapter.fresh(linear, 2)}
    layer = DualLoRALinear.adopt(linear, adapters, RouteState(UniformSpec(2)), path="x.y")
    assert layer is linear and layer.weight is weight and isinstance(layer, DualLoRALinear)
    assert layer.lora_A["embedding"].data_ptr() == adapters["embedding"].A.data_ptr()
    copied = copy.deepcopy(layer)
    assert copied.routing is not layer.routing and torch.equal(copied.weight, weight)
    assert layer.release() is linear and type(linear) is nn.Linear and set(linear.__dict__) == attributes
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_adopt_refuses():
    with pytest.raises(PatchError, match='layer "a.b" must be a plain nn.Linear to adopt, got Conv1d'):
        DualLoRALinear.adopt(nn.Conv1d(1, 1, 1), {}, RouteState(UniformSpec(0)), path="a.b")
    linear = nn.Linear(8, 4)
    with pytest.raises(OptionError, match="got 'embeding'.*Did you mean \"embedding\""):
        DualLoRALinear.adopt(linear, {"embeding": LayerAdapter.fresh(linear, 2)}, RouteState(UniformSpec(0)))
    assert type(linear) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank of reasoning must be a whole number in \[1, 256\], got 0"),
        ({"rank": {"embedding": 257}}, "rank of embedding .* got 257"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
    ],
    ids=str,
)
def test_options(options, message):
    with pytest.raises(OptionError, match=message):
        DualLoRALinear(8, 4, **options)


def test_wrong_inputs():
    layer = _layer()
    with pytest.raises(ShapeError, match="in_features"):
        layer(torch.randn(3, 23), RoutePlan.uniform("both", 3))
    with pytest.raises(ShapeError, match="plan covers 4 tokens but x has 3"):
        layer(torch.randn(3, 24), RoutePlan.uniform("both", 4))
    with pytest.raises(DtypeError, match="weight must have the dtype of x"):
        layer(torch.randn(3, 24).bfloat16(), RoutePlan.uniform("both", 3))


def test_specs_build_the_plans_they_say():
    layer, state = _layer(), RouteState(UniformSpec(0))
    x = torch.randn(2, 3, 24)
    plan = RowSpec([1, 2]).plan_for(x, layer, state)
    assert plan.routes.tolist() == [1, 1, 1, 2, 2, 2] and plan.present == 3 and not plan.is_uniform
    plan = RowSpec([1, 1]).plan_for(x, layer, state)
    assert plan.routes.tolist() == [1] * 6 and plan.present == 1 and plan.is_uniform
    tokens = TokenSpec(torch.tensor([[0, 1, 2], [2, 2, 0]], dtype=torch.int8))
    assert tokens.plan_for(x, layer, state).routes.tolist() == [0, 1, 2, 2, 2, 0]
    assert tokens.plan_for(x[:, :1], layer, state).routes.tolist() == [2, 0]
    state.expand = 2
    assert RowSpec([1, 2]).plan_for(torch.randn(4, 1, 24), layer, state).routes.tolist() == [1, 1, 2, 2]
    assert tokens.plan_for(torch.randn(4, 1, 24), layer, state).routes.tolist() == [2, 2, 0, 0]
    given = RoutePlan.uniform("both", 6)
    assert PlanSpec(given).plan_for(x, layer, state) is given
    assert UniformSpec(0).plan_for(x, layer, state) is None


def test_a_token_spec_keeps_its_own_copy():
    routes = torch.ones(1, 2, dtype=torch.int8)
    spec = TokenSpec(routes)
    routes.zero_()
    assert spec.plan_for(torch.randn(1, 2, 24), _layer(), RouteState(UniformSpec(0))).routes.tolist() == [1, 1]


def test_plans_kept_are_bounded():
    spec, layer, state = RowSpec([1]), _layer(), RouteState(UniformSpec(0))
    for tokens in range(1, 100):
        spec.plan_for(torch.randn(1, tokens, 24), layer, state)
    assert len(spec._plans) <= 16
