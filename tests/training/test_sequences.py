"""One training forward gives what the pipeline computes in several: same vectors, whatever lies beside a row."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline_runs import ran, rows_of

from twn_kernels.errors import ShapeError
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES

GRAPHS = [("shared_kv", "reasoning"), ("shared_kv", "embedding"), ("shared_kv", None), ("reencode", "reasoning")]
# Letters that random text writes soon, so that thoughts are short and of unequal lengths.
SHORT = {"think_end": ("</think>", "e", "a", "t"), "max_think_tokens": 12}


def _thinks(embedder, embedder64, inputs):
    """Thoughts of all rows but the one that the gate scores lowest, in both precisions."""
    scores = embedder.encode(inputs, think="never", return_details=True)[1]
    threshold = sum(sorted(detail.gate_score for detail in scores)[:2]) / 2
    found, truth = (ran(each, inputs, "auto", threshold) for each in (embedder, embedder64))
    assert found.thoughts == truth.thoughts, "fp32 and fp64 disagree on a token: change the stops"
    assert 0 < sum(map(bool, found.thoughts)) < len(inputs)
    return found, truth


@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_pipelines(family, graph, prefill, embedder_of, trainee_of, inputs_of):
    method = {"graph": graph, "prefill_adapter": prefill} | SHORT
    embedder, embedder64 = (embedder_of(family, dtype, **method) for dtype in (torch.float32, torch.float64))
    inputs = inputs_of(family)
    plain, truth = (ran(each, inputs, "never") for each in (embedder, embedder64))
    thoughtful, thoughtful_truth = _thinks(embedder, embedder64, inputs)
    trainee = trainee_of(embedder)
    with torch.no_grad():
        out = trainee(rows_of(embedder, inputs, thoughtful.thoughts))
        without = trainee(rows_of(embedder, inputs, None))
    assert without.thoughtful is None
    assert_as_good_as_torch(without.plain, truth.states, plain.states, "plain states without thoughts")
    assert_as_good_as_torch(out.plain, truth.states, plain.states, "plain states")
    assert_as_good_as_torch(out.thoughtful, thoughtful_truth.states, thoughtful.states, "thoughtful states")
    pooled_truth = torch.nn.functional.normalize(truth.states.mean(1), dim=1)
    assert_as_good_as_torch(trainee.pooled(out.plain), pooled_truth, plain.vectors, "vectors")
    moved = (thoughtful.states - plain.states).abs().amax((1, 2))
    assert [bool(row > 1e-3) for row in moved] == [bool(thought) for thought in thoughtful.thoughts]


@pytest.mark.parametrize("graph", ["shared_kv", "reencode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_the_states_that_predict_them(family, graph, embedder_of, trainee_of, inputs_of):
    """Greedy thoughts: each state's most probable token is the thought's next one, up to the last."""
    embedder = embedder_of(family, graph=graph, **SHORT)
    inputs = inputs_of(family)
    thoughts = ran(embedder, inputs, "always").thoughts
    with torch.no_grad():
        trainee = trainee_of(embedder)
        out = trainee(rows_of(embedder, inputs, thoughts))
        assert trainee.backbone.logits(out.thought_states).argmax(1).tolist() == out.thought_labels.tolist()
        loss = trainee.thought_loss(out)
        logits = trainee.backbone.logits(out.thought_states)
    assert out.thought_labels.tolist() == [token for thought in thoughts for token in thought]
    assert out.thought_rows.tolist() == [row for row, thought in enumerate(thoughts) for _ in thought]
    by_hand = -logits.double().log_softmax(1).gather(1, out.thought_labels[:, None]).sum()
    assert_as_good_as_torch(loss, by_hand, by_hand.float(), "loss")


@pytest.mark.parametrize(("graph", "prefill"), [GRAPHS[0], GRAPHS[3]], ids=str)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3_text", "gpt_neox"])
def test_padding_is_never_read(family, graph, prefill, embedder_of, trainee_of, inputs_of):
    """Other ids in the padding of prompts and of thoughts: not a bit changes."""
    embedder = embedder_of(family, graph=graph, prefill_adapter=prefill)
    trainee, inputs = trainee_of(embedder), inputs_of(family)
    thoughts = [[7, 8, 9, 10], [], [11], [12, 13]] + [[14]] * (len(inputs) - 4)
    rows = rows_of(embedder, inputs, thoughts)
    poisoned = copy.deepcopy(rows)
    ids, mask = poisoned.batch.tensors["input_ids"], poisoned.batch.tensors["attention_mask"]
    assert (mask == 0).any()
    ids[mask == 0] = torch.arange(20, 20 + int((mask == 0).sum())) % 100 + 3
    poisoned.batch.pad_id = 50
    with torch.no_grad():
        out, other = trainee(rows), trainee(poisoned)
    for name in ("plain", "thoughtful", "prompt_state", "thought_states", "thought_labels"):
        assert torch.equal(getattr(out, name), getattr(other, name)), name


@pytest.mark.parametrize(("graph", "prefill"), [GRAPHS[1], GRAPHS[3]], ids=str)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3_text"])
def test_rows_do_not_depend_on_their_mates(family, graph, prefill, embedder_of, trainee_of, inputs_of):
    method = {"graph": graph, "prefill_adapter": prefill}
    embedder, embedder64 = (embedder_of(family, dtype, **method) for dtype in (torch.float32, torch.float64))
    inputs = inputs_of(family)
    thoughts = [[7, 8, 9, 10], [], [11], [12, 13]] + [[14]] * (len(inputs) - 4)
    with torch.no_grad():
        together = trainee_of(embedder)(rows_of(embedder, inputs, thoughts))
        for place, (value, thought) in enumerate(zip(inputs, thoughts, strict=True)):
            alone, truth = (trainee_of(each)(rows_of(each, [value], [thought])) for each in (embedder, embedder64))
            for name in ("plain", "thoughtful") if thought else ("plain",):
                own = (getattr(out, name)[0] for out in (truth, alone))
                assert_as_good_as_torch(getattr(together, name)[place], *own, f"{name} of row {place}")
            if not thought:
                assert alone.thoughtful is None
                mine = (out.plain[0] for out in (truth, alone))
                assert_as_good_as_torch(together.thoughtful[place], *mine, f"no thought in row {place}")


def test_sliding_windows_count_tokens_also_where_positions_do_not(tmp_path, trainee_of, inputs_of):
    """Tokens of an image share a position in time; a window counts them one by one, as the pipeline's does."""
    import transformers

    from twn_kernels import TWNEmbedder
    from twn_kernels.testing.tiny_directory import write_tiny_model
    from twn_kernels.testing.twn_directory import write_twn_directory

    kinds = ["sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    base = write_tiny_model(tmp_path / "base", "qwen2_vl", **window)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    assert model.config.get_text_config().layer_types == kinds
    twn = write_twn_directory(tmp_path / "twn", model, num_queries=3)
    embedder, embedder64 = (TWNEmbedder.from_pretrained(base, twn, dtype=d) for d in (torch.float32, torch.float64))
    inputs = inputs_of("qwen2_vl")
    plain, truth = (ran(each, inputs, "never") for each in (embedder, embedder64))
    with torch.no_grad():
        out = trainee_of(embedder)(rows_of(embedder, inputs, [[7] * 9, [8], [], [9] * 3, [10]]))
    assert_as_good_as_torch(out.plain, truth.states, plain.states, "plain states")


def test_windows_shorter_than_the_text_are_kept(embedder_of, trainee_of, inputs_of):
    """Gemma's window of 8 hides the start of every longer row from its sliding layer, in the masks themselves."""
    from twn_kernels.training.sequences import lay_out

    embedder = embedder_of("gemma3_text")
    trainee = trainee_of(embedder)
    sequences = lay_out(trainee.backbone, rows_of(embedder, inputs_of("gemma3_text"), [[5] * 9, [], [6], [7]]), [3], 4)
    masks = sequences.masks(trainee.backbone.config, torch.float32)
    assert set(masks) == {"full_attention", "sliding_attention"}
    full, sliding = (masks[kind] == 0 for kind in ("full_attention", "sliding_attention"))
    assert (sliding <= full).all() and (sliding.sum(-1) <= 8).all() and (full.sum(-1) > 8).any()
    first = sequences.prompt_end - 1  # of the first row: the last prompt token
    assert sliding[0, 0, first].nonzero()[:, 0].tolist()[-1] == first
    end, thought = sequences.thought_end, 10  # nine tokens of thought and the one that opens it
    plain, thoughtful = full[0, 0, end], full[0, 0, end + 4]
    assert not plain[end - thought : end].any() and thoughtful[end - thought : end].all()
    assert sliding[0, 0, end + 4, end - 7 : end].all() and not sliding[0, 0, end + 4, : end - 7].any()
    assert not full[0, 0, end + 4 :, end : end + 4].any()


def test_families_that_see_have_images_in_some_rows_alone(inputs_of):
    for family in VISION_FAMILIES:
        kinds = [isinstance(value, str) for value in inputs_of(family)]
        assert any(kinds) and not all(kinds)


def test_one_thought_a_row(embedder_of, trainee_of, inputs_of):
    embedder = embedder_of("llama")
    with pytest.raises(ShapeError, match=r"^thoughts must have one list of ids for each of 4 rows .*, got 3\.$"):
        trainee_of(embedder)(rows_of(embedder, inputs_of("llama"), [[5], [], [6]]))
