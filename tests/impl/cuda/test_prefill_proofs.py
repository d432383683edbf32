"""What the prefill kernel's plan and layouts promise, proved over many shapes; its roles under a race detector."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from host_program import needs_cxx, program, run

pytestmark = needs_cxx


def test_everything_is_covered_once_and_nothing_collides():
    assert run(program("prefill_proof")) == "800 plans\n"


@pytest.mark.parametrize(("sanitizer", "seed"), [("thread", 1), ("thread", 2), ("address", 3)])
def test_roles_race_nowhere_and_stay_in_bounds(sanitizer, seed):
    """Stages given back too early, S read before its tag, an entry of the ring told over: all are races of threads."""
    stress = program("prefill_stress", f"-fsanitize={sanitizer}", "-g")
    assert run(stress, 8, seed, seconds=240, TSAN_OPTIONS="halt_on_error=1 exitcode=66") == "8 rounds\n"


def test_more_rounds_without_the_detector():
    assert run(program("prefill_stress"), 30, 3) == "30 rounds\n"
