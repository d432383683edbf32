"""Charts hold the measured points and nothing else, and what is drawn is the chart."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from sample_results import CPU, contest, layer, run

from twn_kernels.benchmarking import charts, plots, report
from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.digest import Source, devices
from twn_kernels.errors import MissingDependency

PREFILL = Case("group", "forward", "8B", 2048, "half", site="qkv")
DECODE = Case("group", "decode", "8B", 4, "half", site="qkv")
LAYER = Case("layer", "forward", "8B", 4096, "half", layers=1)


def rows() -> list:
    found = layer(PREFILL, fused_base=1000.0, ours_auto=1020.0, addmm=1100.0, peft=1500.0)
    found += layer(replace(PREFILL, tokens=4096), fused_base=2000.0, ours_auto=2100.0, addmm=2100.0)
    for tokens in (512, 1024, 8192):  # more than of the routes that the targets are about, and yet not the ones shown
        found += layer(replace(PREFILL, routes="both", tokens=tokens), fused_base=1.0, ours_auto=9.0)
    found += layer(DECODE, fused_base=100.0, ours_auto=90.0)
    return found + contest(LAYER, fused_base=2500.0, ours_auto=2700.0, addmm=1999.0)


def drawn(**fields) -> dict:
    (device,) = devices([Source(run(rows(), **fields), "a.json")])
    return {chart.name: chart for chart in charts.charts(device)}


def points(chart) -> dict[str, list[tuple[float, float]]]:
    return {
        series.name: [tuple(map(float, p)) for p in zip(series.x, series.y, strict=True)] for series in chart.series
    }


def near(expected: list[tuple[float, float]]):
    return [pytest.approx(point) for point in expected]


def test_every_chart_is_there():
    names = {"roofline", "overhead-prefill-8B", "overhead-decode-8B", "layer-time-prefill", "layer-time-decode"}
    assert set(drawn()) == names


def test_overhead_against_tokens():
    found = points(drawn()["overhead-prefill-8B"])
    assert set(found) == {"ours_auto", "addmm", "peft"}
    assert found["ours_auto"] == near([(2048, 2.0), (4096, 5.0)])
    assert found["addmm"] == near([(2048, 10.0), (4096, 5.0)])
    assert found["peft"] == near([(2048, 50.0)])
    assert points(drawn()["overhead-decode-8B"]) == {"ours_auto": near([(4, -10.0)])}


def test_the_roofline_has_each_case_and_the_measured_roofs():
    chart = drawn()["roofline"]
    found = points(chart)
    # 8e9 operations and 4e6 bytes: 2000 operations a byte; 8e9 in 2700 us are 2.963 TFLOP/s.
    assert found["layer, ours_auto"] == near([(2000, 8e9 / 2700e-6 / 1e12)])
    assert len(found["group, ours_auto"]) == 24
    (roof,) = [series for series in chart.series if series.is_limit]
    assert roof.name == "measured roofs: 4000 GB/s, 800 TFLOP/s"
    # The ridge lies at 800e12 / 4000e9 operations a byte, and half as many reach half the rate.
    assert list(zip(roof.x, roof.y, strict=True)) == near([(100, 400), (200, 800), (2000, 800)])


def test_without_measured_roofs_none_is_drawn():
    assert not any(series.is_limit for series in drawn(roofs={})["roofline"].series)


def test_where_a_layers_time_goes():
    chart = drawn()["layer-time-prefill"]
    parts = dict(chart.parts)
    assert chart.bars == (
        "8B, T=4096, fused_base",
        "8B, T=4096, ours_auto",
        "8B, T=4096, addmm, linears alone",  # its layer took less than its cold site groups together
    )
    assert parts["qkv"] == parts["down"] == (500.0, 525.0, 525.0)
    assert parts["attention and the rest"] == (500.0, 600.0, 0.0)
    decode = drawn()["layer-time-decode"]
    assert decode.bars == ("8B, T=4, fused_base, linears alone", "8B, T=4, ours_auto, linears alone")
    assert "attention and the rest" not in dict(decode.parts)


def test_what_matplotlib_is_given():
    pytest.importorskip("matplotlib")
    for chart in drawn().values():
        (axes,) = plots.figure(chart).axes
        if isinstance(chart, charts.Bars):
            widths = [patch.get_width() for patch in axes.patches]
            assert widths == pytest.approx([value for _, values in chart.parts for value in values])
            assert [label.get_text() for label in axes.get_yticklabels()] == list(chart.bars)
            continue
        lines = {line.get_label(): line for line in axes.get_lines()}
        for series in chart.series:
            assert tuple(lines[series.name].get_xdata()) == series.x
            assert tuple(lines[series.name].get_ydata()) == series.y


def test_plots_are_written_and_the_same_results_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    cpu = contest(LAYER, fused_base=2500.0, ours_auto=2700.0)
    sources = [Source(run(layer(PREFILL, fused_base=1.0, ours_auto=1.5)), "a.json"), Source(run(cpu, CPU), "b.json")]
    first = report.write_report(sources, tmp_path / "first")
    second = report.write_report(sources[::-1], tmp_path / "second")
    assert len(first) == 5 and all(path.stat().st_size > 500 for path in first)
    assert {path.name: path.read_bytes() for path in first} == {path.name: path.read_bytes() for path in second}
    text = first[0].read_text()
    assert all(f"]({path.name})" in text for path in first[1:])
    assert "ours_auto" in (tmp_path / "first" / "overhead-prefill-8B-nvidia-h200.svg").read_text()


def test_without_matplotlib_nothing_is_written_and_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r'plots need matplotlib.*pip install "twn_kernels\[bench\]"'):
        report.write_report([Source(run(rows()), "a.json")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
