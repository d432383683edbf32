"""The site-group op of each implementation against fp64 truth: front, back, routes, ranks."""

from __future__ import annotations

import pytest
import torch
from group_cases import GroupCase, arguments, converted, eager_torch, with_gradients

from twn_kernels.errors import DtypeError, OptionError, ShapeError
from twn_kernels.ops import LoRA, Norm, Projection, RoutePlan, choice, dual_lora_group, dual_lora_linear
from twn_kernels.testing.oracle import assert_as_good_as_torch

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
IMPLS = ("reference", "blas", "triton")

CASES = [
    GroupCase(7, 64, (96, 32, 32), ((8, 8), (8, 8), (8, 8)), BF16, front="norm", bias=True),
    GroupCase(33, 65, (31, 17, 40), ((17, 5), (0, 8), (1, 0)), FP32, front="norm"),
    GroupCase(1, 64, (64, 32, 32), ((16, 16),) * 3, BF16, "reasoning", front="norm"),
    GroupCase(20, 48, (80, 80), ((16, 4), (16, 4)), FP32, front="norm", back="swiglu"),
    GroupCase(65, 64, (48, 48), ((8, 16), (32, 16)), BF16, "suffix", front="norm", back="swiglu"),
    GroupCase(19, 64, (48, 48), ((0, 16), (8, 0)), FP16, "alternating", back="swiglu"),
    GroupCase(18, 96, (64,), ((48, 16),), BF16, "both", back="residual"),
    GroupCase(31, 40, (24,), ((4, 8),), FP32, front="gated", back="residual"),
    GroupCase(17, 64, (32,), ((16, 16),), BF16, "mixed", front="gated", back="residual"),
    GroupCase(17, 64, (32, 16), ((8, 4), (8, 4)), BF16, "mixed", front="norm", adapter_dtype=FP32),
    GroupCase(12, 32, (24, 24), ((4, 4), (4, 4)), FP16, "base", front="norm", back="swiglu"),
    GroupCase(5, 1, (1, 2, 3), ((1, 1), (1, 1), (1, 1)), FP32),
    GroupCase(0, 16, (24, 8), ((4, 4), (4, 4)), FP32, front="norm"),
]


