"""Tiny models of real classes with their checkpoints on disk, built once a session for each family and kind of gate."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from twn_kernels import TWNEmbedder
from twn_kernels.pipeline import decode_choice, loading
from twn_kernels.pipeline.captured_steps import CapturedSteps
from twn_kernels.pipeline.decoding import Decoding
from twn_kernels.testing.reference_pipeline import ReferenceResult, reference_encode
from twn_kernels.testing.tiny_directory import write_tiny_model
from twn_kernels.testing.twn_directory import write_twn_directory

sys.path.insert(0, str(Path(__file__).parent))  # what tests share, under pytest's importlib mode
TEXTS = ["a red flower", "The old temple stands above the trees; its roofs are gold and red.", "seven"]


@dataclass
class World:
    """One model in fp32 inside an embedder, the same in fp64, and the inputs to embed."""

    base: Path
    twn: Path
    embedder: TWNEmbedder
    model64: torch.nn.Module
    inputs: list
    known: dict[tuple, ReferenceResult] = field(default_factory=dict)

    def reference(self, index: int, config, *, think: bool, dtype=torch.float32) -> ReferenceResult:
        """What the slow pipeline gives for one input; computed once, since it depends on nothing else."""
        key = (index, repr(config), think, dtype)
        if key not in self.known:
            self.known[key] = self._reference(index, config, think, dtype)
        return self.known[key]

    def _reference(self, index: int, config, think: bool, dtype: torch.dtype) -> ReferenceResult:
        embedder = self.embedder
        processor = embedder.processor
        batch = processor.batch([processor.parse(self.inputs[index], 0)], None)
        model = embedder.model if dtype == torch.float32 else self.model64

        def closes(ids: list[int]) -> bool:
            return any(
                stop == ids[-1] if isinstance(stop, int) else stop in processor.raw_text_of(ids)
                for stop in config.think_end
            )

        return reference_encode(
            model,
            dict(batch.tensors),
            dataclasses.replace(embedder.checkpoint, config=config),
            think=think,
            opening=processor.token_ids(config.think_prompt),
            closes=closes,
            end_of_sequence=loading.end_of_sequence(embedder.model, processor),
            max_think_tokens=config.max_think_tokens,
        )


def images() -> list:
    from PIL import Image

    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((32, 48), (40, 40), (24, 64))
    ]


def video() -> list:
    return [image.resize((32, 32)) for image in images()] + [images()[0].resize((32, 32))]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """``world(family, gate_input)``: built on first use."""

    @functools.cache
    def build(family: str, gate_input: str = "mean") -> World:
        home = tmp_path_factory.mktemp(family)
        base = write_tiny_model(home / "base", family=family)
        plain = loading.base_model(base, torch.float32, "cpu", {})
        options = {"rank": {"reasoning": 8, "embedding": 4}, "gate_input": gate_input, "num_queries": 3}
        twn = write_twn_directory(home / "twn", plain, **options)
        embedder = TWNEmbedder.from_pretrained(base, twn, dtype="float32", device="cpu")
        model64 = TWNEmbedder.from_pretrained(base, twn, dtype=torch.float64, device="cpu").model
        inputs = list(TEXTS)
        if "vl" in family:
            first, second, third = images()
            inputs += [
                first,
                {"image": [second, third], "text": "which number"},
                {"video": video(), "text": "what moves"},
            ]
        return World(base, twn, embedder, model64, inputs)

    return build


@pytest.fixture
def decoding(monkeypatch):
    """``decoding(embedder, mode)``: decode thoughts that way for the rest of the test.

    ``"replayed"`` is ``"cuda_graph"`` with a recording of the step's operators instead of a captured graph.
    """

    def use(embedder: TWNEmbedder, mode: str) -> None:
        if mode == "replayed":
            from stepping import recorded_capture

            monkeypatch.setattr(decode_choice, "_why_no_device", lambda backbone: None)
            monkeypatch.setattr(CapturedSteps, "capture", recorded_capture)
        own = Decoding(embedder._backbone, "cuda_graph" if mode == "replayed" else mode)
        monkeypatch.setattr(embedder, "_decoding", own)

    return use
