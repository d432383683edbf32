"""What the small backbone learns before it is frozen: to read digits and number words, and single steps of arithmetic.

A backbone stands for a pretrained model: it can see, calculate, and think before it replies as Qwen3's models do, and
knows nothing of embedding, of chains of steps or of when to think. It knows every wording of the number task, as a
pretrained model knows its language; training the adapters never uses the ones that the task holds out. Operand pairs,
compositions and hands that the task holds out are in no lesson.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from twn_kernels.evaluation import number_words as words
from twn_kernels.evaluation.number_images import drawn, load_pools
from twn_kernels.evaluation.number_task import UNSEEN_COMPOSITIONS, held_out_pairs, known_steps
from twn_kernels.evaluation.number_words import BINARY, OPERATIONS, Step, applied
from twn_kernels.testing.qwen_processor import THINK_TOKENS

__all__ = ["Lesson", "Lessons"]

_MOST_FACTS = 3
# Tokens that no lesson shows share one direction in the end, and no adapter can tell them apart.
_THOUGHT_SHARE = 0.3
_POOLS = (("train", "document"), ("train", "query"))


class Lesson(NamedTuple):
    """One turn of a user and the reply to it.

    Attributes:
        text, image: of the user; at least one of them.
        reply: of the model.
    """

    text: str
    image: Image.Image | None
    reply: str


class Lessons:
    """Lessons by index; each index always gives the same one.

    Args:
        count: how many there are.
        seed: of what they hold.
    """

    def __init__(self, count: int, *, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        self._pools = load_pools()
        held = held_out_pairs()
        self._steps = {name: [step for step in known_steps(name) if step.key not in held] for name in OPERATIONS}
        self._kinds = {self._reading: 0.4, self._facts: 0.2, self._step: 0.35, self._word: 0.05}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Lesson:
        choose = random.Random(f"lesson {self.seed}: {index}")
        make = choose.choices(list(self._kinds), list(self._kinds.values()))[0]
        return make(choose)

    def _picture(self, number: int, choose: random.Random) -> Image.Image:
        pixels, _ = drawn(number, self._pools, choose.choice(_POOLS), choose, varied=True)
        return Image.fromarray(pixels).convert("RGB")

    def _any_step(self, choose: random.Random) -> Step:
        return choose.choice(self._steps[choose.choice(OPERATIONS)])

    def _reading(self, choose: random.Random) -> Lesson:
        number = choose.randrange(100)
        text = choose.choice(["", *_wordings(words.phrases, [], by_image=True)])
        return Lesson(text, self._picture(number, choose), _reply(number, [], True, choose))

    def _word(self, choose: random.Random) -> Lesson:
        number = choose.randrange(100)
        text = choose.choice(_wordings(words.spoken, number))
        return Lesson(text, None, _reply(number, [], False, choose))

    def _facts(self, choose: random.Random) -> Lesson:
        steps: list[Step] = []
        for _ in range(choose.randint(1, _MOST_FACTS)):
            step = self._any_step(choose)
            if not (steps and _goes_on(steps[-1], step)):
                steps.append(step)
        asked = ", ".join(_in_digits(step) for step in steps)
        return Lesson(asked, None, " ".join(f"{_in_digits(step)} is {applied(step)}." for step in steps))

    def _step(self, choose: random.Random) -> Lesson:
        step, by_image = self._any_step(choose), choose.random() < 0.5
        text = choose.choice(_wordings(words.phrases, [step], by_image=by_image))
        image = self._picture(step.before, choose) if by_image else None
        return Lesson(text, image, _reply(step.before, [step], by_image, choose))


def _reply(start: int, steps: list[Step], by_image: bool, choose: random.Random) -> str:
    """The working, or a thought and nothing after it."""
    if choose.random() < _THOUGHT_SHARE:
        return words.thought(start, steps, by_image=by_image).join(THINK_TOKENS)
    return words.worked(start, steps, by_image=by_image)


def _wordings(words_of: Callable[..., list[str]], *of: Any, **how: Any) -> list[str]:
    return [text for unseen in (False, True) for text in words_of(*of, unseen=unseen, **how)]


def _goes_on(first: Step, second: Step) -> bool:
    """Whether two facts happen to be one after the other of the compositions that the task holds out."""
    return second.before == applied(first) and (first.operation, second.operation) in UNSEEN_COMPOSITIONS


def _in_digits(step: Step) -> str:
    if step.operation in BINARY:
        return f"{step.before} {step.operation} {step.operand}"
    return f"{step.operation}{' of' * (step.operation == 'half')} {step.before}"
