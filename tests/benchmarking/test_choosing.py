"""From results to the table of choices: one winner in every case, ranges that end before what is not known."""

from __future__ import annotations

import json

import pytest
from sample_results import CPU, H200, contest, row, run

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.choosing import choose
from twn_kernels.benchmarking.digest import Source
from twn_kernels.errors import ResultError
from twn_kernels.ops import choice_table

FILE = "bench/results/nvidia-h200/a.json"


def case(tokens: int, routes: str = "half", suite: str = "group", site: str = "qkv", **fields) -> Case:
    return Case(suite, fields.pop("pass_", "forward"), "8B", tokens, routes, site=site, **fields)


def chosen(*rows, name=FILE, **fields):
    found = choose([Source(run([entry for entries in rows for entry in entries], **fields), name)])
    parsed = choice_table.parse(json.dumps(found.table()), "derived")
    assert parsed == found.rows
    return found


def ranges(found) -> list[tuple]:
    return [(row.dtype, row.site, row.min_tokens, row.max_tokens, row.impl) for row in found.rows]


def test_winners_become_ranges_that_end_before_the_next_count_measured():
    found = chosen(
        *(contest(case(t), ours_blas=10.0, ours_triton=9.0) for t in (16, 64, 256)),
        contest(case(1024), ours_blas=10.0, ours_triton=11.0),
        contest(case(4096), ours_blas=10.0, ours_triton=9.5),
    )
    assert ranges(found) == [
        ("bf16", "qkv", 16, 1023, "triton"),
        ("bf16", "qkv", 1024, 4095, "blas"),
        ("bf16", "qkv", 4096, 4096, "triton"),
    ]
    first = found.rows[0]
    assert (first.arch, first.source) == ("sm_90", FILE)
    assert first.cases == tuple(case(t).id for t in (16, 64, 256))
    assert first.measured[case(16).id] == {"blas": 10.0, "triton": 9.0}
    assert found.undecided == ()


def test_one_case_that_another_wins_leaves_its_token_count_undecided():
    found = chosen(
        contest(case(16), ours_blas=10.0, ours_triton=9.0),
        contest(case(64), ours_blas=10.0, ours_triton=9.0),
        contest(case(64, "both"), ours_blas=10.0, ours_triton=10.1),
    )
    assert ranges(found) == [("bf16", "qkv", 16, 63, "triton")]
    (entry,) = found.undecided
    assert (entry.arch, entry.dtype, entry.site, entry.tokens) == ("sm_90", "bf16", "qkv", 64)
    assert entry.why == f"no single winner: blas in {case(64, 'both').id}, triton in {case(64).id}"


def test_a_wrong_or_untimed_implementation_never_wins():
    wrong = row(case(16), "ours_triton", None, correct=False, reason="wrong")
    found = chosen([row(case(16), "ours_blas", 10.0), wrong])
    assert ranges(found) == [("bf16", "qkv", 16, 16, "blas")]
    found = chosen([row(case(16), "ours_blas", None), row(case(16), "ours_triton", 1.0)])
    assert found.rows == () and found.undecided[0].why == f"blas has no time in {case(16).id}"


def test_equal_times_leave_the_default():
    assert ranges(chosen(contest(case(8), ours_blas=5.0, ours_triton=5.0)))[0][-1] == "blas"


def test_sites_dtypes_and_single_linears_are_apart():
    found = chosen(
        contest(case(8, site="down"), ours_blas=2.0, ours_triton=1.0),
        contest(case(8, dtype="fp16"), ours_blas=2.0, ours_triton=1.0),
        contest(case(8, suite="linear", site="v"), ours_blas=2.0, ours_triton=1.0),
        contest(case(8, suite="linear", site="gate"), ours_blas=2.0, ours_triton=1.0),
    )
    assert ranges(found) == [
        ("bf16", "down", 8, 8, "triton"),
        ("bf16", "linear", 8, 8, "triton"),
        ("fp16", "qkv", 8, 8, "triton"),
    ]
    assert len(found.rows[1].cases) == 2


def test_baselines_base_rows_and_backward_passes_choose_nothing():
    found = chosen(
        contest(case(8, pass_="forward_backward"), ours_blas=2.0, ours_triton=1.0),
        contest(Case("layer", "forward", "8B", 64, "half", layers=1), ours_blas=2.0, ours_triton=1.0),
        contest(case(8, "base"), ours_blas=2.0, ours_triton=1.0),
        contest(case(16), ours_auto=0.5, ours_blas=2.0, addmm=0.1),
    )
    assert ranges(found) == [("bf16", "qkv", 16, 16, "blas")]
    assert found.rows[0].measured == {case(16).id: {"blas": 2.0}}


def test_the_newest_file_speaks_for_a_site_alone():
    old = Source(run(contest(case(8), ours_blas=2.0, ours_triton=1.0), created="2026-01-01"), FILE)
    new_rows = contest(case(16), ours_blas=1.0, ours_triton=2.0)
    new = Source(run(new_rows, created="2026-02-01"), FILE.replace("a.json", "b.json"))
    for order in ([old, new], [new, old]):
        found = choose(order)
        assert ranges(found) == [("bf16", "qkv", 16, 16, "blas")]
        assert found.rows[0].source.endswith("b.json")


@pytest.mark.parametrize(
    ("environment", "name", "message"),
    [
        (CPU, FILE, "was measured on a CPU; choices follow results of a GPU alone"),
        (H200 | {"gpu": {"capability": "7.0"}}, FILE, '"sm_70" is no architecture that the choice table knows'),
        (H200 | {"gpu": {}}, FILE, "environment.gpu.capability of the run must be a non-empty string, got None"),
        (H200, "a.json", "a.json must lie in bench/results/<device>/"),
    ],
)
def test_what_no_row_can_come_from_is_refused(environment, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResultError, match=message):
        choose([Source(run(contest(case(8), ours_blas=1.0), environment), name)])
