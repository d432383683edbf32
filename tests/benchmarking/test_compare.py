"""Two runs, row by row: what is beyond noise, what broke, what is missing, and what cannot be compared at all."""

from __future__ import annotations

import json

import pytest
from sample_results import CPU, contest, row, run, saved

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.comparing import FLOOR, compare_runs, noise_of, render
from twn_kernels.benchmarking.files import load_pair
from twn_kernels.errors import ResultError

CASE = Case("group", "forward", "8B", 4096, "half", site="qkv")
ID = f"{CASE.id}-ours_auto"


def compared(before, after, **options):
    return compare_runs(run([before]), run([after]), **options)


def lists(comparison) -> dict[str, list[str]]:
    """The non-empty lists, by name, as ids."""
    names = ("slower", "broken", "missing", "faster", "repaired", "same", "untimed")
    found = {name: [change.id for change in getattr(comparison, name)] for name in names}
    return {name: ids for name, ids in found.items() if ids}


@pytest.mark.parametrize(
    ("before", "after", "spread", "floor", "where"),
    [
        (100, 102.9, 0.0, 0.03, "same"),
        (100, 103.1, 0.0, 0.03, "slower"),
        (100, 97.2, 0.0, 0.03, "same"),
        (100, 96.9, 0.0, 0.03, "faster"),
        (100, 100.6, 0.0, 0.005, "slower"),
        (100, 100.0, 0.0, 0.0, "same"),
        # p20-p80 of 10 % in both runs: half of each, added, is 10 %, above the floor.
        (100, 109.9, 0.10, 0.03, "same"),
        (100, 110.1, 0.10, 0.03, "slower"),
        (100, 109.9, 0.10, 0.12, "same"),
        (100, 111.9, 0.10, 0.12, "same"),
        (100, 112.1, 0.10, 0.12, "slower"),
    ],
)
def test_noise_comes_from_both_spreads_and_has_a_floor(before, after, spread, floor, where):
    rows = [row(CASE, "ours_auto", median, spread=spread) for median in (before, after)]
    found = compared(*rows, floor=floor)
    assert lists(found) == {where: [ID]}
    assert found.ok == (where != "slower")
    (change,) = getattr(found, where)
    assert change.ratio == after / before and change.noise == pytest.approx(max(floor, spread))


def test_a_spread_in_one_run_alone_counts_too():
    steady, noisy = row(CASE, "ours_auto", 100.0, spread=0.0), row(CASE, "ours_auto", 108.0, spread=0.2)
    assert noise_of(steady, noisy) == pytest.approx(0.1)
    assert noise_of(steady, steady) == FLOOR
    assert lists(compared(steady, noisy)) == {"same": [ID]}


def test_slower_one_way_is_faster_the_other_way():
    rows = [row(CASE, "ours_auto", median, spread=0.0) for median in (100.0, 103.05)]
    assert lists(compared(*rows)) == {"slower": [ID]}
    assert lists(compared(*reversed(rows))) == {"faster": [ID]}


WRONG = {"correct": False, "error_ratio": 7.0, "reason": "7 times the budget"}


@pytest.mark.parametrize(
    ("before", "after", "where", "note"),
    [
        ({}, {"median": None} | WRONG, "broken", "fails the gate now: 7 times the budget"),
        ({}, {"median": None, "reason": "out of memory"}, "broken", "has no time any more: out of memory"),
        ({"median": None}, {"median": None} | WRONG, "broken", "fails the gate now: 7 times the budget"),
        ({"median": None, "correct": True}, {"median": None}, "broken", "has no time any more: it was not installed"),
        ({"median": None} | WRONG, {}, "repaired", "before: 7 times the budget"),
        ({"median": None}, {}, "repaired", "before: it was not installed"),
        ({"median": None} | WRONG, {"median": None, "correct": True}, "repaired", "before: 7 times the budget"),
        ({"median": None} | WRONG, {"median": None} | WRONG, "untimed", "7 times the budget"),
        ({"median": None}, {"median": None}, "untimed", "it was not installed"),
    ],
)
def test_what_breaks_and_what_is_repaired(before, after, where, note):
    found = compared(*(row(CASE, "ours_auto", **fields) for fields in (before, after)))
    assert lists(found) == {where: [ID]}
    assert getattr(found, where)[0].note == note
    assert found.ok == (where != "broken")


