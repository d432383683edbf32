"""What the tests of policy optimisation share: settings, examples, and copies of what learns."""

from __future__ import annotations

import dataclasses
import types

import torch

from twn_kernels.evaluation.dataset import Entry
from twn_kernels.training.examples import Examples

WORDS = "red gold temple flower bird stone wall page number seven garden light roofs trees".split()
GRAPHS = [("shared_kv", "reasoning"), ("shared_kv", "embedding"), ("shared_kv", None), ("reencode", "reasoning")]
METHOD = {"max_think_tokens": 8, "think_end": ("</think>", "e")}  # some thoughts of a tiny model end by chance
SETTINGS = {
    "steps": 2,
    "batch_size": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "save_steps": 100,
    "log_steps": 1,
    "group_size": 4,
    "temperature": 1.3,
    "clip": 0.2,
    "kl_weight": 0.1,
    "format_reward": 1.0,
    "rank_reward": 1.0,
    "gap_reward": 1.0,
    "chunk_size": 5,
}


def settings_of(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**(SETTINGS | changes))


def examples_of(count: int = 12, images: list[str] | None = None) -> Examples:
    """Queries with a document each, and a second one that two of them share."""
    queries = [Entry(f"q{i}", f"{WORDS[i % 14]} {WORDS[(i * 5 + 3) % 14]}{'?' * (i % 4)}") for i in range(count)]
    if images:
        queries = [dataclasses.replace(q, image=images[i % 2] if i % 3 else None) for i, q in enumerate(queries)]
    documents = {f"d{i}": Entry(f"d{i}", f"the {WORDS[i % 14]} of the {WORDS[(i * 5 + 3) % 14]}") for i in range(count)}
    return Examples(queries, documents, {f"q{i}": [f"d{i}", f"d{i - i % 2}"][: 1 + i % 2] for i in range(count)})


def learned(trainee) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainee.named_parameters() if p.requires_grad}


def everything(trainee) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in [*trainee.named_parameters(), *trainee.named_buffers()]}


def shifted(trainee, by: float) -> None:
    """Move what learns, the same way for the same tensor whatever its dtype."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainee.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=draw).to(parameter)
