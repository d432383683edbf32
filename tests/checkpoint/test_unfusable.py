"""What PEFT can express and a fused layer cannot, and fields out of range: one error that names them."""

from __future__ import annotations

import json
import shutil

import pytest

from twn_kernels import load_checkpoint
from twn_kernels.errors import TWNWarning
from twn_kernels.testing.twn_directory import write_peft_adapter

CONFIG = "reasoning/adapter_config.json"


class TestNotFusable:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"use_dora": True}, "use_dora = true (DoRA rescales"),
            ({"bias": "all"}, 'bias = "all" (trained biases'),
            ({"bias": "lora_only"}, 'bias = "lora_only"'),
            ({"lora_bias": True}, "lora_bias = true"),
            ({"modules_to_save": ["lm_head"]}, 'modules_to_save = ["lm_head"]'),
            ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = [1, 2]"),
            ({"trainable_token_indices": [3]}, "trainable_token_indices = [3]"),
            ({"target_parameters": ["w"]}, 'target_parameters = ["w"]'),
            ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]"),
            ({"use_qalora": True}, "use_qalora = true"),
            ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights = "pissa_niter_4" (it changed the base weight'),
            ({"init_lora_weights": "olora"}, 'init_lora_weights = "olora"'),
        ],
    )
    def test_config(self, message, twn, edit_config, changes, said):
        edit_config(twn / CONFIG, **changes)
        text = message(twn)
        assert f"{CONFIG}: cannot be fused exactly: " in text and said in text

    @pytest.mark.parametrize("kind", ["IA3", None, "lora"])
    def test_peft_type(self, message, twn, edit_config, kind):
        edit_config(twn / CONFIG, peft_type=kind)
        assert f'peft_type must be "LORA", got {json.dumps(kind)}' in message(twn)

    def test_real_dora(self, message, model, twn):
        shutil.rmtree(twn / "reasoning")
        write_peft_adapter(twn / "reasoning", model, use_dora=True, targets=["q_proj"])
        text = message(twn)
        assert "use_dora = true" in text
        assert "2 tensors are neither lora_A nor lora_B of a linear layer: " in text and "lora_magnitude_vector" in text

    def test_real_embedding_adapter(self, message, model, twn):
        shutil.rmtree(twn / "reasoning")
        write_peft_adapter(twn / "reasoning", model, targets=["q_proj", "embed_tokens"])
        assert "lora_embedding_A" in message(twn)

    def test_real_modules_to_save(self, message, model, twn):
        shutil.rmtree(twn / "reasoning")
        write_peft_adapter(twn / "reasoning", model, targets=["q_proj"], modules_to_save=["lm_head"])
        text = message(twn)
        assert 'modules_to_save = ["lm_head"]' in text and "base_model.model.lm_head.weight" in text

    def test_real_lora_bias(self, message, model, twn):
        shutil.rmtree(twn / "reasoning")
        write_peft_adapter(twn / "reasoning", model, targets=["q_proj"], lora_bias=True)
        assert "lora_B.bias" in message(twn)

    def test_harmless_initialisations_load(self, twn, edit_config):
        for init in (True, False, "gaussian", "eva", "orthogonal"):
            edit_config(twn / CONFIG, init_lora_weights=init)
            assert len(load_checkpoint(twn).adapters["reasoning"].layers) == 14

    def test_a_field_of_the_future_warns(self, twn, edit_config):
        edit_config(twn / CONFIG, use_something_new=True, another_new_one=None)
        with pytest.warns(TWNWarning, match='fields this reader does not know were ignored: "use_something_new"'):
            load_checkpoint(twn)


class TestConfigFields:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"r": 0}, "r must be a whole number in [1, 256], got 0."),
            ({"r": 4.0}, "r must be a whole number in [1, 256], got 4.0."),
            ({"r": True}, "r must be a whole number in [1, 256], got true."),
            ({"r": 257}, "r must be a whole number in [1, 256], got 257."),
            ({"lora_alpha": "8"}, 'lora_alpha must be a finite number, got "8".'),
            ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got NaN."),
            ({"lora_dropout": 1.0}, "lora_dropout must be a number in [0, 1), got 1.0."),
            ({"use_rslora": "yes"}, 'use_rslora must be true or false, got "yes".'),
            ({"target_modules": "(q_proj"}, "target_modules must be a list of module names or one regular expression"),
            ({"target_modules": [1]}, "target_modules must be a list of module names"),
            ({"rank_pattern": [1]}, "rank_pattern must be an object of module pattern to a whole number in [1, 256]"),
            ({"rank_pattern": {"q_proj": 0}}, 'rank_pattern["q_proj"] must be a whole number in [1, 256], got 0.'),
            ({"alpha_pattern": {"(": 2}}, 'alpha_pattern has "(", which is no regular expression:'),
            ({"layers_to_transform": "all"}, "layers_to_transform must be a layer number or a list of them"),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)),
    )
    def test_out_of_range(self, message, twn, edit_config, changes, said):
        edit_config(twn / CONFIG, **changes)
        assert f"{CONFIG}: {said}" in message(twn)
