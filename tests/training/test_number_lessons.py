"""The lessons of the small backbone: right, repeatable, and free of what the number task holds out."""

from __future__ import annotations

import re

import pytest
import torch

from twn_kernels.evaluation import number_words as words
from twn_kernels.evaluation.number_task import UNSEEN_COMPOSITIONS, held_out_pairs, known_steps
from twn_kernels.evaluation.number_words import OPERATIONS, Step
from twn_kernels.training.number_base import new_number_base
from twn_kernels.training.number_lessons import Lessons

COUNT = 3000
_STEP = re.compile(r"(?:(\d+) (times|plus|minus) (\d+)|(half of|double) (\d+)) is (\d+)\.")
_THINK = ("<think>", "</think>")
_VALUES = {
    "times": lambda a, b: a * b,
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "half": lambda a, _: a // 2,
    "double": lambda a, _: 2 * a,
}


@pytest.fixture(scope="module")
def lessons() -> list:
    made = Lessons(COUNT)
    return [made[index] for index in range(COUNT)]


def worked_out(lesson) -> str:
    """The reply without what marks a thought."""
    reply = lesson.reply
    if reply.startswith(_THINK[0]):
        assert reply.endswith(_THINK[1])
        reply = reply[len(_THINK[0]) : -len(_THINK[1])]
    assert "think>" not in reply
    return reply


def steps_of(reply: str) -> list[tuple[Step, int]]:
    """Steps and values that a reply states."""
    found = []
    for before, binary, operand, unary, only, value in _STEP.findall(reply):
        step = Step(binary, int(before), int(operand)) if binary else Step(unary.split()[0], int(only))
        found.append((step, int(value)))
    return found


def number_of(text: str) -> int:
    """Read a number in words without the code that writes them."""
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    ones = (ones + "seventeen eighteen nineteen").split()
    if text in ones:
        return ones.index(text)
    tens, _, rest = text.partition("-")
    value = 10 * ("twenty thirty forty fifty sixty seventy eighty ninety".split().index(tens) + 2)
    return value + (ones.index(rest) if rest else 0)


def test_each_index_gives_one_lesson_whatever_was_asked_before(lessons):
    again, other = Lessons(COUNT), Lessons(COUNT, seed=1)
    different = 0
    for index in (2999, 7, 1500, 7, 0):
        one, known = again[index], lessons[index]
        assert (one.text, one.reply) == (known.text, known.reply)
        assert (one.image is None) == (known.image is None)
        assert one.image is None or one.image.tobytes() == known.image.tobytes()
        different += other[index].reply != known.reply
    assert len(again) == COUNT and different


def test_every_reply_is_right(lessons):
    """Worked out afresh: each step, each value that goes on, the number that a text names."""
    stated = 0
    for lesson in lessons:
        reply = worked_out(lesson)
        sentences = re.findall(r"[^.]+\.", reply)
        steps = steps_of(reply)
        for step, value in steps:
            assert _VALUES[step.operation](step.before, step.operand) == value and 0 <= value <= 99, lesson
            assert step.operation != "half" or step.before % 2 == 0, lesson
        opened = re.match(r"(?:the image shows (\d+)|([a-z-]+) is (\d+))\.", reply)
        if opened and opened[2]:
            assert number_of(opened[2]) == int(opened[3]), lesson
            assert opened[2] in lesson.text, lesson
        if opened and steps:
            assert steps[0][0].before == int(opened[1] or opened[3]), lesson
        if lesson.reply != reply:  # a thought also says what to find, and where nothing is to be worked out
            value = steps[-1][1] if steps else int(opened[1] or opened[3])
            if not steps:
                assert sentences.pop(1) == f" nothing is to be worked out, it stays {value}.", lesson
            digits = re.fullmatch(r" so find a (\d)(?: and a (\d))?: (\d+)\.", sentences.pop())
            assert digits[1] + (digits[2] or "") == digits[3] == str(value), lesson
        assert len(sentences) == len(steps) + bool(opened), lesson
        stated += len(steps)
    assert stated > COUNT / 2


def test_questions_ask_for_what_the_reply_states(lessons):
    kinds = {"reading": 0, "word": 0, "facts": 0, "step": 0}

    def wordings(of, *about, **how) -> list[str]:
        return [text for unseen in (False, True) for text in of(*about, unseen=unseen, **how)]

    for lesson in lessons:
        reply = worked_out(lesson)
        steps = [step for step, _ in steps_of(reply)]
        opened = re.match(r"the image shows|[a-z-]+ is \d+\.", reply)
        if not opened:
            kinds["facts"] += 1
            assert lesson.image is None and reply == lesson.reply
            assert lesson.text == re.sub(r" is \d+\. ", ", ", reply + " ").removesuffix(", ")
        elif steps:
            kinds["step"] += 1
            assert len(steps) == 1 and lesson.text in wordings(words.phrases, steps, by_image=bool(lesson.image))
        else:
            kinds["reading" if lesson.image else "word"] += 1
            number = int(re.findall(r"\d+", reply)[0])
            asked = ["", *wordings(words.phrases, [], by_image=True)]
            assert lesson.text in (asked if lesson.image else wordings(words.spoken, number))
    assert all(count > 90 for count in kinds.values()), kinds
    assert 0.1 < sum(lesson.reply.startswith(_THINK[0]) for lesson in lessons) / COUNT < 0.4


