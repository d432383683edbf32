"""Tiny models with non-zero adapters as trainees, beside the embedder whose vectors they must give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # what tests share, under pytest's importlib mode


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """``directories(family)``: base model and TWN directory, written on first use; every ``lora_B`` is non-zero."""
    import functools

    from twn_kernels.testing import write_demo_directories

    @functools.cache
    def write(family: str) -> tuple[Path, Path]:
        return write_demo_directories(tmp_path_factory.mktemp(family), family=family)

    return write


@pytest.fixture
def embedder_of(directories):
    """``embedder_of(family, dtype, impl=..., **method)``: a new embedder, with fields of its configuration replaced."""
    import dataclasses

    from twn_kernels import TWNEmbedder

    def load(family: str, dtype: torch.dtype = torch.float32, *, impl: str = "auto", **method) -> TWNEmbedder:
        embedder = TWNEmbedder.from_pretrained(*directories(family), dtype=dtype, device="cpu", impl=impl)
        embedder.config = dataclasses.replace(embedder.config, **method)
        return embedder

    return load


@pytest.fixture
def trainee_of():
    """``trainee_of(embedder, roles)``: the embedder's model, queries and method as a trainer sees them."""
    from twn_kernels.training.joint_forward import Roles, Trainee

    def make(embedder, roles: Roles | None = None, *, opening: list[int] | None = None) -> Trainee:
        if opening is None:
            opening = embedder.processor.token_ids(embedder.config.think_prompt)
        queries = embedder.checkpoint.queries.to(next(embedder.model.parameters()).dtype)
        return Trainee(embedder.model, queries, embedder.config, opening, roles or Roles())

    return make


@pytest.fixture(scope="session")
def inputs_of():
    """``inputs_of(family)``: texts of unequal lengths and, where the family sees, images in two of the rows."""
    import numpy as np
    from PIL import Image

    from twn_kernels.testing.tiny_models import VISION_FAMILIES

    texts = ["a red flower", "What is in the picture? There is a number on the page, and the number is seven.", "7"]
    random = np.random.default_rng(0)
    first, second = (
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((32, 48), (24, 64))
    )

    def give(family: str) -> list:
        if family not in VISION_FAMILIES:
            return [*texts, "Find the document that answers the question."]
        return [texts[0], {"image": first, "text": texts[2]}, texts[1], second, texts[2]]

    return give
