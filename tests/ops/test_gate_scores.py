"""The gate as a function, held to the same MLP written out by hand in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from twn_kernels.checkpoint.config import GATE_ACTIVATIONS
from twn_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError, TWNError
from twn_kernels.ops import GateStep, gate_scores
from twn_kernels.ops.gate_scores import ACTIVATIONS
from twn_kernels.testing.oracle import assert_as_good_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IN = 24


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


BY_HAND = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


def _norm(x, weight, bias):
    if bias is None:
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias


def by_hand(features, steps, activation, dtype=torch.float64):
    """``steps``: (weight, bias, activated). Sigmoid and softmax are spelled out too."""
    x = features.to(dtype)
    for weight, bias, activated in steps:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if weight.dim() == 2:
            x = x @ weight.T
            x = x if bias is None else x + bias
        else:
            x = _norm(x, weight, bias)
        x = BY_HAND[activation](x) if activated else x
    if x.shape[1] == 1:
        return 1 / (1 + torch.exp(-x[:, 0]))
    e = torch.exp(x - x.max(1, keepdim=True).values)
    return e[:, 1] / e.sum(1)


def weight(*shape, bias=True, dtype=torch.float32):
    if len(shape) == 1:
        w = 1 + 0.3 * torch.randn(shape)
    else:
        w = torch.randn(shape) * 1.5 / shape[1] ** 0.5
    return w.to(dtype), (0.5 * torch.randn(shape[0])).to(dtype) if bias else None


# Name -> shape, has a bias, and where the activation belongs, written out.
LAYOUTS = {
    "one_linear": [((1, IN), True, False)],
    "one_logit": [((16, IN), True, True), ((1, 16), True, False)],
    "two_logits": [((16, IN), True, True), ((2, 16), True, False)],
    "no_bias": [((16, IN), False, True), ((2, 16), False, False)],
    "deep": [((16, IN), True, True), ((7, 16), False, True), ((9, 7), True, True), ((1, 9), True, False)],
    "norm_first": [((IN,), True, False), ((16, IN), True, True), ((2, 16), True, False)],
    "norm_between": [((16, IN), True, False), ((16,), True, True), ((1, 16), True, False)],
    "rms_norms": [((IN,), False, False), ((16, IN), True, False), ((16,), False, True), ((2, 16), True, False)],
    "two_norms": [((16, IN), True, False), ((16,), False, False), ((16,), True, True), ((1, 16), True, False)],
    "two_norms_first": [((IN,), True, False), ((IN,), False, False), ((16, IN), True, True), ((1, 16), True, False)],
}


def steps_of(layout, dtype=torch.float32):
    return [(*weight(*shape, bias=bias, dtype=dtype), activated) for shape, bias, activated in LAYOUTS[layout]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_mlp_by_hand(layout, dtype):
    steps = steps_of(layout, dtype)
    features = (2 * torch.randn(37, IN)).to(dtype)
    truth = by_hand(features, steps, "gelu")
    baseline = by_hand(features, steps, "gelu", torch.float32)
    scores = gate_scores(features, [(w, b) for w, b, _ in steps])
    assert scores.dtype == torch.float32 and scores.shape == (37,)
    assert truth.std() > 0.05
    assert_as_good_as_torch(scores, truth, baseline, layout)
    assert torch.equal(gate_scores(features, [GateStep(*step) for step in steps]), scores)


@pytest.mark.parametrize("activation", BY_HAND)
def test_activations(activation):
    steps = steps_of("deep")
    features = 2 * torch.randn(64, IN)
    scores = gate_scores(features, [(w, b) for w, b, _ in steps], activation=activation)
    truth = by_hand(features, steps, activation)
    assert_as_good_as_torch(scores, truth, by_hand(features, steps, activation, torch.float32), activation)
    # The oracle must be able to tell this activation from every other.
    for other in set(BY_HAND) - {activation}:
        with pytest.raises(AssertionError, match="worse than torch"):
            assert_as_good_as_torch(
                scores, *(by_hand(features, steps, other, d) for d in (torch.float64, torch.float32))
            )


def test_the_names_are_those_of_a_checkpoint_s_config():
    assert set(ACTIVATIONS) == set(GATE_ACTIVATIONS) == set(BY_HAND)


def test_activation_where_the_step_says():
    first, norm, last = weight(16, IN), weight(16), weight(1, 16)
    features = 2 * torch.randn(33, IN)
    seen = []
    for after_first, after_norm in [(False, True), (True, False), (True, True), (False, False)]:
        steps = [(*first, after_first), (*norm, after_norm), (*last, False)]
        scores = gate_scores(features, [GateStep(*step) for step in steps])
        truth = by_hand(features, steps, "gelu")
        assert_as_good_as_torch(scores, truth, by_hand(features, steps, "gelu", torch.float32))
        assert all((scores - other).abs().max() > 1e-3 for other in seen)
        seen.append(scores)
    assert torch.equal(gate_scores(features, [first, norm, last]), seen[0])
    # What one step leaves open does not depend on what another says.
    assert torch.equal(gate_scores(features, [GateStep(*first, True), norm, last]), seen[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_the_queries_and_what_follows_it(dtype):
    queries, last = (2 * torch.randn(37, 5, 16)).to(dtype), torch.randn(37, 8).to(dtype)
    for features, other, narrow in ((queries, last, 24), (queries, None, 16), (queries[:, 0], last, 24)):
        steps = [(*weight(11, narrow), True), (*weight(1, 11), False)]

        def joined(dtype, features=features, other=other):
            mean = features.to(dtype) if features.dim() == 2 else features.to(dtype).sum(1) / features.shape[1]
            return mean if other is None else torch.cat([mean, other.to(dtype)], dim=1)

        scores = gate_scores(features, [(w, b) for w, b, _ in steps], last=other)
        truth = by_hand(joined(torch.float64), steps, "gelu")
        assert truth.std() > 0.05
        assert_as_good_as_torch(scores, truth, by_hand(joined(torch.float32), steps, "gelu", torch.float32))


def test_the_decision_is_that_of_a_python_comparison():
    # fp32 rounds 0.7 down, so a score of that very number does not reach it.
    features = torch.special.logit(torch.tensor([0.7]) + torch.arange(-20, 21) * 2**-24)[:, None]
    layers = [(torch.ones(1, 1), None)]
    scores, think = gate_scores(features, layers, threshold=0.7)
    assert torch.equal(scores, gate_scores(features, layers)) and torch.tensor(0.7) in scores
    assert think.dtype == torch.bool and think.tolist() == [score >= 0.7 for score in scores.tolist()]
    assert 0 < think.sum() < len(think)
    size = torch.tensor([[-200.0], [0.0], [200.0], [math.nan]])
    for threshold, expected in ((0, [1, 1, 1, 0]), (0.5, [0, 1, 1, 0]), (1, [0, 0, 1, 0])):
        assert gate_scores(size, layers, threshold=threshold)[1].tolist() == expected
    assert gate_scores(size[:0], layers, threshold=0.5)[1].shape == (0,)


def test_dtypes_may_differ_and_fp64_stays_fp64():
    features = torch.randn(9, IN).bfloat16()
    layers = [weight(16, IN), (weight(16)[0].double(), weight(16)[1].half()), weight(2, 16, dtype=torch.float16)]
    scores = gate_scores(features, layers)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, gate_scores(features.float(), [(w.float(), b.float()) for w, b in layers]))
    assert gate_scores(features.double(), layers).dtype == torch.float64


@pytest.mark.parametrize("outputs", [1, 2])
def test_extreme_logits(outputs):
    size = torch.tensor([-3e38, -1e30, -200.0, 0.0, 200.0, 1e30, 3e38])
    head = torch.ones(1, 1) if outputs == 1 else torch.tensor([[-1.0], [1.0]])
    scores = gate_scores(size[:, None], [(head, None)])
    assert scores[[0, 1, 3, 5, 6]].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert 0 <= scores[2] < 1e-30 and scores[4] == 1.0
    # A common size of both logits cancels; a naive exponential would be inf / inf.
    shifted = gate_scores(torch.tensor([[0.0], [2.0]]), [(torch.tensor([[0.0], [1.0]]), torch.full((2,), 1000.0))])
    assert shifted[0] == 0.5 and abs(shifted[1].item() - 1 / (1 + math.exp(-2))) < 1e-4


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_logit_that_overflows_still_decides(outputs):
    head = torch.full((1, 1), 3e38) if outputs == 1 else torch.tensor([[1.0], [3e38]])
    assert gate_scores(torch.tensor([[10.0], [-10.0]]), [(head, None)]).tolist() == [1.0, 0.0]
    half = torch.full((2, 4), 60000.0, dtype=torch.float16) * torch.tensor([[1.0], [-1.0]], dtype=torch.float16)
    assert gate_scores(half, [(torch.full((1, 4), 60000.0).half(), None)]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["norm_first", "rms_norms", "deep"])
def test_nan_stays_in_its_row(layout, bad):
    layers = [(w, b) for w, b, _ in steps_of(layout)]
    features = torch.randn(6, IN)
    clean = gate_scores(features, layers)
    features[2, 5] = bad
    dirty = gate_scores(features, layers)
    assert torch.equal(dirty[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    assert torch.isnan(dirty[2]) if math.isnan(bad) else not torch.equal(dirty[2], clean[2])


def test_strides_and_sizes(cut_from_nan):
    layers = [(w, b) for w, b, _ in steps_of("norm_between")]
    features = torch.randn(5, IN)
    expected = gate_scores(features, layers)
    cut = [(cut_from_nan(w), b) for w, b in layers]
    assert_as_good_as_torch(gate_scores(cut_from_nan(features), cut), expected.double(), expected)
    assert_as_good_as_torch(gate_scores(features.t().contiguous().t(), layers), expected.double(), expected)
    assert gate_scores(features[:0], layers).shape == (0,)
    for row in range(5):
        assert_as_good_as_torch(
            gate_scores(features[row : row + 1], layers), expected[row : row + 1].double(), expected[row : row + 1]
        )


@pytest.mark.parametrize("layout", ["two_logits", "norm_between", "rms_norms"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh"])
def test_gradients(layout, activation):
    steps = steps_of(layout, torch.float64)
    features = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    tensors = [t.requires_grad_() for w, b, _ in steps for t in (w, b) if t is not None]

    def scores(features, *_):
        return gate_scores(features, [(w, b) for w, b, _ in steps], activation=activation)

    assert torch.autograd.gradcheck(scores, (features, *tensors), fast_mode=True)


def test_16_bit_weights_get_gradients_in_their_dtype():
    first, last = weight(8, IN, dtype=torch.bfloat16), weight(1, 8, dtype=torch.bfloat16)
    for tensor in (*first, *last):
        tensor.requires_grad_()
    gate_scores(torch.randn(4, IN).bfloat16(), [first, last]).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 and t.grad.any() for t in (*first, *last))


def test_autocast_does_not_round():
    features, layers = torch.randn(16, IN), [(w, b) for w, b, _ in steps_of("deep")]
    expected = gate_scores(features, layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate_scores(features, layers), expected)
        assert torch.nn.functional.linear(features, layers[0][0]).dtype == torch.bfloat16


def test_fullgraph_without_recompiles():
    layers = [(w, b) for w, b, _ in steps_of("rms_norms")]
    frames = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def run(features):
        return gate_scores(features, layers)

    for batch in (3, 8, 17):
        features = torch.randn(batch, IN)
        assert_as_good_as_torch(run(features), gate_scores(features, layers).double(), gate_scores(features, layers))
    assert frames.frame_count == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_good_as_torch(run(features), gate_scores(features, layers).double(), gate_scores(features, layers))


def test_no_host_reads():
    layers = [(w.to("meta"), None if b is None else b.to("meta")) for w, b, _ in steps_of("two_norms")]
    assert gate_scores(torch.empty(5, IN, device="meta"), layers).shape == (5,)


X = torch.zeros(3, 4)
HEAD = (torch.zeros(1, 4), None)
WIDE = (torch.zeros(8, 4), torch.zeros(8))
TAIL = (torch.zeros(2, 8), torch.zeros(2))
BAD = {
    "features_type": ([[1.0]], [HEAD], {}, DtypeError, "features must be a tensor [batch, in_features], got list."),
    "features_shape": (
        X[0], [HEAD], {}, ShapeError,
        "features must be [batch, in_features] or [batch, num_queries, hidden] with one query or more, got [4].",
    ),
    "features_int": (
        X.int(), [HEAD], {}, DtypeError, "features must be float32, float16, bfloat16 or float64, got torch.int32.",
    ),
    "no_layers": (X, [], {}, ShapeError, "layers must be a sequence of one or more (weight, bias) steps, got none."),
    "layers_type": (
        X, HEAD[0], {}, ShapeError, "layers must be a sequence of one or more (weight, bias) steps, got Tensor.",
    ),
    "layer_type": (
        X, [HEAD[0]], {}, DtypeError, "layers[0] must be a GateStep or a tuple (weight, bias), got Tensor.",
    ),
    "layer_long": (
        X, [WIDE, (*TAIL, False, 1)], {}, DtypeError,
        "layers[1] must be a GateStep or a tuple (weight, bias), got a tuple of 4.",
    ),
    "weight_type": (X, [(None, None)], {}, DtypeError, "layers[0].weight must be a tensor, got NoneType."),
    "bias_type": (X, [(HEAD[0], 0.5)], {}, DtypeError, "layers[0].bias must be a tensor, got float."),
    "weight_dtype": (
        X, [(HEAD[0].long(), None)], {}, DtypeError,
        "layers[0].weight must be float32, float16, bfloat16 or float64, got torch.int64.",
    ),
    "weight_width": (
        X, [(torch.zeros(1, 5), None)], {}, ShapeError,
        "layers[0].weight must be [out_features, 4] of a linear layer or [4] of a norm (in_features of features), none "
        "of them 0, got [1, 5].",
    ),
    "chain": (
        X, [WIDE, (torch.zeros(1, 7), None)], {}, ShapeError,
        "layers[1].weight must be [out_features, 8] of a linear layer or [8] of a norm (what layers[0] writes), none "
        "of them 0, got [1, 7].",
    ),
    "norm_width": (X, [(torch.zeros(5), None), HEAD], {}, ShapeError, "[4] of a norm (in_features of features), none"),
    "weight_3d": (X, [(torch.zeros(1, 1, 4), None)], {}, ShapeError, "none of them 0, got [1, 1, 4]."),
    "weight_empty": (X, [(torch.zeros(0, 4), None), HEAD], {}, ShapeError, "none of them 0, got [0, 4]."),
    "bias_shape": (
        X, [WIDE, (TAIL[0], torch.zeros(3))], {}, ShapeError,
        "layers[1].bias must be [2] (first dimension of layers[1].weight), got [3].",
    ),
    "device": (
        X, [WIDE, (TAIL[0].to("meta"), None)], {}, DeviceError,
        "layers[1].weight must be on the device of features (cpu), got meta. Move one of them.",
    ),
    "outputs": (
        X, [(torch.zeros(3, 4), None)], {}, ShapeError,
        "the last of layers must be linear with 1 output (sigmoid) or 2 (softmax; the second means think), got a "
        "layers[0].weight of [3, 4].",
    ),
    "last_is_norm": (X[:, :2], [(torch.ones(2), None)], {}, ShapeError, "got a layers[0].weight of [2]."),
    "last_activated": (
        X, [WIDE, GateStep(*TAIL, True)], {}, OptionError,
        "layers[1].activated must be False or None: its outputs are the logits, got True.",
    ),
    "activation": (
        X, [HEAD], {"activation": "gleu"}, OptionError,
        'activation must be one of "gelu", "gelu_tanh", "relu", "silu", "tanh", got \'gleu\'. Did you mean "gelu"?',
    ),
    "no_query": (X[:, None][:, :0], [HEAD], {}, ShapeError, "with one query or more, got [3, 0, 4]."),
    "last_type": (X, [HEAD], {"last": 1}, DtypeError, "last must be a tensor [batch, width] or None, got int."),
    "last_shape": (X, [HEAD], {"last": X[:2]}, ShapeError, "last must be [3, width] (batch of features), got [2, 4]."),
    "last_dtype": (X, [HEAD], {"last": X.int()}, DtypeError, "last must be float32, float16, bfloat16 or float64, got"),
    "last_device": (
        X, [HEAD], {"last": X.to("meta")}, DeviceError,
        "last must be on the device of features (cpu), got meta. Move one of them.",
    ),
    "last_width": (
        X, [HEAD], {"last": X}, ShapeError,
        "layers[0].weight must be [out_features, 8] of a linear layer or [8] of a norm (features, then last), none of "
        "them 0, got [1, 4].",
    ),
    "threshold": (X, [HEAD], {"threshold": 1.5}, OptionError, "threshold must be a number in [0, 1] or None, got 1.5."),
    "threshold_type": (X, [HEAD], {"threshold": True}, OptionError, "or None, got True."),
    "threshold_nan": (X, [HEAD], {"threshold": math.nan}, OptionError, "or None, got nan."),
    "activation_type": (X, [HEAD], {"activation": None}, OptionError, '"tanh", got None.'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_violation(name):
    features, layers, options, error, message = BAD[name]
    with pytest.raises(error) as caught:
        gate_scores(features, layers, **options)
    assert message in str(caught.value)
    assert isinstance(caught.value, TWNError)
