"""The report: everything that the files tell, as a dict and as an aligned table, without a base model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from twn_kernels import inspect_checkpoint
from twn_kernels.errors import CheckpointError
from twn_kernels.testing.tiny_models import tiny_model
from twn_kernels.testing.twn_directory import write_peft_adapter, write_twn_directory


def test_everything_in_the_dict(twn):
    report = inspect_checkpoint(twn)
    found = report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["ok"] and not found["problems"] and not found["warnings"]
    reasoning, embedding = found["adapters"]["reasoning"], found["adapters"]["embedding"]
    assert (reasoning["ranks"], embedding["ranks"]) == ({"4": 14}, {"8": 14})
    assert (reasoning["alphas"], embedding["alphas"]) == ({"8": 14}, {"16": 14})
    assert reasoning["scalings"] == {"2": 14} and reasoning["dropout"] == 0.05 and reasoning["rslora"] is False
    projections = ("down", "gate", "k", "o", "q", "up", "v")
    assert reasoning["targets"] == {f"{name}_proj": 2 for name in projections}
    assert set(reasoning["target_modules"]) == {f"{name}_proj" for name in projections}
    assert reasoning["shapes"]["k_proj"] == "64 -> 32" and reasoning["shapes"]["down_proj"] == "96 -> 64"
    assert (reasoning["modules"], reasoning["layers"], reasoning["under"]) == (14, 2, ["model.layers"])
    assert reasoning["dtypes"] == {"float32": 28} and not reasoning["touches_visual"]
    tensors = load_file(twn / "reasoning" / "adapter_model.safetensors").values()
    assert reasoning["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert reasoning["bytes"] == 4 * reasoning["parameters"] and reasoning["zero_lora_B"] == 0
    assert found["queries"] == {"file": "queries.pt", "num_queries": 4, "hidden": 64, "dtype": "float32"}
    gate = found["gate"]
    assert gate["layers"] == "layer norm, linear 64 -> 16, gelu, linear 16 -> 1"
    assert (gate["inputs"], gate["outputs"], gate["in_features"]) == (["mean", "last"], 1, 64)
    assert gate["parameters"] == 2 * 64 + 64 * 16 + 16 + 16 + 1
    assert found["config"]["think_threshold"] == 0.4 and found["config"]["think_end"] == ["</think>"]
    assert "graph" not in found["assumed"] and {"gate_input", "pooling", "temperature"} <= set(found["assumed"])


def test_the_table(twn):
    lines = str(inspect_checkpoint(twn)).splitlines()
    assert lines[0] == f"checkpoint  {twn}"
    rows = {line.split("  ")[0]: line for line in lines}
    column = rows["rank"].index("4")
    head = next(line for line in lines if "reasoning" in line and "embedding" in line and "rank" not in line)
    assert head.index("reasoning") == column and head.index("embedding") == rows["rank"].index("8")
    assert rows["alpha"][column:].startswith("8 ") and rows["dropout"][column:].startswith("0.05")
    assert "not touched" in rows["visual"]
    assert rows["queries"] == "queries      4 x 64, float32, queries.pt"
    assert rows["gate reads"] == "gate reads   64 features: mean or last"
    assert rows["graph"].split() == ["graph", "reencode", "twn_config.json"]
    assert rows["pooling"].split() == ["pooling", "mean", "assumed"]
    assert lines[-1] == "loads: yes"
    assert all(line == line.rstrip() and line.isascii() for line in lines)


def test_mixed_ranks_dtypes_and_rslora(model, tmp_path):
    write_twn_directory(tmp_path, model, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1}, rslora=True,
                        dtype={"reasoning": torch.bfloat16}, gate_outputs=2, gate_input="concat")  # fmt: skip
    report = inspect_checkpoint(tmp_path)
    info = report.adapters["reasoning"]
    assert info["ranks"] == {"2": 2, "4": 12} and info["alphas"] == {"1": 2, "8": 12}
    assert info["scalings"] == {"0.5": 2, "4": 10, "5.65685": 2} and info["rslora"]
    assert info["dtypes"] == {"bfloat16": 28} and info["bytes"] == 2 * info["parameters"]
    assert report.gate["outputs"] == 2 and report.gate["inputs"] == ["concat"] and report.inferred == ["gate_input"]
    text = str(report)
    assert "2 (x2), 4 (x12)" in text and "(rsLoRA)" in text and "2 logits, softmax; the second means think" in text
    assert any(line.split() == ["gate_input", "concat", "implied", "by", "shapes"] for line in text.splitlines())
    assert "gate: which logit means think is not stored; the second is assumed" in report.notes
    assert any("the epsilon of its norms is not stored" in note for note in report.notes)


def test_a_touched_tower_shows(tmp_path):
    model = tiny_model("qwen3_vl")
    write_twn_directory(tmp_path, model)
    assert not inspect_checkpoint(tmp_path).adapters["reasoning"]["touches_visual"]
    shutil.rmtree(tmp_path / "reasoning")
    write_peft_adapter(tmp_path / "reasoning", model, targets=r".*(visual.*\.qkv|q_proj)")
    report = inspect_checkpoint(tmp_path)
    info = report.adapters["reasoning"]
    assert info["touches_visual"] and info["visual_modules"] == 2 and info["modules"] == 4
    assert info["under"] == ["model.language_model.layers", "model.visual.blocks"]
    assert "2 modules" in str(report)


def test_untrained_adapters_show(twn, edit_weights):
    path = twn / "embedding" / "adapter_model.safetensors"
    edit_weights(path, lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    report = inspect_checkpoint(twn)
    assert report.adapters["embedding"]["zero_lora_B"] == 14
    assert "zero in 14 modules" in str(report)


def test_problems_are_listed_and_the_rest_is_still_shown(twn, edit_config):
    edit_config(twn / "reasoning" / "adapter_config.json", use_dora=True)
    (twn / "queries.pt").write_bytes(b"x")
    report = inspect_checkpoint(twn)
    assert not report.ok and len(report.problems) == 2
    assert report.adapters["reasoning"]["ranks"] == {"4": 14}
    assert report.gate["inputs"] is None and report.queries is None
    assert report.unread == ["queries"]
    text = str(report)
    assert "gate reads   64 features: unread, no queries" in text and "queries      unread" in text
    assert "problems:\n  - queries.pt is not a complete torch.save file" in text
    assert text.endswith("loads: no, 2 problem(s) above")


def test_an_adapter_that_cannot_be_read_at_all(twn):
    (twn / "reasoning" / "adapter_model.safetensors").write_bytes(b"x")
    (twn / "reasoning" / "adapter_config.json").write_bytes(b"x")
    (twn / "gate_mlp.pt").write_bytes(b"x")
    report = inspect_checkpoint(twn)
    assert len(report.problems) == 3 and report.unread == ["reasoning", "gate_mlp"]
    info = report.adapters["reasoning"]
    assert info["modules"] is info["zero_lora_B"] is info["touches_visual"] is info["parameters"] is None
    assert json.loads(json.dumps(report.to_dict()))["unread"] == report.unread
    rows = {line.split("  ")[0]: line.split()[1:] for line in str(report).splitlines() if line}
    for title in ("rank", "alpha", "dropout", "targets", "visual", "dtype", "lora_B", "parameters", "bytes", "PEFT"):
        assert rows[title][0] == "unread" != rows[title][1], title
    assert rows["gate"] == ["unread"] and "loads: no" in str(report)


def test_assumed_defaults_of_peft_show(twn, edit_config):
    edit_config(twn / "reasoning" / "adapter_config.json", lora_dropout=..., use_rslora=...)
    notes = inspect_checkpoint(twn).notes
    assert "reasoning: lora_dropout = 0.0 (PEFT's default, not stated)" in notes
    assert "reasoning: use_rslora = False (PEFT's default, not stated)" in notes


def test_different_base_models_show(twn, edit_config):
    for name in ("reasoning", "embedding"):
        edit_config(twn / name / "adapter_config.json", base_model_name_or_path=f"some/{name}")
    report = inspect_checkpoint(twn)
    assert report.base_model_names == ["some/reasoning", "some/embedding"]
    assert 'the adapters name different base models: "some/reasoning", "some/embedding"' in report.notes


def test_a_pair(twn):
    report = inspect_checkpoint({name: twn / name for name in ("reasoning", "embedding")})
    assert report.ok and report.gate is None and report.queries is None
    assert "queries  absent" in str(report) and "gate     absent" in str(report)


def test_weights_are_not_needed_in_memory_at_once(twn, monkeypatch):
    from twn_kernels.checkpoint.tensorfile import TensorFile

    monkeypatch.setattr(TensorFile, "read_all", lambda self: pytest.fail("inspect read a whole file"))
    small = twn / "queries.pt"
    small.unlink()
    (twn / "gate_mlp.pt").unlink()
    assert inspect_checkpoint(twn).ok


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "none")


def test_needs_neither_peft_nor_transformers(twn, tmp_path):
    save_file({"q": torch.ones(4, 64)}, twn / "queries.safetensors")
    code = f"""
import sys
import twn_kernels.checkpoint
heavy = [name for name in ("peft", "transformers", "safetensors", "huggingface_hub") if name in sys.modules]
assert not heavy, heavy
for name in ("peft", "transformers", "huggingface_hub"):
    sys.modules[name] = None
twn_kernels.checkpoint.save_checkpoint(twn_kernels.checkpoint.load_checkpoint({str(twn)!r}), {str(tmp_path / "o")!r})
print(twn_kernels.checkpoint.inspect_checkpoint({str(tmp_path / "o")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "loads: yes" in done.stdout, done.stderr
