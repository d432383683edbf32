"""Real PEFT files of a tiny Llama, made once, and a copy of them for each test to damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from twn_kernels import inspect_checkpoint, load_checkpoint
from twn_kernels.errors import CheckpointError
from twn_kernels.testing.tiny_models import tiny_model
from twn_kernels.testing.twn_directory import write_twn_directory


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def pristine(model, tmp_path_factory) -> Path:
    return write_twn_directory(
        tmp_path_factory.mktemp("pristine") / "twn",
        model,
        rank={"reasoning": 4, "embedding": 8},
        dropout={"reasoning": 0.05, "embedding": 0.0},
        config={"think_threshold": 0.4, "graph": "reencode"},
    )


@pytest.fixture
def twn(pristine, tmp_path) -> Path:
    """A directory of its own for the test, good when it gets it."""
    return Path(shutil.copytree(pristine, tmp_path / "twn"))


@pytest.fixture
def edit_config():
    """Change fields of an ``adapter_config.json``; None removes one."""

    def edit(path: Path, **changes) -> None:
        stated = json.loads(path.read_text())
        stated.update(changes)
        path.write_text(json.dumps({name: value for name, value in stated.items() if value is not ...}))

    return edit


@pytest.fixture
def edit_weights():
    """Pass the tensors of a safetensors file through a function."""

    def edit(path: Path, change) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(change(tensors) or tensors, path, metadata={"format": "pt"})

    return edit


@pytest.fixture
def message():
    """The error of loading a directory; inspecting it reports the same problems and does not raise."""

    def error_of(directory: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(directory)
        report = inspect_checkpoint(directory)
        assert not report.ok
        assert all(problem in str(caught.value) for problem in report.problems)
        return str(caught.value)

    return error_of
