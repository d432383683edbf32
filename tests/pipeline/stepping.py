"""The same decode steps twice: on a cache that grows, and on fixed buffers."""

from __future__ import annotations

import torch

import twn_kernels
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_graph import DecodeGraph
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.recorded_graph import record
from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model

BLOCK = 8  # columns: small enough that a few steps cross buckets and outgrow the buffers
MIXED = ["reasoning", None, "embedding", "both", "reasoning"]


def backbone(family: str, dtype=torch.float32, attention: str = "sdpa") -> Backbone:
    model = twn_kernels.patch(tiny_model(family, dtype=dtype), rank=4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.set_attn_implementation(attention)
    return Backbone(model)


def read(base: Backbone, family: str, rows: int, seed: int = 0):
    """A prompt of unequal lengths, with images where the family sees, and the cache that holds it."""
    prompt, cache = base.prompt(tiny_inputs(family, batch=rows, seed=seed)), base.new_cache()
    with torch.no_grad():
        base.read(prompt, None, cache)
    return prompt, cache


class Growing:
    """The same rows on a cache that grows, one eager step after another."""

    def __init__(self, base: Backbone, family: str, rows: int, routes) -> None:
        self.base, (prompt, self.cache) = base, read(base, family, rows)
        self.mask, self.next, self.routes = prompt.mask, prompt.next_position, list(routes)

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        with twn_kernels.route(self.base.model, self.routes):
            vectors = self.base.embeddings(ids[:, None])
            hidden = self.base.continue_(vectors, self.mask, self.next, self.cache)
        self.next = self.next + 1
        return hidden[:, -1]

    def keep(self, places) -> None:
        index = torch.tensor(places)
        self.cache.batch_select_indices(index)
        self.mask, self.next = self.mask[index], self.next[index]
        self.routes = [self.routes[place] for place in places]


class Fixed:
    """The same rows on fixed buffers."""

    def __init__(self, base: Backbone, family: str, rows: int, routes, block: int = BLOCK, **options) -> None:
        prompt, cache = read(base, family, rows)
        self.graph = DecodeGraph(base, block=block)
        self.graph.load(cache, prompt.mask, prompt.next_position, routes=routes, **options)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.graph.step(ids)
        assert torch.equal(logits.argmax(1), self.graph.backbone.logits(self.graph.hidden).argmax(1))
        return self.graph.hidden.clone()

    def keep(self, places) -> None:
        self.graph.keep(places)


def tokens(rows: int, step: int) -> torch.Tensor:
    return torch.arange(rows) * 7 + step * 3 + 5


def run(batch, rows: int, steps: int, kept=()) -> torch.Tensor:
    """Hidden states of every step, flattened; ``kept`` says which places go on after which step."""
    out, kept = [], dict(kept)
    for step in range(steps):
        out.append(batch.step(tokens(rows, step)).flatten())
        if step in kept:
            batch.keep(kept[step])
            rows = len(kept[step])
    return torch.cat(out)


def check(family: str, rows: int, steps: int, kept=(), routes=None, attention: str = "sdpa") -> Fixed:
    routes = MIXED[:rows] if routes is None else routes
    own = run(Growing(backbone(family, attention=attention), family, rows, routes), rows, steps, kept)
    # transformers' eager attention rounds a padded row's float64 mask to fp32 infinities, hence to NaN.
    truth = run(Growing(backbone(family, torch.float64), family, rows, routes), rows, steps, kept)
    fixed = Fixed(backbone(family, attention=attention), family, rows, routes)
    assert_as_good_as_torch(run(fixed, rows, steps, kept), truth, own, family)
    return fixed


def recorded_capture(steps, step, counters):
    """Stands for ``CapturedSteps.capture``: the step's operators, recorded, with its counters as they were."""
    before = [counter.clone() for counter in counters]
    graph = record(step)
    for counter, value in zip(counters, before, strict=True):
        counter.copy_(value)
    return graph
