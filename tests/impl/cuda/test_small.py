"""Gate and pooling as ``impl="cuda"``: what is launched and with what, every refusal, and who asks for it."""

from __future__ import annotations

import pytest
import small_emulated
import torch
from host_program import needs_cxx
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from twn_kernels.errors import ImplUnavailable, OptionError
from twn_kernels.impl.cuda import gate, loader, pooling
from twn_kernels.modules import GateMLP
from twn_kernels.ops import GateStep, gate_scores, pool_queries
from twn_kernels.testing.oracle import assert_as_good_as_torch

STATES = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(0))
LAYERS = [GateStep(torch.randn(7, 24), torch.randn(7)), GateStep(torch.randn(1, 7))]
CALLS = {
    "pool": lambda **options: pool_queries(STATES, **options),
    "gate": lambda **options: gate_scores(STATES, LAYERS, **options),
}
each_op = pytest.mark.parametrize("op", CALLS)
launches = []


def _pool(states, number, normalize):
    launches.append("pool_queries")
    return small_emulated.pool_queries(states, small_emulated.POOLINGS[number], normalize)


def _gate(states, last, weights, biases, activated, activation, threshold):
    launches.append("gate_scores")
    steps = [(w, b if b.numel() else None, on) for w, b, on in zip(weights, biases, activated, strict=True)]
    name = small_emulated.ACTIVATIONS[activation]
    scores, think, _ = small_emulated.gate_scores(states, last, steps, name, threshold)
    return scores, torch.empty(0, dtype=torch.bool) if think is None else think.bool()


@pytest.fixture(scope="module")
def emulated_library():
    """The extension's schemas over emulated kernels, so that torch checks every argument against them."""
    made = torch.library.Library("twn_emulated", "DEF")
    for name, run in (("pool_queries", _pool), ("gate_scores", _gate)):
        made.define(loader.OPS[name])
        made.impl(name, run, "CPU")
    yield torch.ops.twn_emulated
    made._destroy()


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """``impl="cuda"`` on this machine's tensors: everything above the kernels is the package's own."""
    monkeypatch.setattr(pooling, "_load", lambda device: None)
    monkeypatch.setattr(pooling, "_op", lambda name: getattr(emulated_library, name).default)
    launches.clear()
    return launches


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("pooled", ["mean", "last", "first"])
@needs_cxx
def test_pooling_is_one_launch(emulated, pooled, normalize):
    got, own = (pool_queries(STATES, pooling=pooled, normalize=normalize, impl=impl) for impl in ("cuda", "reference"))
    truth = pool_queries(STATES.double(), pooling=pooled, normalize=normalize)
    assert_as_good_as_torch(got, truth, own)
    assert emulated == ["pool_queries"]


@pytest.mark.parametrize("activation", small_emulated.ACTIVATIONS)
@needs_cxx
def test_the_gate_is_one_launch(emulated, activation):
    last = torch.randn(3, 5)
    layers = [(torch.randn(29), torch.randn(29)), (torch.randn(7, 29), torch.randn(7)), (torch.randn(2, 7), None)]
    options = {"activation": activation, "last": last, "threshold": 0.5}
    (got, think), (own, decided) = (gate_scores(STATES, layers, **options, impl=i) for i in ("cuda", "reference"))
    truth, _ = gate_scores(STATES.double(), layers, **options)
    assert_as_good_as_torch(got, truth, own)
    assert torch.equal(think, decided) and think.dtype == torch.bool
    assert emulated == ["gate_scores"]


@pytest.mark.parametrize("gate_input", ["mean", "last", "concat", "mean_last"])
@needs_cxx
def test_the_module_s_gate_is_one_launch_whatever_it_reads(emulated, gate_input):
    width = {"mean": 24, "last": 24, "concat": 96, "mean_last": 48}[gate_input]
    tensors = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, 1)).state_dict()
    last = torch.randn(3, 24)
    ours, theirs = (GateMLP(tensors, gate_input=gate_input, impl=impl) for impl in ("cuda", "reference"))
    with torch.no_grad():
        got, own = ours(STATES, last), theirs(STATES, last)
        assert emulated == ["gate_scores"]
        assert_as_good_as_torch(got, theirs.double()(STATES.double(), last.double()), own)
        assert torch.equal(ours(STATES, last, threshold=0.5)[1], own >= 0.5)


