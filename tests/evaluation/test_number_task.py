"""The number task: right answers, the same bytes for a seed, and nothing of a test split in training."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from twn_kernels.errors import DataError, MissingDependency, OptionError
from twn_kernels.evaluation import number_task, read_split, split_names
from twn_kernels.evaluation import number_words as words
from twn_kernels.evaluation.number_task import SPLITS, UNSEEN_COMPOSITIONS, held_out_pairs, make_number_task
from twn_kernels.evaluation.number_words import Step

OUT = [name for name in SPLITS if name != "train"]


@pytest.fixture(scope="module")
def splits(numbers):
    return {name: read_split(numbers, name) for name in SPLITS}


def steps_of(entry) -> list[Step]:
    pairs = zip(entry.metadata["operations"], entry.metadata["operands"], strict=True)
    return [Step(operation, *operands) for operation, operands in pairs]


def value_of(number: str) -> int:
    """Read a number in words without the code that writes them."""
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    small += "seventeen eighteen nineteen"
    if number in small.split():
        return small.split().index(number)
    tens, _, ones = number.partition("-")
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"].index(tens)
    return 10 * (tens + 2) + (value_of(ones) if ones else 0)


_N = r"([a-z-]+)"
READINGS = {
    rf"^{_N} (?:times|multiplied by) {_N}$": lambda a, b: a * b,
    rf"^the product of {_N} and {_N}$": lambda a, b: a * b,
    rf"^{_N} plus {_N}$": lambda a, b: a + b,
    rf"^{_N} more than {_N}$": lambda a, b: a + b,
    rf"^the sum of {_N} and {_N}$": lambda a, b: a + b,
    rf"^{_N} minus {_N}$": lambda a, b: a - b,
    rf"^{_N} less than {_N}$": lambda a, b: b - a,
    rf"^{_N} with {_N} taken away$": lambda a, b: a - b,
    rf"^(?:half of|one of two equal parts of) {_N}$": lambda a: a // 2,
    rf"^{_N} divided by two$": lambda a: a // 2,
    rf"^(?:double|twice) {_N}$": lambda a: 2 * a,
    rf"^{_N} and as much again$": lambda a: 2 * a,
}
NEXT = {"times": lambda a, b: a * b, "plus": lambda a, b: a + b, "minus": lambda a, b: a - b}


def answered(text: str) -> int:
    """Work a query in words out, reading its words afresh."""
    first, *rest = text.split(", then ")
    (reading,) = [(match, of) for pattern, of in READINGS.items() if (match := re.match(pattern, first))]
    value = reading[1](*(value_of(word) for word in reading[0].groups()))
    for part in rest:
        if part in ("halved", "doubled"):
            value = value // 2 if part == "halved" else 2 * value
        else:
            operation, number = part.split()
            value = NEXT[operation](value, value_of(number))
    return value


def test_every_query_in_words_asks_for_its_number(splits):
    checked = 0
    for split in splits.values():
        for entry in split.queries:
            if entry.metadata["class"] == "thoughtful" and entry.metadata["modality"] == "text":
                assert answered(entry.text) == entry.metadata["number"], entry.text
                checked += 1
    assert checked > 30


@pytest.mark.parametrize("step", [("times", 6, 7), ("plus", 39, 3), ("minus", 46, 4), ("half", 84), ("double", 21)])
def test_every_wording_of_a_step_asks_for_its_value(step):
    step = Step(*step)
    then = Step("minus", words.applied(step), 2)
    for unseen in (False, True):
        for text in words.phrases([step], by_image=False, unseen=unseen):
            assert answered(text) == words.applied(step), text
            beside = words.phrases([step], by_image=True, unseen=unseen)
            assert all(words.worded(step.before) not in text for text in beside)
        for text in words.phrases([step, then], by_image=False, unseen=unseen):
            assert answered(text) == words.applied(then), text


def test_every_thought_works_out_the_number_that_the_positives_show(splits):
    for split in splits.values():
        shown = {entry.id: entry.metadata["number"] for entry in split.documents}
        for entry in split.queries:
            number, value = entry.metadata["number"], None
            for step in steps_of(entry):
                assert value is None or step.before == value
                value = words.applied(step)
                assert f"{value}." in entry.metadata["thought"]
            assert value is None or value == number
            assert int(re.findall(r"\d+", entry.metadata["thought"])[-1]) == number
            assert {document for document, found in shown.items() if found == number} == set(split.qrels[entry.id])


def test_images_show_their_numbers_and_queries_the_first_operand(splits):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for split in splits.values():
        for entry in split.documents:
            assert "".join(str(target[place]) for place in entry.metadata["samples"]) == str(entry.metadata["number"])
        for entry in split.queries:
            steps = steps_of(entry)
            first = steps[0].before if steps else entry.metadata["number"]
            if entry.metadata["modality"] != "text":
                assert "".join(str(target[place]) for place in entry.metadata["samples"]) == str(first)
            assert (entry.image is None) == (entry.metadata["modality"] == "text")
            assert (not entry.text) == (entry.metadata["modality"] == "image")


def test_both_classes_and_all_modalities_are_there(splits):
    found: dict[str, set[str]] = {"simple": set(), "thoughtful": set()}
    for name, split in splits.items():
        kinds = collections.Counter(entry.metadata["class"] for entry in split.queries)
        assert kinds["simple"] == kinds["thoughtful"] == len(split.queries) // 2, name
        for kind, modalities in found.items():
            own = {entry.metadata["modality"] for entry in split.queries if entry.metadata["class"] == kind}
            assert len(own) > 1, name
            modalities |= own
    assert found == {"simple": {"text", "image", "both"}, "thoughtful": {"text", "both"}}


def samples_of(entries) -> set[int]:
    return {place for entry in entries for place in entry.metadata["samples"]}


def bytes_of(entries) -> set[str]:
    return {hashlib.sha256(Path(entry.image).read_bytes()).hexdigest() for entry in entries if entry.image}


@pytest.mark.parametrize("name", OUT)
def test_no_split_shares_a_digit_an_image_or_a_worded_query_with_training(splits, name):
    train, other = splits["train"], splits[name]
    trained = [*train.queries, *train.documents]
    tested = [*other.queries, *other.documents]
    assert not samples_of(trained) & samples_of(tested)
    assert not bytes_of(trained) & bytes_of(tested)
    alone = [
        {entry.text for entry in split.queries if entry.metadata["modality"] == "text"} for split in (train, other)
    ]
    if name != "gate":  # which is asked in training's words
        assert alone[0] and alone[1] and not alone[0] & alone[1]


def test_nothing_of_the_gates_hands_is_in_a_test(splits):
    """Both come from beyond training; a gate that had seen the test's hands would be calibrated to them."""
    own = samples_of([*splits["gate"].queries, *splits["gate"].documents])
    for name in OUT:
        if name != "gate":
            assert own and not own & samples_of([*splits[name].queries, *splits[name].documents]), name


