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
MODES = ("never", "always", "auto")


@pytest.fixture(scope="module")
def result() -> dict:
    return load_result(RESULTS / "shipped.json")


def test_adaptive_thinking_is_worth_it_in_distribution(result):
    test = result["splits"]["test"]
    assert test["modes"]["auto"]["query_tokens"] < 0.8 * test["modes"]["always"]["query_tokens"]
    assert test["differences"]["auto_minus_never"]["low"] > 0.3
    assert test["differences"]["auto_minus_random"]["low"] > 0.1
    assert test["differences"]["auto_minus_always"]["low"] > -0.03
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
    assert {"test", "ood_pairs", "ood_compositions", "ood_chains", "ood_images"} == set(result["splits"])


def test_the_card_is_made_of_the_run_and_the_result_alone(result):
    run = json.loads((RESULTS.parent / "run.json").read_text(encoding="utf-8"))
    assert shipped.number_model().card.read_text(encoding="utf-8") == model_card(run, result)


def test_the_run_tells_what_was_done_by_hand():
    run = json.loads((RESULTS.parent / "run.json").read_text(encoding="utf-8"))
    assert (run["commit"], run["dirty"]) == ("unknown", None)
    card = shipped.number_model().card.read_text(encoding="utf-8")
    assert run["remarks"] and all(remark in card for remark in run["remarks"])


def test_the_card_and_the_readme_quote_the_result(result):
    card = shipped.number_model().card.read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    metric = result["metric"]
    for name, split in result["splits"].items():
        values = [split["modes"][mode][metric] for mode in MODES]
        assert all(f"{value:.3f}" in card for value in values), name
        row = re.search(rf"^\| `{name}` \|(.*)\|$", readme, flags=re.MULTILINE)
        assert row, f"README has no row of {name}"
        cells = [cell.strip() for cell in row[1].split("|")]
        assert cells[:3] == [f"{value:.3f}" for value in values], name
