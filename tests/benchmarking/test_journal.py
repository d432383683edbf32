"""The journal: whatever moment a run is killed at, what was finished stays, and what was not is done again."""

import json
import os

import pytest
from benchmarking_rows import row

from twn_kernels.benchmarking.journal import Journal
from twn_kernels.errors import ResultError

IDENTITY = {"device": "a GPU", "commit": "abc", "dirty": False}


def written(folder) -> Journal:
    """A finished run of two cases."""
    journal = Journal(folder, IDENTITY, resume=False)
    journal.begin("stage roofs", "")
    journal.stage("roofs", {"copy_gb_per_s": 1.5})
    for number in (1, 2):
        case = f"case{number}"
        journal.begin(case, "ours_blas")
        journal.begin(case, "")
        journal.case(case, [row(id=f"{case}-ours_blas", case=case)])
    journal.close()
    return journal


def test_a_resumed_journal_has_what_was_written(tmp_path):
    before = written(tmp_path)
    after = Journal(tmp_path, IDENTITY, resume=True)
    assert after.rows == before.rows and after.stages == before.stages == {"roofs": {"copy_gb_per_s": 1.5}}
    assert [r.id for r in after.all_rows()] == ["case1-ours_blas", "case2-ours_blas"]
    assert after.excluded("case1") == {}


def test_a_kill_at_any_byte_loses_at_most_what_was_running(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of them; the disk is not what is tested
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    kept = set()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    lengths = {*range(0, len(whole), 11), *(end + near for end in ends for near in (-1, 0, 1))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        journal = Journal(tmp_path, IDENTITY, resume=True)
        finished = [json.loads(line) for line in whole.splitlines()[:lines]]
        assert list(journal.rows) == [entry["case"] for entry in finished if entry["event"] == "case"]
        assert ("roofs" in journal.stages) == any(entry["event"] == "stage" for entry in finished)
        # What the resumed run appends starts on a line of its own.
        journal.case("case3", [row(id="case3-ours_blas", case="case3")])
        journal.close()
        assert all(json.loads(line) for line in path.read_text().splitlines())
        kept.add(len(journal.rows))
    assert kept == {1, 2, 3}


def test_a_step_that_ended_the_process_twice_is_left_out(tmp_path):
    for attempt in range(3):
        journal = Journal(tmp_path, IDENTITY, resume=attempt > 0)
        expected = {"ours_triton": "The process ended 2 times while it ran."} if attempt == 2 else {}
        assert journal.excluded("case1") == expected
        journal.begin("case1", "ours_blas")
        journal.begin("case1", "ours_triton")
        journal.close()  # as a kill would
    assert journal.excluded("case2") == {}


def test_what_the_user_interrupted_is_not_blamed(tmp_path):
    for attempt in range(4):
        journal = Journal(tmp_path, IDENTITY, resume=attempt > 0)
        journal.begin("case1", "ours_blas")
        journal.interrupted()
        journal.close()
    assert Journal(tmp_path, IDENTITY, resume=True).excluded("case1") == {}


def test_what_ended_well_in_between_is_not_blamed(tmp_path):
    for attempt in range(4):
        journal = Journal(tmp_path, IDENTITY, resume=attempt > 0)
        journal.begin("case1", "ours_blas")
        journal.case("case1", [])
        journal.close()
    assert Journal(tmp_path, IDENTITY, resume=True).excluded("case1") == {}


def test_what_broke_the_device_is_left_out_at_once(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    journal.begin("case1", "ours_triton")
    journal.breaks("case1", "ours_triton", "illegal memory access")
    journal.close()
    again = Journal(tmp_path, IDENTITY, resume=True)
    assert again.excluded("case1") == {
        "ours_triton": "It broke the device, so that a new process had to go on: illegal memory access"
    }


def test_a_run_is_not_overwritten_without_being_asked(tmp_path):
    written(tmp_path)
    with pytest.raises(ResultError, match=r"holds a run already\. Continue it with --resume, or name another folder"):
        Journal(tmp_path, IDENTITY, resume=False)


def test_resuming_where_nothing_is_starts(tmp_path):
    assert Journal(tmp_path / "new" / "run", IDENTITY, resume=True).rows == {}


@pytest.mark.parametrize("name, value", [("device", "another GPU"), ("commit", "def"), ("dirty", True)])
def test_another_run_is_not_continued(tmp_path, name, value):
    written(tmp_path)
    with pytest.raises(ResultError, match=rf"line 1: the run has {name} .*, and now it is {value!r}"):
        Journal(tmp_path, IDENTITY | {name: value}, resume=True)


@pytest.mark.parametrize(
    "line, words",
    [
        ("no json", "line 2 is no JSON; only a last line can be cut by a kill"),
        ("[]", "line 2 holds no event of a run, got None"),
        ('{"event": "dance"}', "line 2 holds no event of a run, got 'dance'"),
        ('{"event": "case", "rows": []}', "line 2: the event 'case' has no 'case'"),
        ('{"event": "case", "case": "c", "rows": [{}]}', r"line 2: rows\.id is missing"),
        ('{"event": "start", "schema": 99}', "line 2 has schema 99; this version writes schema 1"),
    ],
)
def test_a_damaged_journal_is_refused_with_the_line(tmp_path, line, words):
    written(tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + line + "\n" + "".join(lines[1:]))
    with pytest.raises(ResultError, match=words):
        Journal(tmp_path, IDENTITY, resume=True)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot hold a run: "):
        Journal(tmp_path / "file", IDENTITY, resume=False)
