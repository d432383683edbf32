"""Joint training: like a slow loop with PEFT, whatever the size of its chunks, and it learns."""

from __future__ import annotations

import functools
import random
import warnings

import pytest
import torch
from joint_work import QUESTIONS, collator, examples_for, joint_trainer, log_of, settings
from slow_training import SlowTrainer

from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES
from twn_kernels.training.examples import Stream

LOSSES = ("loss", "plain_loss", "thoughtful_loss", "thought_loss")
# Every family, and every graph.
RUNS = [(family, "shared_kv", "reasoning") for family in FAMILIES]
RUNS += [("qwen3_vl", "shared_kv", "embedding"), ("llama", "shared_kv", None), ("qwen2_5_vl", "reencode", "reasoning")]


@pytest.fixture
def curve(trainee_of, tmp_path):
    """``curve(embedder, examples, values)``: the losses of a joint run, ``[steps, 4]``."""

    def run(embedder, examples, values) -> torch.Tensor:
        folder = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        joint_trainer(trainee_of(embedder), embedder, examples, folder, values).run()
        return torch.tensor([[row[name] for name in LOSSES] for row in log_of(folder)])

    return run


@pytest.fixture
def slow_curve():
    """``slow_curve(directories, embedder, examples, values, dtype)``: the same of the slow trainer."""
    import peft

    from twn_kernels.pipeline import loading

    def run(directories, embedder, examples, values, dtype) -> torch.Tensor:
        base, twn = directories
        model = loading.base_model(base, torch.float32, "cpu", {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, twn / "reasoning", adapter_name="reasoning")
            model.load_adapter(twn / "embedding", adapter_name="embedding")
        parts = (embedder.checkpoint.queries, embedder.config, embedder.processor, values)
        stream, size = list(Stream(examples, values.steps * values.batch_size, 0)), values.batch_size
        batches = [stream[start : start + size] for start in range(0, len(stream), size)]
        told = SlowTrainer(model.to(dtype), *parts).run(batches)
        return torch.tensor([[losses[name] for name in LOSSES] for losses in told], dtype=dtype)

    return run


@pytest.mark.parametrize(("family", "graph", "prefill"), RUNS, ids=str)
def test_losses_are_those_of_a_slow_loop_with_peft(
    family, graph, prefill, curve, slow_curve, directories, embedder_of, tmp_path
):
    """Six steps, fused and by the reference: layout, interface, losses, chunks, optimiser and schedule together."""
    examples, values, method = examples_for(family, tmp_path), settings(), {"graph": graph, "prefill_adapter": prefill}
    fused, reference = (embedder_of(family, impl=impl, **method) for impl in ("auto", "reference"))
    given = (directories(family), reference, examples, values)
    truth, own = (slow_curve(*given, dtype) for dtype in (torch.float64, torch.float32))
    first, last = truth[:2].mean(0), truth[-2:].mean(0)  # two steps are one pass over the examples
    assert last[0] < 0.9 * first[0] and ((last - first).abs() > 0.01).all(), "nothing was learned"
    for impl, embedder in (("auto", fused), ("reference", reference)):
        assert_as_good_as_torch(curve(embedder, examples, values), truth, own, f"losses of {impl}")


def test_losses_under_triton(curve, slow_curve, tmp_path):
    """Two steps of a model of one layer, since without a GPU the kernels are interpreted."""
    import transformers

    from twn_kernels import TWNEmbedder
    from twn_kernels.testing.tiny_directory import write_tiny_model
    from twn_kernels.testing.twn_directory import write_twn_directory

    base = write_tiny_model(tmp_path / "base", "llama", num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    twn = write_twn_directory(tmp_path / "twn", model, targets=["q_proj", "down_proj"], num_queries=2)
    embedder = TWNEmbedder.from_pretrained(base, twn, dtype="float32", device="cpu", impl="triton")
    examples, values = examples_for("llama", tmp_path), settings(steps=2, batch_size=2, warmup_steps=0)
    truth, own = (slow_curve((base, twn), embedder, examples, values, d) for d in (torch.float64, torch.float32))
    assert_as_good_as_torch(curve(embedder, examples, values), truth, own, "losses")


@pytest.fixture
def step_of(embedder_of, trainee_of, tmp_path):
    """``step_of(dtype, chunk_size, order, **changes)``: scalars and gradients of one step over five examples.

    GPT-NeoX alone computes in fp64 throughout; the norms of the others are fp32 whatever the model is.
    """
    examples = examples_for("gpt_neox", tmp_path)
    picked = [Stream(examples, 6, 0)[place] for place in range(5)]

    def step(dtype, chunk_size, order=range(5), **changes):
        embedder = embedder_of("gpt_neox", dtype)
        trainee = trainee_of(embedder)
        if dtype == torch.float64:  # and so are the pipeline's logits
            trainee.backbone.logits = functools.partial(lambda hidden, head: head(hidden), head=trainee.backbone.head)
        values = settings(batch_size=5, max_grad_norm=1e9, **changes)
        trainer = joint_trainer(trainee, embedder, examples, tmp_path / "out", values)
        batch = collator(embedder, chunk_size)([picked[place] for place in order])
        scalars = trainer.step(trainee, batch)
        assert len(batch["chunks"]) == -(-5 // chunk_size)
        grads = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
        return torch.stack([scalars[name].detach() for name in LOSSES]), grads

    return step


def flat(grads: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    return torch.cat([grad.flatten() for name, grad in sorted(grads.items()) if kind in name])


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk_size, step_of):
    """In fp32, and in fp64 where the order of the rows gives the measure; four and two leave a last chunk of one."""
    (truth, truth_grads), (own, own_grads) = (step_of(dtype, 5) for dtype in (torch.float64, torch.float32))
    turned, turned_grads = step_of(torch.float64, 5, [4, 2, 0, 3, 1])
    measures = {torch.float32: (own, own_grads), torch.float64: (turned, turned_grads)}
    for dtype, (measure, measure_grads) in measures.items():
        actual, grads = step_of(dtype, chunk_size)
        assert grads.keys() == truth_grads.keys() and len(grads) == 33
        assert_as_good_as_torch(actual, truth, measure, f"losses in {dtype}")
        for kind in (".reasoning", ".embedding", "queries"):
            parts = (flat(of, kind) for of in (grads, truth_grads, measure_grads))
            assert_as_good_as_torch(*parts, f"gradients of {kind} in {dtype}")


@pytest.mark.parametrize("chunk_size", [2, 5])
@pytest.mark.parametrize("name", ["thought_weight", "plain_weight", "thoughtful_weight"])
def test_weights_scale_their_losses(name, chunk_size, step_of):
    """Alone with weight 3, each loss gives three times what it gives alone with weight 1; ``loss`` is the sum."""
    none = dict.fromkeys(("thought_weight", "plain_weight", "thoughtful_weight"), 0.0)
    (scalars, one), (_, three) = (step_of(torch.float64, chunk_size, **none | {name: w}) for w in (1.0, 3.0))
    alone = scalars[LOSSES.index(name.replace("_weight", "_loss"))]
    assert torch.equal(scalars[0], alone)
    touched = [key for key, grad in one.items() if grad.any()]
    assert touched and all((".reasoning" in key) == (name == "thought_weight") for key in touched)
    for key in touched:
        assert_as_good_as_torch(three[key], 3 * one[key], 3 * one[key] * (1 + 1e-13), key)


def test_each_job_is_clipped_by_itself(embedder_of, trainee_of, tmp_path):
    embedder = embedder_of("llama")
    trainee, examples = trainee_of(embedder), examples_for("llama", tmp_path)
    trainer = joint_trainer(trainee, embedder, examples, tmp_path / "out", settings(max_grad_norm=0.01))
    scalars = trainer.step(trainee, collator(embedder, 4)(list(Stream(examples, 4, 0))))
    norms = {"thought": 0.0, "queries": 0.0}
    for name, parameter in trainee.named_parameters():
        if parameter.grad is not None:
            norms["thought" if name.endswith(".reasoning") else "queries"] += parameter.grad.square().sum().item()
    for job, squared in norms.items():
        assert scalars[f"{job}_grad_norm"] > 0.01
        assert squared**0.5 == pytest.approx(0.01, rel=1e-4)


def test_a_batch_as_it_is_collated(embedder_of, tmp_path):
    embedder, examples = embedder_of("qwen3_vl"), examples_for("qwen3_vl", tmp_path)
    collate = collator(embedder, 4)
    collate.prompts = ("Find the document.", "Describe it.")
    order = [0, 1, 2, 3, 4, 5]
    batch = collate([examples.example(place, random.Random(0)) for place in order])
    assert [len(queries.batch) for queries, _ in batch["chunks"]] == [4, 2]
    text = embedder.processor.raw_text_of
    thoughts = [text(ids) for queries, _ in batch["chunks"] for ids in queries.thoughts]
    assert thoughts == [thought and f"{thought}</think>" for thought in QUESTIONS.values()]
    for queries, documents in batch["chunks"]:
        assert documents.thoughts is None
        for rows, prompt, other in ((queries, *collate.prompts), (documents, *collate.prompts[::-1])):
            for ids in rows.batch.tensors["input_ids"]:
                assert prompt in text(ids) and other not in text(ids)
    first, second = (queries.batch.images_per_row for queries, _ in batch["chunks"])
    assert first + second == [1, 0, 0, 1, 0, 0]


def test_known_positives_of_other_rows_are_marked(embedder_of, tmp_path):
    from twn_kernels.training.examples import Example

    examples = examples_for("llama", tmp_path)
    queries, documents = examples.queries, examples.documents
    batch = [
        Example(queries[0], documents["d0"], frozenset({"d0"})),
        Example(queries[1], documents["d1"], frozenset({"d0", "d1"})),
        Example(queries[2], documents["d0"], frozenset({"d0", "d2"})),
    ]
    positives = collator(embedder_of("llama"), 3)(batch)["positives"]
    assert positives.tolist() == [[True, False, True], [True, True, True], [True, False, True]]


def recall_at_1(embedder, trainee, examples) -> tuple[float, float]:
    """Of plain and of thoughtful query vectors, over all examples and all documents."""
    picked = [examples.example(place, random.Random(0)) for place in range(len(examples))]
    ((queries, documents),) = collator(embedder, len(picked))(picked)["chunks"]
    names = [example.document.id for example in picked]
    with torch.no_grad():
        asked, vectors = trainee(queries), trainee.pooled(trainee(documents).plain)
        found = [
            [names[place] in picked[row].relevant for row, place in enumerate((states @ vectors.T).argmax(1))]
            for states in (trainee.pooled(asked.plain), trainee.pooled(asked.thoughtful))
        ]
    return tuple(sum(hits) / len(hits) for hits in found)


@pytest.mark.parametrize(("family", "graph"), [("qwen3_vl", "shared_kv"), ("llama", "reencode")])
def test_a_short_run_learns(family, graph, embedder_of, trainee_of, tmp_path):
    """The losses fall, and the few examples find their documents, with and without a thought."""
    embedder = embedder_of(family, graph=graph)
    trainee, examples = trainee_of(embedder), examples_for(family, tmp_path)
    before = recall_at_1(embedder, trainee, examples)
    values = settings(steps=30, batch_size=6, chunk_size=6, log_steps=5, weight_decay=0.0)
    joint_trainer(trainee, embedder, examples, tmp_path / "out", values).run()
    rows = log_of(tmp_path / "out")
    for name in LOSSES:
        assert rows[-1][name] < 0.5 * rows[0][name], name
    assert max(before) < 0.7 and recall_at_1(embedder, trainee, examples) == (1.0, 1.0)


def test_a_stopped_run_goes_on_bit_for_bit(embedder_of, trainee_of, tmp_path, monkeypatch):
    """Six steps that save after the third; the same, stopped in the fifth and resumed by a new process' objects."""
    examples, values = examples_for("llama", tmp_path), settings(save_steps=3, log_steps=2)

    def run(folder, *, stop: bool = False, resume: bool = False):
        embedder = embedder_of("llama")
        trainee = trainee_of(embedder)
        trainer = joint_trainer(trainee, embedder, examples, folder, values)
        step = trainer.step

        def stopped(*args):
            if trainer.state.global_step == 4:
                raise KeyboardInterrupt
            return step(*args)

        if stop:
            monkeypatch.setattr(trainer, "step", stopped)
        trainer.run(resume=resume)
        return {name: p.detach() for name, p in trainee.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop=True)
    resumed = run(tmp_path / "stopped", resume=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    logs = [log_of(tmp_path / name) for name in ("whole", "stopped")]
    assert [row["step"] for row in logs[0]] == [2, 4, 6]
    first, second = ([row | {"seconds": 0} for row in log] for log in logs)
    assert first == second
