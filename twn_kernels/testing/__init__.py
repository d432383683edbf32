"""Tools to test against: the oracle, tiny models of real classes, checkpoints on disk. Importable by users.

Public names are imported when they are first used.
"""

from __future__ import annotations

import importlib

from twn_kernels.errors import did_you_mean

_HOME = {
    "assert_as_good_as_torch": "oracle",
    "write_demo_directories": "demo_directories",
    "write_tiny_model": "tiny_directory",
    "write_twn_directory": "twn_directory",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module twn_kernels.testing has no {name!r}.{did_you_mean(name, _HOME)}")
    value = getattr(importlib.import_module(f"twn_kernels.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
