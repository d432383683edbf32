"""Saving: byte for byte what was loaded, readable by PEFT, all or nothing."""

from __future__ import annotations

import copy
import os
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twn_kernels import Checkpoint, TWNConfig, load_checkpoint, save_checkpoint
from twn_kernels.checkpoint import Adapter, saving
from twn_kernels.checkpoint.tensorfile import safetensors_bytes
from twn_kernels.errors import CheckpointError, OptionError, ShapeError
from twn_kernels.testing.twn_directory import write_twn_directory


def files(directory) -> dict[str, bytes]:
    root = Path(directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def without_readmes(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: raw for name, raw in content.items() if not name.endswith("README.md")}


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
@pytest.mark.parametrize("config", [None, {}, {"pooling": "last"}], ids=["no-config", "empty-config", "config"])
def test_round_trip_is_byte_for_byte(model, tmp_path, file_format, config):
    source = write_twn_directory(
        tmp_path / "a", model, dtype={"reasoning": torch.bfloat16}, rank_pattern={"q_proj": 2}, gate_input="concat",
        file_format=file_format, config=config,
    )  # fmt: skip
    save_checkpoint(load_checkpoint(source), tmp_path / "b")
    assert files(tmp_path / "b") == without_readmes(files(source))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_metadata_and_foreign_layouts_survive(twn, tmp_path):
    path = twn / "reasoning" / "adapter_model.safetensors"
    tensors = load_file(path)
    header = list(safetensors_bytes(dict(reversed(tensors.items())), metadata={"by": "hand", "zeta": "1"}))
    path.write_bytes(b"".join(bytes(part) for part in header))
    config = twn / "reasoning" / "adapter_config.json"
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n") + b"\n")
    save_checkpoint(load_checkpoint(twn), tmp_path / "out")
    assert files(tmp_path / "out") == without_readmes(files(twn))
    with safe_open(tmp_path / "out" / "reasoning" / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata()["by"] == "hand"


def test_changed_values_are_written(twn, tmp_path):
    checkpoint = load_checkpoint(twn)
    name, layer = next(iter(checkpoint.adapters["reasoning"].layers.items()))
    layer.B.add_(1)
    checkpoint.gate["1.weight"].mul_(2)
    checkpoint.queries.zero_()
    checkpoint.config = replace(checkpoint.config, think_threshold=0.9)
    save_checkpoint(checkpoint, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert torch.equal(again.adapters["reasoning"].layers[name].B, layer.B)
    assert torch.equal(again.gate["1.weight"], checkpoint.gate["1.weight"])
    assert list(again.gate) == list(checkpoint.gate)
    assert not again.queries.any() and again.config.think_threshold == 0.9 and again.config.graph == "reencode"
    content = files(tmp_path / "out")
    assert "gate_mlp.safetensors" in content and "gate_mlp.pt" not in content
    assert content["embedding/adapter_model.safetensors"] == files(twn)["embedding/adapter_model.safetensors"]
    assert not torch.equal(load_checkpoint(twn).adapters["reasoning"].layers[name].B, layer.B)


def in_memory() -> Checkpoint:
    generator = torch.Generator().manual_seed(0)

    def factors(rank, k, n):
        return torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)

    widths = {"q_proj": 64, "k_proj": 32}
    layers = {f"model.layers.{i}.self_attn.{p}": (2 + i, 64, n) for i in range(2) for p, n in widths.items()}
    return Checkpoint(
        adapters={
            name: Adapter.build(
                name,
                {module: factors(*shape) for module, shape in layers.items()},
                lora_alpha=6,
                use_rslora=name == "embedding",
                base_model_name="some/base",
            )
            for name in ("reasoning", "embedding")
        },
        # Widths that chain in any order, names that sort wrongly: only the stated order tells.
        gate={"b.weight": torch.randn(64, 64), "a.weight": torch.randn(64, 64), "c.weight": torch.randn(1, 64)},
        queries=torch.randn(3, 64),
        config=TWNConfig(pooling="last"),
    )


def test_built_in_memory_is_deterministic_and_loads(tmp_path):
    checkpoint = in_memory()
    save_checkpoint(checkpoint, tmp_path / "a")
    save_checkpoint(copy.deepcopy(checkpoint), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = load_checkpoint(tmp_path / "a")
    assert list(read.gate) == ["b.weight", "a.weight", "c.weight"]
    assert read.base_model_name == "some/base" and read.config.values() == checkpoint.config.values()
    for name, adapter in checkpoint.adapters.items():
        for module, layer in adapter.layers.items():
            other = read.adapters[name].layers[module]
            assert torch.equal(other.A, layer.A) and torch.equal(other.B, layer.B)
            assert (other.scaling, other.rank, other.alpha) == (layer.scaling, layer.rank, layer.alpha)


@pytest.mark.parametrize("source", ["loaded", "in-memory"])
def test_peft_reads_what_was_saved(model, twn, tmp_path, source):
    checkpoint = load_checkpoint(twn) if source == "loaded" else in_memory()
    save_checkpoint(checkpoint, tmp_path / "out")
    for name, adapter in checkpoint.adapters.items():
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out" / name)
        seen = 0
        for path, module in wrapped.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                layer = adapter.layers[path.removeprefix("base_model.model.")]
                assert torch.equal(module.get_delta_weight("default"), (layer.B @ layer.A) * layer.scaling)
                seen += 1
        assert seen == len(adapter.layers)


def test_bin_and_adapter_names_become_what_peft_reads(model, twn, tmp_path):
    path = twn / "reasoning" / "adapter_model.safetensors"
    torch.save({k.replace(".weight", ".default.weight"): v for k, v in load_file(path).items()},
               path.with_name("adapter_model.bin"))  # fmt: skip
    wanted = load_file(path)
    path.unlink()
    save_checkpoint(load_checkpoint(twn), tmp_path / "out")
    written = load_file(tmp_path / "out" / "reasoning" / "adapter_model.safetensors")
    assert set(written) == set(wanted) and all(torch.equal(written[name], wanted[name]) for name in wanted)


class TestReplacing:
    def test_its_own_directory_while_mapped(self, twn):
        before = without_readmes(files(twn))
        checkpoint = load_checkpoint(twn)
        save_checkpoint(checkpoint, twn)
        save_checkpoint(checkpoint, twn)
        assert without_readmes(files(twn)) == before

    def test_readme_stays_and_a_stale_gate_goes(self, twn, tmp_path):
        (twn / "README.md").write_text("mine")
        checkpoint = load_checkpoint(twn)
        checkpoint.gate_file = None
        save_checkpoint(checkpoint, twn)
        content = files(twn)
        assert content["README.md"] == b"mine" and "reasoning/README.md" in content
        assert "gate_mlp.safetensors" in content and "gate_mlp.pt" not in content

    @pytest.mark.parametrize("name", ["notes.txt", "reasoning/optimizer.pt"])
    def test_foreign_files_are_refused(self, twn, tmp_path, name):
        checkpoint = load_checkpoint(twn)
        (twn / name).write_text("keep me")
        before = files(twn)
        with pytest.raises(CheckpointError, match=f'holds files that are no part of a TWN directory: "{name}"'):
            save_checkpoint(checkpoint, twn)
        assert files(twn) == before and os.listdir(twn.parent) == ["twn"]

    def test_a_directory_of_something_else(self, twn, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        (other / "README.md").write_text("x")
        with pytest.raises(CheckpointError, match='no part of a TWN directory: "README.md"'):
            save_checkpoint(load_checkpoint(twn), other)

    def test_an_empty_directory_and_new_parents(self, twn, tmp_path):
        (tmp_path / "empty").mkdir()
        save_checkpoint(load_checkpoint(twn), tmp_path / "empty")
        save_checkpoint(load_checkpoint(twn), tmp_path / "new" / "deep" / "er")
        assert files(tmp_path / "empty") == files(tmp_path / "new" / "deep" / "er")

    def test_a_file(self, twn):
        with pytest.raises(CheckpointError, match="is a file; a directory was expected"):
            save_checkpoint(load_checkpoint(twn), twn / "queries.pt")

    def test_through_a_link(self, twn, tmp_path):
        (tmp_path / "link").symlink_to(twn)
        save_checkpoint(load_checkpoint(twn), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()


class TestAtomic:
    @pytest.mark.parametrize("target", ["new", "twn"])
    @pytest.mark.parametrize("after", range(7))
    def test_a_failing_write_leaves_nothing(self, twn, monkeypatch, target, after):
        checkpoint = load_checkpoint(twn)
        before = files(twn)
        real, calls = saving.write_file, []

        def failing(path, parts):
            calls.append(path)
            if len(calls) > after:
                raise OSError(28, "No space left on device")
            real(path, parts)

        monkeypatch.setattr(saving, "write_file", failing)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            save_checkpoint(checkpoint, twn.parent / target)
        assert files(twn) == before and os.listdir(twn.parent) == ["twn"]

    def test_a_failing_swap_puts_the_former_back(self, twn, monkeypatch):
        checkpoint, before, real, calls = load_checkpoint(twn), files(twn), os.rename, []

        def failing(source, target):
            calls.append(source)
            if len(calls) == 2:
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(saving.os, "rename", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_checkpoint(checkpoint, twn)
        assert files(twn) == before and os.listdir(twn.parent) == ["twn"]

    def test_permissions_are_the_ordinary_ones(self, twn, tmp_path):
        (tmp_path / "plain").mkdir()
        save_checkpoint(load_checkpoint(twn), tmp_path / "out")
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out")]
        assert modes[0] == modes[1]


class TestWhatDoesNotFit:
    def test_adapters(self, twn, tmp_path):
        checkpoint = load_checkpoint(twn)
        checkpoint.adapters["embeding"] = checkpoint.adapters.pop("embedding")
        with pytest.raises(CheckpointError, match=r'got "embeding", "reasoning"\. Did you mean "embedding"\?'):
            save_checkpoint(checkpoint, tmp_path / "out")

    def test_a_scaling_that_the_config_does_not_give(self, twn, tmp_path):
        checkpoint = load_checkpoint(twn)
        layers = checkpoint.adapters["reasoning"].layers
        name = next(iter(layers))
        layers[name] = layers[name]._replace(scaling=3.0)
        with pytest.raises(CheckpointError, match=f'scaling is not what its config gives: "{name}". Change the config'):
            save_checkpoint(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_gate_that_does_not_fit_the_queries(self, twn, tmp_path):
        checkpoint = load_checkpoint(twn)
        checkpoint.gate = {"weight": torch.ones(1, 63)}
        with pytest.raises(CheckpointError, match="the gate reads 63 features"):
            save_checkpoint(checkpoint, tmp_path / "out")
        assert os.listdir(tmp_path) == ["twn"]

    def test_build(self):
        with pytest.raises(OptionError, match='adapter "reasoning" needs factors of at least one layer'):
            Adapter.build("reasoning", {}, lora_alpha=1)
        with pytest.raises(ShapeError, match=r"layer q: A must be \[rank, in_features\].*got \[2, 4\] and \[4, 3\]"):
            Adapter.build("reasoning", {"q": (torch.ones(2, 4), torch.ones(4, 3))}, lora_alpha=1)


def test_own_writer_equals_the_library(tmp_path):
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2).half(), "c": torch.tensor(1.5), "d": torch.zeros(0, 4)}
    (tmp_path / "ours").write_bytes(b"".join(bytes(part) for part in safetensors_bytes(tensors)))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
