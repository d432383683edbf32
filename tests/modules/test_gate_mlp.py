"""The gate as a module: any checkpoint's layers and names, every way to make its features."""

from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from twn_kernels.checkpoint.config import GATE_INPUTS as CONFIG_GATE_INPUTS
from twn_kernels.checkpoint.gate import gate_inputs, gate_layout
from twn_kernels.checkpoint.tensorfile import infos_of
from twn_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError, TWNError
from twn_kernels.modules import GateMLP
from twn_kernels.modules.gate_mlp import GATE_INPUTS
from twn_kernels.testing.oracle import assert_as_good_as_torch

BATCH, N, H = 6, 3, 8
WIDTHS = {"mean": H, "last": H, "concat": N * H, "mean_last": 2 * H}


class Words(nn.Module):
    """Layers with words for names, one of which the gate uses for itself."""

    def __init__(self):
        super().__init__()
        self.gate_input, self.between, self.a_head = nn.Linear(H, 9), nn.LayerNorm(9), nn.Linear(9, 2)

    def forward(self, x):
        return self.a_head(nn.functional.gelu(self.between(self.gate_input(x))))


GATES = {
    "one_linear": lambda: nn.Sequential(nn.Linear(H, 1)),
    "bare_linear": lambda: nn.Linear(H, 2),
    "sequential": lambda: nn.Sequential(nn.Linear(H, 9), nn.GELU(), nn.Linear(9, 1)),
    "norm_first": lambda: nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 9), nn.GELU(), nn.Linear(9, 2)),
    "norm_after": lambda: nn.Sequential(nn.Linear(H, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 1)),
    "rms_norm": lambda: nn.Sequential(nn.Linear(H, 9), nn.RMSNorm(9, eps=1e-6), nn.GELU(), nn.Linear(9, 1)),
    "nested": lambda: nn.Sequential(OrderedDict(net=nn.Sequential(nn.Linear(H, 9), nn.GELU(), nn.Linear(9, 1)))),
    "words": Words,
}  # fmt: skip


def torch_gate(name):
    gate = GATES[name]()
    for parameter in gate.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape)
    return gate


def score(gate, features):
    logits = gate(features)
    return torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, 1)[:, 1]


def states(dtype=torch.float32):
    return torch.randn(BATCH, N, H).to(dtype), torch.randn(BATCH, H).to(dtype)


def features_by_hand(gate_input, queries, last):
    mean = (queries[:, 0] + queries[:, 1] + queries[:, 2]) / 3
    return {
        "mean": lambda: mean,
        "last": lambda: last,
        "concat": lambda: torch.cat([queries[:, 0], queries[:, 1], queries[:, 2]], 1),
        "mean_last": lambda: torch.cat([mean, last], 1),
    }[gate_input]()


@pytest.mark.parametrize("name", GATES)
def test_layers_of_a_checkpoint_give_the_module_s_scores(name):
    theirs = torch_gate(name)
    tensors = theirs.state_dict()
    layout = gate_layout(infos_of(tensors), "gate_mlp.pt", ordered=True)
    ours = GateMLP(tensors, layout.layers)
    queries, _ = states()
    truth = score(copy.deepcopy(theirs).double(), queries.double().mean(1)).detach()
    assert_as_good_as_torch(ours(queries), truth, score(theirs, queries.mean(1)), name)
    assert truth.std() > 0.01


@pytest.mark.parametrize("name", GATES)
def test_names_survive(name):
    tensors = {key: value.bfloat16() for key, value in torch_gate(name).state_dict().items()}
    gate = GateMLP(tensors)
    state = gate.state_dict()
    assert list(state) == list(tensors) == [key for key, _ in gate.named_parameters()]
    assert all(state[key].dtype == torch.bfloat16 and torch.equal(state[key], tensors[key]) for key in tensors)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = GateMLP({key: torch.zeros_like(value) for key, value in tensors.items()})
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    queries, _ = states()
    assert torch.equal(fresh(queries), gate(queries))
    assert torch.equal(copy.deepcopy(gate)(queries), gate(queries))


def test_names_that_a_module_has_already():
    """A checkpoint may call its layers what ``nn.Module`` calls its methods, or the gate its attributes."""
    theirs = torch_gate("sequential")
    names = {"0": "float", "2": "in_features"}
    tensors = {f"{names[key[0]]}{key[1:]}": value for key, value in theirs.state_dict().items()}
    ours = GateMLP(tensors)
    queries, _ = states()
    assert torch.equal(ours(queries), score(theirs, queries.mean(1)))
    assert list(ours.state_dict()) == list(tensors) and ours.in_features == H
    ours.load_state_dict({key: torch.zeros_like(value) for key, value in tensors.items()})
    assert torch.equal(ours.float()(queries), torch.full((BATCH,), 0.5))