def test_rows_of_one_run_alone_fail_and_are_listed():
    first = run(contest(CASE, fused_base=100.0, ours_auto=104.0))
    second = run(contest(CASE, fused_base=100.0, addmm=130.0))
    found = compare_runs(first, second)
    assert not found.ok
    assert [(change.id, change.note) for change in found.missing] == [
        (f"{CASE.id}-ours_auto", "only in the first run"),
        (f"{CASE.id}-addmm", "only in the second run"),
    ]
    assert [(change.before_us, change.after_us) for change in found.missing] == [(104.0, None), (None, 130.0)]


def test_every_row_stands_in_one_list_and_the_worst_comes_first():
    before = run(contest(CASE, fused_base=100.0, ours_auto=100.0, ours_blas=100.0, addmm=100.0, peft=None))
    after = run(contest(CASE, fused_base=100.0, ours_auto=110.0, ours_blas=150.0, addmm=80.0, peft=None))
    found = lists(compare_runs(before, after))
    assert found == {
        "slower": [f"{CASE.id}-ours_blas", ID],
        "faster": [f"{CASE.id}-addmm"],
        "same": [f"{CASE.id}-fused_base"],
        "untimed": [f"{CASE.id}-peft"],
    }


def test_what_is_printed():
    before = run(contest(CASE, fused_base=100.0, ours_auto=100.0, addmm=100.0))
    after = run(contest(CASE, fused_base=100.0, ours_auto=110.0, addmm=120.0))
    text = render(compare_runs(before, after))
    assert f"{ID}: 100 us -> 110 us, +10.0 %, noise 3.0 %\n" in text
    assert f"{CASE.id}-addmm: 100 us -> 120 us, +20.0 %, noise 3.0 % (not this package: a baseline moved)\n" in text
    assert text.endswith("1 within noise (up to 3.0 %), 0 without a time in both: not ok: 2 slower")
    assert render(compare_runs(before, before)).endswith("no regression")


def test_other_libraries_and_a_lost_graph_are_told():
    rows = [row(CASE, "ours_auto"), row(CASE, "ours_auto", 150.0, in_graph=False)]
    stamps = [{"device": "X", "device_type": "cuda", "libraries": {"torch": v}} for v in ("2.10.0", "2.13.0")]
    found = compare_runs(run(rows[:1], stamps[0]), run(rows[1:], stamps[1]))
    assert found.differences == ("libraries.torch: 2.10.0, then 2.13.0",)
    assert found.slower[0].note.endswith("in a CUDA graph before and not now")


def test_different_devices_are_refused_with_both_named():
    rows = [row(CASE, "ours_auto")]
    with pytest.raises(ResultError, match='different devices, "NVIDIA H200" and "Some CPU @ 2 GHz"'):
        compare_runs(run(rows), run(rows, CPU))
    with pytest.raises(ResultError, match="environment.device of the run must be a non-empty string, got None"):
        compare_runs(run(rows), run(rows, {}))


def test_an_empty_run_and_an_id_with_two_meanings_are_refused():
    rows = [row(CASE, "ours_auto")]
    with pytest.raises(ResultError, match=r"the second run \(2026-.*\) holds no rows"):
        compare_runs(run(rows), run([]))
    with pytest.raises(ResultError, match="two problems: its tokens is 4096 in the first run and 64 in the second"):
        compare_runs(run(rows), run([row(CASE, "ours_auto", tokens=64)]))


def test_different_schemas_are_refused_with_both_named(tmp_path):
    first = saved(run([row(CASE, "ours_auto")]), tmp_path / "first.json")
    document = json.loads(first.read_text())
    second = tmp_path / "second.json"
    second.write_text(json.dumps(document | {"schema": 7}))
    with pytest.raises(ResultError, match=r"first.json has schema 1 and .*second.json has schema 7"):
        load_pair(first, second)
    with pytest.raises(ResultError, match="second.json has schema 7; this version reads schema 1"):
        load_pair(second, second)


def test_a_folder_with_one_result_is_that_result(tmp_path):
    file = saved(run([row(CASE, "ours_auto")]), tmp_path / "run" / "a.json")
    (tmp_path / "run" / "other.json").write_text("{}")
    assert [source.name for source in load_pair(tmp_path / "run", file)] == [str(file), str(file)]
    saved(run([row(CASE, "ours_auto")]), tmp_path / "run" / "b.json")
    with pytest.raises(ResultError, match=r'run" holds 2 results \(a.json, b.json, ...\); name one of them'):
        load_pair(tmp_path / "run", file)
