"""Gates and queries of any naming and shape: read in the right order, or refused with the reason."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from twn_kernels import inspect_checkpoint, load_checkpoint
from twn_kernels.checkpoint.gate import gate_inputs, gate_layout
from twn_kernels.checkpoint.tensorfile import infos_of
from twn_kernels.errors import CheckpointError

H = 64


class Custom(nn.Module):
    """Layers with words for names; the alphabet would order them wrongly."""

    def __init__(self):
        super().__init__()
        self.input_layer, self.hidden_layer, self.a_head = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, 1)

    def forward(self, x):
        x = nn.functional.gelu(self.input_layer(x))
        return self.a_head(nn.functional.gelu(self.hidden_layer(x)))


GATES = {
    "sequential": lambda: nn.Sequential(nn.Linear(H, 8), nn.GELU(), nn.Linear(8, 1)),
    "one-linear": lambda: nn.Sequential(nn.Linear(H, 1)),
    "no-bias": lambda: nn.Sequential(nn.Linear(H, 8, bias=False), nn.GELU(), nn.Linear(8, 2, bias=False)),
    "deep": lambda: nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(H, H), nn.GELU())], nn.Linear(H, 1)),
    "dropout": lambda: nn.Sequential(nn.Linear(H, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 1)),
    "norm-first": lambda: nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 8), nn.GELU(), nn.Linear(8, 1)),
    "norm-before-act": lambda: nn.Sequential(nn.Linear(H, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1)),
    "norm-after-act": lambda: nn.Sequential(nn.Linear(H, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1)),
    "rms-norm": lambda: nn.Sequential(nn.Linear(H, 8), nn.RMSNorm(8, eps=1e-6), nn.GELU(), nn.Linear(8, 1)),
    "many": lambda: nn.Sequential(*[m for i in range(11, 0, -1) for m in (nn.Linear(i + 1, i), nn.GELU())][:-1]),
    "words": Custom,
}


def run(layout, tensors, x):
    """The gate that the layout describes, step by step."""
    for layer in layout.layers:
        weight, bias = tensors[layer.weight], None if layer.bias is None else tensors[layer.bias]
        if layer.kind == "linear":
            x = nn.functional.linear(x, weight, bias)
        elif bias is None:
            x = nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
        else:
            x = nn.functional.layer_norm(x, weight.shape, weight, bias)
        x = nn.functional.gelu(x) if layer.activated else x
    return x


def module(name):
    gate = GATES[name]()
    for parameter in gate.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.5
    return gate.eval()


@pytest.mark.parametrize("name", GATES)
def test_layout_computes_what_the_module_computes(name):
    gate = module(name)
    tensors = gate.state_dict()
    layout = gate_layout(infos_of(tensors), "gate_mlp.pt", ordered=True)
    x = torch.randn(5, layout.in_features)
    assert torch.equal(run(layout, tensors, x), gate(x))
    assert layout.notes == ()


@pytest.mark.parametrize("name", [name for name in GATES if name != "words"])
def test_safetensors_orders_by_the_numbers(name):
    gate = module(name)
    tensors = dict(sorted(gate.state_dict().items()))
    layout = gate_layout(infos_of(tensors), "gate_mlp.safetensors", ordered=False)
    x = torch.randn(5, layout.in_features)
    assert torch.equal(run(layout, tensors, x), gate(x))


def test_names_without_numbers_and_equal_widths_are_ordered_by_name_and_said():
    tensors = dict(sorted(module("words").state_dict().items()))
    with pytest.raises(CheckpointError, match="do not chain, each into the next, in exactly one order"):
        gate_layout(infos_of(tensors), "gate_mlp.safetensors", ordered=False)
    tensors = {k.replace("a_head", "z_head"): v for k, v in tensors.items()}
    layout = gate_layout(infos_of(tensors), "gate_mlp.safetensors", ordered=False)
    assert layout.notes == (
        "gate_mlp.safetensors: layers ordered by names that hold no numbers; their shapes allow other orders",
    )


def test_shapes_order_what_names_do_not():
    tensors = {"a.weight": torch.ones(1, 8), "b.weight": torch.ones(8), "b.bias": torch.ones(8),
               "c.weight": torch.ones(8, H)}  # fmt: skip
    layout = gate_layout(infos_of(tensors), "g", ordered=False)
    assert [layer.name for layer in layout.layers] == ["c", "b", "a"]
    assert [layer.activated for layer in layout.layers] == [False, True, False]
    assert layout.notes == ("g: layers ordered by their shapes, not by their names",)


WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": {"gate": s}},
    "prefixed": lambda s: {f"module.gate_mlp.net.{k}": v for k, v in s.items()},
    "ordered": OrderedDict,
    "parameters": lambda s: {k: nn.Parameter(v) for k, v in s.items()},
    "fp16": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_state_dicts(twn, wrap):
    state = module("sequential").state_dict()
    torch.save(WRAPPED[wrap](state), twn / "gate_mlp.pt")
    checkpoint = load_checkpoint(twn)
    values = list(checkpoint.gate.values())
    assert [value.shape for value in values] == [value.shape for value in state.values()]
    assert all(torch.equal(a.float(), b.half().float() if wrap == "fp16" else b)
               for a, b in zip(values, state.values(), strict=True))  # fmt: skip
    assert checkpoint.gate_layout().out_features == 1


def test_the_older_format_of_torch_save(twn):
    state = module("sequential").state_dict()
    torch.save(state, twn / "gate_mlp.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(twn).gate["0.weight"], state["0.weight"])


def test_values_beside_the_tensors_are_reported(twn):
    torch.save({"state_dict": module("sequential").state_dict(), "epoch": 3}, twn / "gate_mlp.pt")
    assert "gate_mlp.pt: values beside the tensors were not used: epoch = 3" in inspect_checkpoint(twn).notes


def test_tensors_come_in_the_order_of_the_layers(twn):
    state = module("sequential").state_dict()
    torch.save({key: state[key] for key in ("2.bias", "2.weight", "0.bias", "0.weight")}, twn / "gate_mlp.pt")
    assert list(load_checkpoint(twn).gate) == ["0.weight", "0.bias", "2.weight", "2.bias"]


BROKEN = {
    "output": ({"0.weight": torch.ones(3, H)}, "linear with 1 output (sigmoid) or 2 (softmax), got 0.weight with 3"),
    "chain": ({"0.weight": torch.ones(8, H), "1.weight": torch.ones(1, 9)}, "do not chain, each into the next"),
    "no-linear": ({"0.weight": torch.ones(H)}, "holds no linear layer (a weight [out, in])"),
    "extra": ({"0.weight": torch.ones(1, H), "temperature": torch.ones(())}, "belong to no linear layer (weight [out"),
    "bias": ({"0.weight": torch.ones(1, H), "0.bias": torch.ones(2)}, "0.bias [2]"),
    "batch-norm": (nn.BatchNorm1d(H).state_dict(), "got: num_batches_tracked is int64"),
    "integers": ({"0.weight": torch.ones(1, H).int()}, "weights must be one of float32, bfloat16, float16, float64"),
    "width": ({"0.weight": torch.ones(1, 63)}, "the gate reads 63 features; 4 queries of 64 give 64 (mean or last)"),
    "empty": ({}, "gate_mlp.pt holds no tensor"),
    "list": ([torch.ones(1, H)], "gate_mlp.pt holds a list; a tensor or a state dict"),
    "other-values": ({"0.weight": torch.ones(1, H), "x": [1]}, 'neither tensors nor plain numbers: "x" (a list)'),
    "none": (None, "gate_mlp.pt holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_no_gate(twn, case):
    content, said = BROKEN[case]
    torch.save(content, twn / "gate_mlp.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(twn)
    assert said in str(caught.value)
    assert any(said in problem for problem in inspect_checkpoint(twn).problems)


@pytest.mark.parametrize(
    ("width", "queries", "fits"),
    [
        (64, 4, ("mean", "last")),
        (256, 4, ("concat",)),
        (128, 4, ("mean_last",)),
        (128, 2, ("concat", "mean_last")),
        (64, 1, ("mean", "last", "concat")),
        (65, 4, ()),
    ],
)
def test_inputs_by_width(width, queries, fits):
    assert gate_inputs(width, queries, 64) == fits


@pytest.mark.parametrize(
    ("width", "queries", "chosen", "assumed"),
    [(64, 4, "mean", True), (256, 4, "concat", False), (128, 4, "mean_last", False), (128, 2, "concat", True)],
)
def test_gate_input_follows_the_width(twn, width, queries, chosen, assumed):
    torch.save({"0.weight": torch.ones(1, width)}, twn / "gate_mlp.pt")
    torch.save(torch.randn(queries, H), twn / "queries.pt")
    config = load_checkpoint(twn).config
    assert config.gate_input == chosen
    assert ("gate_input" in config.assumed) == assumed


def test_stated_gate_input_must_fit(twn):
    (twn / "twn_config.json").write_text('{"gate_input": "concat"}')
    with pytest.raises(CheckpointError, match='gate_input "concat" does not fit gate_mlp.pt, which reads 64 features: '
                                              'with 4 queries of 64 that is "mean", "last"'):  # fmt: skip
        load_checkpoint(twn)
    (twn / "twn_config.json").write_text('{"gate_input": "last"}')
    config = load_checkpoint(twn).config
    assert config.gate_input == "last" and "gate_input" not in config.assumed


QUERIES = {
    "bare": lambda q: q,
    "batched": lambda q: q[None],
    "dict": lambda q: {"queries": q},
    "embedding": lambda q: {"state_dict": {"query_embeddings.weight": q[None]}},
    "parameter": lambda q: nn.Parameter(q),
    "strided": lambda q: q.t().contiguous().t(),
}


@pytest.mark.parametrize("kind", QUERIES)
def test_queries(twn, kind):
    queries = torch.randn(4, H)
    torch.save(QUERIES[kind](queries), twn / "queries.pt")
    read = load_checkpoint(twn).queries
    assert torch.equal(read, queries) and not read.requires_grad


def test_a_trained_temperature_beside_the_queries_is_reported(twn):
    queries = torch.randn(4, H)
    torch.save({"queries": queries, "logit_scale": torch.tensor(0.5)}, twn / "queries.pt")
    assert torch.equal(load_checkpoint(twn).queries, queries)
    assert "queries.pt: values beside the tensors were not used: logit_scale = 0.5" in inspect_checkpoint(twn).notes


def test_queries_as_safetensors(twn):
    queries = torch.randn(4, H).bfloat16()
    save_file({"anything.at.all": queries}, twn / "queries.safetensors")
    assert torch.equal(load_checkpoint(twn).queries, queries)
    assert "queries.safetensors was read; queries.pt beside it was not" in inspect_checkpoint(twn).notes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.ones(H), '"weight" must be [num_queries, hidden] or [1, num_queries, hidden], got [64].'),
        (torch.ones(2, 4, H), "got [2, 4, 64]."),
        (torch.ones(0, H), "got [0, 64]."),
        (torch.ones(4, H).long(), '"weight" must be one of float32, bfloat16, float16, float64, got int64.'),
        ({"a": torch.ones(4, H), "b": torch.ones(4, H)},
         'must hold one tensor [num_queries, hidden], got 2: "a" [4, 64], "b" [4, 64].'),
    ],
    ids=["1d", "batch", "empty", "integers", "two"],
)  # fmt: skip
def test_no_queries(twn, content, said):
    torch.save(content, twn / "queries.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(twn)
    assert f"queries.pt{': ' if said[0] == chr(34) else ''}" in str(caught.value) and said in str(caught.value)


def test_queries_of_another_model_warn(twn):
    torch.save(torch.randn(4, 100), twn / "queries.pt")
    (twn / "gate_mlp.pt").unlink()
    with pytest.warns(UserWarning, match=r"hidden size 100 is no adapted layer's width .* different models"):
        load_checkpoint(twn)
