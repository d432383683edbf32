"""An embedder without a gate, queries and documents for it, and a slow score to hold labels against."""

from __future__ import annotations

import dataclasses
import math
import types

from twn_kernels import TWNEmbedder, load_checkpoint
from twn_kernels.evaluation.dataset import Entry
from twn_kernels.training.examples import Examples

CLOSES = ("e", "a", "o")  # some of the tiny model's thoughts are closed by these within the cap, and some are not


def settings(**changes) -> types.SimpleNamespace:
    steps = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "save_steps": 2, "log_steps": 1}
    optimiser = {"learning_rate": 1e-2, "weight_decay": 0.01, "max_grad_norm": 1.0}
    own = {"margin": 0.1, "hidden": (8,), "temperature": 0.05, "encode_batch_size": 8}
    return types.SimpleNamespace(**(steps | optimiser | own | changes))


def without_gate(directories, family: str = "llama", **method) -> TWNEmbedder:
    base, twn = directories(family)
    checkpoint = load_checkpoint(twn)
    values = {"think_end": CLOSES, "max_think_tokens": 6} | method
    config = dataclasses.replace(checkpoint.config, **values)
    bare = dataclasses.replace(checkpoint, gate=None, gate_file=None, config=config)
    return TWNEmbedder.from_pretrained(base, bare, device="cpu", prompts={"query": "Find it.", "document": "Keep it."})


def entries(prefix: str, texts: list[str]) -> list[Entry]:
    return [Entry(f"{prefix}{place}", text) for place, text in enumerate(texts)]


QUERIES = entries("q", [f"{head} {i}" for i in range(11) for head in ("a red flower", "What is in the picture?")])
DOCUMENTS = entries("d", [f"the temple and the {word}" for word in "wall stone page tree bird seven gold".split()])


def examples(queries=QUERIES, documents=DOCUMENTS, relevant=None) -> Examples:
    """Query ``i`` seeks documents ``i % 7`` and ``i % 5``, of which there may be one."""
    of = relevant or {query.id: sorted({f"d{i % 7}", f"d{i % 5}"}) for i, query in enumerate(queries)}
    return Examples(list(queries), {entry.id: entry for entry in documents}, of)


def slow_score(query: list[float], documents: list[list[float]], relevant: list[bool], temperature: float) -> float:
    """Mean over the positives of log(exp(own) / (exp(own) + sum over the others that are no positives))."""
    similarity = [sum(a * b for a, b in zip(query, document, strict=True)) / temperature for document in documents]
    total = 0.0
    for own, positive in zip(similarity, relevant, strict=True):
        if positive:
            rest = sum(math.exp(s - own) for s, other in zip(similarity, relevant, strict=True) if not other)
            total -= math.log(1 + rest)
    return total / sum(relevant)
