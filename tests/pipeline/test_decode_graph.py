"""Decode steps on fixed buffers: equal to a growing cache, row by row, through every change of the batch."""

from __future__ import annotations

import pytest
import torch
from stepping import BLOCK, MIXED, Fixed, Growing, backbone, check, read, run, tokens

from twn_kernels.errors import ImplUnavailable, OptionError, ShapeError
from twn_kernels.pipeline.decode_graph import DecodeGraph, column_bucket, row_bucket
from twn_kernels.pipeline.decode_step import DecodeStep
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_a_growing_cache(family):
    fixed = check(family, rows=3, steps=12)
    assert fixed.graph.length == 14 + 12, "the steps crossed buckets, and Gemma's window of 8"


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2_5_vl"])
def test_eager_attention(family):
    check(family, rows=2, steps=4, attention="eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    batches = [kind(backbone("qwen3_vl", dtype), "qwen3_vl", 3, MIXED[:3]) for kind in (Fixed, Growing)]
    # The truth holds the rounded weights, and the same prompt.
    wide = backbone("qwen3_vl", dtype)
    wide.model.double()
    got, own = (run(batch, 3, 4, {1: [0, 2]}) for batch in batches)
    assert_as_good_as_torch(got, run(Growing(wide, "qwen3_vl", 3, MIXED[:3]), 3, 4, {1: [0, 2]}), own)


def test_autocast_without_a_graph():
    base = backbone("qwen3_vl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, own = (run(kind(base, "qwen3_vl", 3, MIXED[:3]), 3, 4) for kind in (Fixed, Growing))
    truth = run(Growing(backbone("qwen3_vl", torch.float64), "qwen3_vl", 3, MIXED[:3]), 3, 4)
    assert_as_good_as_torch(got, truth, own)


@pytest.mark.parametrize("kept", [{1: [1, 4]}, {0: [0, 2, 3], 2: [2]}, {1: [4, 0]}, {0: [0, 1, 2, 3], 1: [3]}], ids=str)
def test_rows_that_end_leave_the_others_alone(kept):
    fixed = check("qwen3_vl", rows=5, steps=5, kept=kept)
    assert fixed.graph._rows == row_bucket(len(list(kept.values())[-1]))


@pytest.mark.parametrize("places", [[1, 4], [4, 0, 2], [3, 1, 2, 0]], ids=str)
def test_hidden_states_follow_the_rows_that_are_kept(places):
    fixed = Fixed(backbone("llama"), "llama", 5, MIXED)
    hidden = fixed.step(tokens(5, 0))
    fixed.keep(places)
    assert torch.equal(fixed.graph.hidden, hidden[places])


def test_buffers_grow_and_keep_what_they_hold():
    base = backbone("llama")
    fixed = Fixed(base, "llama", 2, MIXED[:2])
    first = fixed.graph.capacity
    check("llama", rows=2, steps=2 * BLOCK + 3)
    for step in range(2 * BLOCK + 3):
        fixed.step(tokens(2, step))
    assert fixed.graph.capacity > first and fixed.graph.length > first


def test_a_second_batch_finds_nothing_of_the_first():
    base = backbone("llama")
    prompt, cache = read(base, "llama", 4)
    graph = DecodeGraph(base, block=BLOCK)
    graph.load(cache, prompt.mask, prompt.next_position, room=3 * BLOCK, routes="both")
    for layer in graph._kv._keys + graph._kv._values:
        layer.fill_(float("nan"))  # what rows of NaN would have left behind
    bytes_before = graph.bytes
    small, cache = read(base, "llama", 2)
    graph.load(cache, small.mask, small.next_position, routes=MIXED[:2])
    growing = Growing(base, "llama", 2, MIXED[:2])
    truth = run(Growing(backbone("llama", torch.float64), "llama", 2, MIXED[:2]), 2, 3)
    got = []
    for step in range(3):
        graph.step(tokens(2, step))
        got.append(graph.hidden.flatten().clone())
    got = torch.cat(got)
    assert_as_good_as_torch(got, truth, run(growing, 2, 3))
    assert graph.bytes == bytes_before, "nothing was allocated anew"


def test_a_row_of_nan_stays_alone_through_a_smaller_bucket():
    base = backbone("llama")
    prompt, cache = read(base, "llama", 3)
    clean = DecodeGraph(base, block=BLOCK)
    clean.load(cache, prompt.mask, prompt.next_position, routes="reasoning")
    dirty = DecodeGraph(base, block=BLOCK)
    for layer in cache.layers:
        layer.keys[0], layer.values[0] = float("nan"), float("nan")
    dirty.load(cache, prompt.mask, prompt.next_position, routes="reasoning")
    logits = dirty.step(tokens(3, 0))
    assert logits[0].isnan().any() and torch.equal(logits[1:], clean.step(tokens(3, 0))[1:])
    for graph in (clean, dirty):
        graph.keep([2])  # moves into the slot that held NaN
    for step in range(1, 4):
        assert torch.equal(clean.step(tokens(1, step)), dirty.step(tokens(1, step)))


def test_spare_rows_are_finite_and_follow_the_base():
    fixed = Fixed(backbone("qwen3_vl"), "qwen3_vl", 5, MIXED)
    fixed.step(tokens(5, 0))
    (plan,) = fixed.graph._plans.values()
    assert plan.routes.tolist() == [1, 0, 2, 3, 1, 0, 0, 0] and fixed.graph._hidden.isfinite().all()
    fixed.keep([0, 2, 3, 4])
    fixed.step(tokens(4, 1))
    assert fixed.graph._hidden.shape[0] == 8 and fixed.graph._hidden.isfinite().all()
    assert fixed.graph._plans[4, 3].routes.tolist() == [1, 1, 2, 3], "the last row moved into the place that fell free"


def test_taken_rows_go_on_by_themselves():
    base = backbone("qwen2_5_vl")
    fixed, growing = (kind(base, "qwen2_5_vl", 5, MIXED) for kind in (Fixed, Growing))
    wide = Growing(backbone("qwen2_5_vl", torch.float64), "qwen2_5_vl", 5, MIXED)
    for batch in (fixed, growing, wide):
        run(batch, 5, 2, {1: [0, 3]})
    cache, mask, following = fixed.graph.take([1])
    assert cache.get_seq_length() == mask.shape[1] == growing.mask.shape[1] == 16
    assert torch.equal(mask, growing.mask[1:]) and torch.equal(following, growing.next[1:])
    taken = Growing.__new__(Growing)
    taken.base, taken.cache, taken.mask, taken.next, taken.routes = base, cache, mask, following, ["both"]
    for batch in (growing, wide):
        batch.keep([1])
    assert_as_good_as_torch(taken.step(tokens(1, 9)), wide.step(tokens(1, 9)), growing.step(tokens(1, 9)))
    before = fixed.graph.length
    assert cache.get_seq_length() == before + 1 and fixed.graph.take([0])[0].get_seq_length() == before


def test_rewinding_repeats_a_step_exactly():
    fixed = Fixed(backbone("qwen3_vl"), "qwen3_vl", 2, "both")
    first = run(fixed, 2, 3)
    fixed.graph.rewind(14)
    assert torch.equal(run(fixed, 2, 3), first)
    norm = fixed.graph.backbone.decoder.layers[0].input_layernorm.weight
    kept = norm.detach().clone()
    for value in (float("nan"), kept):  # three tokens of NaN, forgotten again
        with torch.no_grad():
            norm.copy_(torch.as_tensor(value))
        fixed.graph.rewind(14)
        again = run(fixed, 2, 3)
    assert torch.equal(again, first)
    with pytest.raises(OptionError, match=r"length must be in \[0, 17\] \(what the rows hold\), got 18"):
        fixed.graph.rewind(18)


def test_buffers_of_inference_mode_serve_outside_of_it():
    base = backbone("llama")
    graph = DecodeGraph(base, block=BLOCK)
    with torch.inference_mode():
        prompt, cache = read(base, "llama", 2)
        graph.load(cache, prompt.mask, prompt.next_position)
        inside = graph.step(tokens(2, 0)).clone()
    prompt, cache = read(base, "llama", 2)
    graph.load(cache, prompt.mask, prompt.next_position)
    assert torch.equal(graph.step(tokens(2, 0)), inside)


def test_buckets():
    assert [row_bucket(rows) for rows in (1, 2, 3, 5, 9, 32, 33, 64, 65)] == [1, 2, 4, 8, 16, 32, 64, 64, 96]
    assert [column_bucket(n) for n in (1, 256, 257, 1025, 2049, 4097)] == [256, 256, 512, 1280, 2560, 5120]
    for columns in range(1025, 9000, 17):
        assert columns <= column_bucket(columns) <= 1.25 * columns


def test_wrong_batches_and_routes():
    base = backbone("llama")
    prompt, cache = read(base, "llama", 2)
    graph = DecodeGraph(base, block=BLOCK)
    for early in (lambda: graph.step(tokens(2, 0)), lambda: graph.rewind(0), lambda: graph.set_routes(None)):
        with pytest.raises(ShapeError, match=r"no rows are loaded; call load\(...\) first"):
            early()
    with pytest.raises(ShapeError, match=r"mask must be \[rows, 14\] .* got \[2, 13\] and \[2\]"):
        graph.load(cache, prompt.mask[:, 1:], prompt.next_position)
    with pytest.raises(ShapeError, match=r"layer 0 of the cache holds \[2, 14\] rows and tokens, expected \[1, 14\]"):
        graph.load(cache, prompt.mask[:1], prompt.next_position[:1])
    with pytest.raises(OptionError, match="route must be .* got 'reasonin'. Did you mean \"reasoning\""):
        graph.load(cache, prompt.mask, prompt.next_position, routes="reasonin")
    with pytest.raises(ShapeError, match="routes must name one for each of 2 rows, got 3"):
        graph.load(cache, prompt.mask, prompt.next_position, routes=[None] * 3)
    graph.load(cache, prompt.mask, prompt.next_position)
    with pytest.raises(ShapeError, match=r"ids must be \[2\], one for each row that is loaded, got \[2, 1\]"):
        graph.step(tokens(2, 0)[:, None])
    for places in ([1, 1], [2], [-1]):
        with pytest.raises(ShapeError, match=r"places must be distinct and in \[0, 2\), got"):
            graph.keep(places)
    graph.release()
    assert graph.bytes == graph.capacity == graph.length == 0


def test_a_decode_step_of_a_whole_model_returns_to_its_context():
    model = backbone("qwen3_vl").model
    step = DecodeStep(model, rows=3, context=6, room=2, routes=["reasoning", None, "embedding"])
    first, second = step().clone(), step().clone()
    assert not torch.equal(first, second) and step.graph.length == 8
    assert torch.equal(step(), first) and torch.equal(step(), second)
    assert step.graph.failure is None or "GPU" in step.graph.failure
    plain = DecodeStep(tiny_model("llama"), rows=1, context=1)
    assert plain().shape == (1, 160), "a model without adapters decodes too"
    with pytest.raises(OptionError, match="context must be a whole number of at least 1, got 0"):
        DecodeStep(model, rows=1, context=0)
    with pytest.raises(ImplUnavailable, match="CUDA graphs need a GPU and the model is on cpu"):
        DecodeStep(model, rows=1, capture=True)