@pytest.mark.parametrize("seed", [0, 3])
def test_no_held_out_pair_is_taught(seed, lessons):
    made = Lessons(COUNT, seed=seed)
    taught = lessons if seed == 0 else [made[index] for index in range(600)]
    keys = {step.key for lesson in taught for step, _ in steps_of(lesson.reply)}
    assert not keys & held_out_pairs()
    # And the test can tell: a fair part of the others is met.
    others = {step.key for name in OPERATIONS for step in known_steps(name)} - held_out_pairs()
    assert len(keys & others) > (0.5 if seed == 0 else 0.15) * len(others)


def test_no_chain_is_taught_least_of_all_one_that_is_held_out(lessons):
    """Facts in a row may not happen to go on from one another by two operations that training never shows so."""
    for lesson in lessons:
        steps = steps_of(lesson.reply)
        for (first, value), (second, _) in zip(steps, steps[1:], strict=False):
            unseen = (first.operation, second.operation) in UNSEEN_COMPOSITIONS
            assert not (unseen and second.before == value), lesson.reply
        assert ", then" not in lesson.text


def test_pictures_are_of_training_hands():
    class Guarded(dict):
        def __getitem__(self, key):
            seen.add(key)
            return super().__getitem__(key)

    seen: set[tuple[str, str]] = set()
    made = Lessons(COUNT)
    made._pools = made._pools._replace(places=Guarded(made._pools.places))
    shown = [made[index].image for index in range(200)]
    assert sum(image is not None for image in shown) > 50
    assert seen == {("train", "document"), ("train", "query")}
    assert all(image.size == (64, 64) and image.mode == "RGB" for image in shown if image)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a new backbone, its model and the processor read from disk."""
    from twn_kernels.pipeline.processor import load_processor

    folder = tmp_path_factory.mktemp("base")
    model = new_number_base(folder)
    model.save_pretrained(folder)
    return folder, model, load_processor(folder)


def test_the_backbone_is_small_and_of_its_seed(base, tmp_path):
    folder, model, _ = base
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration" and model.dtype == torch.float32
    before = torch.get_rng_state()
    same, other = new_number_base(tmp_path, seed=0), new_number_base(tmp_path, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(model.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert any(not torch.equal(left, right) for left, right in zip(model.parameters(), other.parameters(), strict=True))


def test_every_word_of_the_task_is_one_token(base):
    """With the space before it, or without one where a text begins."""
    _, _, processor = base
    texts: list[str] = []
    for unseen in (False, True):
        texts += [text for number in range(100) for text in words.spoken(number, unseen=unseen)]
        texts += words.phrases([], by_image=True, unseen=unseen)
        for first in OPERATIONS:
            for second in OPERATIONS:
                chain = [Step(name, 40, 4 if name in words.BINARY else 0) for name in (first, second)]
                for by_image in (False, True):
                    texts += words.phrases(chain, by_image=by_image, unseen=unseen)
                    texts.append(words.thought(40, chain, by_image=by_image))
    texts.append(words.thought(40, [], by_image=True))
    found = {word for text in texts for word in re.findall("(?:^| )[a-z]+", text)}
    assert len(found) > 80
    assert [word for word in sorted(found) if len(processor.token_ids(word)) != 1] == []
    assert len(processor.token_ids("</think>")) == len(processor.token_ids("<think>")) == 1


def test_prompts_go_through_processor_and_back(base, lessons):
    """Text comes back as it went in; a picture is as many tokens as the model makes of it."""
    folder, model, processor = base
    with_image = next(lesson for lesson in lessons if lesson.image and lesson.text)
    text = next(lesson for lesson in lessons if lesson.image is None)
    values = [{"text": with_image.text, "image": with_image.image}, text.text]
    batch = processor.batch([processor.parse(value, place) for place, value in enumerate(values)])
    for ids, lesson in zip(batch.tensors["input_ids"], (with_image, text), strict=True):
        assert lesson.text in processor.raw_text_of(ids)
        assert processor.text_of(processor.token_ids(lesson.reply)) == lesson.reply
    assert int((batch.tensors["input_ids"] == model.config.image_token_id).sum()) == 16
    assert batch.tensors["image_grid_thw"].tolist() == [[1, 8, 8]]
    with torch.no_grad():
        assert model.eval()(**batch.tensors).logits.isfinite().all()


def test_a_lesson_is_collated_with_its_reply_as_labels(base, lessons):
    from twn_kernels.training.teaching import LessonCollator

    _, model, processor = base
    batch = LessonCollator(processor)(lessons[:8])
    text = processor.raw_text_of
    for ids, labels, lesson in zip(batch["input_ids"], batch["labels"], lessons[:8], strict=True):
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        assert text(labels[learned]).startswith(lesson.reply)
        assert lesson.reply not in text(ids[~learned])
        assert text(ids[~learned]).rstrip("\n").endswith("assistant")
