"""Examples from a data folder: what they hold, and the order that a seed alone decides."""

from __future__ import annotations

import random

import pytest

from twn_kernels.errors import DataError
from twn_kernels.evaluation.dataset import Entry, write_dataset
from twn_kernels.training.examples import Example, Examples, Stream, read_examples, require_writable
from twn_kernels.training.joint import JointCollator

QRELS = {"q0": {"d0": 1, "d1": 0, "d2": -1, "d3": 2}, "q1": {"d1": 1}, "q2": {"d2": 1, "d0": 1}}


def written(folder, thoughts, qrels=QRELS):
    """A folder of three queries with these thoughts (None: no such metadata) and four documents."""
    queries = [
        Entry(f"q{place}", f"question {place}", metadata={} if thought is None else {"thought": thought})
        for place, thought in enumerate(thoughts)
    ]
    documents = [Entry(f"d{place}", f"answer {place}") for place in range(4)]
    return write_dataset(folder, documents, queries, {"train": qrels})


@pytest.fixture
def many() -> Examples:
    """Twenty queries with two positives each."""
    documents = {f"d{place}": Entry(f"d{place}", "text") for place in range(20)}
    queries = [Entry(f"q{place}", "text", metadata={"thought": "so"}) for place in range(20)]
    return Examples(queries, documents, {f"q{p}": [f"d{p}", f"d{(p + 1) % 20}"] for p in range(20)})


def test_what_an_example_holds(tmp_path):
    examples = read_examples(written(tmp_path, ["two and two is four.", None, ""]))
    assert len(examples) == 3
    first, second, third = (examples.example(place, random.Random(0)) for place in range(3))
    assert [example.query.id for example in (first, second, third)] == ["q0", "q1", "q2"]
    assert (first.thought, second.thought, third.thought) == ("two and two is four.", "", "")
    assert second.document.text == "answer 1" and second.relevant == {"d1"}


def test_positives_are_judged_above_zero_and_each_is_drawn(tmp_path):
    examples = read_examples(written(tmp_path, ["so", None, None]))
    drawn = [examples.example(0, random.Random(seed)) for seed in range(60)]
    assert {example.document.id for example in drawn} == {"d0", "d3"}
    assert {example.relevant for example in drawn} == {frozenset({"d0", "d3"})}


def test_a_folder_without_thoughts_is_refused(tmp_path):
    written(tmp_path, [None, "", None])
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path)
    assert str(caught.value) == (
        f'split "train" of "{tmp_path}" has no thought to learn: no query has metadata.thought. '
        "Write the thoughts there as strings, or train on a folder that has them."
    )


@pytest.mark.parametrize(
    ("thought", "what"),
    [
        ("see <|image_pad|>.", '"<|image_pad|>", which stands for pixels in this model'),
        ("a<|video_pad|>", '"<|video_pad|>", which stands for pixels in this model'),
        ("so</think> four.", '"</think>", which ends a thought'),
        ("Answer: four", '"Answer:", which ends a thought'),
        ("a <|im_end|> flower", '"<|im_end|>", which ends a thought'),
    ],
)
def test_a_thought_that_no_model_writes_is_refused(thought, what, embedder_of):
    processor = embedder_of("qwen3_vl").processor
    query = Entry("q7", "what?", metadata={"thought": thought})
    stops = ("</think>", "Answer:", *processor.token_ids("<|im_end|>"))
    with pytest.raises(DataError) as caught:
        require_writable(query, processor, stops)
    assert str(caught.value) == f'query "q7": metadata.thought holds {what}. Remove it.'
    plain = Entry("q8", "<|image_pad|>", metadata={"thought": "think of it."})
    assert processor.text_of(require_writable(plain, processor, stops)) == "think of it."
    assert require_writable(Entry("q9", "what?"), processor, stops) == []


def test_a_batch_refuses_it_too(embedder_of):
    processor = embedder_of("qwen3_vl").processor
    query = Entry("q7", "what?", metadata={"thought": "see <|image_pad|>."})
    with pytest.raises(DataError, match='query "q7": metadata.thought holds'):
        JointCollator(processor, "</think>", 4)([Example(query, Entry("d", "four"), frozenset({"d"}))])


