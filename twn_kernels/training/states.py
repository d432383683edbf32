"""A stage's states on disk: written whole or not at all, and checked before a run goes on from one.

A state is a folder ``checkpoint-<step>``. It is written elsewhere and then renamed, so that a run that is stopped while
it saves leaves the state before. It lists its files with their digests, so that no run goes on from a damaged one.
Owns the folder and its file of learned tensors; the other files are the Trainer's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from twn_kernels.errors import CheckpointError

__all__ = [
    "WEIGHTS_FILE",
    "drawn",
    "learned_of",
    "load_learned",
    "newest_state",
    "publish",
    "save_learned",
    "staging_folder",
    "undraw",
]

WEIGHTS_FILE = "learned.safetensors"
_DIGESTS_FILE = "sha256.json"
_STAGING = "saving"


def staging_folder(out: Path) -> Path:
    """An empty folder in ``out`` to write a state into; whatever a stopped run left there is removed."""
    folder = out / _STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(state: Path, out: Path) -> Path:
    """Seal a state that was written below the staging folder and move it into ``out``, in place of one of its name."""
    digests = {path.name: _digest(path) for path in sorted(state.iterdir())}
    (state / _DIGESTS_FILE).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    final = out / state.name
    if final.exists():
        shutil.rmtree(final)
    os.replace(state, final)
    shutil.rmtree(state.parent, ignore_errors=True)
    return final


def newest_state(out: Path) -> Path | None:
    """The state of the last step in ``out``, checked file by file; None where there is none.

    Raises:
        CheckpointError: the newest was not written by a stage, or is not as it was written.
    """
    found = get_last_checkpoint(str(out)) if out.is_dir() else None
    if found is None:
        return None
    state = Path(found)
    try:
        digests = dict(json.loads((state / _DIGESTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(
            f'"{state}" is no state of this stage: {_DIGESTS_FILE}, which lists its files, is missing or damaged. '
            "Remove the folder to go on from the state before it, or from the start where there is none."
        ) from None
    for name, digest in digests.items():
        if not (state / name).is_file() or _digest(state / name) != digest:
            what = "is not as it was written" if (state / name).is_file() else "is missing"
            raise CheckpointError(
                f'"{state}" is damaged: its file {name} {what}. '
                "Remove the folder to go on from the state before it, or from the start where there is none."
            )
    return state


def _digest(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            whole.update(piece)
    return whole.hexdigest()


def drawn() -> tuple[Any, ...]:
    """How far the global generators have got: Python's, numpy's, torch's of the CPU and of every GPU."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpus


def undraw(before: tuple[Any, ...]) -> None:
    """Take the global generators back to where :func:`drawn` found them."""
    python, numpy, cpu, gpus = before
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)


def learned_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save_learned(model: nn.Module, folder: Path) -> None:
    """Write the parameters that learn, and nothing else, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(learned_of(model), folder / WEIGHTS_FILE)


def load_learned(model: nn.Module, folder: Path) -> None:
    """Copy what :func:`save_learned` wrote into the parameters that learn.

    Raises:
        CheckpointError: the file is missing, or its names or shapes are not those of the model.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f'"{folder}" holds no {WEIGHTS_FILE}; it is no state of this stage. Remove it.')
    tensors = load_file(path)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(set(own) ^ set(tensors)) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise CheckpointError(
            f'"{path}" belongs to another model: {len(wrong)} of its tensors do not fit, the first is "{wrong[0]}". '
            "Train into an empty folder, or with the configuration that wrote it."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
