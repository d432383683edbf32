"""The report: what it selects, what it says about losing and about nothing, and that it invents no number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sample_results import CPU, contest, layer, row, run, saved

from twn_kernels.benchmarking import report
from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.digest import Source, devices
from twn_kernels.benchmarking.files import find
from twn_kernels.benchmarking.tables import microseconds
from twn_kernels.errors import OptionError, ResultError

ROOT = Path(__file__).resolve().parents[2]
QKV = Case("group", "forward", "8B", 4096, "half", site="qkv")
MODEL = Case("model", "forward", "8B", 4096, "half", layers=36)


def source(*rows, name="bench/results/h200/a.json", **fields) -> Source:
    return Source(run([entry for entries in rows for entry in entries], **fields), name)


def table_rows(text: str, *, having: str) -> list[dict[str, str]]:
    """The rows of every table with a column ``having``, by column."""
    found, head = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
        elif having in head and not set("".join(cells)) <= {"-"}:
            found.append(dict(zip(head, cells, strict=True)))
    return found


def test_a_row_holds_both_times_the_device_the_commit_and_the_command():
    text = report.readme_section([source(contest(MODEL, fused_base=100.0, ours_auto=105.0, addmm=131.25, plain=98.0))])
    (line,) = table_rows(text, having="case")
    assert line == {
        "case": f"`{MODEL.id}`",
        "ours, us (p20-p80)": "105.0 (104.0-106.0)",
        "fastest alternative": "addmm",
        "its us": "131.2",
        "ours / it": "0.80",
        "ours over fused base": "+5.0 %",
        "it over fused base": "+31.2 %",
        "plain us": "98.00",
        "merged us": "-",
        "% of roof": "-",
        "commit": "0123456789",
        "command": f"`python -m bench.gpu --only {MODEL.id}`",
    }
    assert "### NVIDIA H200" in text and "`bench/results/h200/a.json`" in text


def test_bounds_are_shown_but_do_not_compete():
    rows = contest(MODEL, fused_base=100.0, ours_auto=105.0, merged=90.0, plain=80.0, plain_graph=70.0, peft=300.0)
    (line,) = table_rows(report.readme_section([source(rows)]), having="case")
    assert (line["fastest alternative"], line["ours / it"]) == ("peft", "0.35")
    assert (line["merged us"], line["plain us"]) == ("90.00", "80.00; graph 70.00")


@pytest.mark.parametrize("medians", [{"ours_auto": 131.3}, {"ours_auto": None}], ids=["slower", "no time"])
@pytest.mark.parametrize("case", [QKV, Case("linear", "decode", "2B", 7, "both", (96, 16), site="v")], ids=str)
def test_a_case_that_we_lose_keeps_its_row(case, medians):
    winning = Case("group", "forward", "8B", 2048, "half", site="qkv")
    text = report.readme_section(
        [source(contest(case, addmm=131.25, **medians), contest(winning, addmm=200.0, ours_auto=100.0))]
    )
    (line,) = table_rows(text, having="case")
    assert line["case"] == f"`{case.id}`"
    if medians["ours_auto"]:
        assert line["ours / it"] == "1.0004 **slower**"
    else:
        assert line["ours, us (p20-p80)"] == "no time: it was not installed"
    assert "Not shown here: 1 case in which it does not lose" in text


def test_what_the_readme_shows_does_not_depend_on_who_wins():
    other = Case("layer", "forward", "8B", 4096, "half", (16, 16), layers=1)
    cases = (MODEL, Case("layer", "decode", "4B", 8, "half", layers=1, context=128), QKV, other)
    rows = [contest(case, ours_auto=100.0, addmm=150.0) for case in cases]
    shown = table_rows(report.readme_section([source(*rows)]), having="case")
    assert [line["case"] for line in shown] == [f"`{case.id}`" for case in cases[:2]]


def test_the_full_report_has_every_row_with_its_reason():
    rows = contest(QKV, fused_base=100.0, ours_auto=140.0, ours_triton=130.0, addmm=125.0, peft=None)
    wrong = row(QKV, "merged", None, correct=False, error_ratio=12.0, reason="a | b\nc")
    lines = table_rows(report.full_report([source(rows, [wrong])]), having="row")
    notes = {line["row"].strip("`").removeprefix(f"{QKV.id}-"): line["note"] for line in lines if "note" in line}
    assert notes == {
        "fused_base": "this package without adapters",
        "ours_auto": "this package (blas), **slower**: 1.12 of addmm",
        "ours_triton": "this package, named implementation",
        "addmm": "",
        "peft": "",
        "merged": "fails the gate",
    }
    times = {line["row"].strip("`").removeprefix(f"{QKV.id}-"): line.get("us (p20-p80, rounds)") for line in lines}
    assert times["peft"] == "no time: it was not installed"
    assert times["merged"] == r"no time: a \| b c"


def test_a_time_without_a_graph_beside_one_in_a_graph_is_marked():
    rows = [row(QKV, "ours_auto", 50.0), row(QKV, "addmm", 80.0, in_graph=False)]
    (line,) = table_rows(report.full_report([source(rows)]), having="case")
    assert (line["ours, us (p20-p80)"], line["its us"]) == ("50.00 (49.50-50.50)", "80.00 eager")


def test_without_a_gpu_result_it_says_so_and_holds_no_number_of_a_cpu():
    slow = contest(MODEL, fused_base=54321.0, ours_auto=65432.0, addmm=76543.0)
    cpu = Source(run(slow, CPU), "cpu.json")
    tiny = source(contest(Case("model", "forward", "tiny", 64, "half", (4, 4), layers=2), ours_auto=76543.0))
    for sources in ([], [cpu], [tiny], [cpu, tiny]):
        text = report.readme_section(sources)
        assert text.startswith("Nothing has been measured on a GPU yet")
        assert "python -m bench.gpu" in text and "Some CPU" not in text
        assert not re.search("54321|65432|76543", text)
        assert {line["verdict"] for line in table_rows(text, having="verdict")} == {"not measured"}


def test_the_full_report_never_shows_a_cpu_as_a_gpu():
    cpu = Source(run(contest(QKV, ours_auto=65432.0, fused_base=60000.0), CPU), "cpu.json")
    gpu = source(contest(QKV, ours_auto=50.0, fused_base=49.0))
    text = report.full_report([cpu, gpu])
    first, second = text.split("### Some CPU @ 2 GHz: a CPU, not a GPU measurement")
    assert "65432" not in first and "65432" in second
    assert "Targets" in first and "Targets" not in second
    assert "say nothing about speed on a GPU" in second


def test_the_newest_run_of_a_case_counts_and_runs_are_not_mixed():
    old = source(contest(MODEL, ours_auto=200.0, addmm=100.0), created="2026-01-01", name="old.json")
    new = source(contest(MODEL, ours_auto=90.0, peft=150.0), created="2026-02-01", name="new.json", dirty=True)
    for order in ([old, new], [new, old]):
        (line,) = table_rows(report.readme_section(order), having="case")
        assert (line["fastest alternative"], line["commit"]) == ("peft", "0123456789 with changes")


def test_a_later_run_of_one_site_does_not_take_a_layer_apart():
    whole = source(layer(QKV, fused_base=1000.0, ours_auto=1020.0), created="2026-01-01", name="whole.json")
    part = source(contest(QKV, fused_base=250.0, ours_auto=400.0), created="2026-02-01", name="part.json")
    (device,) = devices([part, whole])
    (total,) = device.sums
    assert total.overhead("ours_auto") == pytest.approx(2.0)
    assert {contest.source.name for contest in device.contests} == {"whole.json", "part.json"}


def test_only_the_text_between_the_markers_changes_and_only_once():
    readme = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    once = report.replace_section(readme, "new")
    assert once == f"# Title\n\nbefore\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nafter\n"
    assert report.replace_section(once, "new") == once


@pytest.mark.parametrize("text", ["none", "{0}", "{1}{0}", "{0}{0}{1}", "{0}{1}{1}"])
def test_missing_or_doubled_markers_are_refused(text):
    with pytest.raises(OptionError, match='must hold the lines "<!-- bench:begin -->" and "<!-- bench:end -->" once'):
        report.replace_section(text.format(report.BEGIN, report.END), "new")


def test_a_file_named_twice_counts_once_and_other_json_is_left_out(tmp_path):
    file = saved(run(contest(QKV, ours_auto=1.0)), tmp_path / "deep" / "a.json")
    (tmp_path / "stamp.json").write_text('{"kind": "other"}')
    (tmp_path / "torn.json").write_text("{")
    found = find([tmp_path, file, tmp_path / "deep" / ".." / "deep"], tmp_path)
    assert [source.name for source in found.sources] == ["deep/a.json"]
    assert [path.name for path in found.left_out] == ["stamp.json", "torn.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "twn-bench", "schema": 2}', "has schema 2; this version reads schema 1"),
        ('{"kind": "twn-bench", "sch', "is no JSON"),
    ],
)
def test_a_damaged_or_newer_result_in_a_folder_is_refused_not_left_out(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ResultError, match=message):
        find([tmp_path])


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ResultError, match="holds no result file"):
        find([tmp_path])
    with pytest.raises(ResultError, match="nowhere.json cannot be read"):
        find([tmp_path / "nowhere.json"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ResultError, match='expected an object of kind "twn-bench"'):
        find([tmp_path / "other.json"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123, "0.12"), (99.994, "99.99"), (123.45, "123.5"), (1234.5, "1234"), (98765432.1, "98765432")],
)
def test_times_are_printed_without_powers_of_ten(value, shown):
    assert microseconds(value) == shown


def wrong_numbers(section: str, sources: list[Source]) -> list[str]:
    """Rows of the README's tables that no result bears out."""
    rows = {entry.id: entry for source in sources for entry in source.run.cases}
    wrong = []
    for line in table_rows(section, having="case"):
        case = line["case"].strip("`")
        ours, best = rows.get(f"{case}-ours_auto"), rows.get(f"{case}-{line['fastest alternative']}")
        for entry, cell in ((ours, line["ours, us (p20-p80)"]), (best, line["its us"])):
            printed = re.findall(r"\d+(?:\.\d+)?", "" if cell.startswith("no time") else cell)
            time = entry and entry.time_us
            known = [microseconds(value) for value in (time.median, time.p20, time.p80)] if time else []
            wrong += [f"{case}: {number}" for number in printed if number not in known]
    return wrong


def test_a_number_that_no_result_holds_is_found():
    sources = [source(contest(MODEL, ours_auto=105.0, addmm=131.25))]
    section = report.readme_section(sources)
    assert wrong_numbers(section, sources) == []
    assert wrong_numbers(section.replace("131.2", "231.2"), sources) == [f"{MODEL.id}: 231.2"]
    assert wrong_numbers(section.replace("105.0 (", "95.0 ("), sources) == [f"{MODEL.id}: 95.0"]
    assert len(wrong_numbers(section, [])) == 4


def test_the_readme_is_what_the_committed_results_say():
    readme = (ROOT / "README.md").read_text()
    section = readme.split(report.BEGIN)[1].split(report.END)[0].strip()
    figures = re.findall(r"!\[.*?\]\((.*?)\)", section)
    assert all((ROOT / figure).is_file() for figure in figures)
    folder = ROOT / "bench" / "results"
    sources = find([folder], ROOT).sources if any(folder.rglob("*.json")) else []
    assert section == report.readme_section(sources, figures)
    assert wrong_numbers(section, sources) == []