def test_simple_words_repeat_only_where_they_are_learned_from(tmp_path):
    """Four hundred texts are all that there are: without repetition a large split has next to none of them."""
    folder = make_number_task(tmp_path / "many", queries=60, train_queries=1500, gate_queries=1500, copies=1)
    for split in ("train", "gate"):
        texts = simple_of(folder, split)
        assert len(set(texts)) < len(texts) and 0.28 < len(texts) / 750 < 0.38
    test = simple_of(folder, "test")
    assert len(set(test)) == len(test) > 0


def test_images_are_varied_in_training_alone(tmp_path):
    """A digit of which there is one picture in a split shows the same pixels wherever its sample comes again."""
    import numpy as np
    from PIL import Image

    folder = make_number_task(tmp_path / "many", queries=1, train_queries=1, gate_queries=1, copies=20)
    for name, varied in (("train", True), ("gate", False), ("test", False)):
        own = [entry for entry in read_split(folder, name).documents if entry.metadata["number"] == 7]
        shown: dict[int, set[int]] = {}
        for entry in own:
            pixels = np.asarray(Image.open(entry.image).convert("L"))
            shown.setdefault(entry.metadata["samples"][0], set()).add(int(pixels.astype(int).sum()))
        repeated = [sums for sums in shown.values() if len(own) > len(shown)]
        assert repeated and any(len(sums) > 1 for sums in repeated) == varied, name


def simple_of(folder: Path, split: str) -> list[str]:
    """Texts of a split's simple queries in words."""
    known = [entry.metadata | {"text": entry.text} for entry in read_split(folder, split).queries]
    return [found["text"] for found in known if (found["class"], found["modality"]) == ("simple", "text")]


def test_thoughts_are_as_long_where_nothing_is_to_be_worked_out(splits):
    """In words and digits, within 15 %: a mixture whose simple half has short thoughts says little about a gate."""
    means = {}
    for kind in ("simple", "thoughtful"):
        thoughts = [entry.metadata["thought"] for entry in splits["train"].queries if entry.metadata["class"] == kind]
        means[kind] = sum(len(re.findall(r"[a-z]+|\d", thought)) for thought in thoughts) / len(thoughts)
    assert 0.85 < means["simple"] / means["thoughtful"] < 1.15


