"""Registration with torch: opcheck, fp64 gradcheck, fullgraph without recompiles, no read of device data."""

from __future__ import annotations

import os

import pytest
import torch
from cases import Case, tensors

from twn_kernels.ops import LoRA, RoutePlan, choice, dual_lora_linear, dual_lora_linear_fanout

IMPLS = ("reference", "blas", "triton")
OPS = {"linear": dual_lora_linear, "fanout": dual_lora_linear_fanout}
NAMES = {"linear": "dual_lora_linear", "fanout": "dual_lora_linear_fanout"}


def _flat(impl: str, dtype: torch.dtype, device, *, dropout=0.0, grad=True) -> list:
    case = Case(6, 16, 17, 3, 5, dtype, "mixed")
    inputs = tensors(case, device)
    routes = torch.tensor([0, 1, 2, 3, 1, 2], dtype=torch.int8, device=device)
    lora = [t for name in ("reasoning", "embedding") for t in inputs[name][:2]]
    floats = [inputs["x"], inputs["weight"], inputs["bias"], *lora]
    floats = [t.requires_grad_() if grad and t is not inputs["weight"] else t for t in floats]
    seed = torch.tensor([12345], device=device) if dropout else None
    return [*floats, 0.5, -1.75, routes, 3, False, dropout, dropout, seed, impl]


@pytest.mark.parametrize("form", OPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, form, device):
    torch.library.opcheck(getattr(torch.ops.twn, NAMES[form]).default, _flat(impl, torch.float32, device))


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("form", OPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_in_fp64(impl, form, dropout, device):
    if impl == "triton" and device.type == "cuda":
        pytest.skip("Triton kernels take fp64 in the interpreter alone, for this check")
    # The registered op takes fp64 for this check alone; the public function sends fp64 to the reference.
    arguments = _flat(impl, torch.float64, device, dropout=dropout)
    op = getattr(torch.ops.twn, NAMES[form])
    differentiable = [0, 2, 3, 4, 5, 6]

    def function(*leaves):
        full = list(arguments)
        for index, leaf in zip(differentiable, leaves, strict=True):
            full[index] = leaf
        return op(*full)[:-1]

    torch.autograd.gradcheck(function, [arguments[i] for i in differentiable], fast_mode=impl == "triton")


@pytest.mark.parametrize("form", OPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_to_one_graph_and_does_not_recompile(impl, form, device):
    lora = {name: LoRA(torch.randn(3, 16, device=device), torch.randn(8, 3, device=device), 0.5) for name in "re"}
    weight = torch.randn(8, 16, device=device)
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    def layer(x, routes):
        plan = RoutePlan(routes)
        return OPS[form](x, weight, None, lora["r"], lora["e"], plan, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counting, dynamic=True)
    for tokens in (5, 9, 13):
        x = torch.randn(tokens, 16, device=device)
        routes = torch.randint(0, 4, (tokens,), dtype=torch.int8, device=device)
        expected, got = layer(x, routes), compiled(x, routes)
        for e, g in zip(*(v if isinstance(v, tuple) else (v,) for v in (expected, got)), strict=True):
            assert torch.equal(e, g)
    assert len(graphs) == 1, f"{len(graphs)} graphs were compiled for three token counts"


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_training_step_equals_eager(impl, device):
    case = Case(10, 16, 24, 4, 3, torch.float32, "mixed")
    inputs, plan = tensors(case, device), case.plan(device)

    def grads(step):
        lora = {n: LoRA(*(t.detach().requires_grad_() for t in inputs[n][:2]), inputs[n].scaling) for n in ADAPTERS}
        x = inputs["x"].detach().requires_grad_()
        step(x, inputs["weight"], inputs["bias"], lora["reasoning"], lora["embedding"], plan).square().sum().backward()
        return [x.grad, *(t.grad for n in ADAPTERS for t in lora[n][:2])]

    def step(*args):
        return dual_lora_linear(*args, impl=impl)

    torch._dynamo.reset()
    for eager, compiled in zip(
        grads(step), grads(torch.compile(step, fullgraph=True, backend="aot_eager")), strict=True
    ):
        assert torch.equal(eager, compiled)


ADAPTERS = ("reasoning", "embedding")


@pytest.mark.parametrize("uniform", [False, True], ids=["mixed", "uniform"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_device_data_is_read_on_the_host(impl, dropout, uniform, monkeypatch):
    """The whole host side runs on tensors that have no data: any read of a value would raise.

    Under Triton the kernels' launches are cut out, since a kernel is the one thing that may read data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = choice.load(impl)
    if impl == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("on a GPU, no_sync in tests/ops/test_on_gpu.py shows the same on real launches")
        _cut_launches(monkeypatch)
    with FakeTensorMode():
        arguments = _flat(impl, torch.bfloat16, "cpu", dropout=dropout, grad=False)
        routes, present, seed = arguments[9], arguments[10], arguments[14]
        if uniform and getattr(module, "UNIFORM", False):
            routes = None
        tail = (routes, present, dropout, dropout, seed)
        *_, s = module.forward(*arguments[:9], *tail)
        module.fanout(*arguments[:9], *tail)
        dy = torch.empty(6, 17, dtype=torch.bfloat16)
        x, weight, _, *adapters = arguments[:9]
        module.backward(dy, None, None, x, weight, *adapters, s, *tail, (True,) * 6)


def _cut_launches(monkeypatch) -> None:
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)


def test_the_check_above_would_notice_a_read():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()
