"""What a gate is worth: floor, roof, thresholds, intervals and calibration against values worked out by hand."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from twn_kernels.errors import MissingDependency
from twn_kernels.evaluation import gating

NEVER, ALWAYS = np.array([0.0, 1.0, 0.5, 0.2, 0.9]), np.array([1.0, 0.0, 0.5, 0.6, 0.8])


def test_the_random_gate_is_the_mean_over_all_gates_that_think_as_often():
    thinks = [np.isin(np.arange(5), chosen) for chosen in itertools.combinations(range(5), 2)]
    every = [np.where(chosen, ALWAYS, NEVER).mean() for chosen in thinks]
    auto = np.where([True, False, False, True, False], ALWAYS, NEVER)
    floor = gating.random_gate(NEVER, ALWAYS, auto, 2, seed=0, draws=4000)
    assert floor["mean"] == pytest.approx(np.mean(every)) and floor["expected"].mean() == floor["mean"]
    # Ours is the best of the ten, alone.
    assert np.sum(np.array(every) >= auto.mean() - 1e-12) == 1
    assert floor["p_value"] == pytest.approx(0.1, abs=0.02)


def test_a_gate_that_leaves_nothing_to_chance_has_nothing_to_show():
    for thinking, auto in ((0, NEVER), (5, ALWAYS)):
        assert gating.random_gate(NEVER, ALWAYS, auto, thinking, seed=0, draws=50)["p_value"] == 1.0


def test_the_oracle_thinks_where_that_gains_and_not_at_a_tie():
    assert gating.oracle(NEVER, ALWAYS).tolist() == [True, False, False, True, False]


def test_thresholds_are_the_scores_or_quantiles_of_them():
    scores = np.array([0.5, 0.1, 0.5, 0.9])
    assert gating.thresholds(scores, 10) == [0.1, 0.5, 0.9]
    many = gating.thresholds(np.linspace(0, 1, 1000), 5)
    assert len(many) == 5 and many[0] == 0.0 and many[-1] == 1.0 and many[2] == pytest.approx(0.5, abs=0.01)


def test_the_interval_is_that_of_the_mean_and_follows_its_seed():
    difference = np.random.default_rng(3).normal(0.3, 1.0, 400)
    found = gating.bootstrap(difference, seed=1, resamples=1000)
    half = 1.96 * difference.std() / 20
    assert found["mean"] == pytest.approx(difference.mean())
    assert (found["low"], found["high"]) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=0.02
    )
    assert found == gating.bootstrap(difference, seed=1, resamples=1000)
    assert found != gating.bootstrap(difference, seed=2, resamples=1000)
    assert found["confidence"] == 0.95 and found["resamples"] == 1000


def test_one_query_and_equal_queries_have_no_spread():
    for difference in (np.array([0.25]), np.full(4, 0.25)):
        found = gating.bootstrap(difference, seed=0, resamples=20)
        assert found["low"] == found["mean"] == found["high"] == 0.25


def test_calibration_of_five_queries_by_hand():
    scores, improved = np.array([0.05, 0.55, 0.52, 0.95, 1.0]), np.array([False, True, False, True, True])
    found = gating.calibration(scores, improved)
    assert found["improved_rate"] == pytest.approx(0.6) and found["brier_of_rate"] == pytest.approx(0.24)
    assert found["brier"] == pytest.approx((0.05**2 + 0.45**2 + 0.52**2 + 0.05**2) / 5)
    assert found["auroc"] == 1.0
    assert [(row["low"], row["queries"]) for row in found["reliability"]] == [
        (0.0, 1), (pytest.approx(0.5), 2), (pytest.approx(0.9), 2),
    ]  # fmt: skip
    assert found["reliability"][1]["mean_score"] == pytest.approx(0.535)
    assert [row["improved_rate"] for row in found["reliability"]] == [0.0, 0.5, 1.0]
    assert gating.calibration(np.array([0.9, 0.4, 0.6]), np.array([False, True, True]))["auroc"] == 0.0


@pytest.mark.parametrize("value", [False, True])
def test_a_split_on_which_all_or_none_gained_has_no_auroc(value):
    found = gating.calibration(np.array([0.2, 0.8]), np.array([value, value]))
    assert found["auroc"] is None and found["improved_rate"] == value
    assert found["brier"] == pytest.approx((0.2**2 + 0.8**2) / 2)
    assert [row["improved_rate"] for row in found["reliability"]] == [value, value]


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(
        MissingDependency, match=r"^judging a gate needs scikit-learn and SciPy, and sklearn.metrics is"
    ):
        gating.require_statistics()
