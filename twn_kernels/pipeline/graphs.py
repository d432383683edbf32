"""One batch through the method: prefill, gate, split, think, embed, in both execution graphs.

``shared_kv`` keeps one cache a sequence and splits the adapters by position: prompt, thought under ``reasoning``,
queries under ``embedding``. ``reencode`` reads prompt, thought and queries again under ``embedding`` alone. In both,
the prompt and the queries of the plain embedding run as one forward with a route for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import twn_kernels.patching as patching
from twn_kernels.checkpoint import TWNConfig
from twn_kernels.modules import GateMLP, QueryBank
from twn_kernels.pipeline.backbone import Backbone, Prompt, roll_back
from twn_kernels.pipeline.decoding import Decoding
from twn_kernels.pipeline.thinking import Running, StopRule, Thought, advance, think
from twn_kernels.settings import EMBEDDING, REASONING, ROUTE_BITS

__all__ = ["BatchResult", "Method", "Thinking", "run_batch"]

Batch = object  # EncodedBatch of pipeline.inputs


@dataclass
class Method:
    """What stays the same from batch to batch.

    Attributes:
        backbone: of the patched model.
        queries: the learned vectors.
        gate: None where the checkpoint has none.
        config: how the method runs.
        opening: token ids that open a thought.
        extend: ``(batch, rows, suffixes)`` to a batch of those rows with token ids appended to each.
        decoding: how thoughts are decoded.
        routes_media: whether adapters touch layers whose tokens do not follow the batch's rows (a vision tower).
    """

    backbone: Backbone
    queries: QueryBank
    gate: GateMLP | None
    config: TWNConfig
    opening: list[int]
    extend: Callable[[Batch, list[int], list[list[int]]], Batch]
    decoding: Decoding
    routes_media: bool = False


@dataclass
class Thinking:
    """How one call thinks.

    Attributes:
        decide: gate scores (None without a gate) and batch size to the places that think; None: nobody ever does.
        rule, choose: how thoughts end and how tokens are chosen.
    """

    decide: Callable[[list[float] | None, int], list[int]] | None
    rule: StopRule
    choose: Callable[[Tensor], Tensor]


@dataclass
class BatchResult:
    """What one batch gave.

    Attributes:
        states: ``[batch, num_queries, hidden]``: the query outputs to pool, thoughtful where a thought was closed.
        prompt_state: ``[batch, hidden]`` of the last prompt token in the plain pass. Where nobody was sent to think,
            this and ``states`` are what a gate reads.
        scores: gate score of each input, or None without a gate.
        thoughts: by place in the batch, of the inputs that were sent to think.
    """

    states: Tensor
    prompt_state: Tensor
    scores: list[float] | None
    thoughts: dict[int, Thought]


@torch.no_grad()
def run_batch(method: Method, batch: Batch, thinking: Thinking, phase: Callable[[str], None]) -> BatchResult:
    """Embed one batch.

    Args:
        method: model and configuration.
        batch: the encoded inputs.
        thinking: who thinks, and how.
        phase: receives ``"gate"``, ``"think 3/8"``, ``"embed"`` as they begin.
    """
    backbone, shared = method.backbone, method.config.graph == "shared_kv"
    prompt = backbone.prompt(batch.tensors)
    phase("gate")
    cache = backbone.new_cache() if shared and thinking.decide is not None else None
    adapter = method.config.prefill_adapter if shared else EMBEDDING
    prompt_state, states = _read_with_queries(method, prompt, adapter, cache)
    scores = None if method.gate is None else method.gate(states, prompt_state).tolist()
    chosen = [] if thinking.decide is None else thinking.decide(scores, len(prompt.ids))
    if not chosen:
        return BatchResult(states, prompt_state, scores, {})
    if shared:
        # The queries were the last tokens of every row: forgetting them leaves the prompt's cache.
        roll_back(cache, method.queries.num_queries)
        running = _running(method, prompt, cache, prompt_state).select(chosen)
        del cache
        thoughts = _think_on_cache(method, running, states, thinking, phase)
    else:
        thoughts = _think_and_reencode(method, batch, chosen, states, thinking, phase)
    return BatchResult(states, prompt_state, scores, thoughts)


def _read_with_queries(method: Method, prompt: Prompt, adapter: str | None, cache) -> tuple[Tensor, Tensor]:
    """The prompt under ``adapter`` and the queries under ``embedding``: last prompt state, query outputs."""
    backbone, count = method.backbone, method.queries.num_queries
    batch, tokens = prompt.ids.shape
    if method.routes_media and adapter != EMBEDDING:
        return _read_in_two(method, prompt, adapter, cache)
    spec: str | Tensor = EMBEDDING
    if adapter != EMBEDDING:
        spec = torch.full((batch, tokens + count), ROUTE_BITS[adapter], dtype=torch.int8, device=backbone.device)
        spec[:, tokens:] = ROUTE_BITS[EMBEDDING]
    with patching.route(backbone.model, spec):
        hidden = backbone.read(prompt, method.queries(batch, backbone.dtype), cache)
    return hidden[:, tokens - 1], hidden[:, tokens:]


def _read_in_two(method: Method, prompt: Prompt, adapter: str | None, cache) -> tuple[Tensor, Tensor]:
    """The same in two forwards: layers of a vision tower can follow one route for all tokens, not one for each."""
    backbone = method.backbone
    cache = backbone.new_cache() if cache is None else cache
    with patching.route(backbone.model, adapter):
        hidden = backbone.read(prompt, None, cache)
    return hidden[:, -1], _queries_after(method, _running(method, prompt, cache, hidden[:, -1]))


def _running(method: Method, prompt: Prompt, cache, prompt_state: Tensor) -> Running:
    rows = list(range(len(prompt.ids)))
    return Running(rows, cache, prompt.mask, prompt.next_position, method.backbone.logits(prompt_state))


def _think(method: Method, running: Running, thinking: Thinking, finished, phase) -> dict[int, Thought]:
    total = len(running.rows)
    phase(f"think 0/{total}")
    if method.opening:
        advance(method.backbone, running, [method.opening] * total)
    running = method.decoding.begin(running, thinking.rule.limit)
    return think(
        method.backbone, running, thinking.rule, thinking.choose, finished, lambda done: phase(f"think {done}/{total}")
    )


def _think_on_cache(method: Method, running: Running, states: Tensor, thinking: Thinking, phase) -> dict[int, Thought]:
    """Thoughts on the prompt's own cache; each closed one is followed by the queries. Overwrites rows of ``states``."""
    backbone, count = method.backbone, method.queries.num_queries

    def finished(done: Running, last: list[int]) -> None:
        phase("embed")
        if method.routes_media:
            advance(backbone, done, [[token] for token in last])
            states[done.rows] = _queries_after(method, done).to(states)
            return
        ids = torch.tensor(last, device=backbone.device)[:, None]
        vectors = torch.cat([backbone.embeddings(ids), method.queries(len(last), backbone.dtype)], dim=1)
        routes = torch.full(vectors.shape[:2], ROUTE_BITS[EMBEDDING], dtype=torch.int8, device=backbone.device)
        routes[:, 0] = ROUTE_BITS[REASONING]
        mask = torch.cat([done.mask, done.mask.new_ones(routes.shape)], dim=1)
        with patching.route(backbone.model, routes):
            hidden = backbone.continue_(vectors, mask, done.next_position, done.cache)
        states[done.rows] = hidden[:, -count:].to(states)

    return _think(method, running, thinking, finished, phase)