def test_a_directory_s_gate_and_back(tmp_path):
    from twn_kernels.testing.twn_directory import write_gate_and_queries

    write_gate_and_queries(tmp_path, H, gate_input="mean_last", gate_hidden=(9, 5), gate_norm=True, gate_outputs=2)
    on_disk = torch.load(tmp_path / "gate_mlp.pt", weights_only=True)
    gate = GateMLP(on_disk, gate_layout(infos_of(on_disk), "gate", ordered=True).layers, gate_input="mean_last")
    assert list(gate.state_dict()) == list(on_disk)
    assert all(torch.equal(gate.state_dict()[key], value) for key, value in on_disk.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate_input", GATE_INPUTS)
def test_features(gate_input, dtype):
    theirs = nn.Sequential(nn.Linear(WIDTHS[gate_input], 9), nn.GELU(), nn.Linear(9, 1))
    ours = GateMLP(theirs.state_dict(), gate_input=gate_input)
    queries, last = states(dtype)
    truth = score(copy.deepcopy(theirs).double(), features_by_hand(gate_input, queries.double(), last.double()))
    scores = ours(queries, last)
    assert scores.dtype == torch.float32 and scores.shape == (BATCH,)
    baseline = score(theirs, features_by_hand(gate_input, queries.float(), last.float()))
    assert_as_good_as_torch(scores, truth.detach(), baseline, gate_input)
    if gate_input in ("mean", "concat"):
        assert torch.equal(ours(queries), scores)
    if gate_input == "last":
        assert torch.equal(ours(None, last), scores)


def test_the_names_are_those_of_a_checkpoint_s_config():
    assert set(GATE_INPUTS) == set(CONFIG_GATE_INPUTS)
    assert all(name in gate_inputs(width, N, H) for name, width in WIDTHS.items())


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu", "tanh"])
def test_activation(activation):
    make = {"gelu_tanh": lambda: nn.GELU("tanh"), "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[activation]
    theirs = nn.Sequential(nn.Linear(H, 9), make(), nn.Linear(9, 1))
    queries, _ = states()
    truth = score(copy.deepcopy(theirs).double(), queries.double().mean(1)).detach()
    ours = GateMLP(theirs.state_dict(), activation=activation)
    assert_as_good_as_torch(ours(queries), truth, score(theirs, queries.mean(1)), activation)


def test_trains():
    theirs = torch_gate("norm_after")
    tensors = theirs.state_dict()
    kept = {key: value.clone() for key, value in tensors.items()}
    layout = gate_layout(infos_of(tensors), "gate", ordered=True)
    ours = GateMLP(tensors, layout.layers)
    queries = torch.randn(64, N, H)
    wanted = (queries.mean(1)[:, 0] > 0).float()
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy(ours(queries), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.any() for parameter in ours.parameters())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensors[key], kept[key]) for key in kept), "the tensors given were trained along"


@pytest.mark.parametrize("gate_input", GATE_INPUTS)
def test_gradients_reach_the_states(gate_input):
    tensors = {key: value.double() for key, value in nn.Linear(WIDTHS[gate_input], 2).state_dict().items()}
    gate = GateMLP(tensors, gate_input=gate_input)
    queries, last = (state.requires_grad_() for state in states(torch.float64))
    used = {"mean": (queries,), "concat": (queries,), "last": (last,), "mean_last": (queries, last)}[gate_input]
    assert torch.autograd.gradcheck(lambda *_: gate(queries, last), used)


