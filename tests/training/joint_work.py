"""A few examples to train on, settings, and a joint run as a list of losses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from twn_kernels.evaluation.dataset import Entry
from twn_kernels.testing.tiny_models import VISION_FAMILIES
from twn_kernels.training.examples import Examples, Stream
from twn_kernels.training.joint import JointCollator, JointTrainer
from twn_kernels.training.stage_trainer import LOG_FILE

QUESTIONS = {
    "what grows in the garden": "a flower grows there.",
    "Describe the temple.": "The roofs are gold and red.",
    "seven": "",  # no thought
    "Which number is on the page?": "it is seven.",
    "name the bird": "",
    "In one word, what is in the foreground of the photograph?": "a stone wall, and a bird rests on it.",
}


def settings(**changes) -> SimpleNamespace:
    """Of a short joint run; everything that a stage and joint training read."""
    values = {
        "steps": 6,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "save_steps": 100,
        "log_steps": 1,
        "chunk_size": 2,
        "temperature": 0.1,
        "thought_weight": 0.5,
        "plain_weight": 1.0,
        "thoughtful_weight": 2.0,
        "plain_truncation": 0.0,
    }
    return SimpleNamespace(**(values | changes))


def examples_for(family: str, folder: Path) -> Examples:
    """Six queries, two of which share a positive; where the family sees, two queries and two documents are images."""
    sees = family in VISION_FAMILIES
    random = np.random.default_rng(0)
    queries, documents, relevant = [], {}, {}
    for place, (question, thought) in enumerate(QUESTIONS.items()):
        paths = [folder / f"{kind}-{place}.png" if sees and place % 3 == 0 else None for kind in ("query", "document")]
        for path in filter(None, paths):
            pixels = random.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        metadata = {"thought": thought} if thought else {}
        queries.append(Entry(f"q{place}", question, image=paths[0] and str(paths[0]), metadata=metadata))
        documents[f"d{place}"] = Entry(
            f"d{place}", f"document {place} {question[::-1]}", image=paths[1] and str(paths[1])
        )
        relevant[f"q{place}"] = [f"d{place}"]
    relevant["q1"] = ["d0", "d1"]
    return Examples(queries, documents, relevant)


def collator(embedder, chunk_size: int) -> JointCollator:
    """As a run makes it."""
    return JointCollator(embedder.processor, "</think>", chunk_size)


def joint_trainer(trainee, embedder, examples: Examples, folder: Path, values, seed: int = 0) -> JointTrainer:
    """A trainer over a stream of the examples."""
    stream = Stream(examples, values.steps * values.batch_size, seed)
    return JointTrainer(trainee, folder, values, stream, collator(embedder, values.chunk_size), seed=seed)


def log_of(folder: Path) -> list[dict[str, float]]:
    """Rows of a stage's log."""
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