@each_op
@needs_cxx
def test_a_traced_call_is_one_graph(emulated, op):
    frames = CompileCounter()

    @torch.compile(fullgraph=True, backend=frames)
    def run(states):
        if op == "pool":
            return pool_queries(states, impl="cuda")
        return gate_scores(states, LAYERS, threshold=0.25, impl="cuda")

    with torch.no_grad():
        got = run(STATES)
    expected = CALLS[op](impl="cuda", **({"threshold": 0.25} if op == "gate" else {}))
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, expected)), strict=True):
        assert torch.equal(a, b)
    assert frames.frame_count == 1


@each_op
def test_the_registered_ops_know_their_shapes(op):
    meta = STATES.to("meta")
    if op == "pool":
        assert torch.ops.twn.pool_queries_cuda(meta, "mean", True).shape == (3, 24)
        return
    weights, biases = ([step[part] for step in LAYERS] for part in (0, 1))
    for threshold, decisions in ((None, 0), (0.5, 3)):
        scores, think = torch.ops.twn.gate_scores_cuda(meta, None, weights, biases, [True, False], "gelu", threshold)
        assert scores.shape == (3,) and think.shape == (decisions,) and think.dtype == torch.bool


@each_op
@pytest.mark.parametrize("override", [None, "auto", "reference", "blas", "triton"])
def test_auto_is_the_reference(monkeypatch, op, override):
    expected = CALLS[op](impl="reference")
    monkeypatch.delenv("TWN_IMPL", raising=False)
    if override is not None:
        monkeypatch.setenv("TWN_IMPL", override)
    assert torch.equal(CALLS[op](), expected)


@each_op
def test_a_named_one_heeds_no_override(monkeypatch, op):
    monkeypatch.setenv("TWN_IMPL", "cuda")
    assert CALLS[op](impl="reference").isfinite().all()


@each_op
@needs_cxx
def test_an_override_asks_for_it(monkeypatch, emulated, op):
    monkeypatch.setenv("TWN_IMPL", "cuda")
    CALLS[op]()
    assert len(emulated) == 1


@each_op
def test_an_override_that_cannot_be_met(monkeypatch, op):
    monkeypatch.setenv("TWN_IMPL", "cuda")
    with pytest.raises(ImplUnavailable) as caught:
        CALLS[op]()
    assert str(caught.value) == (
        'TWN_IMPL="cuda" was asked for, but its kernels need a GPU and the tensors are on cpu. Move them: x.cuda(). '
        'Or unset TWN_IMPL, or use impl="reference" (now: reference).'
    )


@each_op
def test_names_of_no_implementation(monkeypatch, op):
    with pytest.raises(OptionError) as caught:
        CALLS[op](impl="cudda")
    names = 'impl must be one of "auto", "cuda", "reference" for this op, got'
    assert str(caught.value) == f"{names} 'cudda'. Did you mean \"cuda\"?"
    for other in ("blas", "triton", None, 3):
        with pytest.raises(OptionError, match=names):
            CALLS[op](impl=other)
    monkeypatch.setenv("TWN_IMPL", "tritn")
    with pytest.raises(OptionError, match="TWN_IMPL must be one of .* got 'tritn'. Did you mean \"triton\"?"):
        CALLS[op]()


def test_the_module_is_made_where_its_gate_cannot_run_yet(monkeypatch):
    monkeypatch.setenv("TWN_IMPL", "cuda")
    made = GateMLP({"0.weight": torch.zeros(1, 4)})
    with torch.no_grad(), pytest.raises(ImplUnavailable, match="the tensors are on cpu"):
        made(torch.zeros(2, 3, 4))
    with pytest.raises(OptionError, match='impl must be one of "auto", "cuda", "reference"'):
        GateMLP({"0.weight": torch.zeros(1, 4)}, impl="blas")


