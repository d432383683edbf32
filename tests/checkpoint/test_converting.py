"""Conversions: same tensors, idempotent, never unsafe, never destroying a source."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from twn_kernels import load_checkpoint
from twn_kernels.checkpoint import convert_directory, convert_file, convert_pair
from twn_kernels.errors import CheckpointError, OptionError


def snapshot(directory):
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same(a, b) -> bool:
    gates = list(a.gate) == list(b.gate) and all(torch.equal(a.gate[name], b.gate[name]) for name in a.gate)
    layers = all(
        torch.equal(a.adapters[name].layers[module].B, layer.B)
        for name, adapter in b.adapters.items()
        for module, layer in adapter.layers.items()
    )
    return gates and layers and torch.equal(a.queries, b.queries) and a.config.values() == b.config.values()


def test_in_place(twn):
    before, wanted = snapshot(twn), load_checkpoint(twn)
    written = convert_directory(twn)
    assert [path.name for path in written] == ["gate_mlp.safetensors", "queries.safetensors"]
    after = snapshot(twn)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {str(path) for path in written}
    assert convert_directory(twn) == written and snapshot(twn) == after
    read = load_checkpoint(twn)
    assert read.gate_file.name == "gate_mlp.safetensors" and same(read, wanted)


def test_to_another_directory(twn, tmp_path):
    before, wanted = snapshot(twn), load_checkpoint(twn)
    convert_directory(twn, tmp_path / "out")
    first = snapshot(tmp_path / "out")
    written = convert_directory(twn, tmp_path / "out")
    assert snapshot(tmp_path / "out") == first and snapshot(twn) == before
    assert not [name for name in first if name.endswith(".pt")] and len(written) == 4
    assert same(load_checkpoint(tmp_path / "out"), wanted)
    with pytest.raises(OptionError, match="out is the directory to convert"):
        convert_directory(twn, twn)


def test_adapters_that_torch_saved(twn):
    path = twn / "reasoning" / "adapter_model.safetensors"
    wanted = path.read_bytes()
    torch.save(load_file(path), path.with_name("adapter_model.bin"))
    path.unlink()
    assert path in convert_directory(twn)
    assert path.read_bytes() == wanted and path.with_name("adapter_model.bin").exists()


def test_the_order_of_layers_survives(twn):
    gate = {name: torch.randn(64, 64) for name in ("last.weight", "first.weight")}
    gate["out.weight"] = torch.randn(1, 64)
    torch.save(gate, twn / "gate_mlp.pt")
    convert_directory(twn)
    (twn / "gate_mlp.pt").unlink()
    assert list(load_checkpoint(twn).gate) == list(gate)


def test_values_beside_the_tensors_are_kept_as_metadata(tmp_path):
    from safetensors import safe_open

    torch.save({"state_dict": {"0.weight": torch.ones(1, 4)}, "epoch": 3, "activation": "relu"}, tmp_path / "g.pt")
    with safe_open(convert_file(tmp_path / "g.pt"), "pt") as opened:
        assert opened.metadata()["epoch"] == "3" and opened.metadata()["activation"] == '"relu"'


def test_a_file(twn, tmp_path):
    out = convert_file(twn / "queries.pt", tmp_path / "q.safetensors")
    assert torch.equal(load_file(out)["queries"], torch.load(twn / "queries.pt", weights_only=True)["queries"])
    assert convert_file(out) == out
    with pytest.raises(OptionError, match="out must end in .safetensors, got q.pt"):
        convert_file(twn / "queries.pt", tmp_path / "q.pt")


def test_other_tensors_there_are_not_overwritten(twn):
    target = convert_file(twn / "queries.pt")
    torch.save({"queries": torch.zeros(4, 64)}, twn / "queries.pt")
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="is there and holds other tensors; remove it or name another file"):
        convert_file(twn / "queries.pt")
    assert target.read_bytes() == before
    assert not [name for name in os.listdir(twn) if name.startswith(".")]


class Evil:
    def __reduce__(self):
        return (getattr, ("text", "upper"))


def test_code_is_never_run(twn):
    torch.save({"x": Evil()}, twn / "gate_mlp.pt")
    for convert in (lambda: convert_file(twn / "gate_mlp.pt"), lambda: convert_directory(twn)):
        with pytest.raises(CheckpointError, match="it pickles builtins.getattr. twn_kernels never unpickles code"):
            convert()
    assert not list(twn.glob("*.safetensors"))


def test_a_pair_becomes_a_directory(twn, tmp_path):
    wanted, before = load_checkpoint(twn), snapshot(twn)
    pair = {name: twn / name for name in ("reasoning", "embedding")}
    out = convert_pair(
        pair,
        tmp_path / "out",
        gate=twn / "gate_mlp.pt",
        queries=twn / "queries.pt",
        config=twn / "twn_config.json",
    )
    assert same(load_checkpoint(out), wanted) and snapshot(twn) == before
    for name in ("reasoning/adapter_model.safetensors", "reasoning/adapter_config.json", "twn_config.json"):
        assert (out / name).read_bytes() == (twn / name).read_bytes()
    first = snapshot(out)
    convert_pair(pair, out, gate=twn / "gate_mlp.pt", queries=twn / "queries.pt", config=twn / "twn_config.json")
    assert snapshot(out) == first


def test_a_pair_alone(twn, tmp_path):
    out = convert_pair({name: twn / name for name in ("reasoning", "embedding")}, tmp_path / "out")
    assert sorted(os.listdir(out)) == ["embedding", "reasoning"]


def test_one_directory_for_both_adapters_is_refused(twn, tmp_path):
    again = twn / "embedding" / ".." / "reasoning"
    with pytest.raises(OptionError, match="both adapters are .*reasoning; reasoning and embedding must be two."):
        convert_pair({"reasoning": twn / "reasoning", "embedding": again}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fit(twn, tmp_path):
    torch.save({"0.weight": torch.ones(1, 63)}, tmp_path / "gate.pt")
    pair = {name: twn / name for name in ("reasoning", "embedding")}
    with pytest.raises(CheckpointError, match="the gate reads 63 features"):
        convert_pair(pair, tmp_path / "out", gate=tmp_path / "gate.pt", queries=twn / "queries.pt")
    (tmp_path / "c.json").write_text('{"poling": "mean"}')
    with pytest.raises(CheckpointError, match='has no field "poling".*mean "pooling"'):
        convert_pair(pair, tmp_path / "out", config=tmp_path / "c.json")
    with pytest.raises(CheckpointError, match="none.pt cannot be read: No such file"):
        convert_pair(pair, tmp_path / "out", gate=tmp_path / "none.pt")
    assert not (tmp_path / "out").exists()


def test_in_place_needs_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="owner/name is no directory, and only a directory can be converted"):
        convert_directory("owner/name")
