"""Which kernel of the extension serves a call, and on which rows: a pure function of plain values, printable as it is.

What a call must offer at all is :mod:`.fitness`' business; launching is :mod:`.launch`'s.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

__all__ = ["DECODE", "DECODE_ROWS", "HOPPER", "MIN_CAPABILITY", "PREFILL", "Dispatch", "Problem", "covers", "dispatch"]

DECODE, PREFILL = "decode_group", "prefill_group"
DECODE_ROWS = 64  # of a launch of the decode kernel: its contract
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores begin there
HOPPER = (9, 0)  # 9.0a code, which the prefill kernel is, runs there and nowhere else

_PREFILL_SOURCE = "prefill_sm90a"  # left out of a build whose architectures do not name 9.0


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    Attributes:
        tokens: rows of the input.
        capability: of the GPU.
        kernels: in the build, as its record lists them.
    """

    tokens: int
    capability: tuple[int, int]
    kernels: str


@dataclass(frozen=True)
class Dispatch:
    """What is launched.

    Attributes:
        kernel: :data:`DECODE`, :data:`PREFILL`; None where there is no row.
        rows: of one launch at most.
        launches: of the kernel; each reads the weights.
        why: in words.
    """

    kernel: str | None
    rows: int
    launches: int
    why: str


@functools.lru_cache(maxsize=1024)
def dispatch(problem: Problem) -> Dispatch:
    """The kernel and the rows of a launch.

    Above 64 rows, a GPU or a build without the prefill kernel gets the decode kernel in slices: right, and slow, as
    every slice reads the weights again.
    """
    tokens = problem.tokens
    if tokens == 0:
        return Dispatch(None, 0, 0, "no row, nothing is launched")
    if tokens <= DECODE_ROWS:
        return Dispatch(DECODE, tokens, 1, f"{tokens} rows, of at most {DECODE_ROWS} in one launch")
    if problem.capability == HOPPER and _PREFILL_SOURCE in problem.kernels.split():
        return Dispatch(PREFILL, tokens, 1, f"{tokens} rows on sm_90")
    on_hopper = problem.capability == HOPPER
    has = "the build has no code for 9.0a" if on_hopper else "the prefill kernel is for sm_90 alone"
    slices = -(-tokens // DECODE_ROWS)
    return Dispatch(DECODE, DECODE_ROWS, slices, f"{tokens} rows in slices of {DECODE_ROWS}: {has}")


@functools.lru_cache(maxsize=64)
def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for ``archs`` has code that a GPU of ``capability`` runs."""
    for name in re.split(r"[;,\s]+", archs.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            continue
        of = int(found[1]), int(found[2])
        if found[3]:
            if capability == of:
                return True
        elif capability >= of and (capability[0] == of[0] or found[4]):
            return True
    return False
