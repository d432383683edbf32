"""What is said of the shipped model is what the committed results say, and they are of this model and this task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from twn_kernels import shipped
from twn_kernels.checkpoint import load_checkpoint
from twn_kernels.evaluation import load_result
from twn_kernels.training.config import load_config
from twn_kernels.training.model_card import model_card

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "twn_kernels" / "training" / "numbers.toml"
RESULTS = ROOT / "twn_kernels" / "shipped" / "numbers" / "results"
SPLITS = {"test", "ood_pairs", "ood_compositions", "ood_chains", "ood_images"}
BASELINES = {"one adapter for both jobs": "one-adapter.json", "interface not detached": "not-detached.json"}
MODES = ("never", "always", "auto")


@pytest.fixture(scope="module")
def result() -> dict:
    return load_result(RESULTS / "shipped.json")


@pytest.fixture(scope="module")
def baselines() -> dict[str, dict]:
    return {name: load_result(RESULTS / file) for name, file in BASELINES.items()}


@pytest.fixture(scope="module")
def run() -> dict:
    return json.loads((RESULTS.parent / "run.json").read_text(encoding="utf-8"))


def test_adaptive_thinking_is_at_least_as_good_for_three_fifths_of_the_tokens(result):
    """On a mixture whose half is simple: what the gate is for."""
    test, metric = result["splits"]["test"], result["metric"]
    never, always, auto = (test["modes"][mode] for mode in MODES)
    assert auto[metric] >= max(never[metric], always[metric])
    assert auto["query_tokens"] <= 0.6 * always["query_tokens"]
    assert test["differences"]["auto_minus_always"]["low"] > -0.01
    assert test["differences"]["auto_minus_random"]["low"] > 0.1
    classes = {name: told["queries"] for name, told in test["classes"].items()}
    assert classes["simple"] == classes["thoughtful"]


def test_the_result_is_of_the_shipped_weights(result):
    counted = result["model"]["parameters"]
    checkpoint = load_checkpoint(shipped.number_model().twn)
    for name, adapter in checkpoint.adapters.items():
        assert counted[name] == sum(layer.A.numel() + layer.B.numel() for layer in adapter.layers.values())
    assert counted["gate"] == sum(tensor.numel() for tensor in checkpoint.gate.values())
    assert counted["queries"] == checkpoint.queries.numel()
    assert "--shipped numbers" in result["command"]
    assert result["options"]["threshold"] == checkpoint.config.think_threshold


def test_every_split_out_of_distribution_is_there(result):
    assert SPLITS == set(result["splits"])


def test_the_baselines_answered_the_same_queries(result, baselines):
    for name, other in baselines.items():
        assert other["data"]["splits"] == result["data"]["splits"], name
        assert other["metric"] == result["metric"] and "--shipped" not in other["command"], name
        # The threshold is each gate's own.
        options = [{**told["options"], "threshold": None} for told in (other, result)]
        assert options[0] == options[1], name


@pytest.mark.parametrize(
    ("file", "changes"),
    [("one-adapter", {"joint.adapters": "one"}), ("not-detached", {"joint.detach": False})],
)
def test_a_baseline_differs_from_the_model_by_what_it_is_called(file, changes, run):
    """Its run stands beside its result: the same backbone, data and settings, and the commands that trained it."""
    other = json.loads((RESULTS / f"{file}-run.json").read_text(encoding="utf-8"))
    assert _differing(run["config"], other["config"]) == {**changes, "policy.steps": 0}
    assert other["data"] == run["data"] and other["base"] == run["base"]
    assert set(other["stages"]) == {"joint", "gate"} and all(stage["done"] for stage in other["stages"].values())
    assert all(command["dirty"] is False for command in other["commands"])
    policy = run["stages"]["policy"]["figures"]
    assert policy["after"]["reward"] - policy["before"]["reward"] < 1e-4  # so that leaving it out makes no difference
    result = load_result(RESULTS / f"{file}.json")
    assert result["options"]["threshold"] == other["stages"]["gate"]["figures"]["threshold"]


def _differing(before: dict, now: dict) -> dict:
    """Values of ``now`` that are not those of ``before``, by dotted name."""
    pairs = ((f"{name}.{key}", part[key]) for name, part in now.items() if isinstance(part, dict) for key in part)
    return {name: value for name, value in pairs if _at(before, name) != value}


def _at(config: dict, name: str):
    section, key = name.split(".")
    return config[section][key]


def test_model_and_results_come_from_commits_and_not_from_changed_trees(run, result, baselines):
    commands = [*run["commands"], *run.get("base", {}).get("commands", [])]
    for told in (*commands, result, *baselines.values()):
        assert re.fullmatch("[0-9a-f]{40}", told["commit"]) and told["dirty"] is False, told["command"]
    stages = run["stages"] | run.get("base", {}).get("stages", {})
    assert set(stages) == {"base", "joint", "policy", "gate"} and all(stage["done"] for stage in stages.values())


def test_the_model_was_not_trained_on_the_seed_that_tests_it(run, result):
    """Data of another seed, which the name of its folder tells."""
    assert result["data"]["name"] == "numbers-seed-2" and run["config"]["seed"] == 0


def test_the_configuration_in_the_package_is_the_one_it_was_trained_with(run):
    """Of another run's backbone the path differs, and nothing else does."""
    held = json.loads(json.dumps(load_config(CONFIGURATION).as_dict()))
    trained = run["config"]
    assert trained | {"base": None} == held | {"base": None}
    base = run.get("base", run)["config"]["base"]
    assert base == held["base"]


