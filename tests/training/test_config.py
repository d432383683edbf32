"""A configuration is read whole, and what is wrong in it is said before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import twn_kernels.training
from twn_kernels.errors import OptionError
from twn_kernels.training.config import TrainingConfig, load_config, parse_config

SHIPPED = Path(twn_kernels.training.__file__).parent / "numbers.toml"


def test_the_shipped_configuration_is_read_whole():
    config = load_config(SHIPPED)
    assert config.base.path is None and config.data.folder is None
    assert config.method.graph == "shared_kv" and config.method.prefill_adapter == "reasoning"
    assert config.joint.adapters == "two" and config.joint.detach
    assert config.gate.margin is None and config.gate.price > 0 and config.gate.split == "gate"
    assert parse_config(config.as_dict()) == config


def test_what_a_configuration_tells_can_be_read_again():
    config = parse_config({"seed": 3, "gate": {"hidden": [8, 4]}, "method": {"prefill_adapter": "none"}})
    told = config.as_dict()
    assert told["gate"]["hidden"] == (8, 4)
    assert parse_config(told) == config


def test_an_empty_configuration_is_the_defaults():
    assert parse_config({}) == TrainingConfig()


def test_the_configuration_in_the_readme_is_read(tmp_path):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```$", readme, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "my.toml").write_text(block)
    config = load_config(tmp_path / "my.toml")
    assert config.base.path and config.data.folder == "my-data" and config.gate.split == "dev"


def test_an_empty_split_takes_the_place_of_the_files():
    """TOML has no null, and neither has a command line."""
    config = load_config(SHIPPED, {"gate.split": "", "gate.share": 0.3})
    assert config.gate.split is None and config.gate.kept_share == 0.3
    assert parse_config({}).gate.kept_share == 0.2


def test_none_stands_for_the_base_alone():
    assert parse_config({"method": {"prefill_adapter": "none"}}).method.prefill_adapter is None


def test_a_whole_number_serves_where_a_fraction_is_meant():
    assert parse_config({"joint": {"learning_rate": 1}}).joint.learning_rate == 1.0


def test_changes_replace_values_of_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[joint]\nrank = 4\nsteps = 7\n")
    config = load_config(path, {"joint.rank": 8, "gate.margin": 0.5, "seed": 2})
    assert (config.joint.rank, config.joint.steps, config.gate.margin, config.seed) == (8, 7, 0.5, 2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"jiont": {}}, 'the configuration has no "jiont"; .* Did you mean "joint"?'),
        ({"joint": {"rnak": 4}}, r'\[joint\] has no "rnak"; .* Did you mean "rank"?'),
        ({"method": {"grahp": "x"}}, r'\[method\] has no "grahp"; .* Did you mean "graph"?'),
        ({"joint": 3}, r"\[joint\] must be a section with keys, got 3\."),
        ({"joint": {"rank": 1.5}}, r"joint\.rank must be a whole number, got 1\.5\."),
        ({"joint": {"rank": True}}, r"joint\.rank must be a whole number, got True\."),
        ({"joint": {"rank": 0}}, r"joint\.rank must be above 0, got 0\."),
        ({"joint": {"rank": 257}}, r"joint\.rank must be at most 256, got 257\."),
        ({"joint": {"batch_size": 1}}, r"joint\.batch_size must be at least 2 to contrast documents, got 1\."),
        ({"joint": {"plain_truncation": 1.5}}, r"joint\.plain_truncation must be between 0 and 1, got 1\.5\."),
        ({"seed": 2**32}, r"seed must be a whole number from 0 to 4294967295, got 4294967296\."),
        ({"base": {"path": ""}}, r'base\.path must be a directory or a hub id, got ""\. Leave it out'),
        ({"joint": {"learning_rate": "high"}}, r"joint\.learning_rate must be a number, got 'high'\."),
        ({"joint": {"learning_rate": float("nan")}}, r"joint\.learning_rate must be above 0, got nan\."),
        ({"joint": {"detach": 1}}, r"joint\.detach must be true or false, got 1\."),
        ({"joint": {"adapters": "three"}}, """joint.adapters must be one of "two", "one", got 'three'."""),
        ({"joint": {"steps": 0}}, r"joint\.steps must be at least 1: without it there is nothing to embed with\."),
        ({"gate": {"hidden": [0]}}, r"gate\.hidden must be a list of whole numbers of at least 1, got \[0\]\."),
        ({"gate": {"hidden": 8}}, r"gate\.hidden must be a list of whole numbers of at least 1, got 8\."),
        ({"gate": {"share": 1.0}}, r"gate\.share must be between 0 and 1, got 1\.0\."),
        ({"gate": {"share": 0.5, "split": "a"}}, r'gate\.share 0\.5 has no meaning beside gate\.split "a".* Leave'),
        ({"data": {"gate_queries": 0}}, r"data\.gate_queries must be above 0, got 0\."),
        ({"gate": {"margin": -1.0}}, r"gate\.margin must be at least 0, got -1\.0\."),
        ({"base": {"path": 3}}, r"base\.path must be a string, got 3\."),
        ({"base": {"dtype": "float8"}}, """base.dtype must be one of .*, got 'float8'. Did you mean "float32"?"""),
        ({"method": {"graph": "x"}}, r'graph must be one of "shared_kv", "reencode", got "x"\.'),
        (
            {"policy": {"steps": 1, "group_size": 1}},
            r"policy\.group_size must be at least 2 to compare thoughts, got 1",
        ),
        (
            {"policy": {"steps": 1, "batch_size": 1}},
            r"policy\.batch_size must be at least 2 so that documents can be ranked, got 1\.",
        ),
        (
            {"policy": {"steps": 5, "inner_steps": 2}},
            r"policy\.steps must be a multiple of policy\.inner_steps, 2, so that no state lies between .* got 5\.",
        ),
        (
            {"policy": {"steps": 6, "save_steps": 20, "inner_steps": 3}},
            r"policy\.save_steps must be a multiple of policy\.inner_steps, 3, .* got 20\.",
        ),
        ({"gate": {"price": -0.1}}, r"gate\.price must be at least 0, got -0\.1\."),
        ({"gate": {"margin": "priced"}}, r"gate\.margin must be a number, got 'priced'\."),
        (
            {"policy": {"steps": 1}, "joint": {"adapters": "one"}},
            r'policy\.steps must be 0 with joint\.adapters = "one": its reward would learn too\.',
        ),
        ({"seed": -1}, r"seed must be a whole number from 0 to 4294967295, got -1\."),
        ({"seed": "a"}, r"seed must be a whole number, got 'a'\."),
    ],
)
def test_a_wrong_value_is_one_clear_error(table, message):
    with pytest.raises(OptionError, match=message):
        parse_config(table)


def test_a_file_that_is_none_says_so(tmp_path):
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[joint\n")
    with pytest.raises(OptionError, match="is no TOML: "):
        load_config(bad)
