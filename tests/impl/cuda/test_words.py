"""Which launches share words that are never reset: one stream's, one capture's, and when they are given to others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from host_program import needs_cxx, program, run

pytestmark = needs_cxx


@pytest.mark.parametrize("flags", [(), ("-fsanitize=thread", "-g")], ids=["plain", "race-detector"])
def test_no_two_that_may_run_at_once_share_words(flags):
    assert run(program("words", *flags), TSAN_OPTIONS="halt_on_error=1 exitcode=66") == "held\n"
