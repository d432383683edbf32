"""Replayed decode steps: a recording of a step's operators sees what a captured graph would see.

Routes, weights, buckets and buffers that change between replays, and captures that fail.
"""

from __future__ import annotations

import pytest
import torch
from stepping import BLOCK, Fixed, backbone, read, recorded_capture, run, tokens

from twn_kernels.errors import ImplUnavailable, TWNWarning
from twn_kernels.modules.site_group import SiteGroup
from twn_kernels.pipeline import decode_choice
from twn_kernels.pipeline.captured_steps import CapturedSteps
from twn_kernels.pipeline.shadows import Shadows
from twn_kernels.testing.recorded_graph import record


def recorded(fixed: Fixed, monkeypatch) -> list:
    """Make the graph replay recordings; returns the list that they are added to."""
    made = []

    def capture(*arguments):
        made.append(recorded_capture(*arguments))
        return made[-1]

    monkeypatch.setattr(decode_choice, "_why_no_device", lambda backbone: None)
    monkeypatch.setattr(CapturedSteps, "capture", capture)
    fixed.graph._steps.active = True
    return made


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3_text", "gpt_neox"])
def test_one_recording_follows_routes_and_weights(family, monkeypatch):
    base, rows = backbone(family), 3
    options = {"block": 32, "adapters": ["reasoning", "embedding"]}
    fixed, eager = (Fixed(base, family, rows, "reasoning", **options) for _ in range(2))
    made = recorded(fixed, monkeypatch)
    for step, routes in enumerate([["reasoning"] * 3, [None, "both", "embedding"], [None] * 3, ["both"] * 3]):
        for batch in (fixed, eager):
            batch.graph.set_routes(routes)
        assert torch.equal(fixed.step(tokens(rows, step)), eager.step(tokens(rows, step))), routes
    before = eager.step(tokens(rows, 4))
    fixed.step(tokens(rows, 4))
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.5)
    eager.graph.rewind(18)
    fixed.graph.rewind(18)
    after = fixed.step(tokens(rows, 4))
    assert torch.equal(after, eager.step(tokens(rows, 4))) and not torch.equal(after, before)
    assert len(made) == 1, "one recording served every step"


def test_a_recording_for_each_bucket(monkeypatch):
    base = backbone("llama")
    fixed, eager = (Fixed(base, "llama", 5, "reasoning", room=10) for _ in range(2))
    recorded(fixed, monkeypatch)
    kept = {2: [1, 3], 4: [1]}
    assert torch.equal(run(fixed, 5, 7, kept), run(eager, 5, 7, kept))
    assert fixed.graph.captured == [(8, 16), (8, 24), (2, 24), (1, 24)]


def test_recordings_of_outgrown_buffers_are_dropped(monkeypatch):
    base = backbone("llama")
    fixed, eager = (Fixed(base, "llama", 2, "reasoning") for _ in range(2))
    recorded(fixed, monkeypatch)
    for seed, steps in ((0, BLOCK), (1, 2)):
        prompt, cache = read(base, "llama", 2, seed)
        for batch in (fixed, eager):
            batch.graph.load(cache, prompt.mask, prompt.next_position)
        assert torch.equal(run(fixed, 2, steps), run(eager, 2, steps))
        assert fixed.graph.capacity > 16


def test_replaced_weights_are_captured_anew(monkeypatch):
    base = backbone("llama")
    fixed = Fixed(base, "llama", 2, "reasoning")
    recorded(fixed, monkeypatch)
    prompt, cache = read(base, "llama", 2)

    def again():
        fixed.graph.load(cache, prompt.mask, prompt.next_position)
        return fixed.step(tokens(2, 0))

    first = again()
    held = fixed.graph._steps.keys
    assert torch.equal(again(), first) and fixed.graph._steps.keys == held != []
    layer = base.decoder.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    doubled = again()
    assert not torch.equal(doubled, first)
    layer.scaling["reasoning"] = 3.0
    assert not torch.equal(again(), doubled), "a scaling is baked in, so it must be captured anew too"


def test_a_step_that_cannot_be_captured_says_so_and_runs(monkeypatch):
    base = backbone("llama")
    fixed, eager = (Fixed(base, "llama", 2, "reasoning") for _ in range(2))
    recorded(fixed, monkeypatch)
    plain = type(base.decoder.norm).forward

    def asks_the_host(self, hidden):
        return plain(self, hidden) * (1.0 if float(hidden.abs().max()) >= 0 else 2.0)

    monkeypatch.setattr(type(base.decoder.norm), "forward", asks_the_host)
    with pytest.warns(TWNWarning, match="capturing a step failed: .*wait for each other.* run eagerly from here on"):
        got = fixed.step(tokens(2, 0))
    assert torch.equal(got, eager.step(tokens(2, 0)))
    assert not fixed.graph.capture and "wait for each other" in fixed.graph.failure
    assert torch.equal(fixed.step(tokens(2, 1)), eager.step(tokens(2, 1)))
    demanding = CapturedSteps(True, demanded=True)
    with pytest.raises(ImplUnavailable, match="capturing a step failed: .*Decode without a graph: capture=None"):
        demanding.run("key", lambda: float(torch.ones(1)), [torch.zeros(1)])


def test_packed_adapters_are_refreshed_where_they_were_edited(monkeypatch):
    monkeypatch.setattr(SiteGroup, "packs_on", lambda group, device: True)
    base = backbone("qwen3_vl", torch.bfloat16)
    read(base, "qwen3_vl", 2)  # packs
    shadows = Shadows(base)
    groups = shadows._groups
    assert len(groups) == 8 and all(shadows.refresh()) and not shadows.refresh_if_edited()
    B = base.decoder.layers[0].self_attn.q_proj.lora_B["embedding"]

    def shadow():
        _, panel, *_ = groups[0].panels()
        return panel.clone()

    with torch.no_grad():
        before = shadow()
        B.mul_(-1)
        assert not shadows.refresh_if_edited(), "still finite: graphs stay"
        assert not torch.equal(shadow(), before)
        B[0, 0] = torch.inf
        assert shadows.refresh_if_edited() and shadows._clean.count(False) == 1
        B[0, 0] = 0
        assert shadows.refresh_if_edited() and all(shadows._clean)


def test_a_hook_added_later_ends_the_replays(monkeypatch):
    base = backbone("llama")
    fixed = Fixed(base, "llama", 2, "reasoning")
    recorded(fixed, monkeypatch)
    fixed.step(tokens(2, 0))
    called = []
    hook = base.decoder.norm.register_forward_hook(lambda *_: called.append(1))
    prompt, cache = read(base, "llama", 2)
    with pytest.warns(TWNWarning, match="a forward hook on LlamaRMSNorm would not run in a replay.* run eagerly"):
        fixed.graph.load(cache, prompt.mask, prompt.next_position)
    called.clear()
    for step in range(2):
        fixed.step(tokens(2, step))
    assert len(called) == 2 and not fixed.graph.capture
    hook.remove()


def test_only_so_many_graphs_are_kept():
    steps = CapturedSteps(True)
    steps.capture = lambda step, counters: record(step)
    out = torch.zeros(1)
    for key in range(70):
        steps.run(key, lambda: out.add_(1), [out])
    assert steps.keys == list(range(6, 70))
    steps.forget()
    assert steps.keys == []
