"""Targets: judged by their worst row, on the right device, and never met by what was not measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sample_results import CPU, H200, contest, layer, row, run

from twn_kernels.benchmarking.cases import GROUPS, MODELS, Case
from twn_kernels.benchmarking.counters import adapter_elements, base_elements
from twn_kernels.benchmarking.digest import Source, devices
from twn_kernels.benchmarking.tables import target_rows
from twn_kernels.benchmarking.targets import MET, MISSED, NOT_JUDGED, NOT_MEASURED, judge

QKV = Case("group", "forward", "8B", 4096, "half", site="qkv")
DECODE = Case("group", "decode", "4B", 16, "half", site="qkv")
MODEL = Case("model", "forward", "8B", 4096, "half", layers=2)
STEP = Case("model", "decode", "8B", 16, "half", layers=2, context=512)
TRAINING = Case("group", "forward_backward", "2B", 512, "half", site="o")


def verdicts(*rows, environment=H200) -> dict:
    (device,) = devices([Source(run([entry for entries in rows for entry in entries], environment), "a.json")])
    return {verdict.name: verdict for verdict in judge(device)}


def outcome(verdict) -> tuple:
    return verdict.verdict, verdict.value if verdict.value is None else round(verdict.value, 6), verdict.row


def test_without_results_nothing_is_met_and_every_target_says_what_measures_it():
    judged = judge(None)
    assert {verdict.verdict for verdict in judged} == {NOT_MEASURED}
    assert len({verdict.name for verdict in judged}) == len(judged) == 10
    assert all(verdict.value is None and verdict.command for verdict in judged)


def test_a_cpu_measures_no_target():
    found = verdicts(layer(QKV, fused_base=1000.0, ours_auto=1010.0), environment=CPU)
    assert {verdict.verdict for verdict in found.values()} == {NOT_MEASURED}


@pytest.mark.parametrize(("ours", "verdict"), [(1040.0, MET), (1040.1, MISSED)])
def test_prefill_is_judged_on_the_four_site_groups_together(ours, verdict):
    found = verdicts(layer(QKV, fused_base=1000.0, ours_auto=ours))["prefill-8B"]
    pattern = f"{QKV.id.replace('-qkv-', '-*-')}-ours_auto"
    assert outcome(found) == (verdict, round(ours / 10 - 100, 6), pattern)
    assert found.limit == "<= 4 %"


def test_the_worst_row_decides_and_the_count_shows():
    longer = replace(QKV, tokens=8192)
    whole = Case("layer", "forward", "8B", 2048, "suffix", layers=1)
    rows = [layer(QKV, fused_base=1000.0, ours_auto=1010.0), layer(longer, fused_base=1000.0, ours_auto=1030.0)]
    found = verdicts(*rows, contest(whole, fused_base=100.0, ours_auto=105.0))["prefill-8B"]
    assert outcome(found) == (MISSED, 5.0, f"{whole.id}-ours_auto")
    assert (found.rows_met, found.rows) == (2, 3)


@pytest.mark.parametrize(
    "case",
    [
        replace(QKV, tokens=1024),
        replace(QKV, routes="reasoning"),
        replace(QKV, routes="both"),
        replace(QKV, ranks=(64, 32)),
        replace(QKV, dtype="fp32"),
        replace(QKV, model="2B"),
        replace(DECODE, tokens=64),
    ],
    ids=str,
)
def test_rows_that_a_target_is_not_about_do_not_count(case):
    found = verdicts(layer(case, fused_base=1000.0, ours_auto=2000.0))
    assert all(found[name].verdict == NOT_MEASURED for name in found if name.startswith(("prefill", "decode")))


def test_an_incomplete_layer_does_not_count():
    found = verdicts(*(contest(replace(QKV, site=s), fused_base=1.0, ours_auto=1.01) for s in GROUPS[:3]))
    assert found["prefill-8B"].verdict == NOT_MEASURED


def test_decode():
    found = verdicts(layer(DECODE, fused_base=100.0, ours_auto=111.0))
    assert (found["decode-4B"].verdict, found["decode-8B"].verdict) == (MET, NOT_MEASURED)


def test_base_rows():
    rows = contest(replace(QKV, routes="base"), fused_base=100.0, ours_auto=101.5)
    assert outcome(verdicts(rows)["base-rows"]) == (MISSED, 1.5, rows[1].id)


def test_the_whole_model_against_the_stock_one_without_adapters():
    found = verdicts(
        contest(MODEL, plain=1000.0, ours_auto=999.0), contest(STEP, plain=1000.0, plain_graph=450.0, ours_auto=501.0)
    )
    assert outcome(found["model-prefill"]) == (MET, 0.999, f"{MODEL.id}-ours_auto")
    assert outcome(found["model-decode"]) == (MISSED, 0.501, f"{STEP.id}-ours_auto")


@pytest.mark.parametrize(
    ("ours", "theirs", "value", "verdict"),
    [(110.0, 113.0, 1.3, MET), (110.0, 112.0, 1.2, MISSED), (110.0, 95.0, 0.0, MISSED), (99.0, 98.0, 0.0, MISSED)],
)
def test_less_overhead_than_the_fastest_alternative(ours, theirs, value, verdict):
    rows = contest(QKV, fused_base=100.0, ours_auto=ours, addmm=theirs, peft=500.0, merged=100.0)
    assert outcome(verdicts(rows)["less-overhead"]) == (verdict, value, f"{QKV.id}-ours_auto")


def test_no_overhead_at_all_is_met_and_still_json():
    found = verdicts(contest(QKV, fused_base=100.0, ours_auto=99.0, addmm=120.0))["less-overhead"]
    assert found.verdict == MET
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["value"] is None
    assert "| no overhead of ours |" in "\n".join(target_rows([found]))


def test_training_is_set_against_the_fastest_form_of_peft():
    rows = contest(TRAINING, ours_auto=100.0, peft=200.0, peft_compiled=140.0, addmm=90.0)
    assert outcome(verdicts(rows)["training"]) == (MISSED, 1.4, f"{TRAINING.id}-ours_auto")


@pytest.mark.parametrize(("extra", "verdict"), [(0.009, MET), (0.02, MISSED)])
def test_memory_is_what_is_added_beyond_the_adapters(extra, verdict):
    sites = tuple(MODELS["8B"].group(name) for name in GROUPS)
    adapters = 2 * 2 * 2 * adapter_elements(sites, 64)  # bytes an element, layers, adapters
    base = 2 * 2 * base_elements(sites)
    rows = [row(MODEL, "ours_auto", memory_added_bytes=int(adapters + extra * base))]
    found = verdicts(rows)["memory"]
    assert found.verdict == verdict and found.value == pytest.approx(100 * extra, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "judged"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA H20", False),
    ],
)
def test_another_card_gets_values_without_a_verdict(name, judged):
    found = verdicts(layer(QKV, fused_base=1000.0, ours_auto=1010.0), environment=H200 | {"device": name})["prefill-8B"]
    assert found.value == pytest.approx(1.0) and found.verdict == (MET if judged else NOT_JUDGED)


def test_rounding_does_not_carry_a_value_across_its_limit():
    found = verdicts(layer(QKV, fused_base=1000.0, ours_auto=1040.004))["prefill-8B"]
    assert "| 4.0004 % | missed (0 of 1 rows meet it) |" in "\n".join(target_rows([found]))


def test_decode_is_judged_by_its_own_kernels_where_they_were_timed():
    both = {"fused_base": 100.0, "ours_auto": 150.0, "fused_base_cuda": 50.0, "ours_cuda": 54.0}
    found = verdicts(layer(DECODE, **both))["decode-4B"]
    assert outcome(found) == (MET, 8.0, f"{DECODE.id.replace('-qkv-', '-*-')}-ours_cuda")
    without = verdicts(layer(DECODE, **both | {"fused_base_cuda": None}))["decode-4B"]
    assert outcome(without) == (MISSED, 50.0, f"{DECODE.id.replace('-qkv-', '-*-')}-ours_auto")
    step = replace(STEP, suite="layer", layers=1)
    assert outcome(verdicts(contest(step, **both))["decode-8B"]) == (MET, 8.0, f"{step.id}-ours_cuda")


def test_prefill_is_judged_by_what_a_user_gets():
    rows = layer(QKV, fused_base=100.0, ours_auto=110.0, fused_base_cuda=50.0, ours_cuda=50.0)
    assert outcome(verdicts(rows)["prefill-8B"])[:2] == (MISSED, 10.0)
