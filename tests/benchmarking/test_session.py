"""A session: every tiny case end to end, stages that fail, deadlines, and kills between any two steps."""

import dataclasses
import time
from collections import Counter

import pytest
import torch

from twn_kernels.benchmarking import environment, measure, results, roofs, session, suites
from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.journal import Journal
from twn_kernels.benchmarking.measure import DeviceBroken, Options, contenders_of, measure_case
from twn_kernels.benchmarking.results import ROUTES

IDENTITY = {"device": "cpu", "commit": "abc"}
OPTIONS = Options(torch.device("cpu"), seconds=0.05, rounds=1, compile_backend="eager")
# Compiling takes seconds, and the interpreter tenths of one, so these two run in one case each, below.
FAST = {
    "group": ("fused_base", "ours_auto", "ours_reference", "plain", "merged", "addmm", "addmm_side_stream",
              "peft", "peft_fp32", "peft_mixed"),
    "model": ("fused_base", "ours_auto", "ours_reference", "plain", "plain_graph", "merged", "addmm", "peft",
              "peft_graph", "peft_fp32", "peft_mixed"),
}  # fmt: skip
FAST |= {"linear": FAST["group"], "layer": FAST["model"]}
MAY_BE_ABSENT = {"addmm_side_stream", "peft_mixed", "peft_fp32", "merged", "addmm"}
CASES = [
    Case("linear", "forward", "tiny", 4, "half", (4, 4), "fp32", site="k"),
    Case("linear", "decode", "tiny", 2, "both", (4, 4), "fp32", site="o"),
]
QUICK = dataclasses.replace(OPTIONS, contenders=("fused_base", "ours_auto"))


@pytest.mark.parametrize("case", suites.cases("tiny"), ids=str)
def test_every_tiny_case_runs_every_contender_to_a_row(case):
    rows = measure_case(case, dataclasses.replace(OPTIONS, contenders=FAST[case.suite]))
    results.parse(run_of(rows).to_dict())
    by_name = {row.contender: row for row in rows}
    assert set(by_name) == {
        c.name for c in contenders_of(case, dataclasses.replace(OPTIONS, contenders=FAST[case.suite]))
    }
    for row in rows:
        assert row.correct is not False, row.reason
        # What is absent is so by its own word, not by an exception that was caught.
        absent = row.contender in MAY_BE_ABSENT and row.time_us is None and "Error" not in row.reason
        assert row.time_us is not None or absent, f"{row.contender}: {row.reason}"
    assert by_name["ours_auto"].overhead_percent is not None
    assert by_name["ours_auto"].memory_added_bytes > 0 and by_name["plain"].memory_added_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", suites.cases("tiny"), ids=str)
def test_every_tiny_case_runs_on_the_gpu_in_graphs_where_they_belong(case):
    options = dataclasses.replace(OPTIONS, device=torch.device("cuda"), rounds=3)
    rows = {row.contender: row for row in measure_case(case, options)}
    for name in ("fused_base", "ours_auto", "ours_blas", "ours_triton", "plain"):
        assert rows[name].correct and rows[name].time_us is not None, rows[name].reason
    graphed = case.pass_ == "decode" or (case.pass_ == "forward" and case.suite in ("linear", "group"))
    assert rows["ours_auto"].in_graph is graphed
    if case.pass_ != "forward_backward":
        assert rows["addmm_side_stream"].correct and rows["addmm_side_stream"].time_us is not None
    if case.pass_ == "decode" and case.suite in ("layer", "model"):
        assert rows["plain"].in_graph is False and rows["plain_graph"].in_graph is True


def run_of(rows):
    return results.Run(environment.now(), "abc", None, "pytest", {}, {}, {}, tuple(rows))


def test_the_compiled_baseline_runs():
    case = Case("linear", "forward", "tiny", 4, "half", (4, 4), "fp32", site="k")
    (row,) = measure_case(case, dataclasses.replace(OPTIONS, contenders=("peft_compiled",)))
    assert row.correct and row.time_us is not None, row.reason


