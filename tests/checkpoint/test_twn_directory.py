"""The directories that tests, demos and benchmarks use: real, complete, and without a trace on the model."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

from twn_kernels import inspect_checkpoint, load_checkpoint
from twn_kernels.errors import OptionError
from twn_kernels.testing.tiny_models import FAMILIES, tiny_model
from twn_kernels.testing.twn_directory import write_gate_and_queries, write_peft_adapter, write_twn_directory


def state(model):
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    model = tiny_model(family)
    before = state(model)
    path = write_twn_directory(tmp_path / "twn", model)
    assert state(model) == before
    report = inspect_checkpoint(path)
    assert report.ok and not report.warnings
    for info in report.adapters.values():
        assert info["modules"] >= 8 and not info["touches_visual"] and not info["zero_lora_B"]


def test_the_model_is_left_alone_by_any_adapter(tmp_path):
    model = tiny_model("llama").train()
    model.lm_head.requires_grad_(False)
    before = state(model)
    write_peft_adapter(tmp_path, model, targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], dropout=0.1)
    assert state(model) == before
    with pytest.raises(ValueError, match="not found in the base model"):
        write_peft_adapter(tmp_path, model, targets=["no_such"])
    assert state(model) == before


def test_options_reach_both_adapters(model, tmp_path):
    write_twn_directory(
        tmp_path, model, rank={"reasoning": 2, "embedding": 6}, alpha={"reasoning": 1, "embedding": 3},
        targets={"reasoning": ["q_proj"], "embedding": r".*\.v_proj"}, rslora={"embedding": True},
        dropout={"reasoning": 0.1}, dtype={"embedding": torch.bfloat16}, rank_pattern={"embedding": {"layers.0": 9}},
    )  # fmt: skip
    adapters = load_checkpoint(tmp_path).adapters
    r, e = adapters["reasoning"], adapters["embedding"]
    assert {module.rpartition(".")[2] for module in r.layers} == {"q_proj"}
    assert {module.rpartition(".")[2] for module in e.layers} == {"v_proj"}
    assert (r.config.r, r.config.lora_alpha, r.config.use_rslora, r.config.lora_dropout) == (2, 1, False, 0.1)
    assert (e.config.r, e.config.lora_alpha, e.config.use_rslora, e.config.lora_dropout) == (6, 3, True, 0.0)
    assert e.config.rank_pattern == {"layers.0": 9} and r.config.rank_pattern == {}
    assert {layer.A.dtype for layer in e.layers.values()} == {torch.bfloat16}


def test_seeds(model, tmp_path):
    def weights(name, seed):
        write_twn_directory(tmp_path / name, model, seed=seed)
        checkpoint = load_checkpoint(tmp_path / name)
        layers = [layer for adapter in checkpoint.adapters.values() for layer in adapter.layers.values()]
        return torch.cat([t.flatten() for layer in layers for t in (layer.A, layer.B)] + [checkpoint.queries.flatten()])

    generator_before = torch.get_rng_state()
    one, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), generator_before)
    adapters = load_checkpoint(tmp_path / "a").adapters
    name = next(iter(adapters["reasoning"].layers))
    assert not torch.equal(adapters["reasoning"].layers[name].A, adapters["embedding"].layers[name].A)


def test_each_adapter_moves_the_output(model, tmp_path):
    write_twn_directory(tmp_path, model)
    ids = torch.randint(3, 150, (2, 9))
    outputs = [model(ids).logits]
    for name in ("reasoning", "embedding"):
        wrapped = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name)
        outputs.append(wrapped(ids).logits)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        gap = (outputs[i] - outputs[j]).norm() / outputs[i].norm()
        assert 0.05 < gap < 2


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_again_replaces_what_was_there(model, tmp_path, file_format):
    write_twn_directory(tmp_path, model, file_format="pt", config={"pooling": "last"})
    write_twn_directory(tmp_path, model, file_format=file_format, gate_input=None, num_queries=0, rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embedding", "reasoning"]
    assert load_checkpoint(tmp_path).adapters["reasoning"].config.r == 2


def test_config_is_written_as_given(model, tmp_path):
    write_twn_directory(tmp_path, model, config={"graph": "reencode"})
    assert json.loads((tmp_path / "twn_config.json").read_text()) == {"graph": "reencode"}


def gate_scores(checkpoint, features):
    for layer in checkpoint.gate_layout().layers:
        weight, bias = checkpoint.gate[layer.weight], checkpoint.gate[layer.bias]
        linear = layer.kind == "linear"
        features = nn.functional.linear(features, weight, bias) if linear else nn.functional.layer_norm(
            features, weight.shape, weight, bias)  # fmt: skip
        features = nn.functional.gelu(features) if layer.activated else features
    return features.sigmoid()[:, 0] if features.shape[1] == 1 else features.softmax(-1)[:, 1]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("gate_input", ["mean", "last", "concat", "mean_last"])
def test_scores_of_real_states_fall_on_both_sides(model, tmp_path, gate_input, outputs):
    write_twn_directory(tmp_path, model, gate_input=gate_input, gate_outputs=outputs, gate_norm=outputs == 2)
    checkpoint = load_checkpoint(tmp_path)
    ids = torch.randint(3, 150, (32, 11))
    queries = checkpoint.queries.expand(32, -1, -1)
    states = model.model(inputs_embeds=torch.cat([model.model.embed_tokens(ids), queries], 1)).last_hidden_state
    mean, last = states[:, -4:].mean(1), states[:, -5]
    both = torch.cat([mean, last], 1)
    features = {"mean": mean, "last": last, "concat": states[:, -4:].flatten(1), "mean_last": both}
    scores = gate_scores(checkpoint, features[gate_input])
    assert scores.std() > 0.1 and 0.1 < (scores > 0.5).float().mean() < 0.9


@pytest.mark.parametrize("hidden", [[], [8], [16, 8]], ids=str)
def test_gates_of_any_depth(model, tmp_path, hidden):
    write_twn_directory(tmp_path, model, gate_hidden=hidden)
    widths = [layer.out_features for layer in load_checkpoint(tmp_path).gate_layout().layers if layer.kind == "linear"]
    assert widths == [*hidden, 1]


def test_option_names(tmp_path):
    with pytest.raises(OptionError, match='gate_input must be one of .* got "meen". Did you mean "mean"?'):
        write_gate_and_queries(tmp_path, 64, gate_input="meen")
    with pytest.raises(OptionError, match='file_format must be "pt" or "safetensors", got "safetensor"'):
        write_gate_and_queries(tmp_path, 64, file_format="safetensor")