def _queries_after(method: Method, done: Running) -> Tensor:
    """Query outputs after all that the cache holds, in a forward of their own."""
    queries = method.queries(len(done.rows), method.backbone.dtype)
    mask = torch.cat([done.mask, done.mask.new_ones(queries.shape[:2])], dim=1)
    with patching.route(method.backbone.model, EMBEDDING):
        return method.backbone.continue_(queries, mask, done.next_position, done.cache)


def _think_and_reencode(
    method: Method, batch: Batch, chosen: list[int], states: Tensor, thinking: Thinking, phase
) -> dict[int, Thought]:
    """Thoughts on a cache of ``reasoning``'s own; then prompt, thought and queries under ``embedding``."""
    backbone = method.backbone
    prompt = backbone.prompt(method.extend(batch, chosen, [[] for _ in chosen]).tensors)
    cache = backbone.new_cache()
    with patching.route(backbone.model, REASONING):
        hidden = backbone.read(prompt, None, cache)
    running = _running(method, prompt, cache, hidden[:, -1])
    running.rows = list(chosen)
    thoughts = _think(method, running, thinking, lambda done, last: None, phase)
    closed = [row for row in chosen if thoughts[row].broken is None]
    if closed:
        phase("embed")
        extended = method.extend(batch, closed, [[*method.opening, *thoughts[row].ids] for row in closed])
        _, thoughtful = _read_with_queries(method, backbone.prompt(extended.tensors), EMBEDDING, None)
        states[closed] = thoughtful.to(states)
    return thoughts
