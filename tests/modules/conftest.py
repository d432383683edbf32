"""Make the groups beside these tests importable under pytest's importlib mode."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from packed_groups import draw_members


@pytest.fixture(params=[True, False], ids=["shared", "shadowed"])
def draw(request):
    """``draw_members`` for both states of a packed ``lora_B``: on a CPU, those are shared that require no grad."""
    return lambda *args: draw_members(*args, frozen=request.param)