def test_triton_runs_in_the_interpreter_or_on_the_gpu(device):
    case = Case("linear", "forward", "tiny", 4, "half", (4, 4), "fp32", site="k")
    (row,) = measure_case(case, dataclasses.replace(OPTIONS, device=device, contenders=("ours_triton",)))
    assert row.correct and row.impl == "triton" and row.time_us is not None, row.reason


def test_the_tiny_cases_cover_the_routes_in_every_kind_of_suite():
    found = {(case.suite in ("layer", "model"), case.routes) for case in suites.cases("tiny")}
    assert {routes for whole, routes in found if not whole} == set(ROUTES)
    assert len({routes for whole, routes in found if whole}) >= 5


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def session_with(folder, kill_at, *, resume):
    """A session over the cases that is killed when the journal is told of its ``kill_at``-th event."""
    journal = Journal(folder, IDENTITY, resume=resume)
    told = [0]
    append = journal._append

    def counting(entry):
        told[0] += 1
        if told[0] == kill_at:
            raise Killed
        return append(entry)

    journal._append = counting
    try:
        session.run_stage(journal, "roofs", lambda: {"copy_gb_per_s": 1.0, "matmul_tflops": 1.0})
        left = session.measure_cases(CASES, QUICK, journal, time.monotonic() + 600, lambda line: None, lambda: None)
        assert left == []
    finally:
        journal.close()
    return journal, told[0]


def test_a_session_killed_at_any_event_resumes_to_the_same_rows(tmp_path):
    whole, events = session_with(tmp_path / "whole", None, resume=False)
    expected = [row.id for row in whole.all_rows()]
    assert len(expected) == 4 and events > 10
    for kill_at in range(1, events + 1):
        folder = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            session_with(folder, kill_at, resume=False)
        kept = Journal(folder, IDENTITY, resume=True)
        kept.close()
        resumed, _ = session_with(folder, None, resume=True)
        assert [row.id for row in resumed.all_rows()] == expected
        for case, rows in kept.rows.items():
            assert resumed.rows[case] == rows  # not measured again
        assert all(row.time_us is not None for row in resumed.all_rows())
    document = session.document(resumed, command="c", commit="abc", dirty=None)
    assert results.parse(document.to_dict()).roofs == {"copy_gb_per_s": 1.0, "matmul_tflops": 1.0}


def test_no_case_begins_after_the_deadline(tmp_path):
    journal = Journal(tmp_path, IDENTITY, resume=False)
    left = session.measure_cases(CASES, QUICK, journal, time.monotonic() - 1, pytest.fail, lambda: None)
    assert left == CASES and journal.rows == {}


def test_a_contender_that_breaks_the_device_is_left_out_by_the_next_process(tmp_path, monkeypatch):
    def breaks(timer, error):
        raise DeviceBroken(f"illegal memory access ({error})")

    real = measure.contenders_of

    def with_a_breaking_one(case, options):
        def build(problem):
            raise RuntimeError("boom")

        return [dataclasses.replace(c, build=build) if c.name == "ours_auto" else c for c in real(case, options)]

    monkeypatch.setattr(measure, "contenders_of", with_a_breaking_one)
    monkeypatch.setattr(measure, "_check_alive", breaks)
    journal = Journal(tmp_path, IDENTITY, resume=False)
    with pytest.raises(DeviceBroken, match="illegal memory access"):
        session.measure_cases(CASES[:1], QUICK, journal, time.monotonic() + 60, lambda line: None, lambda: None)
    journal.close()
    journal = Journal(tmp_path, IDENTITY, resume=True)
    said = []
    assert session.measure_cases(CASES[:1], QUICK, journal, time.monotonic() + 60, said.append, lambda: None) == []
    base, ours = journal.all_rows()
    assert base.time_us is not None and ours.time_us is None
    assert ours.reason.startswith("It broke the device, so that a new process had to go on: illegal memory access")
    assert len(said) == 1 and "1 of 2 timed" in said[0]


