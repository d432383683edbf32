"""Every row of the shipped table is shown by the file it names; made-up files show that the check can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sample_results import CPU, H200, contest, row, run, saved

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.choice_proof import objections
from twn_kernels.benchmarking.choosing import choose
from twn_kernels.benchmarking.digest import Source
from twn_kernels.ops import choice_table

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "bench/results/nvidia-h200/made-up.json"


def case(tokens: int, routes: str = "half", suite: str = "group", site: str = "qkv", **fields) -> Case:
    return Case(suite, fields.pop("pass_", "forward"), "8B", tokens, routes, site=site, **fields)


RESULTS = [
    *contest(case(16), ours_blas=10.0, ours_triton=9.0, peft=8.0),
    *contest(case(16, "both"), ours_blas=12.0, ours_triton=9.5, fused_base=1.0),
    *contest(case(16, "base"), ours_blas=7.0, ours_triton=7.5),
    *contest(case(64), ours_blas=20.0, ours_triton=18.0),
    *contest(case(256), ours_blas=30.0, ours_triton=33.0),
    *contest(case(64, site="o"), ours_blas=1.0, ours_triton=2.0),
    *contest(case(64, pass_="forward_backward"), ours_blas=1.0, ours_triton=2.0),
    *contest(case(32, suite="linear", site="q"), ours_blas=5.0, ours_triton=4.0),
]
CASES = (case(16).id, case(16, "both").id, case(64).id)
MEASURED = {
    CASES[0]: {"blas": 10.0, "triton": 9.0},
    CASES[1]: {"blas": 12.0, "triton": 9.5},
    CASES[2]: {"blas": 20.0, "triton": 18.0},
}
GOOD = choice_table.Row("sm_90", "bf16", "qkv", 16, 255, "triton", SOURCE, CASES, MEASURED)


def against(row: choice_table.Row, root: Path, results=RESULTS, **fields) -> list[str]:
    saved(run(list(results), **fields), root / SOURCE)
    return objections(row, root)


def test_the_shipped_table_is_shown_by_committed_results():
    for index, shipped in enumerate(choice_table.packaged()):
        assert objections(shipped, ROOT) == [], f"rows[{index}] of {choice_table.PATH}"


def test_a_row_that_its_source_shows(tmp_path):
    assert against(GOOD, tmp_path) == []
    linear = case(32, suite="linear", site="q").id
    measured = {linear: {"blas": 5.0, "triton": 4.0}}
    assert (
        against(
            replace(GOOD, site="linear", min_tokens=32, max_tokens=32, cases=(linear,), measured=measured), tmp_path
        )
        == []
    )


def test_derived_rows_are_shown_by_what_they_were_derived_from(tmp_path):
    source = run(list(RESULTS))
    saved(source, tmp_path / SOURCE)
    rows = choose([Source(source, str(tmp_path / SOURCE))]).rows
    assert GOOD in rows and len(rows) == 4
    assert [objections(derived, tmp_path) for derived in rows] == [[]] * 4


def without(name: str) -> dict:
    return {case: medians for case, medians in MEASURED.items() if case != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_tokens": 15}, "min_tokens 15 is no token count that was measured."),
        ({"min_tokens": 17}, "min_tokens 17 is no token count that was measured."),
        ({"arch": "sm_100"}, "was measured on sm_90, not on sm_100."),
        ({"dtype": "fp16"}, "has no such case of qkv in fp16 in the range"),
        ({"site": "o"}, "has no such case of o in bf16 in the range: "),
        ({"max_tokens": 256}, f"has more cases in the range than are listed: {case(256).id}."),
        ({"max_tokens": 9999}, "max_tokens 9999 lies beyond the largest token count measured, 256."),
        (
            {"cases": (CASES[0], CASES[2]), "measured": without(CASES[1])},
            f"has more cases in the range than are listed: {CASES[1]}.",
        ),
        ({"impl": "blas"}, f"triton took 9.0 us in {CASES[0]}, blas 10.0 us."),
        ({"impl": "cuda"}, f"cuda was not right, or has no time, in {CASES[0]}."),
        (
            {"measured": MEASURED | {CASES[0]: {"blas": 10.0, "triton": 8.0}}},
            f"measured says {{'blas': 10.0, 'triton': 8.0}} for {CASES[0]}, the file {{'blas': 10.0, 'triton': 9.0}}.",
        ),
        ({"source": "bench/results/nvidia-h200/none.json"}, "none.json cannot be read"),
    ],
)
def test_a_row_that_its_source_does_not_show(change, message, tmp_path):
    found = against(replace(GOOD, **change), tmp_path)
    assert any(message in sentence for sentence in found), found


def test_a_result_that_was_wrong_proves_nothing(tmp_path):
    wrong = [entry for entry in RESULTS if (entry.case, entry.contender) != (CASES[0], "ours_triton")]
    wrong.append(row(case(16), "ours_triton", None, correct=False, reason="beyond the oracle"))
    assert f"triton was not right, or has no time, in {CASES[0]}." in against(GOOD, tmp_path, wrong)


@pytest.mark.parametrize(
    ("environment", "message"),
    [(CPU, "was measured on a CPU, not on sm_90."), (H200 | {"gpu": {"capability": "8.0"}}, "was measured on sm_80")],
)
def test_results_of_another_device_prove_nothing(environment, message, tmp_path):
    (found,) = against(GOOD, tmp_path, environment=environment)
    assert message in found
