"""Arithmetic in words: numbers below one hundred, chains of operations on them, and the thought that works them out.

Owns the language of the number task: which phrasings belong to training and which are held out. Images, splits and
files are :mod:`twn_kernels.evaluation.number_task`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BINARY", "OPERATIONS", "Step", "applied", "phrases", "spoken", "thought", "worded", "worked"]

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ONES += ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

# {x} is the first operand in words, or "this number" beside an image of it; {n} the second.
# By operation: phrasings seen in training, and one or more that only tests use.
_FIRST = {
    "times": (("{x} times {n}", "{x} multiplied by {n}"), ("the product of {x} and {n}",)),
    "plus": (("{n} more than {x}", "{x} plus {n}"), ("the sum of {x} and {n}",)),
    "minus": (("{n} less than {x}", "{x} minus {n}"), ("{x} with {n} taken away",)),
    "half": (("half of {x}", "{x} divided by two"), ("one of two equal parts of {x}",)),
    "double": (("double {x}", "twice {x}"), ("{x} and as much again",)),
}
# Beside an image, words alone may carry the operation: an image of 6 with "times seven".
_BESIDE_IMAGE = {"times": "times {n}", "plus": "plus {n}", "minus": "minus {n}", "half": "halved", "double": "doubled"}
_NEXT = {"times": "times {n}", "plus": "plus {n}", "minus": "minus {n}", "half": "halved", "double": "doubled"}
# A plain vector cannot fall back on the backbone's own knowledge of words as a thought can, so that it needs several to
# learn from before it takes a new one for the same.
_NUMBER = (
    ("{x}", "the number {x}", "a picture of {x}", "{x} in digits"),
    ("a handwritten {x}", "the digits of {x}"),
)
_SAME = (
    ("this number", "the same number", "the number shown here", "another picture of this number", "what this says"),
    ("another hand writing this",),
)

OPERATIONS = tuple(_FIRST)
BINARY = ("times", "plus", "minus")


class Step(NamedTuple):
    """One operation: its name, the value that it is applied to, its second operand (0 where it has none)."""

    operation: str
    before: int
    operand: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        """The same for pairs that are the same sum or product."""
        low, high = sorted((self.before, self.operand))
        return (self.operation, low, high) if self.operation in ("times", "plus") else tuple(self)


def worded(number: int) -> str:
    """A number from 0 to 99 in words.

    >>> worded(42)
    'forty-two'
    """
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def applied(step: Step) -> int | None:
    """The value after a step; None where it is no whole number from 0 to 99.

    >>> applied(Step("half", 84)), applied(Step("half", 7)), applied(Step("times", 50, 2))
    (42, None, None)
    """
    operation, x, n = step
    value = {"times": x * n, "plus": x + n, "minus": x - n, "double": 2 * x}.get(operation)
    if operation == "half":
        value = x // 2 if x % 2 == 0 else None
    return value if value is not None and 0 <= value <= 99 else None


def phrases(steps: Sequence[Step], *, by_image: bool, unseen: bool) -> list[str]:
    """The wordings of a chain.

    Args:
        steps: none for the number itself; each applies to the value after the one before.
        by_image: the first operand is an image beside the words.
        unseen: the wordings that training never uses. Of a chain only its first step has such.
    """
    if not steps:
        return list(_SAME[unseen]) if by_image else []
    first, *rest = steps
    wordings = list(_FIRST[first.operation][unseen])
    x = "this number" if by_image else worded(first.before)
    if by_image and not unseen:
        wordings.append(_BESIDE_IMAGE[first.operation])
    tail = "".join(f", then {_NEXT[step.operation].format(n=worded(step.operand))}" for step in rest)
    return [wording.format(x=x, n=worded(first.operand)) + tail for wording in wordings]


def spoken(number: int, *, unseen: bool) -> list[str]:
    """The wordings of a number by itself."""
    return [wording.format(x=worded(number)) for wording in _NUMBER[unseen]]


def thought(start: int, steps: Sequence[Step], *, by_image: bool) -> str:
    """What is written before the answer is searched for: read, work out, say what to find. The answer is its last
    number.

    A model that always thinks writes about as much where nothing is to be worked out, so that all thoughts have the
    same parts and are about as long.

    >>> thought(6, [Step("times", 6, 7)], by_image=True)
    'the image shows 6. 6 times 7 is 42. so find a 4 and a 2: 42.'
    >>> thought(42, [], by_image=False)
    'forty-two is 42. nothing is to be worked out, it stays 42. so find a 4 and a 2: 42.'
    """
    answer = applied(steps[-1]) if steps else start
    working = worked(start, steps, by_image=by_image)
    if not steps:
        working += f" nothing is to be worked out, it stays {start}."
    return f"{working} so find {' and '.join(f'a {digit}' for digit in str(answer))}: {answer}."


def worked(start: int, steps: Sequence[Step], *, by_image: bool) -> str:
    """The working alone, as a reply to someone who asks for the number.

    >>> worked(6, [Step("times", 6, 7), Step("half", 42)], by_image=True)
    'the image shows 6. 6 times 7 is 42. half of 42 is 21.'
    """
    parts = [f"the image shows {start}." if by_image else f"{worded(start)} is {start}."]
    for step in steps:
        value = applied(step)
        if step.operation in BINARY:
            parts.append(f"{step.before} {step.operation} {step.operand} is {value}.")
        else:
            parts.append(f"{step.operation}{' of' * (step.operation == 'half')} {step.before} is {value}.")
    return " ".join(parts)
