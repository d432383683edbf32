"""The result document: what is written is read back, and each way to be damaged names its field."""

from __future__ import annotations

import copy
import json

import pytest
from known import write_four

from twn_kernels.errors import MissingDependency, OptionError, ResultError
from twn_kernels.evaluation import EvaluationOptions, evaluate, formats, load_result, plots, save_result, tables
from twn_kernels.evaluation.results import parse


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder, embedder = write_four(tmp_path_factory.mktemp("data") / "four")
    (folder / "qrels" / "ood.tsv").write_text("q-same\td2\t1\nq-gains\td0\t1\n")
    return evaluate(embedder, folder, EvaluationOptions(k=1, threshold=0.5, resamples=100))


def test_what_is_saved_is_loaded(result, tmp_path):
    path = save_result(result, tmp_path / "new" / "result.json")
    assert load_result(path) == json.loads(path.read_text()) == result
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def changed(result: dict, *path, value) -> dict:
    """A copy with one field set; ``...`` removes it."""
    whole = copy.deepcopy(result)
    inner = whole
    for name in path[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "twn-bench", 'x is no evaluation result: expected an object of kind "twn-eval", got kind '),
        (("schema",), 2, "x has schema 2; this version reads schema 1. Evaluate again, or read it with the version"),
        (("commit",), ..., "x.commit is missing."),
        (("comit",), "a", 'x.comit is no field of schema 1. Did you mean "commit"?'),
        (("splits", "test", "modes", "never", "ndcg_at_1"), ..., "x.splits.test.modes.never has no ndcg_at_1, which"),
        (("splits", "test", "modes", "auto", "think_rate"), -1, "x.splits.test.modes.auto.think_rate must be a finite"),
        (("splits", "test", "per_query", "tokens"), [1], "x.splits.test.per_query.tokens must have one entry for each"),
        (("splits", "test", "per_query", "never"), ["a"], "x.splits.test.per_query.never[0] must be a number from"),
        (("data", "splits", "test", "digest"), "", "x.data.splits.test.digest must be a non-empty string, got ''."),
        (("splits", "test", "sweep"), {}, "x.splits.test.sweep must be a list, got {}."),
        (("splits", "test", "calibration", "by_metric", "auroc"), "none", "by_metric.auroc must be a number from 0"),
        (("splits", "test", "oracle"), ..., "x.splits.test must tell of the gate (oracle, random, sweep, ...) exactly"),
        (("splits", "test", "modes"), {}, "x.splits.test.modes is empty; expected at least one mode."),
        (("splits", "test", "modes", "auto", "query_seconds"), ..., "modes.auto.query_seconds is missing."),
        (("splits", "ood"), ..., "x.splits and .data.splits must name the same splits."),
        (("splits",), {}, "x.splits is empty; expected at least one split."),
        (("options", "seed"), ..., "x.options.seed is missing."),
        (("model",), [], "x.model must be an object, got []."),
        (("dirty",), 1, "x.dirty must be true or false, got 1."),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_damaged_documents(result, path, value, message):
    with pytest.raises(ResultError) as caught:
        parse(changed(result, *path, value=value), "x")
    assert message in str(caught.value)


def test_files_that_are_no_results(tmp_path, result):
    path = tmp_path / "a.json"
    with pytest.raises(ResultError, match=r'^result file ".*a.json" cannot be read: No such file.* Name one that'):
        load_result(path)
    path.write_text("{")
    with pytest.raises(
        ResultError, match=r'^result file ".*a.json" is no JSON \(.*\). Name one that an evaluation wrote.'
    ):
        load_result(path)
    with pytest.raises(ResultError, match="x is no evaluation result: .* got list."):
        parse([], "x")
    with pytest.raises(ResultError, match="cannot be written: "):
        save_result(result, path / "result.json")


def test_mteb_s_format(result, tmp_path):
    found = formats.mteb_result(result, "auto")
    assert found["task_name"] == "four" and set(found["scores"]) == {"test", "ood"}
    (scores,) = found["scores"]["test"]
    assert scores == {
        "ndcg_at_1": 0.75, "recall_at_1": 0.75, "mrr_at_1": 0.75, "hit_at_1": 0.75, "main_score": 0.75,
        "hf_subset": "default", "languages": ["eng-Latn"],
    }  # fmt: skip
    told = [split["modes"]["auto"] for split in result["splits"].values()]
    assert found["evaluation_time"] == pytest.approx(sum(t["query_seconds"] + t["document_seconds"] for t in told))
    digests = [split["digest"][:12] for split in result["data"]["splits"].values()]
    assert found["dataset_revision"] == "+".join(digests)