def test_the_card_is_made_of_the_run_and_the_results_alone(run, result, baselines):
    assert shipped.number_model().card.read_text(encoding="utf-8") == model_card(run, result, baselines)


def test_the_card_and_the_readme_quote_the_result(result):
    card = shipped.number_model().card.read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, split in result["splits"].items():
        values = [f"{split['modes'][mode][result['metric']]:.3f}" for mode in MODES]
        assert all(value in card for value in values), name
        row = re.search(rf"^\| `{name}` \|(.*)\|$", readme, flags=re.MULTILINE)
        assert row, f"README has no row of {name}"
        auto, always = (split["modes"][mode] for mode in ("auto", "always"))
        share = auto["query_tokens"] / always["query_tokens"]
        assert [cell.strip() for cell in row[1].split("|")] == [*values, f"{auto['think_rate']:.0%}", f"{share:.0%}"]
    found = result["splits"]["test"]["differences"]["auto_minus_always"]
    assert f"{found['mean']:+.3f}, 95 % interval {found['low']:+.3f} to {found['high']:+.3f}" in readme


def test_the_words_of_the_readme_are_the_results(result, baselines):
    """Of the sentences below the tables, each number."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    splits, classes = result["splits"], result["splits"]["test"]["classes"]
    simple, thoughtful = classes["simple"], classes["thoughtful"]
    assert f"What it gains is on simple queries ({simple['auto']:.3f} against {simple['always']:.3f})" in readme
    assert thoughtful["think_rate"] == 1.0 and 1 / 9 < simple["think_rate"] < 1 / 7
    others = [other["splits"]["test"]["classes"]["thoughtful"]["always"] for other in baselines.values()]
    said = f"{thoughtful['always']:.3f} here, {others[0]:.3f} and {others[1]:.3f} there"
    assert f"(always thinking: {said})" in readme
    images = splits["ood_images"]["differences"]["auto_minus_always"]
    assert f"it is better ({images['mean']:+.3f}, {images['low']:+.3f} to {images['high']:+.3f})" in readme
    assert images["low"] > 0
    assert all(split["differences"]["auto_minus_always"]["high"] > 0 for split in splits.values())
    tied = [
        one["splits"]["ood_compositions"]["classes"]["thoughtful"]["always"] for one in (result, *baselines.values())
    ]
    assert abs(tied[0] - tied[2]) < 0.005


def test_the_readme_quotes_the_baselines(result, baselines):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, other in {"this model": result, **baselines}.items():
        modes = other["splits"]["test"]["modes"]
        values = [f"{modes[mode][other['metric']]:.3f}" for mode in MODES]
        share = modes["auto"]["query_tokens"] / modes["always"]["query_tokens"]
        assert f"| {name} | {' | '.join(values)} | {share:.0%} |" in readme, name
