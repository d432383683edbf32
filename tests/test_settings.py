"""The shared names, and the environment variables: few, and all in one place."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from twn_kernels import settings

ROOT = Path(__file__).resolve().parent.parent
MAX_VARIABLES = 5


def declared() -> set[str]:
    return {value for name, value in vars(settings).items() if name.startswith("ENV_")}


def test_both_is_the_union_of_the_adapters_and_base_is_neither():
    bits = [settings.ROUTE_BITS[name] for name in settings.ADAPTERS]
    assert sorted(bits) == [1, 2]
    assert settings.ROUTE_BITS["both"] == settings.BOTH == bits[0] | bits[1]
    assert settings.ROUTE_BITS[None] == 0


def test_the_tree_reads_at_most_five_variables_and_settings_names_them_all():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the list of tracked files is unknown")
    found, macros = set(), set()
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".svg"):
            # CMake-like includes and TORCH_ variables do not count: only names that begin with our prefix.
            text = path.read_text(encoding="utf-8", errors="ignore")
            found |= set(re.findall(r"\bTWN_[A-Z][A-Z_]*[A-Z]\b", text))
            macros |= set(re.findall(r"#define (TWN_[A-Z_]+)", text))
            assert path.suffix == ".py" or "getenv" not in text, f"{name} reads the environment"
    # Macros of the C++ sources are no variables: nothing there reads one. TWN_SM.. says what a build holds.
    assert {name for name in found - macros if not name.startswith("TWN_SM")} == declared()
    assert len(declared()) <= MAX_VARIABLES


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("blas", "blas")])
def test_the_override_of_auto(monkeypatch, value, expected):
    monkeypatch.delenv(settings.ENV_IMPL, raising=False)
    if value is not None:
        monkeypatch.setenv(settings.ENV_IMPL, value)
    assert settings.impl_override() == expected
