"""The schema of result files: what is written can be read, and whatever breaks it is refused by the field's name."""

import copy
import json

import pytest
from benchmarking_rows import row, run

from twn_kernels.benchmarking import results
from twn_kernels.benchmarking.results import Time
from twn_kernels.errors import ResultError


def document() -> dict:
    return json.loads(json.dumps(run().to_dict()))


def test_what_is_saved_loads_as_the_same_run(tmp_path):
    untimed = row(
        id="case-peft", contender="peft", correct=None, error_ratio=None, time_us=None, in_graph=None, reason="absent"
    )
    path = results.save(run(row(), untimed), tmp_path / "deep" / "run.json")
    assert results.load(path) == run(row(), untimed)
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_the_json_has_the_names_of_the_schema():
    (entry,) = document()["cases"]
    assert entry["pass"] == "decode" and entry["ranks"] == [64, 32]
    assert entry["time_us"] == {"median": 10.0, "p20": 9.5, "p80": 11.0, "rounds": 20}


@pytest.mark.parametrize("schema", [0, 2, "1", None, True, 1.5])
def test_another_schema_is_refused_with_its_version(schema):
    with pytest.raises(ResultError, match=rf"has schema {schema!r}; this version reads schema 1\. Measure again"):
        results.parse(document() | {"schema": schema})


@pytest.mark.parametrize("other", [[], "text", {}, {"kind": "another"}, None])
def test_another_document_is_refused(other):
    with pytest.raises(ResultError, match='is no benchmark result: expected an object of kind "twn-bench"'):
        results.parse(other)


WRONG = {
    "suite": ("groups", 'must be one of "linear", "group", "layer", "model"'),
    "pass": ("backward", 'must be one of "forward", "forward_backward", "decode"'),
    "tokens": (0, "must be a whole number of 1 or more, got 0"),
    "ranks": ([64], r"must be two whole numbers \[reasoning, embedding\]"),
    "correct": (1, "must be true or false or null, got 1"),
    "error_ratio": (float("nan"), "must be a finite number of 0 or more or null, got nan"),
    "percent_of_roof": (-1, "must be a finite number of 0 or more or null, got -1"),
    "ideal_bytes": (1.5, "must be a whole number of 0 or more, got 1.5"),
    "ideal_flops": (True, "must be a whole number of 0 or more, got True"),
    "contender": ("", "must be a non-empty string, got ''"),
    "time_us": ([1], r"must be an object or null, got \[1\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_field_is_named(name):
    value, words = WRONG[name]
    broken = document()
    broken["cases"][0][name] = value
    with pytest.raises(ResultError, match=rf"^file: cases\[0\]\.{name} {words}"):
        results.parse(broken, "file")


@pytest.mark.parametrize("name", sorted(row().to_dict()))
def test_no_field_of_a_row_may_be_missing(name):
    broken = document()
    del broken["cases"][0][name]
    with pytest.raises(ResultError, match=rf"cases\[0\]\.{name} is missing; expected "):
        results.parse(broken)


@pytest.mark.parametrize("name", sorted(set(run().to_dict()) - {"kind", "schema"}))
def test_no_field_of_a_run_may_be_missing(name):
    broken = document()
    del broken[name]
    with pytest.raises(ResultError, match=rf"document\.{name} is missing; expected "):
        results.parse(broken)


def test_an_unknown_field_is_refused_with_the_nearest_name():
    broken = document()
    broken["cases"][0]["token"] = 1
    with pytest.raises(ResultError, match=r'cases\[0\]\.token is no field of schema 1\. Did you mean "tokens"\?'):
        results.parse(broken)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"correct": False, "reason": "wrong"}, "time_us must be null where correct is false"),
        ({"correct": None}, "time_us must be null where correct is null"),
        ({"reason": "slow"}, "reason must be null beside a time"),
        ({"time_us": None, "in_graph": None}, "reason must say why"),
        ({"in_graph": None}, "in_graph must be null exactly where time_us is"),
        ({"time_us": Time(10.0, 10.5, 11.0, 3)}, "time_us must have p20 <= median <= p80"),
        ({"time_us": Time(10.0, 9.0, 11.0, 0)}, "rounds must be a whole number of 1 or more"),
        ({"id": "another"}, "id must be <case>-<contender>, 'case-ours_blas'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_contradict_one_another_are_refused(changes, words):
    with pytest.raises(ResultError, match=words):
        results.parse(run(row(**changes)).to_dict())


def test_a_repeated_row_is_refused():
    with pytest.raises(ResultError, match=r"cases\[1\]\.id repeats that of cases\[0\]"):
        results.parse(run(row(), row()).to_dict())


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ResultError, match="error_ratio"):
        results.save(run(row(error_ratio=float("inf"))), tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_json_or_not_there(tmp_path):
    with pytest.raises(ResultError, match=r"none\.json cannot be read: No such file"):
        results.load(tmp_path / "none.json")
    with pytest.raises(ResultError, match="cannot be read: Is a directory"):
        results.load(tmp_path)
    for content in ("{", "\x00", "[" * 200_000):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(ResultError, match=r"broken\.json is no JSON"):
            results.load(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="is no JSON"):
        results.load(tmp_path / "binary.json")


def test_the_rows_of_a_document_are_not_changed_by_reading_it():
    before = document()
    kept = copy.deepcopy(before)
    results.parse(before)
    assert before == kept
