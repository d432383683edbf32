"""``twn-kernels embed``: which inputs each file gives, what is refused, and vectors equal to those of Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import failure, report

from twn_kernels.cli import embed, main
from twn_kernels.errors import InputError
from twn_kernels.testing.twn_directory import write_twn_directory


def test_text_files_are_lines_or_wholes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufefffirst\r\n\r\n  second\u2028still second \n".encode())
    lines = embed.read_inputs([str(path)])
    assert [(source.value, source.line) for source in lines] == [
        ({"text": "first"}, 1),
        ({"text": "  second\u2028still second "}, 3),
    ]
    (whole,) = embed.read_inputs([str(path)], whole_files=True)
    assert whole.value["text"].startswith("first") and whole.line is None


def test_jsonl_keeps_strings_and_takes_media_beside_the_file(tmp_path):
    path = tmp_path / "inputs.jsonl"
    frames = {"video": [["a.png", "b.png"]]}
    messages = [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "a.png"}]}]
    rows = [
        "a text",
        {"text": "a.png", "image": "sub/a.png"},
        {"image": ["a.png", "https://host/b.png", "/abs/c.png"]},
        messages,
        frames,
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    values = [source.value for source in embed.read_inputs([str(path)])]
    assert values[0] == {"text": "a text"}
    assert values[1] == {"text": "a.png", "image": str(tmp_path / "sub/a.png")}
    assert values[2] == {"image": [str(tmp_path / "a.png"), "https://host/b.png", "/abs/c.png"]}
    assert values[3][0]["content"] == [
        {"type": "image", "image": str(tmp_path / "b.png")},
        {"type": "text", "text": "a.png"},
    ]
    assert values[4] == {"video": [[str(tmp_path / "a.png"), str(tmp_path / "b.png")]]}


def test_a_folder_gives_its_images_by_name_and_counts_the_rest(tmp_path, capsys):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    sources = embed.read_inputs([str(tmp_path)])
    assert [source.value for source in sources] == [{"image": str(tmp_path / name)} for name in ("a.jpg", "b.PNG")]
    assert "1 files that are no images are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"ok"\n{"text": \n', "line 2: not JSON: Expecting value at column 10"),
        ("a.jsonl", b'"ok"\n\n7\n', "line 3: expected a string, an object of modalities or a list of messages, got 7."),
        ("a.jsonl", b"null\n", "line 1: expected a string"),
        ("a.jsonl", b'" "\n', "line 1: the input is empty."),
        ("a.jsonl", b"{}\n", "line 1: the input is empty."),
        ("a.jsonl", b'["a", "b"]\n', "line 1: a list must hold chat messages"),
        ("a.jsonl", b'"ok"\n' + b"[" * 100_000 + b"\n", "line 2: nested too deeply."),
        ("a.jsonl", b'"ok"\n{"text": "a\\ud83d"}\n', "line 2: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", b"\n\n", "holds no inputs; expected at least one."),
        ("a.txt", b"", "holds no inputs; expected at least one."),
        ("a.txt", b"ok\n\xff\xfe\n", "is not UTF-8 text (byte 3)."),
    ],
)
def test_input_files_that_are_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        embed.read_inputs([str(path)])
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_inputs_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        embed.read_inputs([str(tmp_path / "nowhere.txt")])
    with pytest.raises(InputError, match="holds no images"):
        embed.read_inputs([str(tmp_path)])


def embed_failure(capsys, tmp_path, *options: str, out: str = "out.npy") -> str:
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("a\n")
    places = ["--model", str(tmp_path / "model"), "--checkpoint", str(tmp_path / "twn"), "--out", str(tmp_path / out)]
    return failure(capsys, "embed", str(inputs), *places, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1.5"], '--threshold: must be a number from 0 to 1, got "1.5".'),
        (["--threshold", "nan"], '--threshold: must be a number from 0 to 1, got "nan".'),
        (["--batch-size", "0"], '--batch-size: must be a whole number, 1 or more, got "0".'),
        (["--max-think-tokens", "-1"], '--max-think-tokens: must be a whole number, 1 or more, got "-1".'),
        (["--truncate-dim", "2.5"], '--truncate-dim: must be a whole number, 1 or more, got "2.5".'),
        (["--dtype", "bfloat"], 'got "bfloat". Did you mean "bfloat16"?'),
        (["--impl", "tritn"], 'got "tritn". Did you mean "triton"?'),
        (["--decode", "graph"], 'got "graph". Did you mean "cuda_graph"?'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_out_of_range_are_wrong_usage(capsys, tmp_path, options, message):
    with pytest.raises(SystemExit) as caught:
        embed_failure(capsys, tmp_path, *options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.txt"]


def test_outputs_that_cannot_be(capsys, tmp_path):
    assert 'must end in .safetensors or .npy, got "out.csv"' in embed_failure(capsys, tmp_path, out="out.csv")
    assert "does not exist. Create it first." in embed_failure(capsys, tmp_path, out="sub/out.npy")
    (tmp_path / "out.jsonl").write_text("mine")
    assert "exists. Name another file, or replace it with --overwrite." in embed_failure(capsys, tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    (tmp_path / "folder.npy").mkdir()
    for more in ([], ["--overwrite"]):
        assert 'folder.npy" is a directory. Name another file.' in embed_failure(
            capsys, tmp_path, *more, out="folder.npy"
        )


def test_the_details_never_replace_an_input(tmp_path, capsys):
    inputs = tmp_path / "data.jsonl"
    inputs.write_text('"a"\n')
    places = ["--model", "m", "--checkpoint", "c", "--out", str(tmp_path / "data.npy"), "--overwrite"]
    assert "would replace the input" in failure(capsys, "embed", str(inputs), *places)
    assert inputs.read_text() == '"a"\n'


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_both_files_are_written_whole(tmp_path, suffix):
    from safetensors.numpy import load_file

    out, details = tmp_path / f"out{suffix}", tmp_path / "out.jsonl"
    vectors = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    embed.write_outputs(out, details, vectors, [{"index": 0, "text": "ü"}, {"index": 1}])
    read = np.load(out) if suffix == ".npy" else load_file(out)["embeddings"]
    assert read.dtype == np.float32 and np.array_equal(read, vectors)
    assert [json.loads(line) for line in details.read_text().splitlines()] == [{"index": 0, "text": "ü"}, {"index": 1}]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path):
    out, details = tmp_path / "out.npy", tmp_path / "out.jsonl"
    out.write_bytes(b"old")
    details.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        embed.write_outputs(out, details, np.zeros((1, 2), np.float32), [{"index": 0}])
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.npy"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A tiny vision model, a TWN directory for it, and one input file of each kind."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from twn_kernels.testing.tiny_directory import write_tiny_model

    folder = tmp_path_factory.mktemp("corpus")
    base = write_tiny_model(folder / "base")
    write_twn_directory(folder / "twn", AutoModelForImageTextToText.from_pretrained(base))
    (folder / "images").mkdir()
    for index, name in enumerate("ab"):
        Image.new("RGB", (40, 28 + 12 * index), (200 * index, 40, 90)).save(folder / "images" / f"{name}.png")
    (folder / "lines.txt").write_text("a red square\n\na blue one\n")
    rows = ["a red square", {"text": "what is it?", "image": "images/a.png"}, {"image": "images/b.png"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def embed_report(capsys, corpus, inputs: list[str], out: Path, *options: str) -> dict:
    places = ["--model", str(corpus / "base"), "--checkpoint", str(corpus / "twn"), "--out", str(out), "--quiet"]
    return report(capsys, "embed", *(str(corpus / name) for name in inputs), *places, *options)


def test_embedding_files_equals_embedding_in_python(capsys, corpus, tmp_path):
    from safetensors.numpy import load_file

    from twn_kernels import TWNEmbedder

    out = tmp_path / "vectors.safetensors"
    options = ["--think", "always", "--max-think-tokens", "6", "--batch-size", "3", "--decode", "static"]
    found = embed_report(capsys, corpus, ["lines.txt", "rows.jsonl", "images"], out, *options)
    details = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()]
    vectors = load_file(out)["embeddings"]
    assert found["inputs"] == len(details) == len(vectors) == 7
    assert found["dimensions"] == vectors.shape[1] and found["thought"] == sum(row["thought"] for row in details)
    assert [(Path(row["source"]).name, row["line"]) for row in details] == [
        ("lines.txt", 1), ("lines.txt", 3), ("rows.jsonl", 1), ("rows.jsonl", 2), ("rows.jsonl", 3),
        ("a.png", None), ("b.png", None),
    ]  # fmt: skip
    embedder = TWNEmbedder.from_pretrained(corpus / "base", corpus / "twn", decode="static")
    image = {name: {"image": str(corpus / "images" / f"{name}.png")} for name in "ab"}
    asked = {"text": "what is it?"} | image["a"]
    inputs = ["a red square", "a blue one", "a red square", asked, image["b"], image["a"], image["b"]]
    expected, expected_details = embedder.encode(
        inputs, think="always", max_think_tokens=6, batch_size=3, return_details=True, show_progress_bar=False
    )
    assert np.array_equal(vectors, expected)
    assert [row["text"] for row in details] == [detail.text for detail in expected_details]
    assert {row["decode"] for row in details} == {"static"}


def test_options_reach_the_embedder(capsys, corpus, tmp_path):
    plain = embed_report(capsys, corpus, ["lines.txt"], tmp_path / "plain.npy", "--think", "never")
    assert plain["thought"] == 0
    options = ["--think", "auto", "--threshold", "1", "--prompt", "Find it.", "--truncate-dim", "8"]
    options += ["--dtype", "bfloat16", "--impl", "reference"]
    found = embed_report(capsys, corpus, ["lines.txt"], tmp_path / "other.npy", *options)
    assert found["dimensions"] == 8
    vectors = np.load(tmp_path / "other.npy")
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert not np.allclose(vectors[0], np.load(tmp_path / "plain.npy")[0, :8], atol=1e-3)


def test_a_media_file_that_is_missing_leaves_nothing_behind(capsys, corpus, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('"fine"\n{"image": "nowhere.png"}\n')
    places = ["--model", str(corpus / "base"), "--checkpoint", str(corpus / "twn"), "--out", str(tmp_path / "out.npy")]
    assert main(["embed", str(rows), *places, "--quiet"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f'InputError: "{rows}", line 2: ' in last and "nowhere.png" in last
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_line_that_names_an_image_or_an_address_is_text(capsys, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(corpus / "images")
    words = ["a.png", "https://host/a.png"]
    (tmp_path / "lines.txt").write_text("\n".join(words))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, words)))
    (tmp_path / "objects.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
    names = ("lines.txt", "rows.jsonl", "objects.jsonl")
    inputs = [str(tmp_path / name) for name in names]
    embed_report(capsys, corpus, inputs, tmp_path / "out.npy", "--think", "never", "--batch-size", "2")
    vectors = np.load(tmp_path / "out.npy").reshape(3, 2, -1)
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[1], vectors[2])


def test_vectors_that_are_not_finite_fail_and_write_nothing(capsys, corpus, tmp_path):
    import shutil

    import torch

    broken = tmp_path / "twn"
    shutil.copytree(corpus / "twn", broken)
    queries = torch.load(broken / "queries.pt")
    torch.save({name: torch.full_like(value, torch.nan) for name, value in queries.items()}, broken / "queries.pt")
    places = ["--model", str(corpus / "base"), "--checkpoint", str(broken), "--out", str(tmp_path / "out.npy")]
    line = failure(capsys, "embed", str(corpus / "lines.txt"), *places, "--quiet", "--think", "never")
    assert f'2 of 2 vectors are not finite (the first: "{corpus / "lines.txt"}", line 1); nothing was written.' in line
    assert [path.name for path in tmp_path.iterdir()] == ["twn"]


def test_one_input_is_counted_as_one(capsys, corpus, tmp_path):
    (tmp_path / "one.txt").write_text("a red square")
    places = ["--model", str(corpus / "base"), "--checkpoint", str(corpus / "twn"), "--out", str(tmp_path / "out.npy")]
    assert main(["embed", str(tmp_path / "one.txt"), *places, "--quiet", "--think", "never"]) == 0
    assert capsys.readouterr().out.startswith("1 input, ")