def _step(shape=(1, 24), **options):
    return GateStep(torch.zeros(shape, **options))


def _with_a_tangent():
    with forward_ad.dual_level():
        pool_queries(forward_ad.make_dual(STATES, torch.ones_like(STATES)), impl="cuda")


GRAD = "requires a gradient. Call it under torch.no_grad()."
REFUSED = {
    "fp64_states": (
        lambda: pool_queries(STATES.double(), impl="cuda"),
        "its kernel takes float32, float16 and bfloat16, and states is float64. Convert it with .float().",
    ),
    "fp64_features": (lambda: gate_scores(STATES.double(), LAYERS, impl="cuda"), "and features is float64. Convert it"),
    "fp64_last": (
        lambda: gate_scores(STATES, [_step((1, 25))], last=torch.zeros(3, 1).double(), impl="cuda"),
        "and last is float64. Convert it with .float().",
    ),
    "fp64_weight": (
        lambda: gate_scores(STATES, [_step((24,)), _step(dtype=torch.float64)], impl="cuda"),
        "and layers[1].weight is float64. Convert it with .float().",
    ),
    "fp64_bias": (
        lambda: gate_scores(STATES, [GateStep(torch.zeros(1, 24), torch.zeros(1).double())], impl="cuda"),
        "and layers[0].bias is float64. Convert it with .float().",
    ),
    "steps": (
        lambda: gate_scores(STATES, [_step((24,))] * 16 + [_step()], impl="cuda"),
        "its kernel takes at most 16 layers and norms, and layers has 17.",
    ),
    "columns": (
        lambda: gate_scores(STATES, [GateStep(torch.zeros(24, 2).t())], impl="cuda"),
        "its kernel reads layers[0].weight with a contiguous last dimension, and its strides are (1, 2). Store it so: "
        ".contiguous().",
    ),
    "bias_strides": (
        lambda: gate_scores(STATES, [GateStep(torch.zeros(2, 24), torch.zeros(4)[::2])], impl="cuda"),
        "its kernel reads layers[0].bias with a contiguous last dimension, and its strides are (2,).",
    ),
    "states_grad": (
        lambda: pool_queries(STATES.clone().requires_grad_(), impl="cuda"),
        f"its kernel has no backward pass and states {GRAD}",
    ),
    "weight_grad": (
        lambda: gate_scores(STATES, [GateStep(torch.zeros(1, 24, requires_grad=True))], impl="cuda"),
        f"its kernel has no backward pass and layers[0].weight {GRAD}",
    ),
    "tangent": (
        _with_a_tangent,
        f"its kernel has no backward pass and states {GRAD}",
    ),
    "device": (
        lambda: pool_queries(STATES, impl="cuda"),
        "its kernels need a GPU and the tensors are on cpu. Move them: x.cuda().",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ImplUnavailable) as caught:
        call()
    words = str(caught.value)
    assert words.startswith('impl="cuda" was asked for, but ') and message in words
    assert words.endswith(' Or use impl="auto" (now: reference).')


@needs_cxx
def test_what_is_no_refusal(emulated):
    many = [_step((24,))] * (gate.MAX_STEPS - 1) + [_step()]
    assert gate_scores(STATES, many, impl="cuda").shape == (3,)
    with torch.no_grad():
        assert pool_queries(STATES.clone().requires_grad_(), impl="cuda").shape == (3, 24)
    assert gate_scores(STATES[:, 0], [GateStep(torch.zeros(1, 48)[:, ::2].contiguous())], impl="cuda").shape == (3,)


@each_op
def test_a_traced_call_meets_the_refusal_when_it_runs(op):
    run = torch.compile(lambda: CALLS[op](impl="cuda"), fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(ImplUnavailable, match='the tensors are on cpu.* Or use impl="auto"'):
        run()


@each_op
def test_an_extension_that_is_not_there(monkeypatch, op):
    monkeypatch.setattr(pooling.fitness, "device_reason", lambda device: "the extension is not built (no nvcc).")
    with pytest.raises(ImplUnavailable, match=r"but the extension is not built \(no nvcc\)\. Or use"):
        CALLS[op](impl="cuda")
