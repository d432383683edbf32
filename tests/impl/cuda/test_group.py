"""``impl="cuda"`` above its kernels: which one serves on which rows, what is refused, and what the caller is told.

The extension's ops are a stand-in that computes with the reference, so none of this needs a GPU.
"""

from __future__ import annotations

import cuda_stand_in
import pytest
import torch

from twn_kernels.errors import DtypeError, ImplUnavailable, OptionError, ShapeError
from twn_kernels.impl.cuda import launch, loader
from twn_kernels.impl.cuda.dispatch import Dispatch, Problem, covers, dispatch
from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.packing import PackedGroup
from twn_kernels.ops import (
    LoRA,
    Norm,
    Projection,
    RoutePlan,
    dual_lora_group,
    dual_lora_linear,
    dual_lora_linear_fanout,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FEATURES, OUTPUTS = 64, (40, 24, 16)


@pytest.fixture
def extension(monkeypatch):
    return cuda_stand_in.install(monkeypatch)


def draw(*shape, dtype=BF16):
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


def lora(rank, out, features=FEATURES, dtype=BF16):
    return LoRA(draw(rank, features, dtype=dtype), draw(out, rank, dtype=dtype), 0.5)


def projections(count=3, features=FEATURES, dtype=BF16):
    return [
        Projection(draw(out, features, dtype=dtype), None, lora(5, out, features, dtype), lora(8, out, features, dtype))
        for out in OUTPUTS[:count]
    ]


def mixed(tokens):
    return RoutePlan.from_routes((torch.arange(tokens) % 4).to(torch.int8))


def both(x, *args, **options):
    """The same call under the reference and under cuda."""
    with torch.no_grad():
        return [dual_lora_group(x, *args, **options, impl=impl) for impl in ("reference", "cuda")]


EVERYTHING = "copy decode_sm80 decode_sm90 prefill_sm90a"


@pytest.mark.parametrize(
    ("problem", "kernel", "rows", "launches"),
    [
        (Problem(0, (9, 0), EVERYTHING), None, 0, 0),
        (Problem(1, (8, 0), EVERYTHING), "decode_group", 1, 1),
        (Problem(64, (9, 0), EVERYTHING), "decode_group", 64, 1),
        (Problem(65, (9, 0), EVERYTHING), "prefill_group", 65, 1),
        (Problem(65, (9, 0), "decode_sm80 decode_sm90"), "decode_group", 64, 2),
        (Problem(65, (8, 9), EVERYTHING), "decode_group", 64, 2),
        (Problem(4096, (10, 0), EVERYTHING), "decode_group", 64, 64),
    ],
)
def test_the_kernel_is_a_function_of_the_problem(problem, kernel, rows, launches):
    chosen = dispatch(problem)
    assert (chosen.kernel, chosen.rows, chosen.launches) == (kernel, rows, launches)


def test_a_choice_prints_as_what_it_is():
    assert str(dispatch(Problem(100, (9, 0), "decode_sm90"))) == str(
        Dispatch("decode_group", 64, 2, "100 rows in slices of 64: the build has no code for 9.0a")
    )
    assert dispatch(Problem(100, (12, 0), EVERYTHING)).why.endswith("the prefill kernel is for sm_90 alone")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.9", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a;9.0+PTX", (10, 0), True),
        ("8.0, 9.0a", (9, 0), True),
    ],
)
def test_which_gpus_a_build_has_code_for(archs, capability, runs):
    assert covers(archs, capability) is runs


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
@pytest.mark.parametrize(
    "front", [{}, {"norm": Norm(draw(FEATURES), 1e-6)}, {"gated": True}], ids=["plain", "norm", "gated"]
)
def test_prefill_rows_on_hopper_get_their_front_first(front, tokens, extension):
    x = draw(tokens, FEATURES * (2 if front.get("gated") else 1))
    expected, actual = both(x, projections(), mixed(tokens), **front)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    if tokens <= 64:
        assert extension.taken == [("decode_group", tokens)]
    else:
        assert extension.taken == [*[("front", tokens)] * bool(front), ("prefill_group", tokens)]


@pytest.mark.parametrize("options", [{"capability": (8, 0)}, {"archs": "9.0"}], ids=["ampere", "without-9.0a"])
def test_more_rows_elsewhere_are_slices_of_the_decode_kernel(options, monkeypatch):
    extension = cuda_stand_in.install(monkeypatch, **options)
    x, residual = draw(150, FEATURES), draw(150, OUTPUTS[0])
    expected, actual = both(x, projections(1), mixed(150), residual=residual)
    assert torch.equal(expected[0], actual[0])
    assert extension.taken == [("decode_group", rows) for rows in (64, 64, 22)]


