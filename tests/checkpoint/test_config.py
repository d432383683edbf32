"""``twn_config.json``: defaults, ranges, unknown fields, what is stated and what is assumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from twn_kernels import TWNConfig
from twn_kernels.checkpoint.config import FIELDS, parse_twn_config
from twn_kernels.errors import OptionError


def parse(**stated):
    return parse_twn_config(json.dumps(stated).encode(), "twn_config.json")


def test_defaults_without_a_file():
    config, problems = parse_twn_config(None, "twn_config.json")
    assert not problems and config.assumed == FIELDS
    assert config.values() == {
        "graph": "shared_kv",
        "prefill_adapter": "reasoning",
        "gate_input": "mean",
        "gate_activation": "gelu",
        "think_threshold": 0.5,
        "pooling": "mean",
        "think_prompt": "<think>",
        "think_end": ("</think>",),
        "max_think_tokens": 1024,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    assert config.to_json() is None


def test_every_field_is_read():
    stated = {
        "graph": "reencode", "prefill_adapter": None, "gate_input": "last", "gate_activation": "silu",
        "think_threshold": 0, "pooling": "first", "think_prompt": "", "think_end": ["</t>", 7],
        "max_think_tokens": 1, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip
    config, problems = parse(**stated)
    assert not problems and config.assumed == ()
    assert config.values() == {**stated, "think_end": ("</t>", 7)}


@pytest.mark.parametrize(
    ("decoding", "temperature", "top_p"), [("greedy", 0.0, 1.0), ({"temperature": 0.5, "top_p": 0.8}, 0.5, 0.8)]
)
def test_decoding(decoding, temperature, top_p):
    config, problems = parse(decoding=decoding)
    assert not problems and (config.temperature, config.top_p) == (temperature, top_p)
    assert "temperature" not in config.assumed


WRONG = {
    "graph": ("shared-kv", 'one of "shared_kv", "reencode"', ' Did you mean "shared_kv"?'),
    "prefill_adapter": ("reasonin", 'one of "reasoning", "embedding", null', ' Did you mean "reasoning"?'),
    "gate_input": (["mean"], 'one of "mean", "last", "concat", "mean_last"'),
    "gate_activation": (False, 'one of "gelu", "gelu_tanh", "relu", "silu", "tanh"'),
    "think_threshold": (1.5, "a number in [0, 1]"),
    "pooling": ("max", 'one of "mean", "last", "first"'),
    "think_prompt": (None, "a string"),
    "think_end": ([], "a non-empty string, a token id >= 0, or a non-empty list of these"),
    "max_think_tokens": (0, "a whole number of tokens >= 1"),
    "temperature": (-1, "a finite number >= 0 (0 is greedy)"),
    "top_p": (0, "a number in (0, 1]"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_out_of_range_names_the_field(name):
    value, expected, *near = WRONG[name]
    sentence = f"{name} must be {expected}, got {json.dumps(value)}.{''.join(near)}"
    config, problems = parse(**{name: value})
    assert problems == [f"twn_config.json: {sentence}"]
    assert getattr(config, name) == getattr(TWNConfig(), name)
    with pytest.raises(OptionError) as caught:
        TWNConfig(**{name: value})
    assert str(caught.value) == f"TWNConfig.{sentence}"


@pytest.mark.parametrize("value", [True, "0.5", float("nan"), None, [0.5]])
def test_no_number(value):
    with pytest.raises(OptionError, match=r"TWNConfig.think_threshold must be a number in \[0, 1\]"):
        TWNConfig(think_threshold=value)


def test_all_wrong_fields_at_once():
    _, problems = parse(think_treshold=0.5, pooling="max", top_p=2, decoding="beam")
    assert len(problems) == 4
    assert any('has no field "think_treshold"' in p and 'Did you mean "think_threshold"?' in p for p in problems)
    assert any('decoding must be "greedy" or an object of temperature and top_p, got "beam".' in p for p in problems)


def test_decoding_typos_and_repeats():
    _, problems = parse(decoding={"topp": 0.5, "temperature": 1}, temperature=0.5)
    assert any('decoding has no field "topp"' in p and 'Did you mean "top_p"?' in p for p in problems)
    assert any("temperature is given twice" in p for p in problems)


def test_the_file_is_kept_until_a_value_changes():
    raw = b'{\n      "think_threshold":0.25 ,"decoding" : "greedy"}\n\n'
    config, _ = parse_twn_config(raw, "twn_config.json")
    assert config.to_json() == raw
    changed = replace(config, pooling="last")
    assert json.loads(changed.to_json()) == {"think_threshold": 0.25, "temperature": 0.0, "pooling": "last"}
    assert parse_twn_config(changed.to_json(), "x")[0].values() == changed.values()


def test_built_in_memory_states_everything():
    config, problems = parse_twn_config(TWNConfig(think_end=7).to_json(), "x")
    assert not problems and config.assumed == () and config.think_end == (7,)
