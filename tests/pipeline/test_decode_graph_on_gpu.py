"""Decode steps captured in real CUDA graphs: equal to eager steps, fed in place, without allocations or waiting."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import twn_kernels
from twn_kernels import TWNEmbedder
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_graph import DecodeGraph
from twn_kernels.pipeline.decode_step import DecodeStep
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, tiny_inputs, tiny_model

pytestmark = pytest.mark.gpu

ROUTES = ["reasoning", None, "embedding", "both", "reasoning"]
IMPLS = ("blas", "triton")


def _backbone(family: str, device, dtype=torch.bfloat16, impl: str = "auto") -> Backbone:
    # Drawn in bf16 whatever the dtype, so that every dtype holds the same model.
    model = tiny_model(family, dtype=torch.bfloat16)
    model = twn_kernels.patch(model.to(device), rank=16, impl=impl)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return Backbone(model.to(dtype))


def _loaded(base: Backbone, family: str, routes, **options) -> DecodeGraph:
    prompt, cache = base.prompt(tiny_inputs(family, batch=len(routes))), base.new_cache()
    with torch.no_grad():
        base.read(prompt, None, cache)
    graph = DecodeGraph(base, **options)
    graph.load(cache, prompt.mask, prompt.next_position, routes=routes, adapters=["reasoning", "embedding"], room=20)
    return graph


def _run(graph: DecodeGraph, rows: int, steps: int, kept=()) -> torch.Tensor:
    out, kept = [], dict(kept)
    for step in range(steps):
        graph.step(torch.arange(rows, device=graph.backbone.device) * 7 + step * 3 + 5)
        out.append(graph.hidden.flatten().clone())
        if step in kept:
            graph.keep(kept[step])
            rows = len(kept[step])
    return torch.cat(out)


@torch.no_grad()
def _edit(model, name: str, edit) -> None:
    for path, parameter in model.named_parameters():
        if name in path:
            edit(parameter)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_replays_equal_eager_steps(family, impl, device):
    kept = {2: [0, 3, 4], 4: [2]}
    graph = _loaded(_backbone(family, device, impl=impl), family, ROUTES, capture=True, block=8)
    eager = _loaded(_backbone(family, device, impl=impl), family, ROUTES, capture=False, block=8)
    wide = _loaded(_backbone(family, device, torch.float64), family, ROUTES, capture=False, block=8)
    truth = _run(wide, 5, 8, kept)
    assert_as_good_as_torch(_run(graph, 5, 8, kept), truth, _run(eager, 5, 8, kept), f"{family} {impl}")
    assert graph.capture and graph.captured == [(8, 16), (8, 24), (4, 24), (1, 24)]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_follows_routes_and_adapters_changed_in_place(impl, device):
    base = _backbone("qwen3_vl", device, impl=impl)
    graph, eager = (_loaded(base, "qwen3_vl", ROUTES, capture=capture) for capture in (True, False))
    wide = _backbone("qwen3_vl", device, torch.float64)
    truth = _loaded(wide, "qwen3_vl", ROUTES, capture=False)
    seen = []
    for factor, routes in ((1.0, ROUTES), (1.0, ROUTES[::-1]), (1.0, [None] * 5), (-1.5, ["both"] * 5), (2.0, ROUTES)):
        for model in (base.model, wide.model):
            _edit(model, "lora_B", lambda B, factor=factor: B.mul_(factor))
        results = []
        for one in (graph, truth, eager):
            one.rewind(14)
            one.set_routes(routes)
            results.append(_run(one, 5, 1))
        assert_as_good_as_torch(*results, f"{routes} {factor}")
        seen.append(results[0])
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    assert len(graph.captured) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_an_adapter_that_becomes_infinite_reaches_its_own_rows_alone(impl, device):
    base = _backbone("qwen3_vl", device, impl=impl)
    graph = _loaded(base, "qwen3_vl", ["reasoning", "embedding", None], capture=True)
    before = _run(graph, 3, 2).view(2, 3, -1)
    _edit(base.model, "lora_B.embedding", lambda B: B[0].fill_(torch.inf))
    graph.rewind(14)
    after = _run(graph, 3, 2).view(2, 3, -1)
    assert not after[:, 1].isfinite().all() and after[:, [0, 2]].isfinite().all()
    _edit(base.model, "lora_B.embedding", lambda B: B[0].zero_())
    graph.rewind(14)
    again = _run(graph, 3, 2).view(2, 3, -1)
    assert torch.equal(again[:, [0, 2]], before[:, [0, 2]]) and again.isfinite().all()


def test_replays_allocate_nothing_and_never_wait(device, no_sync):
    graph = _loaded(_backbone("qwen3_vl", device), "qwen3_vl", ROUTES, capture=True)
    ids = torch.arange(5, device=device) + 5
    graph.step(ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with no_sync():
        for _ in range(16):
            graph.step(ids)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_eager_step_never_waits_either(family, device, no_sync):
    graph = _loaded(_backbone(family, device), family, ROUTES, capture=False)
    ids = torch.arange(5, device=device) + 5
    graph.step(ids)
    with no_sync():
        graph.step(ids)


def test_growing_and_freeing_return_the_memory(device):
    base = _backbone("llama", device)
    wide = _loaded(_backbone("llama", device, torch.float64), "llama", ROUTES, capture=False, block=8)
    eager = _loaded(base, "llama", ROUTES, capture=False, block=8)
    truth, own = _run(wide, 5, 40), _run(eager, 5, 40)
    left = []
    for _ in range(2):  # what libraries set up once is there after the first round
        graph = _loaded(base, "llama", ROUTES, capture=True, block=8)
        before = graph.capacity
        assert_as_good_as_torch(_run(graph, 5, 40), truth, own)
        assert graph.capacity > before and graph.bytes > 0
        graph.release()
        del graph
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert left[0] == left[1]


def test_two_models_keep_their_graphs_apart(device):
    graphs = [_loaded(_backbone(family, device), family, ROUTES, capture=True) for family in ("llama", "qwen3_vl")]
    alone = [_run(graph, 5, 3) for graph in graphs]
    for graph in graphs:
        graph.rewind(14)
    together = [[], []]
    for step in range(3):
        for place, graph in enumerate(graphs):
            graph.step(torch.arange(5, device=device) * 7 + step * 3 + 5)
            together[place].append(graph.hidden.flatten().clone())
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(together, alone, strict=True))


def test_a_whole_models_step_is_captured(device):
    step = DecodeStep(_backbone("qwen3_vl", device).model, rows=3, context=40, room=4)
    assert step.graph.capture and step.graph.failure is None
    first = step().clone()
    for _ in range(3):
        step()
    assert torch.equal(step(), first) and len(step.graph.captured) == 1


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_the_embedder_thinks_in_graphs(family, world, device):
    known = world(family, "mean" if family == "qwen3_vl" else "mean_last")
    found = {}
    for decode in ("auto", "dynamic"):
        embedder = TWNEmbedder.from_pretrained(known.base, known.twn, dtype="float32", device=device, decode=decode)
        embedder.config = dataclasses.replace(embedder.config, max_think_tokens=7)
        found[decode] = embedder.encode(known.inputs, think="always", return_details=True)[1]
        mode = "cuda_graph" if decode == "auto" else "dynamic"
        assert embedder.decode_choice.mode == mode and {detail.decode for detail in found[decode]} == {mode}
    assert [d.text for d in found["auto"]] == [d.text for d in found["dynamic"]]
