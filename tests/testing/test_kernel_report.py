"""The static report's table, its baseline file, and what counts as a regression."""

from __future__ import annotations

import dataclasses
import json

import pytest

from twn_kernels.errors import TableError
from twn_kernels.impl.triton.variants import variants
from twn_kernels.testing import kernel_report
from twn_kernels.testing.aot import AotReport
from twn_kernels.testing.kernel_work import Count, Work

REPORT = AotReport(
    kernel="gemm_kernel",
    variant="gemm-forward",
    arch=90,
    registers=200,
    spill_bytes=0,
    shared_bytes=196608,
    shared_limit_bytes=232448,
    tensor_core=("HGMMA",),
    bulk_copy=("UTMALDG", "UTMASTG"),
    local_accesses=0,
    instructions=1000,
    num_warps=8,
)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_is_counted_and_never_does_less_than_the_ideal(arch):
    for variant in variants(arch):
        work = kernel_report.counted(variant, arch)
        assert work is not None, f"kernel_report counts nothing for {variant.name}"
        assert work.count.done.bytes >= work.count.ideal.bytes > 0, variant.name
        assert work.count.done.flops >= work.count.ideal.flops, variant.name


def test_the_shape_follows_the_tile():
    named = {variant.name: kernel_report.counted(variant, 90) for variant in variants(90)}
    decode = named["gemm-forward-bf16-bf16-16x32x128-4w-all_aligned"]
    assert decode.shape == "8B o (4096 -> 4096), 16 tokens, half and half, ranks 64+64"
    # 128 tiles of 32 columns read x once each and the weight once together; s and both B as well.
    x, w, y = 2 * 128 * 16 * 4096, 2 * 4096 * 4096, 2 * 16 * 4096
    assert decode.count.done.bytes == x + w + y + 128 * 16 + 2 * 2 * 64 * (128 * 16 + 4096) + 2 * 4096
    assert "64 tokens" in named["gemm-forward-bf16-bf16-64x64x64-8w-all_aligned"].shape
    assert "4096 tokens" in named["gemm-forward-bf16-bf16-128x256x64-8w-all_aligned"].shape
    assert "base only" in named["gemm-base-fp16-fp16-128x256x64-8w-all_aligned"].shape


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"registers": 255, "tensor_core": ("HGMMA", "HMMA")}, []),
        ({"spill_bytes": 8}, ["spills 8 bytes a thread, recorded 0"]),
        ({"tensor_core": ("HMMA",)}, ["lost its tensor-core instructions HGMMA (left: HMMA)"]),
        ({"tensor_core": ()}, ["lost its tensor-core instructions HGMMA (left: none)"]),
        ({"bulk_copy": ("UTMASTG",)}, ["lost its bulk-copy instructions UTMALDG (left: UTMASTG)"]),
    ],
)
def test_a_regression_is_a_spill_or_an_instruction_that_is_gone(change, expected, tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text(kernel_report.baseline_text([REPORT], "3.6.0"))
    version, recorded = kernel_report.read_baseline(path)
    assert version == "3.6.0"
    assert kernel_report.regressions(dataclasses.replace(REPORT, **change), recorded["sm_90 gemm-forward"]) == expected


def test_more_registers_are_shown():
    recorded = json.loads(kernel_report.baseline_text([REPORT], "3.6.0"))["kernels"]["sm_90 gemm-forward"]
    assert kernel_report.growth(REPORT, recorded) is None
    grown = dataclasses.replace(REPORT, registers=210)
    assert kernel_report.growth(grown, recorded) == "sm_90 gemm-forward: 200 -> 210 registers a thread"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "none.json: the baseline cannot be read: FileNotFoundError"),
        ("{", "the baseline cannot be read: JSONDecodeError"),
        ("[]", "the baseline cannot be read: TypeError"),
        ('{"format": 1, "triton": "3.6.0"}', "the baseline cannot be read: KeyError: 'kernels'"),
        ('{"format": 2, "triton": "3.6.0", "kernels": {}}', "format must be 1, got 2. Write it anew with --baseline"),
        ('{"format": 1, "triton": "3.6.0", "kernels": {"sm_90 a": {}}}', "sm_90 a must have registers, spill_bytes"),
    ],
)
def test_a_damaged_baseline_is_named(text, message, tmp_path):
    path = tmp_path / "none.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TableError, match=message):
        kernel_report.read_baseline(path)


def test_the_table_groups_by_shape_and_shows_ratios():
    work = kernel_report.Counted("8B o", Count(Work(300, 40), Work(200, 0)))
    other = dataclasses.replace(REPORT, variant="reduce", tensor_core=(), bulk_copy=())
    lines = kernel_report.table([(REPORT, work), (other, None), (REPORT, work)]).splitlines()
    assert lines[1].split() == "variant registers spills shared KiB tensor cores bulk copies bytes operations".split()
    assert lines[3] == "sm_90, 8B o" and lines[4] == lines[5] and lines[7] == "sm_90, not counted"
    assert lines[4].split() == "gemm-forward 200 0 192 of 227 HGMMA UTMALDG UTMASTG 1.50x -".split()
    assert lines[8].split() == "reduce 200 0 192 of 227 - - - -".split()