def test_nan_stays_in_its_row():
    gate = GateMLP(nn.Linear(2 * H, 1).state_dict(), gate_input="mean_last")
    queries, last = states()
    clean = gate(queries, last)
    queries[1, 2, 0] = last[4, 3] = torch.nan
    dirty = gate(queries, last)
    assert torch.equal(torch.isnan(dirty), torch.tensor([False, True, False, False, True, False]))
    assert torch.equal(dirty[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_autocast_and_moves_do_not_round():
    gate = GateMLP(torch_gate("words").state_dict())
    queries, _ = states()
    expected = gate(queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(queries), expected)
    assert gate.to(torch.bfloat16)(queries.bfloat16()).dtype == torch.float32
    assert gate.to("meta")(queries.to("meta")).shape == (BATCH,)
    assert GateMLP(torch_gate("words").state_dict())(queries[:0]).shape == (0,)


@pytest.mark.parametrize("gate_input", GATE_INPUTS)
def test_fullgraph_without_recompiles(gate_input):
    hidden = nn.Sequential(nn.Linear(WIDTHS[gate_input], 4), nn.GELU(), nn.Linear(4, 1))
    gate = GateMLP({f"float.{key}": value for key, value in hidden.state_dict().items()}, gate_input=gate_input)
    frames = CompileCounter()
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend=frames)
    for batch in (5, 11, 17):
        queries, last = torch.randn(batch, N, H), torch.randn(batch, H)
        assert_as_good_as_torch(compiled(queries, last), gate(queries, last).double(), gate(queries, last))
    assert frames.frame_count == 1


def test_it_prints_what_it_holds():
    gate = GateMLP(nn.Sequential(nn.Linear(H, 4), nn.GELU(), nn.Linear(4, 1)).state_dict())
    assert 'gate_input="mean", activation="gelu", 0.weight [4, 8], 2.weight [1, 4]' in repr(gate)


GOOD = {"a.weight": torch.zeros(4, H), "a.bias": torch.zeros(4), "b.weight": torch.zeros(1, 4)}


def _layer(weight, bias=None):
    return SimpleNamespace(weight=weight, bias=bias, activated=None)


A, B = _layer("a.weight", "a.bias"), _layer("b.weight")
BAD = {
    "gate_input": (
        GOOD, None, {"gate_input": "meen"}, OptionError,
        'gate_input must be one of "mean", "last", "concat", "mean_last", got \'meen\'. Did you mean "mean"?',
    ),
    "activation": (GOOD, None, {"activation": "rleu"}, OptionError, "got 'rleu'. Did you mean \"relu\"?"),
    "empty": ({}, None, {}, ShapeError, "the gate must have one layer or more, got none in tensors none."),
    "no_layers": (GOOD, (), {}, ShapeError, 'got none in tensors "a.weight", "a.bias", "b.weight".'),
    "missing": (
        GOOD, (A, _layer("bb.weight")), {}, OptionError,
        'layers names "bb.weight", which tensors does not hold: "a.weight", "a.bias", "b.weight". '
        'Did you mean "b.weight"?',
    ),
    "unused": (
        GOOD, (_layer("a.weight"), B), {}, OptionError,
        'every tensor must belong to a layer of the gate, but no layer names "a.bias".',
    ),
    "unused_in_order": (GOOD | {"temperature": torch.ones(1)}, None, {}, OptionError, 'no layer names "temperature".'),
    "repeated": (
        GOOD, (A, B, B), {}, OptionError,
        'a tensor must belong to one layer, but layers names "b.weight" more than once.',
    ),
    "integers": (
        GOOD | {"b.weight": torch.zeros(1, 4).int()}, None, {}, DtypeError,
        '"b.weight" of the gate must be a floating-point tensor, got torch.int32.',
    ),
    "no_tensor": (GOOD | {"b.weight": [1]}, None, {}, DtypeError, "a floating-point tensor, got list."),
    "chain": (
        GOOD | {"b.weight": torch.zeros(1, 5)}, None, {}, ShapeError,
        "layers[1].weight must be [out_features, 4] of a linear layer or [4] of a norm (what layers[0] writes)",
    ),
    "outputs": (GOOD | {"b.weight": torch.zeros(3, 4)}, None, {}, ShapeError, "the last of layers must be linear with"),
    "scalar": ({"weight": torch.tensor(1.0)}, None, {}, ShapeError, "got []."),
    "devices": (GOOD | {"b.weight": torch.zeros(1, 4, device="meta")}, None, {}, DeviceError, "layers[1].weight must"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_no_gate(name):
    tensors, layers, options, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        GateMLP(tensors, layers, **options)
    assert isinstance(caught.value, TWNError)


Q, L = torch.zeros(2, N, H), torch.zeros(2, H)
BAD_STATES = {
    "no_queries": (
        "mean", None, L, DtypeError,
        'query_states must be a tensor [batch, num_queries, hidden]: gate_input "mean" reads it, got NoneType.',
    ),
    "no_last": (
        "mean_last", Q, None, DtypeError,
        'last_prompt_state must be a tensor [batch, hidden]: gate_input "mean_last" reads it, got NoneType.',
    ),
    "queries_shape": (
        "concat", L, None, ShapeError, "query_states must be [batch, num_queries, hidden], got [2, 8].",
    ),
    "queries_empty": ("mean", Q[:, :0], None, ShapeError, "hidden], got [2, 0, 8]."),
    "last_shape": ("last", Q, Q, ShapeError, "last_prompt_state must be [batch, hidden], got [2, 3, 8]."),
    "integers": ("mean", Q.int(), None, DtypeError, "query_states must be floating point, got torch.int32."),
    "batch": (
        "mean_last", Q, L[:1], ShapeError,
        "last_prompt_state must be [2, 8] (batch and hidden of query_states), got [1, 8].",
    ),
    "two_devices": (
        "mean_last", Q, L.to("meta"), DeviceError,
        "last_prompt_state must be on the device of query_states (cpu), got meta. Move one of them.",
    ),
    "device": ("mean", Q.to("meta"), None, DeviceError, "layers[0].weight must be on the device of features (meta)"),
    "width": (
        "mean", Q[..., :5], None, ShapeError,
        'the gate reads 8 features but gate_input "mean" makes 5 of query_states [2, 3, 5]. Use the model, the queries '
        "and the gate_input it was trained with.",
    ),
    "width_concat": (
        "concat", Q[:, :2], L, ShapeError,
        'reads 24 features but gate_input "concat" makes 16 of query_states [2, 2, 8], last_prompt_state [2, 8].',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_that_do_not_fit(name):
    gate_input, queries, last, error, message = BAD_STATES[name]
    gate = GateMLP(nn.Linear(WIDTHS[gate_input], 1).state_dict(), gate_input=gate_input)
    with pytest.raises(error, match=re.escape(message)) as caught:
        gate(queries, last)
    assert isinstance(caught.value, TWNError)
