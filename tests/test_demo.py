"""The demo on the shipped model: its report is complete, its figures hold together, its pictures show something."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from twn_kernels import demo
from twn_kernels.cli import main
from twn_kernels.demo.naive import NaivePipeline
from twn_kernels.demo.setting import Setting
from twn_kernels.errors import CheckpointError, MissingDependency, OptionError
from twn_kernels.evaluation import load_result
from twn_kernels.shipped import ShippedModel

ROOT = Path(__file__).resolve().parent.parent
QUERIES = 40


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo") / "new"


@pytest.fixture(scope="module")
def ran(out) -> tuple[dict, list[str]]:
    """Figures and report of one run in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TWN_IMPL": "blas"}
    command = [
        sys.executable,
        "-m",
        "twn_kernels",
        "demo",
        "--json",
        "--queries",
        str(QUERIES),
        "--directory",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


def test_the_table_is_the_evaluations(ran, out):
    figures, lines = ran
    told, modes = figures["retrieval"], load_result(out / "result.json")["splits"]["test"]["modes"]
    assert told["queries"] == QUERIES and told["documents"] == 200
    assert told["modes"]["never"]["query_tokens"] == 0 and told["modes"]["always"]["think_rate"] == 1
    rows = [line.split() for line in lines]
    shown = {row[0]: row for row in rows if row and row[0] in told["modes"] and row[1] != "minus"}
    for mode, of in told["modes"].items():
        assert {name: modes[mode][name] for name in of} == of and modes[mode]["seconds_measured"]
        row = shown[mode]
        quality = (
            of["ndcg_at_10"],
            *(told["classes"][kind][mode] for kind in ("simple", "thoughtful")),
            of["hit_at_1"],
        )
        assert row[1:5] == [f"{value:.4f}" for value in quality]
        assert row[7:] == [f"{of['query_tokens']:,}", f"{of['query_seconds']:.2f}"]


def test_thinking_pays_where_it_is_needed(ran):
    """Of the shipped weights: without a thought the arithmetic is out of reach, and the gate sends it to think."""
    kinds = ran[0]["retrieval"]["classes"]
    assert kinds["thoughtful"]["always"] > 2 * kinds["thoughtful"]["never"]
    assert kinds["thoughtful"]["think_rate"] > kinds["simple"]["think_rate"]


def test_queries_are_shown_with_thought_and_finds(ran):
    figures, lines = ran
    assert {one["class"] for one in figures["examples"]} == {"simple", "thoughtful"}
    text = "\n".join(lines)
    for one in figures["examples"]:
        assert len(one["found"]) == 5 and f"   {one['query']}\n      gate {one['gate_score']:.3f}; " in text
        assert (one["thought"] is None) == (one["tokens"] == 0)
        if one["thought"] is not None:
            assert f'thought: "{one["thought"]}"' in text


def test_the_numbers_agree_with_peft(ran):
    figures = ran[0]
    peft, thinking = figures["peft"], figures["cost"]["thinking"]
    assert peft["adapter_effect"] > 1000 * peft["largest_difference"]
    assert peft["greedy_tokens_equal"] == peft["greedy_tokens"] == 64
    assert thinking["thoughts_as_long"] == thinking["queries"] == QUERIES
    assert thinking["typical_entry"] > 1000 * thinking["largest_difference"]
    assert figures["patch"]["unpatch_restores_modules"] and figures["patch"]["beyond_adapters_percent_of_base"] <= 1


def test_rows_are_called_fused_only_where_a_fused_kernel_ran(ran):
    cost = ran[0]["cost"]
    assert cost["impl"] == "blas" and "patched, rows of both adapters" in cost["prefill"]
    assert not [name for name in (*cost["prefill"], *cost["thinking"]["times"]) if name.startswith("fused")]


def test_the_pictures_show_something(ran, out):
    from PIL import Image

    assert [Path(path).name for path in ran[0]["files"]] == ["result.json", "quality.png", "queries.png"]
    assert sorted(path.name for path in out.iterdir()) == ["quality.png", "queries.png", "result.json"]
    for name, least in (("quality.png", (300, 250)), ("queries.png", (800, 600))):
        with Image.open(out / name) as image:
            pixels = np.asarray(image.convert("RGB"))
            assert image.width >= least[0] and image.height >= least[1]
        assert pixels.std() > 5 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    frames = {"right": (0, 158, 115), "wrong": (213, 94, 0)}
    marked = {word for word, colour in frames.items() if (pixels == colour).all(-1).sum() > 100}
    found = [number == one["answer"] for one in ran[0]["examples"] for number in one["found"]]
    assert marked == {word for word, of in (("right", any(found)), ("wrong", not all(found))) if of}


def test_a_demo_replaces_its_own_files_and_eval_shows_them(ran, out, capsys):
    assert demo._checked(out) == out
    assert main(["eval", str(out / "result.json")]) == 0
    assert "model numbers (shipped), numbers (shipped)" in capsys.readouterr().out


def test_nothing_but_the_report_is_in_the_report(ran):
    lines = ran[1]
    assert [line[:2] for line in lines if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5.", "6."]
    assert not [line for line in lines if "%|" in line or "it/s" in line or "arning" in line or "deprecated" in line]
    assert lines[-1].startswith("done in ")


def test_what_is_missing_is_said_first_and_at_once(monkeypatch, tmp_path):
    for module in ("peft", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    said: list[str] = []
    with pytest.raises(
        MissingDependency, match="not installed: peft, scikit-learn. Run: pip install peft scikit-learn$"
    ):
        demo.run_demo(tmp_path / "new", say=said.append)
    assert said == [] and not (tmp_path / "new").exists()


def test_too_few_queries_and_an_absent_model_are_refused(monkeypatch, tmp_path):
    for queries in (1, True, 2.5):
        with pytest.raises(OptionError, match="queries must be a whole number of at least 2"):
            demo.run_demo(tmp_path / "new", queries=queries)
    monkeypatch.setattr("twn_kernels.shipped._NUMBERS", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match='the model "numbers" is not whole'):
        demo.run_demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> ShippedModel:
    """A tiny model whose thoughts end where a test says."""
    from twn_kernels.testing import write_demo_directories

    folder = tmp_path_factory.mktemp("untrained")
    return ShippedModel(*write_demo_directories(folder), folder / "README.md")


def test_a_model_that_thinks_in_another_way_is_refused(untrained, tmp_path):
    import shutil

    other = untrained._replace(twn=tmp_path / "twn")
    shutil.copytree(untrained.twn, other.twn)
    path = other.twn / "twn_config.json"
    path.write_text(json.dumps({"graph": "reencode"}))
    with pytest.raises(OptionError, match='model must have graph "shared_kv" .* got "reencode".'):
        Setting.load(other, tmp_path / "numbers", 2, None)
    assert not (tmp_path / "numbers").exists()


@pytest.mark.parametrize("prefill", ["reasoning", "embedding", None])
def test_the_naive_pipeline_embeds_as_ours_does(prefill, untrained, tmp_path):
    """Rows that close early, late and never, texts and images, in one batch."""
    setting = Setting.load(untrained, tmp_path / "numbers", 6, None)
    embedder = setting.embedder
    inputs = [entry.input for entry in setting.split.queries]
    embedder.config = dataclasses.replace(embedder.config, max_think_tokens=8, prefill_adapter=prefill)
    written = [detail.text for detail in embedder.encode(inputs, think="always", return_details=True)[1]]
    # What some of them write sooner or later ends a thought from now on.
    end = next(
        text[place : place + 2]
        for text in written
        for place in range(3, len(text) - 2)
        if 0 < sum(text[place : place + 2] in other for other in written) < len(written)
    )
    embedder.config = dataclasses.replace(embedder.config, think_end=(end,))
    vectors, details = embedder.encode(inputs, think="always", convert_to_tensor=True, return_details=True)
    assert 0 < sum(detail.thought for detail in details) < len(inputs)
    found = NaivePipeline(setting.peft_model(), embedder).always(inputs)
    assert found.tokens == [detail.tokens for detail in details]
    plain = embedder.encode(inputs, think="never", convert_to_tensor=True)
    torch.testing.assert_close(found.vectors, vectors, rtol=0, atol=(vectors - plain).abs().max().item() / 1000)
