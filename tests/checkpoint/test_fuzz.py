"""Files changed at random: they load, or they raise one of the package's errors; never anything else."""

from __future__ import annotations

import json
import random
import shutil
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twn_kernels import inspect_checkpoint, load_checkpoint
from twn_kernels.checkpoint.adapter_config import parse_adapter_config
from twn_kernels.checkpoint.config import FIELDS, parse_twn_config
from twn_kernels.errors import TWNError
from twn_kernels.testing.twn_directory import write_twn_directory

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ADAPTER_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "peft_type", "use_dora",
    "init_lora_weights", "modules_to_save", "base_model_name_or_path", "peft_version", "anything",
)  # fmt: skip


def damage(raw: bytes, dice: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(dice.choice([1, 1, 2, 5])):
        if not out:
            break
        at = dice.randrange(min(len(out), dice.choice([64, 4000, 10**9])))
        kind = dice.randrange(4)
        if kind == 0:
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del out[at : at + dice.randrange(1, 50)]
        elif kind == 2:
            out[at:at] = dice.randbytes(dice.randrange(1, 9))
        else:
            out[at] = dice.choice(b'0129{}[]",-:eEtn\x00\xff')
    return bytes(out)


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_damaged_bytes(model, tmp_path, file_format, seed):
    source = write_twn_directory(tmp_path / "a", model, rank=1, targets=["q_proj"], file_format=file_format, config={})
    names = sorted(p.relative_to(source) for p in source.rglob("*.*") if p.is_file() and p.name != "README.md")
    assert len(names) == 7
    dice, outcomes = random.Random(seed), set()
    for turn in range(140):
        name = names[turn % len(names)]
        copy = tmp_path / "b"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        (copy / name).write_bytes(damage((source / name).read_bytes(), dice))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = inspect_checkpoint(copy)
            try:
                load_checkpoint(copy)
                outcomes.add(report.ok)
            except TWNError:
                assert not report.ok
                outcomes.add(False)
        assert str(report).splitlines()[-1].startswith("loads: yes" if report.ok else "loads: no")
    assert outcomes == {True, False}


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(ADAPTER_FIELDS), JSON, max_size=6))
def test_any_json_in_an_adapter_config(stated):
    config, problems, _ = parse_adapter_config(json.dumps({"peft_type": "LORA", **stated}).encode(), "c")
    assert config is not None and config.r >= 1
    assert all(problem.startswith("c: ") for problem in problems)
    if not problems:
        again, more, _ = parse_adapter_config(config.to_json(), "c")
        assert again == config and not more
        assert config.scaling("model.layers.0.self_attn.q_proj") is not None


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from((*FIELDS, "decoding", "x")), JSON, max_size=5))
def test_any_json_in_a_twn_config(stated):
    config, problems = parse_twn_config(json.dumps(stated).encode(), "c")
    assert all(problem.startswith("c") for problem in problems)
    if not problems:
        assert parse_twn_config(config.to_json(), "c")[0].values() == config.values()
