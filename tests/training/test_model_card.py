"""The card of a trained model: its numbers are the run's and the evaluation's, and an unfinished run gets none."""

from __future__ import annotations

import copy
import json
import re

import pytest

from twn_kernels.errors import ResultError, TrainingError
from twn_kernels.training.config import TrainingConfig
from twn_kernels.training.model_card import model_card

_INTERVAL = {"confidence": 0.95, "resamples": 100}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> dict:
    """Of the tiny model on a few queries: a real document, with figures that a test can recognise put in."""
    from twn_kernels import TWNEmbedder
    from twn_kernels.evaluation import EvaluationOptions, evaluate
    from twn_kernels.evaluation.number_task import make_number_task
    from twn_kernels.testing import write_demo_directories

    folder = tmp_path_factory.mktemp("card")
    embedder = TWNEmbedder.from_pretrained(*write_demo_directories(folder), device="cpu")
    data = make_number_task(folder / "numbers", queries=4, train_queries=1, copies=1)
    options = EvaluationOptions(splits=("test", "ood_pairs"), max_think_tokens=2, resamples=100)
    document = evaluate(embedder, data, options, command="twn-kernels eval numbers --shipped numbers")
    test = document["splits"]["test"]
    test["modes"]["auto"] |= {"ndcg_at_10": 0.8127, "hit_at_1": 0.625, "think_rate": 0.5, "query_tokens": 26}
    test["classes"]["thoughtful"] |= {"never": 0.0631, "auto": 0.7319}
    test["differences"]["auto_minus_never"] = {"mean": 0.4171, "low": 0.3052, "high": 0.5293, **_INTERVAL}
    test["differences"]["auto_minus_always"] = {"mean": -0.01, "low": -0.03, "high": 0.01, **_INTERVAL}
    return document


@pytest.fixture
def run() -> dict:
    """What a finished run tells of itself."""
    return {
        "commands": [
            {
                "command": "twn-kernels train numbers --out out/numbers",
                "created": "2026-01-02T03:04:05+00:00",
                "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.17.0"},
                "machine": {"processor": "x86_64", "device": "CPU", "threads": 2},
                "commit": "0123456789abcdef",
                "dirty": False,
            }
        ],
        "config": json.loads(json.dumps(TrainingConfig(seed=7).as_dict())),
        "stages": {name: {"done": True, "seconds": 600.0, "figures": {}} for name in ("base", "joint", "gate")},
    }


def test_every_number_is_the_runs_or_the_evaluations(run, evaluation):
    card = model_card(run, evaluation)
    assert "| `test` | auto | 0.813 | 0.625 | 50% | 6.5 |" in card
    assert "| `test` | thoughtful | " in card and "| 0.063 |" in card and "| 0.732 |" in card
    assert "| `test` | +0.417 [+0.305, +0.529] better | -0.010 [-0.030, +0.010] not shown |" in card
    assert "- `ood_pairs`: operand pairs that training never shows" in card
    assert "In all 30 minutes, seed 7; the same commands train it again at the commits below" in card
    assert "Everything:\n\n```bash\n" in card and "of a run of its own" not in card
    assert "```bash\ntwn-kernels train numbers --out out/numbers\n```\n" in card
    ran = "a CPU (x86_64) with 2 threads; torch 2.13.0, transformers 5.17.0; commit `0123456789ab`"
    assert f"\n- 2026-01-02T03:04 UTC on {ran}\n" in card
    assert "12,000 training queries, 10 images of each number, seed 7." in card
    assert f"| base | {evaluation['model']['parameters']['base']:,} |" in card
    assert card.count("\n## ") == 5 and card.rstrip().splitlines()[-1].startswith("- So small a model")


def test_a_gpu_other_data_and_a_changed_tree_are_said(run, evaluation):
    command = run["commands"][0]
    other = {"command": "twn-kernels train --resume", "dirty": True, "machine": {"device": "NVIDIA H100", "threads": 4}}
    run["commands"].append(command | other)
    run["config"]["data"]["folder"] = "my/data"
    card = model_card(run, evaluation)
    assert "out/numbers\ntwn-kernels train --resume\n```\n" in card
    first, second = re.findall(r"^- 2026.*$", card, flags=re.MULTILINE)
    assert "uncommitted" not in first and second.endswith("commit `0123456789ab` with uncommitted changes")
    assert "UTC on NVIDIA H100 with 4 threads" in second
    assert "- Adapters and queries: the folder `my/data`, split `train`." in card


