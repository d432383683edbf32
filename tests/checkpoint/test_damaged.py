"""Whatever can be wrong with the files: one clear error, every problem of the directory in it."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from twn_kernels import inspect_checkpoint, load_checkpoint
from twn_kernels.errors import CheckpointError, OptionError, TWNWarning

WEIGHTS = "reasoning/adapter_model.safetensors"
CONFIG = "reasoning/adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


class TestMissing:
    def test_no_such_directory(self, twn):
        with pytest.raises(CheckpointError, match=r'twm does not exist; a checkpoint is .* Did you mean "twn"\?'):
            load_checkpoint(twn.with_name("twm"))

    def test_a_file(self, twn):
        with pytest.raises(CheckpointError, match=r"queries\.pt is a file; a checkpoint is a directory"):
            load_checkpoint(twn / "queries.pt")

    def test_empty_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"is empty; a TWN directory holds reasoning/ and embedding/"):
            load_checkpoint(tmp_path)

    def test_one_peft_adapter(self, twn):
        with pytest.raises(CheckpointError, match=r'is one PEFT adapter; .* pass \{"reasoning": dir, "embedding'):
            load_checkpoint(twn / "reasoning")

    @pytest.mark.parametrize("name", ["reasoning", "embedding"])
    def test_an_adapter(self, message, twn, name):
        shutil.rmtree(twn / name)
        assert f'has no adapter "{name}"; both reasoning/ and embedding/ are needed' in message(twn)

    def test_a_misspelt_adapter(self, message, twn):
        (twn / "embedding").rename(twn / "embeding")
        text = message(twn)
        assert 'has no adapter "embedding"; both' in text and text.endswith('Did you mean "embeding"?')

    def test_a_third_adapter(self, message, twn):
        shutil.copytree(twn / "reasoning", twn / "judge")
        assert 'holds adapters beside reasoning and embedding: "judge"' in message(twn)

    def test_an_adapter_that_is_a_file(self, message, twn):
        shutil.rmtree(twn / "reasoning")
        (twn / "reasoning").write_text("x")
        assert 'has no adapter "reasoning"' in message(twn)

    @pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
    def test_a_file_of_an_adapter(self, message, twn, file):
        (twn / file).unlink()
        assert f"{file} is missing; peft.save_pretrained writes it" in message(twn)

    @pytest.mark.parametrize(("file", "other"), [("gate_mlp", "queries"), ("queries", "gate_mlp")])
    def test_half_of_gate_and_queries_warns(self, twn, file, other):
        (twn / f"{file}.pt").rename(twn / f"{file}s.pt")
        with pytest.warns(TWNWarning, match=rf'has no {file}\.safetensors and no {file}\.pt.*mean "{file}s\.pt"'):
            checkpoint = load_checkpoint(twn)
        part = "gate" if file == "gate_mlp" else "queries"
        assert getattr(checkpoint, part) is None
        with pytest.raises(CheckpointError, match=rf"has no {part}; expected {file}\.safetensors or {file}\.pt"):
            checkpoint.require(part)

    def test_other_suffixes_warn(self, twn):
        for name in ("gate_mlp", "queries"):
            (twn / f"{name}.pt").rename(twn / f"{name}.pth")
        with pytest.warns(TWNWarning, match=r"gate_mlp.pth, queries.pth not read; the names end in .safetensors or"):
            assert load_checkpoint(twn).gate is None

    def test_subfolder(self, twn):
        assert load_checkpoint(twn.parent, subfolder="twn").queries.shape == (4, 64)
        with pytest.raises(CheckpointError, match=r"has no directory 'twm'\. Did you mean \"twn\"\?"):
            load_checkpoint(twn.parent, subfolder="twm")
        with pytest.raises(OptionError, match="must be a relative path inside"):
            load_checkpoint(twn, subfolder="../twn")


class TestDamaged:
    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_truncated_safetensors(self, message, twn, keep):
        raw = (twn / WEIGHTS).read_bytes()
        (twn / WEIGHTS).write_bytes(raw[:keep])
        text = message(twn)
        assert f"{WEIGHTS} cannot be read: it is" in text or f"{WEIGHTS} cannot be read: it has {keep} bytes" in text
        assert "Copy or download it again" in text
        if keep == -1:
            assert f"it is truncated: {len(raw) - 1} bytes of {len(raw)}" in text

    @pytest.mark.parametrize("raw", [b"\xff" * 64, b"not a tensor file at all", b"\x05\0\0\0\0\0\0\0[1,2]"])
    def test_no_safetensors_at_all(self, message, twn, raw):
        (twn / WEIGHTS).write_bytes(raw)
        assert f"{WEIGHTS} cannot be read: it is no safetensors file" in message(twn)

    @pytest.mark.parametrize("file", [WEIGHTS, "gate_mlp.pt"])
    def test_git_lfs_pointer(self, message, twn, file):
        (twn / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        assert f"{file} is a Git LFS pointer, not the file itself. Run: git lfs pull" in message(twn)

    @pytest.mark.parametrize("file", ["gate_mlp.pt", "queries.pt"])
    @pytest.mark.parametrize("keep", [0, 3, 200, -30])
    def test_truncated_pickle(self, message, twn, file, keep):
        (twn / file).write_bytes((twn / file).read_bytes()[:keep])
        text = message(twn)
        assert f"{file} is empty" in text or f"{file} is not a complete torch.save file" in text
        assert "weights_only" not in text

    @pytest.mark.parametrize("file", [CONFIG, "twn_config.json"])
    @pytest.mark.parametrize(
        ("raw", "said"),
        [
            (b"", "is empty; a JSON object was expected"),
            (b'{"r": 4', "is not JSON"),
            (b"[1]", "holds a JSON list; a JSON object was expected"),
            (b"\xff\xfe{", "is not JSON"),
            (b'{"r": 4, "r": 8}', 'repeated field "r"'),
        ],
    )
    def test_json(self, message, twn, file, raw, said):
        (twn / file).write_bytes(raw)
        assert f"{file} {said.split(' (')[0]}" in message(twn) or said in message(twn)

    def test_everything_at_once(self, message, twn):
        (twn / WEIGHTS).write_bytes(b"x")
        (twn / "embedding" / "adapter_config.json").unlink()
        (twn / "queries.pt").write_bytes(b"x")
        (twn / "twn_config.json").write_text('{"grph": "shared_kv"}')
        text = message(twn)
        assert "has 4 problems:" in text
        assert text.count("\n  - ") == 4


class Evil:
    def __reduce__(self):
        return (getattr, ("text", "upper"))


class TestPickledCode:
    @pytest.mark.parametrize("file", ["gate_mlp.pt", "queries.pt"])
    def test_is_named_and_not_run(self, message, twn, file):
        torch.save({"weight": torch.zeros(1, 64), "evil": Evil()}, twn / file)
        text = message(twn)
        assert (
            f"{file} does not load with weights_only=True: it pickles builtins.getattr. "
            "twn_kernels never unpickles code.\n  Convert it where you trust it" in text
        )

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_a_bare_pickle(self, message, twn, protocol):
        (twn / "gate_mlp.pt").write_bytes(pickle.dumps(Evil(), protocol=protocol))
        assert "it pickles builtins.getattr. twn_kernels never unpickles code" in message(twn)

    def test_a_whole_module(self, message, twn):
        torch.save(torch.nn.Sequential(torch.nn.Linear(64, 1)), twn / "gate_mlp.pt")
        text = message(twn)
        assert "it pickles torch.nn.modules.container.Sequential, " in text
        assert "torch.nn.modules.linear.Linear" in text

    def test_numpy(self, twn):
        torch.save({"queries": np.ones((4, 64))}, twn / "queries.pt")
        with pytest.raises(CheckpointError, match=r"queries.pt does not load .* it pickles numpy.*_reconstruct, "):
            load_checkpoint(twn)

    @pytest.mark.parametrize("raw", [b"\x80\x020.", b"\x80\x02.", b"\x80\x02h\x05.", b"\x80\x02]b."])
    def test_a_pickle_out_of_order_is_told_in_our_words(self, message, twn, raw):
        (twn / "queries.pt").write_bytes(raw)
        assert "queries.pt is not a complete torch.save file: its pickle cannot be parsed." in message(twn)

    def test_an_empty_archive(self, message, twn):
        zipfile.ZipFile(twn / "queries.pt", "w").close()
        text = message(twn)
        assert "queries.pt is not a complete torch.save file: its pickle cannot be parsed." in text
        assert "weights_only" not in text

    def test_an_adapter_file(self, message, twn):
        (twn / WEIGHTS).unlink()
        torch.save({"x": Evil()}, twn / "reasoning" / "adapter_model.bin")
        assert "reasoning/adapter_model.bin does not load with weights_only=True: it pickles" in message(twn)

    def test_nothing_runs(self, message, twn, tmp_path):
        class Runs:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save(Runs(), twn / "gate_mlp.pt")
        assert "it pickles " in message(twn)
        assert not (tmp_path / "ran").exists()


class TestTensors:
    def test_halves_are_all_listed(self, message, twn, edit_weights):
        drop = (f"{Q}.lora_A.weight", f"{Q.replace('q_', 'v_')}.lora_B.weight")
        edit_weights(twn / WEIGHTS, lambda t: {k: v for k, v in t.items() if k not in drop})
        text = message(twn)
        assert "layers with only one of lora_A and lora_B: " in text
        assert "q_proj (only lora_B)" in text and "v_proj (only lora_A)" in text

    def test_rank_differs_from_config(self, message, twn, edit_config):
        edit_config(twn / CONFIG, r=8)
        text = message(twn)
        assert f"{WEIGHTS}: ranks differ from adapter_config.json (r, rank_pattern)" in text
        for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
            assert f"model.layers.{{0-1}}.{name}: 4, config 8" in text

    @pytest.mark.parametrize("shape", [(3, 64), (4, 64, 1), (4,), (0, 64)])
    def test_shapes(self, message, twn, edit_weights, shape):
        edit_weights(twn / WEIGHTS, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(shape)}))
        expected = f"model.layers.0.self_attn.q_proj: lora_A {list(shape)}, lora_B [64, 4]"
        assert f"lora_A must be [rank, in_features] and lora_B [out_features, rank], got: {expected}" in message(twn)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn, torch.bool])
    def test_dtypes(self, message, twn, edit_weights, dtype):
        edit_weights(twn / WEIGHTS, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64).to(dtype)}))
        name = str(dtype).removeprefix("torch.")
        said = f"weights must be one of float32, bfloat16, float16, float64, got: {Q}.lora_A.weight is {name}."
        assert said in message(twn)

    def test_tensors_of_no_linear_layer(self, message, twn, edit_weights):
        edit_weights(twn / WEIGHTS, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}))
        said = f"cannot be fused exactly: 1 tensors are neither lora_A nor lora_B of a linear layer: {Q}"
        assert said in message(twn)

    def test_no_tensor_at_all(self, message, twn):
        save_file({}, twn / WEIGHTS)
        assert f"{WEIGHTS} holds no lora_A or lora_B." in message(twn)

    def test_two_adapters_in_one_file(self, message, twn, edit_weights):
        def renamed(key):
            return key.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two.")

        edit_weights(twn / WEIGHTS, lambda t: {renamed(k): v for k, v in t.items()})
        assert f'{WEIGHTS} holds more than one adapter: "one", "two"' in message(twn)

    def test_layers_outside_the_targets(self, message, twn, edit_config):
        edit_config(twn / CONFIG, target_modules=["q_proj"])
        text = message(twn)
        assert "layers that target_modules of adapter_config.json does not name, which PEFT would drop: " in text
        assert "q_proj," not in text.split("would drop: ")[1]

    def test_targets_without_tensors_warn(self, twn, edit_config):
        stated = json.loads((twn / CONFIG).read_text())["target_modules"]
        edit_config(twn / CONFIG, target_modules=[*stated, "w_proj"])
        with pytest.warns(TWNWarning, match='target_modules without any tensor: "w_proj"'):
            load_checkpoint(twn)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_weights_warn_and_load(self, twn, edit_weights, value):
        edit_weights(twn / WEIGHTS, lambda t: t.update({f"{Q}.lora_B.weight": torch.full((64, 4), value)}))
        with pytest.warns(TWNWarning, match=f"{WEIGHTS}: NaN or infinity in: {Q}.lora_B.weight"):
            load_checkpoint(twn)
        assert any("NaN or infinity" in warning for warning in inspect_checkpoint(twn).warnings)

    def test_a_view_that_repeats_its_bytes(self, message, twn):
        torch.save({"queries": torch.zeros(1, 1).expand(1_000_000, 1_000_000)}, twn / "queries.pt")
        assert "is larger than what the file stores for it" in message(twn)

    def test_a_sparse_tensor(self, message, twn):
        torch.save(torch.eye(64).to_sparse(), twn / "queries.pt")
        assert "plain dense tensors were expected" in message(twn)


class TestOtherWeightFiles:
    @pytest.fixture
    def wanted(self, twn):
        return load_checkpoint(twn).adapters["reasoning"].layers

    def same(self, twn, wanted):
        layers = load_checkpoint(twn).adapters["reasoning"].layers
        assert set(layers) == set(wanted)
        return all(torch.equal(layers[name].B, wanted[name].B) for name in wanted)

    def test_bin(self, twn, wanted):
        from safetensors.torch import load_file

        torch.save(load_file(twn / WEIGHTS), twn / "reasoning" / "adapter_model.bin")
        (twn / WEIGHTS).unlink()
        assert self.same(twn, wanted)

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_shards(self, message, twn, wanted, suffix):
        from safetensors.torch import load_file

        tensors = load_file(twn / WEIGHTS)
        (twn / WEIGHTS).unlink()
        folder = twn / "reasoning"
        places = {name: f"adapter_model-0000{i % 2 + 1}-of-00002.{suffix}" for i, name in enumerate(sorted(tensors))}
        for shard in set(places.values()):
            part = {name: tensors[name] for name, place in places.items() if place == shard}
            save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
        index = folder / f"adapter_model.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert self.same(twn, wanted)
        (folder / f"adapter_model-00001-of-00002.{suffix}").unlink()
        assert f"reasoning/adapter_model-00001-of-00002.{suffix} cannot be read: No such file" in message(twn)
        index.write_text(json.dumps({"weight_map": {"x": "../../../etc/passwd"}}))
        assert "names files outside its own directory" in message(twn)
        index.write_text("{}")
        assert 'has no "weight_map"' in message(twn)


class TestPairs:
    def test_loads(self, twn):
        pair = {"reasoning": twn / "reasoning", "embedding": str(twn / "embedding")}
        checkpoint = load_checkpoint(pair)
        assert checkpoint.gate is None and checkpoint.queries is None
        assert checkpoint.config.assumed and {len(a.layers) for a in checkpoint.adapters.values()} == {14}
        with pytest.raises(CheckpointError, match="has no gate and no queries; expected gate_mlp"):
            checkpoint.require("gate", "queries")

    def test_keys(self, twn):
        pair = {"reasoning": twn / "reasoning", "embeding": twn / "embedding"}
        with pytest.raises(OptionError, match=r'got "reasoning", "embeding"\. Did you mean "embedding"\?'):
            load_checkpoint(pair)

    @pytest.mark.parametrize("source", [None, 3, "", b"x"])
    def test_no_source(self, source):
        with pytest.raises(OptionError, match="a checkpoint must be a directory, a Hub id such as owner/name"):
            load_checkpoint(source)
