"""Every violation of the tensor contract is one sentence that names the argument, the expectation and what came."""

from __future__ import annotations

import pytest
import torch
from cases import Case, tensors

from twn_kernels.errors import DeviceError, DtypeError, ImplUnavailable, OptionError, ShapeError, TWNError
from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear, dual_lora_linear_fanout

CASE = Case(6, 16, 24, 4, 8, torch.float32, "mixed")


def _lora(**parts):
    return lambda inputs, name="reasoning": {name: inputs[name]._replace(**parts)}


BAD = {
    "x_features": (lambda i: {"x": torch.zeros(6, 15)}, ShapeError, r"got x \[6, 15\] and weight \[24, 16\]"),
    "x_scalar": (lambda i: {"x": torch.tensor(1.0)}, ShapeError, r"x must be \[..., in_features\]"),
    "x_strides": (
        lambda i: {"x": torch.zeros(16, 6).t()},
        ShapeError,
        r"x must have a contiguous last dimension, got strides \(1, 6\). Call x.contiguous",
    ),
    "x_int": (
        lambda i: {"x": i["x"].int(), "weight": i["weight"].int()},
        DtypeError,
        "x must be float32, float16 or bfloat16 .* got torch.int32",
    ),
    "weight_dtype": (
        lambda i: {"weight": i["weight"].half()},
        DtypeError,
        r"weight must have the dtype of x \(torch.float32\), got torch.float16",
    ),
    "weight_device": (
        lambda i: {"weight": i["weight"].to("meta")},
        DeviceError,
        r"weight must be on the device of x \(cpu\), got meta",
    ),
    "bias_shape": (
        lambda i: {"bias": torch.zeros(23)},
        ShapeError,
        r"bias must be \[24\] \(out_features of weight\), got \[23\]",
    ),
    "bias_dtype": (lambda i: {"bias": i["bias"].half()}, DtypeError, "bias must have the dtype of x"),
    "A_shape": (
        _lora(A=torch.zeros(4, 15)),
        ShapeError,
        r"reasoning.A must be \[rank, 16\] \(in_features of weight\), got \[4, 15\]",
    ),
    "rank_zero": (
        _lora(A=torch.zeros(0, 16), B=torch.zeros(24, 0)),
        ShapeError,
        "reasoning.A must have a rank of 1 … 256 .* got 0",
    ),
    "rank_large": (_lora(A=torch.zeros(257, 16), B=torch.zeros(24, 257)), ShapeError, "rank of 1 … 256 .* got 257"),
    "B_shape": (
        _lora(B=torch.zeros(24, 8)),
        ShapeError,
        r"reasoning.B must be \[24, 4\] \(out_features of weight, rank of reasoning.A\), got \[24, 8\]",
    ),
    "A_dtype": (
        _lora(A=torch.zeros(4, 16).half()),
        DtypeError,
        "reasoning.A must be torch.float32 next to an x of torch.float32, A and B alike, got torch.float16",
    ),
    "B_dtype": (
        _lora(B=torch.zeros(24, 4).double()),
        DtypeError,
        "reasoning.B must be torch.float32 .* got torch.float64",
    ),
    "two_dtypes": (
        lambda i: {
            "x": i["x"].half(),
            "weight": i["weight"].half(),
            "bias": None,
            "embedding": LoRA(i["embedding"].A.half(), i["embedding"].B.half(), 1.0),
        },
        DtypeError,
        "both adapters must have one dtype, got reasoning torch.float32 and embedding torch.float16",
    ),
    "plan_tokens": (
        lambda i: {"plan": RoutePlan.uniform(None, 5)},
        ShapeError,
        "plan covers 5 tokens but x has 6 .*Build the plan from the same batch",
    ),
    "plan_type": (
        lambda i: {"plan": torch.zeros(6, dtype=torch.int8)},
        DtypeError,
        "plan must be a RoutePlan, got Tensor. Build one with RoutePlan.from_routes",
    ),
    "plan_device": (
        lambda i: {"plan": RoutePlan.uniform("both", 6, device="meta")},
        DeviceError,
        "plan.routes must be on the device of x",
    ),
    "dropout": (lambda i: {"dropout": (0.1, 1.0)}, OptionError, r"dropout must be two probabilities in \[0, 1\)"),
    "impl": (lambda i: {"impl": "tritn"}, OptionError, "impl must be one of .* got 'tritn'. Did you mean \"triton\""),
}


@pytest.mark.parametrize("op", [dual_lora_linear, dual_lora_linear_fanout], ids=["linear", "fanout"])
@pytest.mark.parametrize("name", BAD)
def test_violation(name, op):
    change, error, message = BAD[name]
    inputs = tensors(CASE, "cpu")
    arguments = inputs | {"plan": CASE.plan("cpu")} | change(inputs)
    with pytest.raises(error, match=message) as caught:
        op(**arguments)
    assert isinstance(caught.value, TWNError)


@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_float64_is_the_reference_s_alone(impl):
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in tensors(CASE, "cpu").items()}
    for name in ("reasoning", "embedding"):
        inputs[name] = LoRA(inputs[name].A.double(), inputs[name].B.double(), 1.0)
    plan = CASE.plan("cpu")
    with pytest.raises(ImplUnavailable, match=f'impl="{impl}" was asked for, but .*float64.*Or use impl="auto"'):
        dual_lora_linear(**inputs, plan=plan, impl=impl)
    assert dual_lora_linear(**inputs, plan=plan).dtype == torch.float64


def test_the_environment_chooses_only_where_the_caller_left_auto(monkeypatch):
    from twn_kernels.ops.choice import resolve

    cpu, fp32 = torch.device("cpu"), torch.float32
    monkeypatch.setenv("TWN_IMPL", "reference")
    assert resolve("auto", cpu, fp32) == "reference"
    assert resolve("blas", cpu, fp32) == "blas"
    monkeypatch.setenv("TWN_IMPL", "blass")
    with pytest.raises(OptionError, match='TWN_IMPL must be one of .* Did you mean "blas"'):
        resolve("auto", cpu, fp32)


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch):
    from twn_kernels.ops.choice import unavailable_reason

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a GPU and the tensors are on cpu" in unavailable_reason("triton", "cpu")
    assert "TRITON_INTERPRET=1" in unavailable_reason("triton", "cpu")
