"""An evaluation end to end: modes and gate on vectors that are known, and on the tiny model against its own auto."""

from __future__ import annotations

import numpy as np
import pytest
from known import TOKENS, axis, near, write_four

from twn_kernels.errors import DataError, InputError, OptionError
from twn_kernels.evaluation import Entry, EvaluationOptions, evaluate, metrics, read_split, write_dataset
from twn_kernels.evaluation.embedding import embed_both_ways

QUICK = {"resamples": 200, "threshold": 0.5}


@pytest.fixture
def four(tmp_path):
    folder, embedder = write_four(tmp_path)
    return evaluate(embedder, folder, EvaluationOptions(k=1, **QUICK)), embedder


def test_modes_on_known_vectors(four):
    modes = four[0]["splits"]["test"]["modes"]
    assert {mode: told["ndcg_at_1"] for mode, told in modes.items()} == {"never": 0.5, "always": 0.5, "auto": 0.75}
    assert {mode: told["think_rate"] for mode, told in modes.items()} == {"never": 0.0, "always": 1.0, "auto": 0.5}
    assert {mode: told["query_tokens"] for mode, told in modes.items()} == {"never": 0, "always": 20, "auto": 10}
    assert {mode: told["fallback_rate"] for mode, told in modes.items()} == {"never": 0.0, "always": 0.25, "auto": 0.25}
    assert modes["auto"]["seconds_measured"] is False and modes["never"]["seconds_measured"] is True


def test_roof_floor_and_differences_on_known_vectors(four):
    split = four[0]["splits"]["test"]
    assert split["oracle"]["ndcg_at_1"] == 0.75 and split["oracle"]["think_rate"] == 0.25
    assert split["oracle"]["query_tokens"] == TOKENS
    assert split["random"]["ndcg_at_1"] == pytest.approx(0.5)
    # Of six gates that send two to think, those with "gains" and without "loses" are as good: two of them.
    assert split["random"]["p_value"] == pytest.approx(1 / 3, abs=0.05)
    means = {name: found["mean"] for name, found in split["differences"].items()}
    assert means == pytest.approx(
        {"auto_minus_never": 0.25, "auto_minus_always": 0.25, "auto_minus_random": 0.25, "always_minus_never": 0.0}
    )
    assert split["best_in_hindsight"]["threshold"] == 0.9 and split["best_in_hindsight"]["think_rate"] == 0.25


def test_the_sweep_has_every_decision_that_a_threshold_can_make(four):
    sweep = four[0]["splits"]["test"]["sweep"]
    assert [point["threshold"] for point in sweep] == [None, 0.9, 0.7, 0.2, 0.1]
    assert [point["ndcg_at_1"] for point in sweep] == [0.5, 0.75, 0.75, 0.5, 0.5]
    assert [point["query_tokens"] for point in sweep] == [0, 5, 10, 15, 20]


def test_classes_and_calibration_on_known_vectors(four):
    split = four[0]["splits"]["test"]
    assert split["classes"] == {
        "easy": {"queries": 2, "think_rate": 0.0, "never": 1.0, "always": 0.5, "auto": 1.0},
        "hard": {"queries": 2, "think_rate": 1.0, "never": 0.0, "always": 0.5, "auto": 0.5},
    }
    assert split["calibration"]["by_metric"]["auroc"] == 1.0
    assert split["calibration"]["by_metric"]["improved_rate"] == 0.25
    assert split["calibration"]["by_margin"]["improved_rate"] == 0.25
    assert split["calibration"]["by_margin"]["auroc"] == 1.0
    columns = split["per_query"]
    assert columns["id"] == ["q-gains", "q-loses", "q-same", "q-breaks"]
    assert columns["never"] == [0, 1, 1, 0] and columns["always"] == [1, 0, 1, 0]
    assert columns["margin_never"] == pytest.approx([-0.2, 1.0, 1.0, -0.2])
    assert columns["fell_back"] == [False, False, False, True] and columns["tokens"] == [TOKENS] * 4


def test_a_query_is_embedded_once_each_way_and_a_document_once(four):
    # After one query that warms up; documents never think unless asked to.
    assert four[1].calls[2:] == [("document", "never", 4), ("query", "never", 4), ("query", "always", 4)]