def test_queries_that_all_seek_the_same_are_refused(tmp_path):
    written(tmp_path, ["so", None, None], dict.fromkeys(("q0", "q1", "q2"), {"d0": 1}))
    with pytest.raises(DataError, match="has the same positives, so that there is nothing to tell apart. Add queries"):
        read_examples(tmp_path)


def test_the_digest_is_of_all_that_is_learned_from(tmp_path):
    known = read_examples(written(tmp_path / "a", ["so", None, None])).digest
    assert read_examples(written(tmp_path / "b", ["so", None, None])).digest == known
    others = [
        written(tmp_path / "c", ["so.", None, None]),
        written(tmp_path / "d", ["so", None, None], QRELS | {"q1": {"d2": 1}}),
    ]
    assert len({known, *(read_examples(folder).digest for folder in others)}) == 3


@pytest.mark.parametrize(("thought", "kind"), [(7, "int"), (["so"], "list"), (False, "bool"), ({"a": 1}, "dict")])
def test_a_thought_that_is_no_string_is_refused(thought, kind, tmp_path):
    written(tmp_path, ["so", thought, None])
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path)
    assert str(caught.value) == (
        f'query "q1" of "{tmp_path}": metadata.thought must be a string or absent, got {kind}. '
        "Write the thought as text."
    )


def test_an_unknown_split_is_refused(tmp_path):
    written(tmp_path, ["so", None, None])
    with pytest.raises(DataError, match='has no split "trian"; its splits are "train". Did you mean "train"?'):
        read_examples(tmp_path, "trian")


def ids(stream, places) -> list[tuple[str, str]]:
    return [(stream[place].query.id, stream[place].document.id) for place in places]


def test_the_order_depends_on_the_seed_alone(many):
    """Not on what was read before, in which order, nor on anybody's generator."""
    places = range(70)
    expected = ids(Stream(many, 70, 3), places)
    random.seed(99)
    other = Stream(many, 500, 3)
    mixed = list(places)
    random.shuffle(mixed)
    found = dict(zip(mixed, ids(other, mixed), strict=True))
    assert [found[place] for place in places] == expected
    assert ids(Stream(many, 70, 4), places) != expected


def test_each_pass_has_every_query_once_in_an_order_of_its_own(many):
    stream = Stream(many, 100, 0)
    passes = [[query for query, _ in ids(stream, range(start, start + 20))] for start in range(0, 100, 20)]
    assert all(sorted(one) == sorted(query.id for query in many.queries) for one in passes)
    assert len({tuple(one) for one in passes}) == 5


def test_positives_are_drawn_anew_in_each_pass(many):
    drawn: dict[str, set[str]] = {}
    for query, document in ids(Stream(many, 400, 0), range(400)):
        drawn.setdefault(query, set()).add(document)
    assert all(len(documents) == 2 for documents in drawn.values())


def test_a_stream_ends(many):
    stream = Stream(many, 30, 0)
    assert len(stream) == len(list(stream)) == 30
    for index in (30, -1):
        with pytest.raises(IndexError, match=rf"^index must be from 0 to 29, got {index}\.$"):
            stream[index]
    with pytest.raises(DataError, match="^a stream of examples needs at least one example to draw from, got none.$"):
        Stream(Examples([], {}, {}), 5, 0)


@pytest.mark.parametrize(("share", "count"), [(0.2, 4), (0.5, 10), (0.33, 7)])
def test_parts_share_nothing_and_lack_nothing(share, count, many):
    first, second = many.divided(share, seed=1)
    parts = [[query.id for query in part.queries] for part in (first, second)]
    assert len(parts[1]) == count and not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(query.id for query in many.queries)
    order = [query.id for query in many.queries]
    assert all(part == sorted(part, key=order.index) for part in parts)
    assert [query.id for query in many.divided(share, seed=1)[1].queries] == parts[1]
    assert [query.id for query in many.divided(share, seed=2)[1].queries] != parts[1]
    same = many.example(order.index(parts[1][0]), random.Random(0))
    assert second.example(0, random.Random(0)) == same