@pytest.mark.parametrize("name", list(SPLITS))
def test_a_query_is_in_another_hand_than_every_document(splits, name):
    assert not samples_of(splits[name].queries) & samples_of(splits[name].documents)


@pytest.mark.parametrize("name", ["test", "ood_images"])
def test_unseen_phrasing_is_in_no_training_query(name):
    """All phrasings, not those of one draw: every wording of a step that ``name`` may use is none of training's."""
    assert SPLITS[name].unseen_words and not SPLITS["train"].unseen_words
    for by_image in (False, True):
        for step in (Step("times", 6, 7), Step("plus", 6, 7), Step("minus", 9, 7), Step("half", 8), Step("double", 8)):
            seen, unseen = (set(words.phrases([step], by_image=by_image, unseen=flag)) for flag in (False, True))
            assert seen and unseen and not seen & unseen
    assert not set(words.spoken(7, unseen=False)) & set(words.spoken(7, unseen=True))
    assert not set(words.phrases([], by_image=True, unseen=False)) & set(words.phrases([], by_image=True, unseen=True))


def test_each_split_holds_out_what_it_says(splits):
    held = held_out_pairs()
    for name, split in splits.items():
        chains = [steps_of(entry) for entry in split.queries if entry.metadata["class"] == "thoughtful"]
        for steps in chains:
            assert all((step.key in held) == (name == "ood_pairs") for step in steps), name
            names = [step.operation for step in steps]
            unseen = set(zip(names, names[1:], strict=False)) & UNSEEN_COMPOSITIONS
            assert bool(unseen) == (name == "ood_compositions"), name
        lengths = {"ood_pairs": {1}, "ood_compositions": {2}, "ood_chains": {3, 4}}
        assert {len(steps) for steps in chains} == lengths.get(name, {1, 2}), name


def test_held_out_pairs_are_a_share_of_every_operation():
    assert Step("times", 6, 7).key == Step("times", 7, 6).key and Step("minus", 9, 7).key != Step("minus", 7, 9).key
    held = held_out_pairs()
    for operation in words.OPERATIONS:
        every = {step.key for step in number_task.known_steps(operation)}
        assert 0.1 < len({key for key in held if key[0] == operation}) / len(every) < 0.3, operation


def test_degraded_images_differ_and_others_are_dark_on_light(splits):
    import numpy as np
    from PIL import Image

    def border(split: str) -> float:
        pictures = [np.asarray(Image.open(entry.image).convert("L")) for entry in splits[split].documents[:20]]
        return float(np.mean([np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]]).mean() for p in pictures]))

    assert border("test") > 254 > 252 > border("ood_images")


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()


def test_a_seed_gives_the_same_bytes(tmp_path):
    small = {"queries": 2, "train_queries": 4, "copies": 1}
    folders = [make_number_task(tmp_path / str(run), seed=seed, **small) for run, seed in enumerate((3, 3, 4))]
    first, again, other = map(digest, folders)
    assert first == again != other


def test_the_folder_is_described_and_whole(numbers):
    assert split_names(numbers) == sorted(SPLITS)
    described = (numbers / "README.md").read_text()
    for name, plan in SPLITS.items():
        count = {"train": 60, "gate": 48}.get(name, 24)
        assert f"| `{name}` | {count} | {plan.says} |" in described
    line = json.loads((numbers / "queries.jsonl").read_text().splitlines()[0])
    assert all(f"`{field}`" in described for field in line["metadata"])


def test_a_folder_that_is_taken_and_counts_that_are_none(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is not an empty folder. Name another one."):
        make_number_task(tmp_path)
    with pytest.raises(OptionError, match="queries must be a whole number of at least 1, got 0."):
        make_number_task(tmp_path / "new", queries=0)
    with pytest.raises(OptionError, match="gate_queries must be a whole number of at least 1, got 0."):
        make_number_task(tmp_path / "new", gate_queries=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_scikit_learn_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        MissingDependency, match="^the number task draws the handwritten digits that scikit-learn ships, "
    ):
        make_number_task(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_spelled():
    assert [words.worded(number) for number in (0, 13, 20, 42, 99)] == [
        "zero", "thirteen", "twenty", "forty-two", "ninety-nine",
    ]  # fmt: skip
    assert all(value_of(words.worded(number)) == number for number in range(100))
