"""The MLP as one case: it stands for its two groups where a layer is added up, and chooses no implementation."""

from dataclasses import replace

import pytest
from sample_results import contest, layer, run

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.choosing import choose
from twn_kernels.benchmarking.digest import Source, devices

QKV = Case("group", "forward", "8B", 4096, "half", site="qkv")
MLP = replace(QKV, site="mlp")


def layer_sum(*rows):
    entries = [entry for part in rows for entry in part]
    (device,) = devices([Source(run(entries), "bench/results/nvidia-h200/a.json")])
    (found,) = device.sums
    return found


def test_a_layer_is_qkv_o_and_the_mlp_where_that_was_measured():
    groups = layer(QKV, fused_base=400.0, ours_auto=440.0)
    assert layer_sum(groups).medians == {"fused_base": 400.0, "ours_auto": 440.0}
    found = layer_sum(groups, contest(MLP, fused_base=200.0, ours_auto=190.0))
    assert found.medians == {"fused_base": 400.0, "ours_auto": 410.0}
    assert found.overhead("ours_auto") == pytest.approx(2.5)
    assert [contest.case.site for contest in found.contests] == ["qkv", "o", "gate_up", "down"]


def test_a_contender_without_a_time_in_the_mlp_is_not_added_up():
    groups = layer(QKV, fused_base=400.0, ours_auto=440.0, peft=800.0)
    found = layer_sum(groups, contest(MLP, fused_base=200.0, ours_auto=190.0, peft=None))
    assert set(found.medians) == {"fused_base", "ours_auto"}


def test_the_mlp_gives_the_choice_table_no_row():
    rows = contest(MLP, ours_blas=10.0, ours_triton=9.0)
    found = choose([Source(run(rows), "bench/results/nvidia-h200/a.json")])
    assert found.rows == () and found.undecided == ()