def test_thinking_documents_are_ranked_as_their_own_gate_says(tmp_path):
    folder, embedder = write_four(tmp_path)
    # Document 3 becomes what "breaks" looks for by thinking; document 1 becomes wrong for everyone.
    embedder.thoughtful |= {"document 3": near(0, 3), "document 1": axis(3)}
    embedder.scores |= {"document 3": 0.8, "document 1": 0.3}
    found = evaluate(embedder, folder, EvaluationOptions(k=1, think_documents=True, **QUICK))
    split = found["splits"]["test"]
    assert split["modes"]["auto"]["document_think_rate"] == 0.25 and split["modes"]["auto"]["document_tokens"] == TOKENS
    assert split["modes"]["always"]["document_think_rate"] == 1.0
    data = read_split(folder, "test")
    for mode, thinks in (("auto", lambda text: embedder.scores[text] >= 0.5), ("always", lambda text: True)):
        tables = [embedder.thoughtful if thinks(e.text) and e.text in embedder.thoughtful else embedder.plain
                  for e in (*data.queries, *data.documents)]  # fmt: skip
        vectors = np.array([table[e.text] for table, e in zip(tables, (*data.queries, *data.documents), strict=True)])
        best = (vectors[:4] @ vectors[4:].T).argmax(1)
        assert split["modes"][mode]["ndcg_at_1"] == pytest.approx((best == np.arange(4)).mean()), mode
    assert [point["threshold"] for point in split["sweep"]][:3] == [None, 0.9, 0.8]


def test_queries_may_think_where_no_document_does(tmp_path):
    folder, embedder = write_four(tmp_path)
    embedder.thoughtful |= {"document 0": [-1.0, 0.0, 0.0, 0.0]}  # by thinking it leaves "gains"
    embedder.scores |= {"breaks": 0.3}
    found = evaluate(embedder, folder, EvaluationOptions(k=1, think_documents=True, **QUICK))["splits"]["test"]
    assert found["modes"]["auto"]["document_think_rate"] == 0.0
    assert found["modes"]["auto"]["ndcg_at_1"] == 0.75
    assert found["per_query"]["always"] == [0, 1, 1, 1]


def test_chance_is_given_the_documents_of_the_gate(tmp_path):
    """Where no query thinks, nothing is left to chance, however much its thinking documents gained."""
    folder, embedder = write_four(tmp_path)
    embedder.thoughtful |= {"document 3": near(0, 3)}
    embedder.scores |= {"document 3": 0.95}
    options = EvaluationOptions(k=1, think_documents=True, threshold=0.95, resamples=50)
    split = evaluate(embedder, folder, options)["splits"]["test"]
    assert split["differences"]["auto_minus_never"]["mean"] != 0
    assert split["differences"]["auto_minus_random"]["mean"] == 0 and split["random"]["p_value"] == 1.0


def test_splits_that_share_candidates_embed_them_once(tmp_path):
    folder, embedder = write_four(tmp_path)
    (folder / "qrels" / "ood.tsv").write_text("q-same\td2\t1\n")
    found = evaluate(embedder, folder, EvaluationOptions(k=1, **QUICK))
    assert set(found["splits"]) == {"test", "ood"}
    assert [call for call in embedder.calls if call[0] == "document"] == [("document", "never", 4)]
    assert [point["threshold"] for point in found["splits"]["ood"]["sweep"]] == [None, 0.1]


def test_what_was_embedded_plainly_has_no_thoughtful_vectors(tmp_path):
    folder, embedder = write_four(tmp_path)
    ways = embed_both_ways(embedder, read_split(folder, "test").queries, "query", thoughtful=False)
    assert np.array_equal(ways.vectors(np.zeros(4, dtype=bool)), ways.plain)
    with pytest.raises(
        OptionError, match="^these inputs were embedded plainly alone; embed them with thoughtful=True."
    ):
        ways.vectors(np.array([False, True, False, False]))


def test_never_alone_thinks_of_nothing(tmp_path):
    folder, embedder = write_four(tmp_path)
    found = evaluate(embedder, folder, EvaluationOptions(k=1, think=("never",), **QUICK))["splits"]["test"]
    assert {call[1] for call in embedder.calls} == {"never"}
    assert set(found["modes"]) == {"never"} and "sweep" not in found and "always" not in found["per_query"]
    assert found["classes"]["hard"] == {"queries": 2, "never": 0.0}


def test_auto_can_be_timed_itself(tmp_path):
    folder, embedder = write_four(tmp_path)
    found = evaluate(embedder, folder, EvaluationOptions(k=1, time_auto=True, **QUICK))
    assert ("query", "auto", 4) in embedder.calls
    assert found["splits"]["test"]["modes"]["auto"]["seconds_measured"] is True


def test_without_a_gate_auto_is_refused_before_anything_long(tmp_path):
    folder, embedder = write_four(tmp_path)
    embedder.scores = None
    with pytest.raises(OptionError, match='think="auto" needs a gate, and the checkpoint has none. Use "never" and'):
        evaluate(embedder, folder, EvaluationOptions(k=1, **QUICK))
    assert all(count == 1 for _, _, count in embedder.calls)
    found = evaluate(embedder, folder, EvaluationOptions(k=1, think=("never", "always"), **QUICK))
    assert set(found["splits"]["test"]["modes"]) == {"never", "always"}
    assert found["splits"]["test"]["differences"]["always_minus_never"]["mean"] == 0.0