def test_no_row_launches_nothing(extension):
    (y,) = both(draw(0, FEATURES), projections(1), mixed(0))[1]
    assert y.shape == (0, OUTPUTS[0]) and extension.taken == []


@pytest.mark.parametrize(("route", "present"), [(None, 0), ("reasoning", 1), ("embedding", 2), ("both", 3)])
def test_uniform_routes_are_not_read(route, present, extension):
    x = draw(7, FEATURES)
    expected, actual = both(x, projections(2), RoutePlan.uniform(route, 7), swiglu=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert extension.present == [present]


def test_swiglu_bias_and_absent_adapters(extension):
    gate, up = (Projection(draw(40, FEATURES), draw(40), None, lora(8, 40)) for _ in range(2))
    expected, actual = both(draw(9, FEATURES), [gate, up], mixed(9), swiglu=True)
    assert torch.equal(expected[0], actual[0])
    assert extension.present == [2]


@pytest.mark.parametrize("tokens", [3, 70])
def test_inputs_of_odd_pitch_are_copied(tokens, extension, cut_from_nan):
    x, residual = cut_from_nan(draw(tokens, FEATURES)), cut_from_nan(draw(tokens, OUTPUTS[0]))
    expected, actual = both(x, projections(1), mixed(tokens), residual=residual)
    assert torch.equal(expected[0], actual[0])
    assert actual[0].isfinite().all()


def test_inputs_whose_rows_overlap_or_start_beside_a_word_are_copied(extension):
    for x in (draw(1, FEATURES).expand(5, FEATURES), shifted(5, FEATURES)):
        expected, actual = both(x, projections(1), mixed(5))
        assert torch.equal(expected[0], actual[0])


def test_a_single_column_of_B_may_have_any_stride(extension):
    column = LoRA(draw(1, FEATURES), draw(1, 40).t(), 0.5)
    expected, actual = both(draw(5, FEATURES), bent(reasoning=column), mixed(5))
    assert torch.equal(expected[0], actual[0])


def test_an_aligned_input_is_not_copied(extension, monkeypatch):
    seen = []
    decode = extension._decode
    monkeypatch.setattr(extension, "_decode", lambda x, *call: seen.append(x.data_ptr()) or decode(x, *call))
    x = draw(5, FEATURES)
    with torch.no_grad():
        dual_lora_group(x, projections(1), mixed(5), impl="cuda")
    assert seen == [x.data_ptr()]


def test_one_linear_is_a_group_of_one(extension):
    x, (projection,), plan = draw(6, FEATURES), projections(1), mixed(6)
    with torch.no_grad():
        expected = dual_lora_linear(x, *projection, plan, impl="reference")
        assert torch.equal(dual_lora_linear(x, *projection, plan, impl="cuda"), expected)
    assert extension.taken == [("decode_group", 6)]


def bent(**changes):
    return [projections(1)[0]._replace(**changes)]


def shifted(rows, columns):
    """A matrix that starts one element behind a 16-byte word."""
    return draw(rows * columns + 1)[1:].view(rows, columns)


INSTEAD = ' Or use impl="triton", impl="blas" or impl="auto".'
REFUSALS = {
    "in_features": (
        ShapeError,
        lambda: (draw(3, 36), [Projection(draw(40, 36))]),
        'in_features must be a multiple of 8 for impl="cuda" (16-byte words), got 36.',
    ),
    "the pitch of a weight": (
        ShapeError,
        lambda: (draw(3, FEATURES), bent(weight=draw(40, FEATURES + 4)[:, :FEATURES])),
        'weight must have rows that start at 16-byte words for impl="cuda" (strides (a multiple of '
        "8, 1), address a multiple of 16), got strides (68, 1) at an address of 0 modulo 16. Give the weight memory of "
        "its own: .clone(memory_format=torch.contiguous_format).",
    ),
    "the address of a weight": (
        ShapeError,
        lambda: (draw(3, FEATURES), bent(weight=shifted(40, FEATURES))),
        "got strides (64, 1) at an address of 2 modulo 16. Give the weight memory of its own",
    ),
    "the pitch of A": (
        ShapeError,
        lambda: (
            draw(3, FEATURES),
            bent(reasoning=LoRA(draw(4, FEATURES + 4)[:, :FEATURES], draw(40, 4), 1.0)),
        ),
        "reasoning.A must have rows that start at 16-byte words",
    ),
    "a transposed B": (
        ShapeError,
        lambda: (draw(3, FEATURES), bent(embedding=LoRA(draw(4, FEATURES), draw(4, 40).t(), 1.0))),
        'embedding.B must have a contiguous last dimension for impl="cuda", got strides (1, 40). '
        "Store it so: B.contiguous().",
    ),
    "fp32 adapters beside a linear without any": (
        DtypeError,
        lambda: (
            draw(3, FEATURES),
            [Projection(draw(40, FEATURES)), *bent(reasoning=lora(4, 40, dtype=FP32), embedding=None)],
        ),
        "projections[1].reasoning must be in the dtype of x",
    ),
    "fp32 adapters": (
        DtypeError,
        lambda: (draw(3, FEATURES), bent(reasoning=lora(4, 40, dtype=FP32), embedding=None)),
        'reasoning must be in the dtype of x (torch.bfloat16) for impl="cuda", got torch.float32. '
        "Convert it: A.to(torch.bfloat16), B.to(torch.bfloat16); a patched model with all it holds: "
        "model.to(torch.bfloat16).",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_kernels_cannot_read_is_refused_by_name(name, extension):
    error, arguments, words = REFUSALS[name]
    x, layers = arguments()
    with torch.no_grad(), pytest.raises(error) as caught:
        dual_lora_group(x, layers, mixed(3), impl="cuda")
    assert words in str(caught.value) and str(caught.value).endswith(INSTEAD)
    assert ("projections[" in str(caught.value)) == (len(layers) > 1)
    assert extension.taken == []


def test_a_dtype_that_the_kernels_do_not_take(extension):
    x, layers = draw(3, FEATURES, dtype=FP32), projections(1, dtype=FP32)
    with torch.no_grad(), pytest.raises(ImplUnavailable) as caught:
        dual_lora_group(x, layers, mixed(3), impl="cuda")
    assert str(caught.value) == (
        'impl="cuda" was asked for, but its kernels take float16 and bfloat16, not float32. Convert the layer: '
        'model.to(torch.bfloat16). Or use impl="auto" (now: blas).'
    )


def test_a_cpu_tensor():
    with torch.no_grad(), pytest.raises(ImplUnavailable) as caught:
        dual_lora_group(draw(3, FEATURES), projections(1), mixed(3), impl="cuda")
    assert str(caught.value) == (
        'impl="cuda" was asked for, but its kernels need a GPU and the tensors are on cpu. Move them: x.cuda(). '
        'Or use impl="auto" (now: blas).'
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capability": (7, 5)}, "it needs a GPU of compute capability 8.0 or newer; this one has 7.5. Or use"),
        (
            {"capability": (8, 0), "archs": "9.0a"},
            "the extension is built for 9.0a, not for this GPU (8.0). Rebuild: TWN_BUILD_CUDA=1",
        ),
    ],
)
def test_a_gpu_without_code_for_it(options, words, monkeypatch):
    extension = cuda_stand_in.install(monkeypatch, **options)
    with torch.no_grad(), pytest.raises(ImplUnavailable) as caught:
        dual_lora_group(draw(3, FEATURES), projections(1), mixed(3), impl="cuda")
    assert words in " ".join(str(caught.value).split())
    assert extension.taken == []


NEEDS_NO_GRAD = (
    'impl="cuda" was asked for, but it has no backward pass and a tensor of this call requires a gradient. Run it '
    'under torch.no_grad(), or use impl="triton" or impl="auto" where gradients are needed.'
)


@pytest.mark.parametrize("wants", ["x", "A", "weight"])
def test_gradients_are_refused_before_anything_runs(wants, extension):
    x, (projection,), plan = draw(6, FEATURES), projections(1), mixed(6)
    {"x": x, "A": projection.reasoning.A, "weight": projection.weight}[wants].requires_grad_()
    for call in (
        lambda: dual_lora_group(x, [projection], plan, impl="cuda"),
        lambda: dual_lora_linear(x, *projection, plan, impl="cuda"),
    ):
        with pytest.raises(ImplUnavailable) as caught:
            call()
        assert str(caught.value) == NEEDS_NO_GRAD
        assert extension.taken == []
        with torch.no_grad():
            call()
        assert extension.taken == [("decode_group", 6)]


def test_the_environment_asks_for_no_gradient_either(extension, monkeypatch):
    monkeypatch.setenv("TWN_IMPL", "cuda")
    x, layers = draw(6, FEATURES).requires_grad_(), projections(1)
    for call in (
        lambda: dual_lora_group(x, layers, mixed(6)),
        lambda: dual_lora_linear(x, *layers[0], mixed(6)),
    ):
        with pytest.raises(ImplUnavailable, match='^TWN_IMPL="cuda" was .* or unset TWN_IMPL or use impl="triton" wh'):
            call()
        assert extension.taken == []


def test_what_the_kernels_do_not_do(extension):
    x, (projection,) = draw(6, FEATURES), projections(1)
    with torch.no_grad():
        with pytest.raises(OptionError, match=r'dropout must be 0 for impl="cuda", which has no .*\(0.5, 0.0\)'):
            dual_lora_linear(x, *projection, mixed(6), dropout=(0.5, 0.0), impl="cuda")
        with pytest.raises(ImplUnavailable, match='fanout was asked for with impl="cuda", which has no kernel'):
            dual_lora_linear_fanout(x, *projection, impl="cuda")


@pytest.mark.parametrize("tokens", [5, 80])
def test_a_compiled_call_does_not_look_into_it(tokens, extension):
    layers, plan, norm = projections(1) * 2, mixed(tokens), Norm(draw(FEATURES), 1e-6)

    def layer(x, routes):
        routed = RoutePlan(routes)
        (y,) = dual_lora_group(x, layers, routed, norm=norm, swiglu=True, impl="cuda")
        return y, dual_lora_linear(x, *layers[0], routed, impl="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    x = draw(tokens, FEATURES)
    with torch.no_grad():
        expected = layer(x, plan.routes)
        taken = extension.taken
        actual = compiled(x, plan.routes)
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert extension.taken == taken


@pytest.mark.parametrize("tokens", [3, 70])
def test_the_built_ops_take_what_they_are_given(tokens, extension, monkeypatch):
    """Of the real library: its schemas take the arguments, and its first check finds a CPU tensor."""
    monkeypatch.undo()
    if not loader.build_info().built:
        pytest.skip(f"needs the CUDA extension, which is {loader.build_info()}")
    loader.load()
    real = launch._op
    cuda_stand_in.install(monkeypatch)
    monkeypatch.setattr(launch, "_op", real)
    for name, front in (("decode_group", {}), ("front", {"norm": Norm(draw(FEATURES), 1e-6)}), ("prefill_group", {})):
        if (name == "decode_group") != (tokens <= 64):
            continue
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"twn_cuda::{name}: x must be on a CUDA device"):
            dual_lora_group(draw(tokens, FEATURES), projections(), mixed(tokens), **front, impl="cuda")


def test_packed_weights_are_served_as_they_lie(extension):
    """A model may prefill on the vendor GEMM's panels and decode here, on the same parameters."""
    for count, ranks in ((1, (64, 17)), (2, (5, 8)), (3, (200, 1))):
        members = []
        for out in OUTPUTS[:count]:
            sizes = {"reasoning": ranks[0], "embedding": ranks[1]}
            members.append(DualLoRALinear(FEATURES, out, rank=sizes).to(BF16).requires_grad_(False))
        packed = PackedGroup(members)
        assert packed.reason is None and not members[0].weight.is_contiguous()
        expected, actual = both(draw(5, FEATURES), [member.site_projection() for member in members], mixed(5))
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
        assert extension.taken == [("decode_group", 5)]


def test_the_registered_op_keeps_its_schema(extension):
    """The linear's op has ``s``, which is only for a backward pass: zeros here, of its shape."""
    x, (projection,) = draw(6, FEATURES), projections(1)
    weight, _, r, e = projection
    adapters = (r.A, r.B, e.A, e.B, r.scaling, e.scaling)
    call = (x, weight, None, *adapters, mixed(6).routes, 3, False, 0.0, 0.0, None, "cuda")
    y, s = torch.ops.twn.dual_lora_linear(*call)
    assert y.shape == (6, OUTPUTS[0]) and torch.equal(s, torch.zeros(6, 13, dtype=BF16))
    torch.library.opcheck(torch.ops.twn.dual_lora_linear, call, test_utils=("test_schema", "test_faketensor"))
