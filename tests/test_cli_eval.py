"""``twn-kernels eval``: the number task made, evaluated and compared from the command line, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from commands import failure, report

from twn_kernels.cli import _parse, evaluate, main
from twn_kernels.evaluation import load_result, split_names


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A model, a TWN directory, and small data beside them."""
    from twn_kernels.evaluation import Entry, write_dataset
    from twn_kernels.testing import write_demo_directories

    folder = tmp_path_factory.mktemp("eval")
    write_demo_directories(folder)
    documents = [Entry(f"d{number}", f"number {number}") for number in range(6)]
    queries = [Entry(f"q{number}", f"find {number}") for number in range(5)]
    qrels = {f"q{number}": {f"d{number}": 1} for number in range(5)}
    write_dataset(folder / "data", documents, queries, {"test": qrels, "dev": {"q0": {"d1": 1}}})
    return folder


def options(places: Path, *more: str) -> list[str]:
    model = ["--model", str(places / "base"), "--checkpoint", str(places / "twn"), "--quiet"]
    return ["eval", str(places / "data"), *model, "--max-think-tokens", "4", "--resamples", "50", *more]


def test_a_run_is_written_and_shown_again(places, tmp_path, capsys):
    out = tmp_path / "out"
    argv = options(places, "--out", str(out), "--plot", str(tmp_path / "plot.svg"), "--split", "test")
    found = report(capsys, *argv)
    saved = load_result(out / "result.json")
    assert found["result"] == saved and set(saved["splits"]) == {"test"}
    assert saved["options"]["max_think_tokens"] == 4 and saved["options"]["resamples"] == 50
    assert saved["model"]["base"] == str(places / "base") and saved["command"] == shlex.join(
        ["twn-kernels", *argv, "--json"]
    )
    assert {Path(path).relative_to(tmp_path).as_posix() for path in found["written"]} == {
        "out/result.json", "plot.svg",
        *(f"out/mteb/{mode}/data.json" for mode in ("never", "always", "auto")),
        *(f"out/mmeb/{mode}/data-test_score.json" for mode in ("never", "always", "auto")),
    }  # fmt: skip
    assert all(Path(path).stat().st_size > 100 for path in found["written"])
    again = report(capsys, "eval", str(out / "result.json"), "--compare", str(out / "result.json"))
    assert again["result"] == saved and again["written"] == []
    assert [(row["split"], row["mode"]) for row in again["comparison"]] == [
        ("test", mode) for mode in ("never", "always", "auto")
    ]
    assert main(["eval", str(out / "result.json"), "--compare", str(out / "result.json")]) == 0
    shown = capsys.readouterr().out
    assert "is the gate better than never thinking?" in shown and "ours is" in shown


def test_modes_threshold_and_metric_reach_the_evaluation(places, capsys):
    found = report(capsys, *options(places, "--think", "never,auto", "--threshold", "1", "--k", "3", "--metric", "mrr"))
    told = found["result"]
    assert set(told["splits"]) == {"dev", "test"} and told["metric"] == "mrr_at_3"
    assert set(told["splits"]["test"]["modes"]) == {"never", "auto"}
    assert told["splits"]["test"]["modes"]["auto"]["think_rate"] == 0.0 and told["options"]["threshold"] == 1.0


def test_what_exists_is_not_replaced_unless_asked(places, tmp_path, capsys):
    (tmp_path / "result.json").write_text("mine")
    line = failure(capsys, *options(places, "--out", str(tmp_path)))
    assert line == (
        f'twn-kernels eval: OptionError: "{tmp_path / "result.json"}" exists. Name another place, or replace it with '
        "--overwrite."
    )
    assert (tmp_path / "result.json").read_text() == "mine"
    report(capsys, *options(places, "--out", str(tmp_path), "--overwrite", "--split", "dev"))
    assert set(load_result(tmp_path / "result.json")["splits"]) == {"dev"}
    assert 'result.json" is a file. Name a folder.' in failure(
        capsys, *options(places, "--out", str(tmp_path / "result.json"))
    )


def test_the_number_task_is_made(tmp_path, capsys):
    found = report(capsys, "eval", "--make-numbers", str(tmp_path / "numbers"), "--queries", "2", "--seed", "5")
    assert found == {"folder": str(tmp_path / "numbers"), "splits": split_names(tmp_path / "numbers"), "seed": 5}
    assert "seed=5" in (tmp_path / "numbers" / "README.md").read_text()
    assert len((tmp_path / "numbers" / "queries.jsonl").read_text().splitlines()) == 5 * 2 + 4 + 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "OptionError: eval needs DATA, a data folder or a result.json; or --make-numbers DIR."),
        (["DATA"], "OptionError: eval of a data folder needs --model and --checkpoint, or --shipped; --model is mis"),
        (["DATA", "--model", "m"], "needs --model and --checkpoint, or --shipped; --checkpoint is missing."),
        (["nowhere", "--model", "m", "--checkpoint", "c"], 'DataError: data folder "nowhere" does not exist.'),
        (["DATA", "--make-numbers", "d"], "OptionError: --make-numbers writes data and takes none, got"),
        (["DATA", "--queries", "3"], "OptionError: --queries belongs to --make-numbers; name splits with --split"),
        (["DATA/corpus.jsonl", "--split", "a"], "OptionError: --split needs a data folder as DATA; "),
        (["DATA/corpus.jsonl", "--k", "5"], "OptionError: --k needs a data folder as DATA; "),
        (["DATA/corpus.jsonl", "--seed", "4"], "OptionError: --seed needs a data folder as DATA; "),
        (["DATA/corpus.jsonl", "--think", "never"], "OptionError: --think needs a data folder as DATA; "),
        (
            ["--make-numbers", "d", "--think-documents"],
            "OptionError: --think-documents has no meaning for --make-numbers, which takes --queries and --seed.",
        ),
        (["--make-numbers", "d", "--out", "o"], "OptionError: --out has no meaning for --make-numbers"),
        (["DATA/corpus.jsonl"], "is no JSON ("),
        (
            ["DATA", "--model", "nowhere", "--checkpoint", "c", "--split", "tset"],
            'has no split "tset"; its splits are ',
        ),
        (["DATA", "--compare", "nowhere.json"], 'ResultError: result file "nowhere.json" cannot be read'),
        (["DATA", "--plot", "a.txt"], "OptionError: a plot must end in one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_refused(places, argv, message, capsys):
    line = failure(capsys, "eval", *(word.replace("DATA", str(places / "data")) for word in argv))
    assert message in line


def test_each_option_has_its_place_in_what_is_refused():
    anywhere = {"command", "data", "run", "parser", "words", "json", "traceback", "quiet", "seed"}
    for_numbers = {"make_numbers", "queries"}
    names = [*evaluate._OF_A_RUN, *evaluate._OF_A_RESULT]
    assert sorted(names) == sorted(set(vars(_parse(["eval"]))) - anywhere - for_numbers)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--think", "never,allways"],
            'must be of "never", "always", "auto", with commas between, got "never,allways".',
        ),
        (["--think", "allways"], 'Did you mean "always"?'),
        (["--metric", "ndgc"], 'got "ndgc". Did you mean "ndcg"?'),
        (["--seed", "-1"], '--seed: must be a whole number, 0 or more, got "-1".'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_out_of_range_are_wrong_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["eval", "data", *argv])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_progress_goes_to_stderr(places, capsys):
    argv = [word for word in options(places, "--split", "dev", "--think", "never") if word != "--quiet"]
    assert main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["result"]["metric"] == "ndcg_at_10"
    assert "twn-kernels eval: dev: 6 documents" in printed.err