def test_an_input_that_cannot_be_embedded_is_named_by_its_id(tmp_path):
    folder, embedder = write_four(tmp_path)
    lines = (folder / "corpus.jsonl").read_text().replace("document 2", "unreadable")
    (folder / "corpus.jsonl").write_text(lines)
    with pytest.raises(InputError, match=r'^document "d2": it cannot be read.$'):
        evaluate(embedder, folder, EvaluationOptions(k=1, **QUICK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": ("sometimes",)}, 'think must be of "never", "always", "auto", got \'sometimes\'.'),
        ({"think": ()}, 'think must name one or more of "never", "always", "auto", got none.'),
        ({"metric": "ndgc"}, 'metric must be of "ndcg", "recall", "mrr", "hit", got \'ndgc\'. Did you mean "ndcg"?'),
        ({"k": 0}, "k must be a whole number of at least 1, got 0."),
        ({"threshold": 1.5}, "threshold must be a number in [0, 1], got 1.5."),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError) as caught:
        EvaluationOptions(**options)
    assert str(caught.value) == message


def test_a_split_that_is_not_there(tmp_path):
    folder, embedder = write_four(tmp_path)
    with pytest.raises(DataError, match='has no split "dev"'):
        evaluate(embedder, folder, EvaluationOptions(splits=("dev",)))
    assert embedder.calls == []


@pytest.fixture(scope="module")
def measured(embedder, numbers):
    options = EvaluationOptions(
        splits=("test", "ood_images"), max_think_tokens=6, resamples=100, query_prompt="Find it."
    )
    scores = embedder.encode_query(
        [e.input for e in read_split(numbers, "test").queries], prompt="Find it.", think="never", return_details=True
    )[1]
    threshold = float(np.median([detail.gate_score for detail in scores]))
    from dataclasses import replace

    return replace(options, threshold=threshold), evaluate(embedder, numbers, replace(options, threshold=threshold))


def test_auto_composed_is_the_embedder_s_own_auto(embedder, numbers, measured):
    options, found = measured
    split, told = read_split(numbers, "test"), found["splits"]["test"]
    vectors, details = embedder.encode_query(
        [entry.input for entry in split.queries],
        prompt="Find it.",
        think="auto",
        think_threshold=options.threshold,
        max_think_tokens=6,
        return_details=True,
    )
    documents = embedder.encode_document([entry.input for entry in split.documents], think="never")
    ids = [entry.id for entry in split.queries], [entry.id for entry in split.documents]
    ranked = metrics.rank(vectors, documents, *ids, split.qrels, 10)
    own = metrics.score(ranked.places, split.qrels, ids[0], 10)
    auto = told["modes"]["auto"]
    sent = [detail.thought or detail.fallback is not None for detail in details]
    assert auto["think_rate"] == np.mean(sent) and 0.3 < auto["think_rate"] < 0.7
    assert auto["query_tokens"] == sum(detail.tokens for detail in details)
    assert auto["fallback_rate"] == np.mean([detail.fallback is not None for detail in details]) > 0
    for name in metrics.metric_names(10):
        assert auto[name] == pytest.approx(own[name].mean(), abs=1e-9), name


def test_what_the_document_says_beside_the_numbers(embedder, measured):
    options, found = measured
    counts = found["model"]["parameters"]
    layers = embedder.checkpoint.adapters
    for name in ("reasoning", "embedding"):
        assert counts[name] == sum(layer.A.numel() + layer.B.numel() for layer in layers[name].layers.values())
    assert counts["queries"] == 4 * 64 and counts["gate"] == 64 + 64 + 16 * 64 + 16 + 16 + 1
    everything = sum(parameter.numel() for parameter in embedder.model.parameters())
    assert counts["base"] == everything - counts["reasoning"] - counts["embedding"]
    assert counts["added"] == sum(counts[name] for name in ("reasoning", "embedding", "gate", "queries"))
    assert found["options"]["threshold"] == options.threshold and found["options"]["seed"] == 0
    assert found["versions"]["pytrec_eval-terrier"] != "absent" and found["commit"]
    assert found["data"]["splits"]["test"]["queries"] == 24 and found["data"]["splits"]["test"]["documents"] == 100
    assert set(found["splits"]["test"]["classes"]) == {"simple", "thoughtful"}


def test_an_entry_s_class_is_optional(tmp_path):
    _, embedder = write_four(tmp_path / "four")
    folder = write_dataset(
        tmp_path / "data", [Entry("d", "document 0")], [Entry("q", "gains")], {"test": {"q": {"d": 1}}}
    )
    split = evaluate(embedder, folder, EvaluationOptions(k=1, **QUICK))["splits"]["test"]
    assert split["classes"] == {} and split["per_query"]["class"] == [None]
    assert split["per_query"]["margin_never"] == [None] and "by_margin" not in split["calibration"]