def test_mmeb_s_format(result):
    assert formats.mmeb_scores(result, "never")["four-test"] == {
        "ndcg_linear@1": 0.5, "recall@1": 0.5, "mrr@1": 0.5, "hit@1": 0.5, "num_pred": 4, "num_data": 4,
    }  # fmt: skip


def test_each_mode_has_files_of_its_own(result, tmp_path):
    names = {path.relative_to(tmp_path).as_posix() for path in formats.write_formats(result, tmp_path)}
    assert names == {f"mteb/{mode}/four.json" for mode in ("never", "always", "auto")} | {
        f"mmeb/{mode}/four-{split}_score.json" for mode in ("never", "always", "auto") for split in ("test", "ood")
    }
    assert json.loads((tmp_path / "mmeb/auto/four-test_score.json").read_text())["hit@1"] == 0.75


def test_the_table_says_what_the_document_says(result):
    told = tables.render(result).splitlines()
    (row,) = [line.split() for line in told if line.startswith("test   auto")]
    assert row[:9] == ["test", "auto", "0.7500", "0.7500", "0.7500", "0.7500", "50", "%", "25"] and "10" in row
    assert any(line.startswith("test: is the gate better than never thinking? not shown: +0.2500 [") for line in told)
    assert any(line.startswith("test: gate score against gain by metric: AUROC 1.000, Brier ") for line in told)
    assert any(line.split() == ["test", "hard", "2", "100", "%", "0.0000", "0.5000", "0.5000"] for line in told)
    assert any(line.split() == "than never thinking not shown not shown".split() for line in told)
    assert "test: best in hindsight: threshold 0.9000, ndcg_at_1 0.7500, think 25 %" in told


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "not shown")]
)
def test_a_verdict_needs_an_interval_without_zero(low, high, said):
    assert tables.verdict({"low": low, "high": high}) == said


def test_two_runs_are_paired_by_query_where_the_data_are_the_same(result):
    worse = copy.deepcopy(result)
    split = worse["splits"]["test"]
    split["per_query"]["never"] = [0.0, 0.0, 0.0, 0.0]
    split["modes"]["never"]["ndcg_at_1"] = 0.0
    rows = {(row["split"], row["mode"]): row for row in tables.compare(result, worse)}
    assert set(rows) == {(split, mode) for split in ("test", "ood") for mode in ("never", "always", "auto")}
    assert rows["test", "never"]["difference"]["mean"] == 0.5 and rows["test", "never"]["other"] == 0.0
    assert rows["test", "auto"]["difference"]["mean"] == 0.5  # "loses" and "same" do not think
    assert rows["test", "always"]["difference"]["mean"] == 0.0
    shown = tables.render_comparison(list(rows.values()), "other.json")
    assert any(line.split()[:5] == ["test", "never", "0.5000", "0.0000", "+0.5000"] for line in shown.splitlines())
    other_data = changed(worse, "data", "splits", "test", "digest", value="another")
    rows = {(row["split"], row["mode"]): row for row in tables.compare(result, other_data)}
    assert rows["test", "never"]["difference"] is None and rows["ood", "never"]["difference"] is not None
    shown = tables.render_comparison(list(rows.values()), "other.json")
    assert {line.split()[0] for line in shown.splitlines() if line.endswith("on other data")} == {"test"}
    assert tables.render_comparison([], "other.json") == "other.json has no split and mode in common with this run"


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_drawn_and_always_the_same(result, tmp_path, suffix):
    first, second = (plots.draw(result, tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert first == second and len(first) > 4000


def test_a_plot_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r'a plot must end in one of ".png", ".svg", ".pdf", got "a.txt".'):
        plots.require_matplotlib(tmp_path / "a.txt")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"^plots need matplotlib, which is not installed. Run: pip install"):
        plots.require_matplotlib(tmp_path / "a.png")
