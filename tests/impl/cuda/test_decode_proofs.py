"""What the decode kernel's plan and layouts promise, proved over many shapes; its flags under a race detector."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from host_program import needs_cxx, program, run

pytestmark = needs_cxx


def test_everything_is_covered_once_and_nothing_collides():
    assert run(program("decode_proof")) == "9600 plans, 8 layouts\n"


@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_race_nowhere_and_wait_for_nobody_that_waits_for_them(seed):
    """Few blocks run at a time, in any order: a wait that needs another block to be resident would never end."""
    stress = program("decode_stress", "-fsanitize=thread", "-g")
    assert run(stress, 25, seed, TSAN_OPTIONS="halt_on_error=1 exitcode=66") == "25 rounds\n"


def test_more_rounds_without_the_detector():
    assert run(program("decode_stress"), 300, 3) == "300 rounds\n"
