"""Metrics equal a worked example and trec_eval's own values; ties and margins are as documented."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from twn_kernels.errors import InputError, MissingDependency
from twn_kernels.evaluation import metrics


def test_a_worked_example():
    # Four documents ranked b, a, d, c; a has relevance 2, c has 1.
    places, qrels = {"q": ["b", "a", "d", "c"]}, {"q": {"a": 2, "c": 1, "b": 0}}
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    at_3, at_4 = (metrics.score(places, qrels, ["q"], k) for k in (3, 4))
    assert at_3["ndcg_at_3"] == pytest.approx([(2 / math.log2(3)) / ideal])
    assert at_4["ndcg_at_4"] == pytest.approx([(2 / math.log2(3) + 1 / math.log2(5)) / ideal])
    assert at_3["recall_at_3"] == pytest.approx([0.5]) and at_4["recall_at_4"] == pytest.approx([1.0])
    assert at_3["mrr_at_3"] == pytest.approx([0.5]) and at_3["hit_at_1"] == pytest.approx([0.0])
    assert metrics.score(places, qrels, ["q"], 1)["mrr_at_1"] == pytest.approx([0.0])
    assert set(at_3) == set(metrics.metric_names(3))


def test_vectors_without_ties_give_what_trec_eval_gives_for_their_similarities():
    import pytrec_eval

    generator = np.random.default_rng(0)
    queries, documents = (generator.standard_normal((n, 6)).astype(np.float32) for n in (70, 90))
    query_ids, document_ids = [f"q{i}" for i in range(70)], [f"d{i}" for i in range(90)]
    qrels = {
        query: {document_ids[place]: int(generator.integers(0, 3)) for place in generator.permutation(90)[:12]}
        | {"d0": 1}
        for query in query_ids
    }
    ranked = metrics.rank(queries, documents, query_ids, document_ids, qrels, 10)
    found = metrics.score(ranked.places, qrels, query_ids, 10)
    similarities = queries @ documents.T
    run = {
        q: dict(zip(document_ids, map(float, row), strict=True)) for q, row in zip(query_ids, similarities, strict=True)
    }
    names = {"ndcg_at_10": "ndcg_cut_10", "recall_at_10": "recall_10", "hit_at_1": "success_1"}
    own = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "success.1"}).evaluate(run)
    for name, theirs in names.items():
        assert found[name] == pytest.approx([own[query][theirs] for query in query_ids], abs=1e-12), name
    for index, row in enumerate(similarities):
        positives = [place for place in range(90) if qrels[f"q{index}"].get(f"d{place}", 0) > 0]
        others = [place for place in range(90) if place not in positives]
        assert ranked.margins[index] == pytest.approx(row[positives].max() - row[others].max(), abs=1e-5), index


def test_ties_are_in_the_order_of_ids_whatever_the_order_of_rows():
    documents = np.eye(3, dtype=np.float32)[[0, 0, 1, 0]]
    query = np.array([[1, 0, 0]], dtype=np.float32)
    for ids in (["b", "c", "a", "d"], ["d", "b", "a", "c"]):
        for depth, best in ((2, ["b", "c"]), (4, ["b", "c", "d", "a"])):
            assert metrics.rank(query, documents, ["q"], ids, {"q": {"b": 1}}, depth).places["q"] == best


def test_equal_documents_tie_wherever_they_stand():
    """Where threads share a matrix product, sums may run in another order at its edges, and last bits differ."""
    from threadpoolctl import threadpool_limits

    generator = np.random.default_rng(1)
    documents = np.tile(generator.standard_normal((1, 1000)).astype(np.float32), (1000, 1))
    ids, query_ids = [f"{place:03d}" for place in generator.permutation(1000)], [f"q{index}" for index in range(64)]
    queries = generator.standard_normal((64, 1000)).astype(np.float32)
    with threadpool_limits(2):
        ranked = metrics.rank(queries, documents, query_ids, ids, {query: {"000": 1} for query in query_ids}, 1000)
    assert all(ranked.places[query] == sorted(ids) for query in query_ids)


def test_documents_in_parts_rank_as_whole(monkeypatch):
    generator = np.random.default_rng(2)
    queries, documents = (generator.standard_normal((n, 5)).astype(np.float32) for n in (3, 20))
    ids = [f"{place:02d}" for place in range(20)]
    arguments = (queries, documents, ["a", "b", "c"], ids, {query: {"00": 1} for query in "abc"}, 7)
    whole = metrics.rank(*arguments).places
    monkeypatch.setattr(metrics, "_DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr(metrics, "_QUERIES_AT_ONCE", 2)
    assert metrics.rank(*arguments).places == whole
    assert whole["c"] == [ids[place] for place in np.argsort(-(documents @ queries[2]))[:7]]


def test_a_margin_needs_another_document():
    ones = np.ones((1, 2), dtype=np.float32)
    assert np.isnan(metrics.rank(ones, ones, ["q"], ["d"], {"q": {"d": 1}}, 1).margins).all()


def test_vectors_that_are_not_finite_are_refused_by_name():
    good = np.ones((2, 2), dtype=np.float32)
    bad = good.copy()
    bad[1, 0] = np.nan
    with pytest.raises(
        InputError, match=r'^1 of 2 document vectors are not finite \(the first: "y"\). Look for NaN in'
    ):
        metrics.rank(good, bad, ["a", "b"], ["x", "y"], {"a": {"x": 1}, "b": {"x": 1}}, 1)


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    with pytest.raises(MissingDependency) as caught:
        metrics.require_trec_eval()
    assert str(caught.value) == (
        'retrieval metrics need pytrec_eval-terrier, which is not installed. Run: pip install "twn_kernels[eval]"'
    )
