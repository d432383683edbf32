"""A tiny untrained model on disk, the number task in miniature, and an embedder whose vectors are known beforehand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what tests share, under pytest's importlib mode


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, Path]:
    from twn_kernels.testing import write_demo_directories

    return write_demo_directories(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def embedder(demo):
    from twn_kernels import TWNEmbedder

    return TWNEmbedder.from_pretrained(*demo)


@pytest.fixture(scope="session")
def numbers(tmp_path_factory) -> Path:
    from twn_kernels.evaluation.number_task import make_number_task

    return make_number_task(tmp_path_factory.mktemp("numbers") / "numbers", queries=24, train_queries=60, copies=1)
