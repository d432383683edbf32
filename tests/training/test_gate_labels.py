"""Labels of the gate against slow ones, and the margin and the threshold that a price makes."""

from __future__ import annotations

import math

import pytest
import pytrec_eval
import torch
from gate_examples import slow_score

from twn_kernels.errors import DataError, OptionError
from twn_kernels.training import gate_labels as labelling
from twn_kernels.training.gate_labels import gate_labels, ndcg, priced_margin, priced_threshold


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_labels_are_those_of_a_slow_recomputation(monkeypatch):
    monkeypatch.setattr(labelling, "_ROWS", 7)  # so that rows are cut, the last piece short
    plain, documents = unit(40, 12), unit(9, 12)
    thoughtful = torch.nn.functional.normalize(plain + 0.3 * torch.randn(40, 12), dim=1)
    positives = torch.rand(40, 9) < 0.3
    positives[torch.arange(40), torch.randint(9, (40,))] = True
    positives[3] = True  # no negative at all
    found = gate_labels(plain, thoughtful, documents, positives, 0.2, 0.15)
    lists = [value.double().tolist() for value in (plain, thoughtful, documents)]
    for row in range(40):
        slow = [slow_score(way[row], lists[2], positives[row].tolist(), 0.2) for way in lists[:2]]
        assert found.plain_scores[row].item() == pytest.approx(slow[0], rel=1e-9, abs=1e-12)
        assert found.thoughtful_scores[row].item() == pytest.approx(slow[1], rel=1e-9, abs=1e-12)
        assert bool(found.labels[row]) == (slow[1] - slow[0] > 0.15), row
    assert 5 < found.labels.sum() < 35 and found.labels.dtype == torch.bool
    assert found.plain_scores[3] == 0 and not found.labels[3]


def test_other_positives_are_masked():
    query, documents = torch.eye(4)[:1], torch.eye(4)
    alone = torch.tensor([[True, False, False, False]])
    score = gate_labels(query, query, documents, alone, 1.0, 0.0).plain_scores.item()
    assert score == pytest.approx(1 - math.log(math.e + 3))
    # A second positive, as near as the first: as a negative it would halve the probability, as a positive it does not.
    twice = torch.cat([documents, query])
    both = torch.tensor([[True, False, False, False, True]])
    assert gate_labels(query, query, twice, both, 1.0, 0.0).plain_scores.item() == pytest.approx(score)
    other = torch.tensor([[True, False, False, False, False]])
    assert gate_labels(query, query, twice, other, 1.0, 0.0).plain_scores.item() < score - 0.3


def test_the_margin_must_be_passed():
    documents, positives = torch.eye(2), torch.tensor([[True, False]])
    plain, thoughtful = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    found = gate_labels(plain, thoughtful, documents, positives, 1.0, 0.0)
    gain = (found.thoughtful_scores - found.plain_scores).item()
    assert gain > 0 and found.labels.item()
    assert not gate_labels(plain, thoughtful, documents, positives, 1.0, gain).labels.item()
    assert gate_labels(plain, thoughtful, documents, positives, 1.0, gain - 1e-9).labels.item()
    assert not gate_labels(plain, plain, documents, positives, 1.0, 0.0).labels.item()


def paid(margin: float, gains, plain, thoughtful, price: float) -> tuple[float, int]:
    """Summed reciprocal rank less the price of the thoughts, and how many there are, one query at a time."""
    total, thoughts = 0.0, 0
    for gain, without, with_it in zip(gains, plain, thoughtful, strict=True):
        thinks = gain > margin
        total, thoughts = total + (with_it - price if thinks else without), thoughts + thinks
    return total, thoughts


