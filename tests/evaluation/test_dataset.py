"""BEIR folders: what is written is read back, and each way to be damaged is one sentence with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twn_kernels.errors import DataError
from twn_kernels.evaluation import Entry, read_split, split_names, write_dataset


def folder_with(tmp_path: Path, **files: str) -> Path:
    """A folder that is whole but for the files given (``qrels`` stands for ``qrels/test.tsv``)."""
    whole = {
        "corpus": '{"_id": "d1", "title": "A", "text": "one"}\n{"_id": "d2", "text": "two"}\n',
        "queries": '{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "second"}\n',
        "qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    }
    (tmp_path / "qrels").mkdir()
    for name, text in (whole | files).items():
        path = tmp_path / "qrels" / "test.tsv" if name == "qrels" else tmp_path / f"{name}.jsonl"
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_what_is_written_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"pixels")
    image = str(tmp_path / "images" / "a.png")
    documents = [Entry("d1", "body", "Title"), Entry("d2", image=image)]
    queries = [Entry("q1", "ask", image=image, metadata={"class": "simple"}), Entry("q2", "other")]
    own = [Entry("d9", "its own")]
    qrels = {"test": {"q1": {"d2": 2, "d1": 0}}, "dev": {"q2": {"d9": 1}}}
    write_dataset(tmp_path, documents, queries, qrels, candidates={"dev": own})
    assert split_names(tmp_path) == ["dev", "test"]
    test, dev = (read_split(tmp_path, name) for name in ("test", "dev"))
    assert (
        list(test.documents) == documents
        and test.queries == (queries[0],)
        and test.qrels == {"q1": qrels["test"]["q1"]}
    )
    assert list(dev.documents) == own and dev.queries == (queries[1],)
    assert [entry.input for entry in documents] == [{"text": "Title body"}, {"image": image}]
    assert queries[0].input == {"image": image, "text": "ask"}
    assert json.loads((tmp_path / "corpus.jsonl").read_text().splitlines()[1])["image"] == "images/a.png"
    assert (tmp_path / "qrels" / "test.tsv").read_text().splitlines() == [
        "query-id\tcorpus-id\tscore", "q1\td2\t2", "q1\td1\t0",
    ]  # fmt: skip


def test_a_header_is_optional_and_blank_lines_and_crlf_are_nothing(tmp_path):
    folder = folder_with(tmp_path, qrels="q1\td1\t1\r\n\r\nq2\td2\t1\r\n")
    assert read_split(folder, "test").qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}}


def test_a_query_without_a_positive_is_left_out_and_counted(tmp_path):
    split = read_split(folder_with(tmp_path, qrels="q1\td1\t0\nq2\td2\t1\n"), "test")
    assert [entry.id for entry in split.queries] == ["q2"]
    assert split.without_positive == 1 and set(split.qrels) == {"q2"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"qrels": "q1\td1\t1\nq1\td7\t1\n"}, 'test.tsv", line 2: document "d7" is not in "corpus.jsonl".'),
        ({"qrels": "q7\td1\t1\n"}, 'test.tsv", line 1: query "q7" is not in "queries.jsonl".'),
        ({"qrels": "q1\td1\t1\nq1\td1\t0\n"}, 'line 2: query "q1" and document "d1" come twice.'),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, 'split "test" is empty: '),
        ({"qrels": "q1\td1\t0\n"}, 'split "test" has no query with a positive: all 1 queries of '),
        ({"qrels": "q1\td1\t1\nq1 d2 1\n"}, "line 2: expected query-id, corpus-id and a whole-number score between"),
        ({"qrels": "q1\td1\t1.5\n"}, "line 1: expected query-id, corpus-id and a whole-number score"),
        ({"corpus": '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n'}, 'line 2: _id "d1" comes twice, first'),
        ({"queries": '{"_id": "q1", "text": "a"}\n\n{"_id": "q1", "text": "b"}\n'}, 'line 3: _id "q1" comes twice'),
        ({"corpus": '{"_id": "d1", "text": "a"}\n{"_id": \n'}, 'corpus.jsonl", line 2: not JSON: '),
        ({"corpus": "[1]\n"}, "line 1: expected an object with _id and text or image, got list."),
        ({"corpus": '{"text": "a"}\n'}, "line 1: _id is missing or empty; expected a string that is unique"),
        ({"corpus": '{"_id": 7, "text": "a"}\n'}, "line 1: _id must be a string or absent, got int."),
        ({"corpus": '{"_id": "d1", "text": ["a"]}\n'}, "line 1: text must be a string or absent, got list."),
        ({"corpus": '{"_id": "d1", "text": " "}\n'}, 'line 1: "d1" is empty; expected text, title or image.'),
        ({"corpus": '{"_id": "d1", "text": "\\ud83d"}\n'}, "line 1: holds half of a surrogate pair"),
        ({"corpus": '{"_id": "d1", "image": "../a.png"}\n'}, 'line 1: image must be a path inside the data folder'),
        ({"corpus": '{"_id": "d1", "image": "a.png"}\n'}, 'the image of "d1" is missing: "'),
        ({"corpus": "\n"}, 'corpus.jsonl" holds no entries; expected at least one.'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_damaged_data(tmp_path, files, message):
    with pytest.raises(DataError) as caught:
        read_split(folder_with(tmp_path, **files), "test")
    assert message in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(
        DataError, match='data folder ".*nowhere" does not exist. Name a folder that holds corpus.jsonl'
    ):
        split_names(tmp_path / "nowhere")
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated" / "result.json").write_text("{}")
    with pytest.raises(DataError, match='It holds the result of an evaluation, ".*result.json"'):
        split_names(tmp_path / "evaluated")
    with pytest.raises(DataError, match="has no splits: expected one or more files qrels/<split>.tsv."):
        split_names(tmp_path)
    folder = folder_with(tmp_path)
    with pytest.raises(DataError, match='has no split "tets"; its splits are "test". Did you mean "test"?'):
        read_split(folder, "tets")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r'queries.jsonl" does not exist. A data folder holds corpus.jsonl, queries'):
        read_split(folder, "test")
    (folder / "queries.jsonl").mkdir()
    with pytest.raises(DataError, match=r'queries.jsonl" cannot be read: Is a directory.'):
        read_split(folder, "test")
    (folder / "queries.jsonl").rmdir()
    (folder / "queries.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 0\)."):
        read_split(folder, "test")


def test_an_image_outside_of_the_folder_is_not_written(tmp_path):
    with pytest.raises(DataError, match='the image of "d1" must lie in the data folder'):
        write_dataset(tmp_path / "data", [Entry("d1", image=str(tmp_path / "a.png"))], [Entry("q1", "a")], {})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(DataError, match=r'data folder ".*data" cannot be written: '):
        write_dataset(tmp_path / "data", [Entry("d", "a")], [Entry("q", "a")], {})


def test_the_digest_follows_what_the_split_ranks_and_nothing_else(tmp_path):
    folder = folder_with(tmp_path)
    before = read_split(folder, "test").digest
    (folder / "qrels" / "dev.tsv").write_text("q2\td2\t1\n")
    queries = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text(queries.replace("second", "another"))
    assert read_split(folder, "test").digest == before
    (folder / "queries.jsonl").write_text(queries.replace("first", "another"))
    assert read_split(folder, "test").digest != before
    (folder / "a.png").write_bytes(b"1")
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "image": "a.png"}\n')
    before = read_split(folder, "test").digest
    (folder / "a.png").write_bytes(b"2")
    assert read_split(folder, "test").digest != before