def test_a_case_whose_tensors_do_not_fit_has_rows_that_say_so(tmp_path, monkeypatch):
    def too_large(case, options):
        raise torch.cuda.OutOfMemoryError("tried to allocate 900 GiB")

    monkeypatch.setattr(measure, "_problem", too_large)
    journal = Journal(tmp_path, IDENTITY, resume=False)
    session.measure_cases(CASES[:1], QUICK, journal, time.monotonic() + 60, lambda line: None, lambda: None)
    assert [row.reason for row in journal.all_rows()] == ["The case cannot be set up: tried to allocate 900 GiB"] * 2


def test_an_interrupt_is_noted_in_a_stage_and_in_a_case(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_problem", interrupt)
    for attempt in range(3):
        journal = Journal(tmp_path, IDENTITY, resume=attempt > 0)
        with pytest.raises(KeyboardInterrupt):
            session.run_stage(journal, "doctor", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.measure_cases(CASES[:1], QUICK, journal, time.monotonic() + 60, pytest.fail, lambda: None)
        assert journal.excluded("stage doctor") == journal.excluded(CASES[0].id) == {}
        journal.close()


def test_a_stage_runs_once_and_its_failure_is_recorded(tmp_path):
    calls = Counter()

    def stage():
        calls["stage"] += 1
        raise ValueError("no such tool")

    journal = Journal(tmp_path, IDENTITY, resume=False)
    for _ in range(2):
        assert session.run_stage(journal, "doctor", stage) == {"failed": "ValueError: no such tool"}
    assert calls["stage"] == 1
    journal.close()
    assert Journal(tmp_path, IDENTITY, resume=True).stages["doctor"] == {"failed": "ValueError: no such tool"}


def test_a_wrong_result_is_in_the_line_of_its_case(tmp_path, monkeypatch):
    from twn_kernels.benchmarking.group_contenders import GROUP_CONTENDERS

    base = GROUP_CONTENDERS["fused_base"]
    monkeypatch.setitem(GROUP_CONTENDERS, "ours_auto", dataclasses.replace(base, name="ours_auto", base_only=False))
    journal, said = Journal(tmp_path, IDENTITY, resume=False), []
    session.measure_cases(CASES[:1], QUICK, journal, time.monotonic() + 60, said.append, lambda: None)
    assert "1 of 2 timed" in said[0] and "WRONG: ours_auto" in said[0]


def test_results_are_named_by_device_date_and_commit():
    run = run_of([])
    run = dataclasses.replace(run, created="2026-01-02T03:04:05+00:00", commit="0123456789abcdef", dirty=True)
    named = dataclasses.replace(run, environment={"device": "NVIDIA H100 80GB HBM3 (x)"})
    assert str(session.result_name(named)) == "nvidia-h100-80gb-hbm3-x/2026-01-02-0123456789ab-dirty.json"
    assert str(session.result_name(run)).startswith("unknown/")


def test_roofs_of_a_cpu_have_the_shape_of_a_gpus():
    found = roofs.measure("cpu", seconds=0.1, rounds=2)
    assert found["copy_gb_per_s"] > 0 and found["matmul_tflops"] > 0 and found["launch_gap_us"] > 0
    assert [entry["extra"] for entry in found["pitched_gemm"]] == list(roofs.PITCHES)
    first, second, _ = found["pitched_gemm"]
    assert first["ideal_over_unpitched"] == 1.0 and second["ideal_over_unpitched"] == 2.0
    assert all(entry["time_us"] > 0 and entry["over_unpitched"] > 0 for entry in found["pitched_gemm"])


def test_the_environment_names_device_versions_and_commit(tmp_path):
    found = environment.stamp("cpu")
    assert found["device_type"] == "cpu" and found["device"] == found["cpu_model"]
    assert found["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment.commit_of(tmp_path) == ("unknown", None)
    assert all(version == "absent" or version[0].isdigit() for version in environment.peers().values())
    assert {"vllm", "sglang", "unsloth", "lorafusion", "liger-kernel"} <= set(environment.peers())