@pytest.mark.parametrize("price", [0.0, 0.02, 0.3, 5.0])
@pytest.mark.parametrize("seed", range(8))
def test_the_margin_pays_best_of_all(seed, price):
    draw = torch.Generator().manual_seed(seed)
    gains = (torch.randn(60, generator=draw) * 3).round()  # with ties, and some of them below zero
    plain, thoughtful = (1 / torch.randint(1, 5, (2, 60), generator=draw)).double()
    values = [value.tolist() for value in (gains, plain, thoughtful)]
    found = priced_margin(gains, plain, thoughtful, price)
    got, thoughts = paid(found, *values, price)
    for margin in {0.0, *(gain for gain in values[0] if gain > 0)}:
        other, more = paid(margin, *values, price)
        assert got > other - 1e-9
        if other == pytest.approx(got, abs=1e-12):
            assert thoughts <= more


def test_the_margin_of_queries_that_thinking_never_helps_leaves_none_to_think():
    ranks = torch.ones(3)
    assert priced_margin(torch.tensor([2.0, 0.5, -1.0]), ranks, ranks, 0.02) == 2.0
    assert priced_margin(torch.tensor([-2.0, 0.0, -1.0]), ranks, ranks, 0.02) == 0.0
    worth = priced_margin(torch.tensor([2.0, 0.5, 1.0]), 0.1 * ranks, ranks, 0.02)
    assert worth == 0.0  # each of them pays
    with pytest.raises(OptionError, match=r"^price must be at least 0, got -1\.$|^price must be at least 0, got -1\.0"):
        priced_margin(ranks, ranks, ranks, -1.0)


@pytest.mark.parametrize(("documents", "cutoff"), [(7, 10), (40, 10), (40, 3)])
def test_ndcg_is_the_evaluations(documents, cutoff, monkeypatch):
    """The same as trec_eval's of the same vectors; rows are cut, the last piece short."""
    monkeypatch.setattr(labelling, "_ROWS", 3)
    queries, found, positives = unit(10, 4), unit(documents, 4), torch.rand(10, documents) < 0.4
    positives[torch.arange(10), torch.randint(documents, (10,))] = True
    qrels = {f"q{i}": {f"d{j}": 1 for j in range(documents) if positives[i, j]} for i in range(10)}
    run = {
        f"q{i}": {f"d{j}": float(queries[i].double() @ found[j].double()) for j in range(documents)} for i in range(10)
    }
    name = f"ndcg_cut.{cutoff}"
    told = pytrec_eval.RelevanceEvaluator(qrels, {name}).evaluate(run)
    for row, value in enumerate(ndcg(queries, found, positives, cutoff).tolist()):
        assert value == pytest.approx(told[f"q{row}"][f"ndcg_cut_{cutoff}"], abs=1e-9)


@pytest.mark.parametrize("price", [0.0, 0.05, 0.4, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_pays_best_of_all(seed, price):
    draw = torch.Generator().manual_seed(seed)
    scores = (torch.rand(50, generator=draw) * 11).round() / 12  # with ties
    plain, thoughtful = torch.rand(2, 50, generator=draw, dtype=torch.float64)
    found = priced_threshold(scores, plain, thoughtful, price)

    def paid(threshold: float) -> float:
        thinks = scores.double() >= threshold
        return float((torch.where(thinks, thoughtful - price, plain)).sum())

    others = [place / 24 for place in range(25)]
    assert 0 <= found <= 1 and paid(found) >= max(map(paid, others)) - 1e-9
    assert price < 2 or found == 1.0


@pytest.mark.parametrize(
    ("temperature", "margin", "message"),
    [
        (0.0, 0.1, "temperature must be above 0, got 0.0."),
        (float("nan"), 0.1, "temperature must be above 0, got nan."),
        (0.1, -0.5, "margin must be at least 0, got -0.5."),
        (0.1, float("nan"), "margin must be at least 0, got nan."),
    ],
)
def test_labels_refuse_settings_out_of_range(temperature, margin, message):
    with pytest.raises(OptionError) as error:
        gate_labels(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2).bool(), temperature, margin)
    assert str(error.value) == message


def test_labels_refuse_a_query_without_a_positive():
    positives = torch.tensor([[True, False], [False, False]])
    with pytest.raises(DataError, match="1 of 2 queries have no positive among the documents, the first is at place 1"):
        gate_labels(torch.eye(2), torch.eye(2), torch.eye(2), positives, 0.1, 0.1)
