"""What is said of the shipped model is what the committed results say, and they are of this model and this task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from twn_kernels import shipped
from twn_kernels.checkpoint import load_checkpoint
from twn_kernels.evaluation import load_result
from twn_kernels.training.model_card import model_card

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "twn_kernels" / "shipped" / "numbers" / "results"
SPLITS = {"test", "ood_pairs", "ood_compositions", "ood_chains", "ood_images"}
ONE_ADAPTER = "one adapter for both jobs"
MODES = ("never", "always", "auto")


@pytest.fixture(scope="module")
def result() -> dict:
    return load_result(RESULTS / "shipped.json")


@pytest.fixture(scope="module")
def one_adapter() -> dict:
    return load_result(RESULTS / "one-adapter.json")


@pytest.fixture(scope="module")
def run() -> dict:
    return json.loads((RESULTS.parent / "run.json").read_text(encoding="utf-8"))


def test_adaptive_thinking_nearly_keeps_the_quality_for_three_fifths_of_the_tokens(result):
    """It does not keep all of it: what it loses against always thinking is stated in README and card."""
    test, differences = result["splits"]["test"], result["splits"]["test"]["differences"]
    always, auto = test["modes"]["always"], test["modes"]["auto"]
    assert auto["query_tokens"] <= 0.6 * always["query_tokens"]
    assert differences["auto_minus_always"]["low"] > -0.04
    assert differences["auto_minus_never"]["low"] > 0.3 and differences["auto_minus_random"]["low"] > 0.1
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


def test_the_baseline_answered_the_same_queries(result, one_adapter):
    for name in ("metric", "options"):
        assert one_adapter[name] == result[name]
    assert one_adapter["data"]["splits"] == result["data"]["splits"] and "--shipped" not in one_adapter["command"]


def test_model_and_results_come_from_commits_and_not_from_changed_trees(run, result, one_adapter):
    for told in (*run["commands"], result, one_adapter):
        assert re.fullmatch("[0-9a-f]{40}", told["commit"]) and told["dirty"] is False, told["command"]
    assert all(stage["done"] for stage in run["stages"].values()) and set(run["stages"]) == {
        *("base", "joint", "policy", "gate")
    }


def test_the_model_was_not_trained_on_the_seed_that_tests_it(run, result):
    """Data of another seed, which the name of its folder tells."""
    assert result["data"]["name"] == "numbers-seed-1" and run["config"]["seed"] == 0


def test_the_card_is_made_of_the_run_and_the_results_alone(run, result, one_adapter):
    assert shipped.number_model().card.read_text(encoding="utf-8") == model_card(
        run, result, {ONE_ADAPTER: one_adapter}
    )


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


def test_the_readme_quotes_the_baseline(one_adapter):
    values = [one_adapter["splits"]["test"]["modes"][mode][one_adapter["metric"]] for mode in MODES]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {ONE_ADAPTER} | {' | '.join(f'{value:.3f}' for value in values)} |" in readme
