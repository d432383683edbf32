"""Values of options, checked while the command line is parsed, so that a wrong one is wrong usage (exit code 2)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from twn_kernels.errors import did_you_mean, quoted

__all__ = ["DTYPES", "count", "fraction", "not_negative", "one_of", "whole"]

DTYPES = ("auto", "float32", "float16", "bfloat16")


def fraction(word: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be a number from 0 to 1, got "{word}".')
    return value


def count(word: str) -> int:
    """A whole number, 1 or more."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number, 1 or more, got "{word}".')
    return value


def whole(word: str) -> int:
    """A whole number, 0 or more."""
    try:
        value = int(word)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f'must be a whole number, 0 or more, got "{word}".')
    return value


def not_negative(word: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f'must be a number of 0 or more, got "{word}".')
    return value


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A reader of one of ``names``."""

    def read(word: str) -> str:
        if word not in names:
            near = did_you_mean(word, names)
            raise argparse.ArgumentTypeError(f'must be one of {quoted(names)}, got "{word}".{near}')
        return word

    return read