def test_what_the_gate_learned_from_is_said(run, evaluation):
    gate, data = run["config"]["gate"], run["config"]["data"]
    told = [model_card(run, evaluation)]
    gate["share"] = 0.35
    told.append(model_card(run, evaluation))
    gate |= {"share": None, "split": "gate"}
    told.append(model_card(run, evaluation))
    data["folder"] = "my/data"
    told.append(model_card(run, evaluation))
    wanted = [
        "20% of the training queries, kept out of joint training",
        "35% of the training queries, kept out of joint",
    ]
    wanted += ["2,400 queries of the task's split `gate`, in hands of its own", "split `gate` of the same folder"]
    assert all(f"- Gate: {words}" in card for words, card in zip(wanted, told, strict=True))


def test_one_thread_is_one(run, evaluation):
    run["commands"][0]["machine"]["threads"] = 1
    assert "with 1 thread; " in model_card(run, evaluation)


def test_a_backbone_of_another_run_is_told_with_its_commands(run, evaluation):
    whole = copy.deepcopy(run)
    run["base"] = {name: whole[name] for name in ("commands", "config")} | {
        "stages": {"base": run["stages"].pop("base")}
    }
    run["base"]["commands"][0]["command"] = "twn-kernels train numbers --out first --until base"
    card = model_card(run, evaluation)
    assert card.index("| `base` |") < card.index("| `joint` |") and "In all 30 minutes" in card
    first, second = card.index("--out first --until base"), card.index("--out out/numbers")
    assert (
        card.index("The backbone is of a run of its own:")
        < first
        < card.index("Adapters, queries and gate:\n\n```")
        < second
    )


def test_models_that_were_trained_otherwise_stand_beside_it(run, evaluation):
    other = copy.deepcopy(evaluation)
    modes = other["splits"]["test"]["modes"]
    modes["always"] |= {"ndcg_at_10": 0.5005, "query_tokens": 100}
    modes["auto"] |= {"ndcg_at_10": 0.4004, "think_rate": 0.25, "query_tokens": 31}
    never = modes["never"]["ndcg_at_10"]
    card = model_card(run, evaluation, {"one adapter": other})
    assert "## Trained otherwise" in card and "## Trained otherwise" not in model_card(run, evaluation)
    assert f"| `test` | one adapter | {never:.3f} | 0.500 | 0.400 | 25% | 31% |" in card
    assert "| `test` | this model | " in card and "| `ood_pairs` | one adapter | " in card
    other["data"]["splits"]["test"]["digest"] = "0" * 64
    with pytest.raises(ResultError, match='^the baseline "one adapter" was evaluated on other data than the model. '):
        model_card(run, evaluation, {"one adapter": other})
    with pytest.raises(ResultError, match='the baseline "one adapter".commit is missing'):
        model_card(run, evaluation, {"one adapter": {k: v for k, v in evaluation.items() if k != "commit"}})


def test_an_unfinished_run_gets_no_card(run, evaluation):
    run["stages"]["gate"]["done"] = False
    with pytest.raises(TrainingError, match='stage "gate" is not done. Go on with twn-kernels train --resume.$'):
        model_card(run, evaluation)
    with pytest.raises(TrainingError, match="it has no stages"):
        model_card(run | {"stages": {}}, evaluation)


def test_an_evaluation_that_does_not_tell_enough_is_refused(run, evaluation):
    without = copy.deepcopy(evaluation)
    without["model"]["parameters"] = None
    with pytest.raises(ResultError, match="does not count them"):
        model_card(run, without)
    with pytest.raises(ResultError, match="the evaluation.commit is missing"):
        model_card(run, {name: value for name, value in evaluation.items() if name != "commit"})
    one_mode = copy.deepcopy(evaluation)
    for split in one_mode["splits"].values():
        for name in ("oracle", "random", "sweep", "best_in_hindsight", "calibration"):
            del split[name]
        del split["modes"]["auto"], split["differences"]
        for told in split["classes"].values():
            del told["think_rate"], told["auto"]
    with pytest.raises(ResultError, match='split "test" lacks "auto"|the evaluation'):
        model_card(run, one_mode)
