"""What the tests of whole runs share: a small configuration, and a run on data that may be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from twn_kernels.testing import write_tiny_model

SMALL = {
    "base": {"steps": 3, "batch_size": 4, "save_steps": 2, "log_steps": 1},
    "data": {"train_queries": 30, "gate_queries": 4, "copies": 1},
    "method": {"max_think_tokens": 6},
    "joint": {
        "steps": 4,
        "batch_size": 6,
        "chunk_size": 4,
        "rank": 2,
        "num_queries": 2,
        "save_steps": 2,
        "log_steps": 1,
    },
    "policy": {"steps": 2, "batch_size": 2, "group_size": 2, "save_steps": 1, "log_steps": 1},
    "gate": {"steps": 3, "batch_size": 4, "share": 0.3, "hidden": [4], "save_steps": 2, "log_steps": 1},
}


def quiet(line: str) -> None:
    pass


def changed(**sections) -> dict:
    return {name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}}


def small_run(data: Path, folder: Path, **sections) -> tuple[dict, Path]:
    """Sections of a run on a tiny backbone and on data that may be changed, and its folder."""
    own = folder / "data"
    if not own.exists():
        shutil.copytree(data, own)
    made = changed(policy={"steps": 0}, **sections)
    made |= {"data": {"folder": str(own)}, "base": {"path": str(write_tiny_model(folder / "base"))}}
    return made, folder / "run"
