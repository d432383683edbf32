"""Two LoRA adapters on one frozen multimodal model, at (nearly) no cost.

Public names are imported when they are first used, so ``import twn_kernels`` needs no GPU, no Triton, no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint",
    "TWNConfig": "checkpoint",
    "TWNEmbedder": "pipeline",
    "adapters_of": "patching",
    "inspect_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "patch": "patching",
    "route": "patching",
    "save_checkpoint": "checkpoint",
    "status": "patching",
    "unpatch": "patching",
}
_SUBPACKAGES = ("checkpoint", "errors", "modules", "ops", "patching", "pipeline", "shipped", "testing")

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from twn_kernels.checkpoint import Checkpoint, TWNConfig, inspect_checkpoint, load_checkpoint, save_checkpoint
    from twn_kernels.patching import adapters_of, patch, route, status, unpatch
    from twn_kernels.pipeline import TWNEmbedder


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f"twn_kernels.{_HOME[name]}"), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"twn_kernels.{name}")
    else:
        from twn_kernels.errors import did_you_mean

        raise AttributeError(f"module twn_kernels has no {name!r}.{did_you_mean(name, [*_HOME, *_SUBPACKAGES])}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