def _call(impl):
    return lambda args, plan: dual_lora_group(**args, plan=plan, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_is_as_good_as_torch(case, impl, device, cut_from_nan):
    args, plan = arguments(case, device, cut_from_nan), case.plan(device)
    # Not the reference in fp64: where it was wrong, the oracle would take torch's distance from it for rounding.
    truth, own = eager_torch(converted(args, lambda t: t.double()), plan), eager_torch(args, plan)
    with torch.no_grad():
        actual = dual_lora_group(**args, plan=plan, impl=impl)
    assert len(actual) == len(truth)
    for i, y in enumerate(actual):
        assert y.shape == truth[i].shape and y.dtype == case.dtype
        assert_as_good_as_torch(y, truth[i], own[i], f"{impl} y{i}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_as_good_as_torch(case, impl, device, cut_from_nan):
    args, plan = arguments(case, device, cut_from_nan), case.plan(device)
    truth = with_gradients(eager_torch, converted(args, lambda t: t.double()), plan)
    own = with_gradients(eager_torch, args, plan)
    actual = with_gradients(_call(impl), args, plan)
    for name, value in actual.items():
        assert_as_good_as_torch(value, truth[name], own[name], f"{impl} {name}")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_equals_its_linears(impl, device):
    case = GroupCase(23, 64, (40, 24), ((8, 4), (16, 2)), FP32)
    args, plan = arguments(case, device), case.plan(device)
    outputs = dual_lora_group(**args, plan=plan, impl=impl)
    for projection, y in zip(args["projections"], outputs, strict=True):
        wide = converted(projection, lambda t: t.double())
        truth = dual_lora_linear(args["x"].double(), *wide, plan, impl="reference")
        assert_as_good_as_torch(y, truth, dual_lora_linear(args["x"], *projection, plan, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_shape_and_pitched_weights(impl, device, cut_from_nan):
    case = GroupCase(24, 32, (40, 24), ((4, 4), (4, 4)), FP32, front="norm")
    args, plan = arguments(case, device), case.plan(device)
    flat = dual_lora_group(**args, plan=plan, impl=impl)
    cube = dual_lora_group(**args | {"x": args["x"].view(2, 3, 4, 32)}, plan=plan, impl=impl)
    pitched = [p._replace(weight=cut_from_nan(p.weight)) for p in args["projections"]]
    assert all(torch.equal(a.reshape(24, -1), b) for a, b in zip(cube, flat, strict=True))
    truth = dual_lora_group(**converted(args, lambda t: t.double()), plan=plan, impl="reference")
    for y, t, own in zip(
        dual_lora_group(**args | {"projections": pitched}, plan=plan, impl=impl), truth, flat, strict=True
    ):
        assert_as_good_as_torch(y, t, own, "pitched weights")


@pytest.mark.parametrize("impl", IMPLS)
def test_norm_weight_and_bias_may_have_any_stride(impl, device):
    args = arguments(GroupCase(5, 32, (24, 8), ((4, 0), (0, 4)), FP32, front="norm", bias=True), device)
    plan = RoutePlan.uniform("both", 5, device=device)

    def strided(vector):
        if vector.dim() != 1:
            return vector
        return torch.stack([vector, torch.full_like(vector, float("nan"))], dim=1)[:, 0]

    expected = dual_lora_group(**args, plan=plan, impl=impl)
    for before, after in zip(expected, dual_lora_group(**converted(args, strided), plan=plan, impl=impl), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["qkv", "gate_up", "down"])
def test_nan_stays_where_it_is_used(impl, form, device):
    """A NaN row, and adapters that are all NaN, against the same call without them; every other row bit for bit."""
    ranks = ((8, 8),) * 3
    case = {
        "qkv": GroupCase(12, 32, (24, 16, 16), ranks, BF16, front="norm"),
        "gate_up": GroupCase(12, 32, (24, 24), ranks[:2], BF16, front="norm", back="swiglu"),
        "down": GroupCase(12, 32, (24,), ranks[:1], BF16, front="gated", back="residual"),
    }[form]
    args, plan = arguments(case, device), case.plan(device)
    clean = dual_lora_group(**args, plan=plan, impl=impl)
    ill = converted(args, torch.clone)
    ill["x"][3] = float("nan")
    ill["projections"] = [
        p._replace(embedding=LoRA(p.embedding.A.fill_(float("nan")), p.embedding.B.fill_(float("inf")), 1.0))
        for p in ill["projections"]
    ]
    untouched = (plan.routes & 2) == 0
    untouched[3] = False
    for before, after in zip(clean, dual_lora_group(**ill, plan=plan, impl=impl), strict=True):
        assert torch.equal(before[untouched], after[untouched])
        assert not after[~untouched].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_adapter_gets_no_gradient_from_rows_that_do_not_use_it(impl, device):
    case = GroupCase(12, 32, (24, 16), ((8, 8), (8, 8)), FP32)
    args, plan = arguments(case, device), RoutePlan.from_segments([5, 7], ["reasoning", "embedding"], device=device)
    leaves = converted(args["projections"], lambda t: t.detach().requires_grad_())
    x = args["x"].detach().requires_grad_()
    outputs = dual_lora_group(**args | {"projections": leaves, "x": x}, plan=plan, impl=impl)
    sum(y[:5].square().sum() for y in outputs).backward()
    for projection in leaves:
        assert projection.reasoning.A.grad.abs().sum() > 0
        assert not projection.embedding.A.grad.any() and not projection.embedding.B.grad.any()
    assert not x.grad[5:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_plan_it_is_the_base(impl, device):
    case = GroupCase(9, 32, (24, 16), ((4, 4), (4, 4)), FP32, front="norm")
    args = arguments(case, device)
    base = [p._replace(reasoning=None, embedding=None) for p in args["projections"]]
    own = eager_torch(args | {"projections": base}, RoutePlan.uniform(None, 9))
    truth = eager_torch(converted(args | {"projections": base}, lambda t: t.double()), RoutePlan.uniform(None, 9))
    for y, t, o in zip(dual_lora_group(**args, impl=impl), truth, own, strict=True):
        assert_as_good_as_torch(y, t, o)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_to_one_graph_and_does_not_recompile(impl, device):
    case = GroupCase(8, 32, (24, 24), ((4, 4), (4, 4)), FP32, front="norm", back="swiglu")
    args = arguments(case, device)
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    def layer(x, routes):
        return dual_lora_group(**args | {"x": x}, plan=RoutePlan(routes), impl=impl)[0]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counting, dynamic=True)
    for tokens in (5, 9, 13):
        x = torch.randn(tokens, 32, device=device)
        routes = torch.randint(0, 4, (tokens,), dtype=torch.int8, device=device)
        assert torch.equal(layer(x, routes), compiled(x, routes))
    assert len(graphs) == 1, f"{len(graphs)} graphs were compiled for three token counts"


def _registered(impl: str, dtype, device, grad: bool = True) -> list:
    case = GroupCase(6, 16, (17, 8), ((3, 5), (4, 0)), dtype, bias=True)
    args = converted(arguments(case, device), lambda t: t.requires_grad_(grad))
    projections = args["projections"]
    empty = projections[0].weight.new_empty
    sides = [
        ([p[2 + side].A if p[2 + side] else empty((0, 16)).detach() for p in projections],
         [p[2 + side].B if p[2 + side] else empty((p.weight.shape[0], 0)).detach() for p in projections])
        for side in (0, 1)
    ]  # fmt: skip
    weights = [p.weight.detach() for p in projections]
    biases = [p.bias for p in projections]
    routes = torch.tensor([0, 1, 2, 3, 1, 2], dtype=torch.int8, device=device)
    return [
        args["x"], weights, biases, *sides[0], *sides[1], [0.5, 0.5], [-1.75, 0.0], routes, 3, False, [], impl, None,
    ]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    torch.library.opcheck(torch.ops.twn.dual_lora_group.default, _registered(impl, FP32, device))
    flat = _registered(impl, FP32, device, grad=False)
    front = (torch.randn(16, device=device), 1e-6, False, False, None)
    torch.library.opcheck(torch.ops.twn.dual_lora_group_inference.default, [flat[0], *front, *flat[1:]])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_in_fp64(impl, device):
    if impl == "triton" and device.type == "cuda":
        pytest.skip("Triton kernels take fp64 in the interpreter alone, for this check")
    flat = _registered(impl, FP64, device)
    leaves = [flat[0], *flat[2], *(t for part in flat[3:7] for t in part if t.requires_grad)]

    def function(*new):
        table = {id(old): fresh for old, fresh in zip(leaves, new, strict=True)}
        swapped = [
            [table.get(id(t), t) for t in part] if isinstance(part, list) else table.get(id(part), part)
            for part in flat
        ]
        return torch.ops.twn.dual_lora_group(*swapped)[0]

    torch.autograd.gradcheck(function, leaves, fast_mode=impl == "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_are_refused(impl, device):
    args = arguments(GroupCase(4, 16, (8,), ((2, 2),), FP32), device)
    x = args["x"].requires_grad_()
    (y,) = dual_lora_group(**args, plan=RoutePlan.uniform("both", 4, device=device), impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="dual_lora_group has no second derivative"):
        dx.sum().backward()


def test_autocast_casts_like_linear_layers(device):
    case = GroupCase(11, 32, (24, 16), ((4, 8), (4, 8)), FP32, front="norm")
    args, plan = arguments(case, device), case.plan(device)
    with torch.autocast(device.type, dtype=BF16):
        outputs = dual_lora_group(**args, plan=plan)
        own = eager_torch(args, plan)
    truth = eager_torch(converted(args, lambda t: t.double()), plan)
    for y, t, o in zip(outputs, truth, own, strict=True):
        assert y.dtype == BF16
        assert_as_good_as_torch(y, t, o)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_under_autocast_the_residual_keeps_its_dtype(grad, device):
    case = GroupCase(11, 32, (24,), ((4, 8),), FP32, front="gated", back="residual")
    args, plan = arguments(case, device), case.plan(device)
    leaves = converted(args, lambda t: t.detach().requires_grad_(grad))
    with torch.autocast(device.type, dtype=BF16):
        (y,) = dual_lora_group(**leaves, plan=plan)
        (own,) = eager_torch(args | {"residual": None}, plan)
    (truth,) = eager_torch(converted(args, lambda t: t.double()), plan)
    assert y.dtype == FP32
    assert_as_good_as_torch(y - args["residual"], truth - args["residual"], own.to(BF16))
    if grad:
        y.sum().backward()
        assert torch.equal(leaves["residual"].grad, torch.ones_like(y))


def _bad(**changes):
    case = GroupCase(4, 16, (8, 8), ((2, 2), (2, 2)), FP32)
    return arguments(case, "cpu") | {"plan": RoutePlan.uniform("both", 4)} | changes


def _one(**changes):
    return [_bad()["projections"][0]._replace(**changes)]


BAD = {
    "x of a list": (DtypeError, r"x must be a torch tensor \[\.\.\., in_features\], got list", lambda: _bad(x=[1.0])),
    "no projections": (
        ShapeError,
        "projections must be 1 … 3 linears that read x, got 0",
        lambda: _bad(projections=[]),
    ),
    "a bare weight": (
        DtypeError,
        r"projections\[0\] must be Projection\(weight, \.\.\.\), got torch\.float32 \[8, 16\]",
        lambda: _bad(projections=[torch.ones(8, 16)]),
    ),
    "one projection, not a list": (
        DtypeError,
        "projections must be a list of Projection",
        lambda: _bad(projections=_one()[0]),
    ),
    "other features": (
        ShapeError,
        r"projections\[0\]\.weight \[out_features",
        lambda: _bad(projections=_one(weight=torch.ones(8, 15))),
    ),
    "a transposed weight": (
        ShapeError,
        r"projections\[0\]\.weight must have a contiguous last dimension",
        lambda: _bad(projections=_one(weight=torch.ones(16, 8).t())),
    ),
    "a wrong B": (
        ShapeError,
        r"projections\[0\]\.reasoning\.B must be \[8, 2\]",
        lambda: _bad(projections=_one(reasoning=LoRA(torch.ones(2, 16), torch.ones(7, 2), 1.0))),
    ),
    "two dtypes": (
        DtypeError,
        "all adapters of a group must have one dtype",
        lambda: _bad(
            x=torch.ones(4, 16, dtype=BF16),
            projections=[
                Projection(torch.ones(8, 16, dtype=BF16), None, LoRA(torch.ones(2, 16), torch.ones(8, 2), 1.0)),
                Projection(
                    torch.ones(8, 16, dtype=BF16),
                    None,
                    LoRA(torch.ones(2, 16, dtype=BF16), torch.ones(8, 2, dtype=BF16), 1.0),
                ),
            ],
        ),
    ),
    "norm and gated": (
        OptionError,
        "norm and gated exclude each other",
        lambda: _bad(norm=Norm(torch.ones(16), 1e-6), gated=True),
    ),
    "an odd gated x": (
        ShapeError,
        r"x must be \[\.\.\., 2 \* in_features\]",
        lambda: _bad(x=torch.ones(4, 15), gated=True),
    ),
    "a wrong norm": (ShapeError, r"norm\.weight must be \[16\]", lambda: _bad(norm=Norm(torch.ones(15), 1e-6))),
    "a norm module": (
        DtypeError,
        r"norm must be Norm\(weight, eps\), got RMSNorm",
        lambda: _bad(norm=torch.nn.RMSNorm(16)),
    ),
    "a negative eps": (
        OptionError,
        r"norm\.eps must be a finite number of 0 or more, got -1",
        lambda: _bad(norm=Norm(torch.ones(16), -1)),
    ),
    "eps of NaN": (
        OptionError,
        r"norm\.eps must be a finite number of 0 or more, got nan",
        lambda: _bad(norm=Norm(torch.ones(16), float("nan"))),
    ),
    "eps as a tensor": (
        DtypeError,
        r"norm\.eps must be a Python number",
        lambda: _bad(norm=Norm(torch.ones(16), torch.tensor(1e-6))),
    ),
    "swiglu of one": (
        ShapeError,
        r"swiglu needs two projections \(gate, then up\), got 1",
        lambda: _bad(projections=_one(), swiglu=True),
    ),
    "residual of two": (
        OptionError,
        "residual is added to the output of a single projection",
        lambda: _bad(residual=torch.ones(4, 8)),
    ),
    "a wrong residual": (
        ShapeError,
        r"residual must be \[4, 8\]",
        lambda: _bad(projections=_one(), residual=torch.ones(4, 7)),
    ),
    "a plan of other tokens": (
        ShapeError,
        "plan covers 3 tokens but x has 4",
        lambda: _bad(plan=RoutePlan.uniform("both", 3)),
    ),
    "an unknown impl": (OptionError, 'impl must be one of .*"blas".*Did you mean "triton"', lambda: _bad(impl="tritn")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_contract_is_one_sentence(name):
    error, message, build = BAD[name]
    with pytest.raises(error, match=message):
        dual_lora_group(**build())


@pytest.mark.parametrize("name", [name for name in BAD if name != "two dtypes"])
def test_a_broken_contract_is_one_sentence_under_autocast(name):
    error, message, build = BAD[name]
    with torch.autocast("cpu", dtype=BF16), pytest.raises(error, match=message):
        dual_lora_group(**build())


def test_every_implementation_has_the_group(device):
    for impl in IMPLS:
        assert callable(choice.load(impl).group) and callable(choice.load(impl).group_backward)
