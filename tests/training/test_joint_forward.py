"""Which loss teaches what: embedding losses never reach ``reasoning``, thoughts never ``embedding`` nor the queries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pipeline_runs import rows_of

from twn_kernels import TWNEmbedder, load_checkpoint
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES
from twn_kernels.training.joint_forward import Roles

GRAPHS = [("shared_kv", "reasoning"), ("shared_kv", "embedding"), ("shared_kv", None), ("reencode", "reasoning")]
LOSSES = ("plain", "thoughtful", "thought")


def thoughts_for(inputs: list) -> list[list[int]]:
    """Thoughts of unequal lengths, none in the second row."""
    return [[7, 8, 9, 10], [], [11, 12], [13, 14, 15], [16, 17]][: len(inputs)]


def kind_of(name: str) -> str:
    """``"reasoning"``, ``"embedding"``, ``"queries"`` or ``"base"``."""
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return last if "lora_" in name or last == "queries" else "base"


def losses_of(trainee, out) -> dict[str, torch.Tensor]:
    """A scalar of each loss's kind; contrastive ones read vectors alone, and every direction of them here."""
    draw = torch.Generator().manual_seed(1)
    plain, thoughtful = (trainee.pooled(states) for states in (out.plain, out.thoughtful))
    weight = torch.randn(plain.shape, generator=draw).to(plain)
    return dict(
        zip(LOSSES, ((plain * weight).sum(), (thoughtful * weight).sum(), trainee.thought_loss(out)), strict=True)
    )


def gradients(trainee, loss) -> dict[str, torch.Tensor]:
    """By name, of every parameter that learns; zero where there is none."""
    learned = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(learned.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(learned.items(), found, strict=True)}


def moved(grads: dict[str, torch.Tensor]) -> dict[str, set[bool]]:
    """Kind of parameter to whether its tensors have a gradient: ``{False}`` none of them, ``{True}`` each."""
    told: dict[str, set[bool]] = {}
    for name, grad in grads.items():
        told.setdefault(kind_of(name), set()).add(bool(grad.any()))
    return told


@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_teaches_its_own_adapter(family, graph, prefill, embedder_of, trainee_of, inputs_of):
    embedder = embedder_of(family, graph=graph, prefill_adapter=prefill)
    trainee, inputs = trainee_of(embedder), inputs_of(family)
    losses = losses_of(trainee, trainee(rows_of(embedder, inputs, thoughts_for(inputs))))
    for name in ("plain", "thoughtful"):
        told = moved(gradients(trainee, losses[name]))
        assert told == {"reasoning": {False}, "embedding": {True}, "queries": {True}}, name
    told = moved(gradients(trainee, losses["thought"]))
    assert told == {"reasoning": {True}, "embedding": {False}, "queries": {False}}
    sum(losses.values()).backward()
    frozen = [p for name, p in trainee.named_parameters() if kind_of(name) == "base"]
    assert len(frozen) > 10 and not any(p.requires_grad for p in frozen) and all(p.grad is None for p in frozen)


@pytest.mark.parametrize(
    ("prefill", "loss", "kind"),
    [
        ("reasoning", "plain", "reasoning"),
        ("reasoning", "thoughtful", "reasoning"),
        ("embedding", "thoughtful", "reasoning"),
        (None, "thoughtful", "reasoning"),
        ("embedding", "thought", "embedding"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3_text", "gpt_neox"])
def test_without_the_detached_interface_gradients_cross(
    family, prefill, loss, kind, embedder_of, trainee_of, inputs_of
):
    """What the test above can see: only the cut keeps the adapters apart. Values do not change by it."""
    method = {"graph": "shared_kv", "prefill_adapter": prefill}
    embedder, embedder64 = (embedder_of(family, dtype, **method) for dtype in (torch.float32, torch.float64))
    inputs = inputs_of(family)
    thoughts = thoughts_for(inputs)
    trainee = trainee_of(embedder, Roles(detach=False))
    out = trainee(rows_of(embedder, inputs, thoughts))
    assert True in moved(gradients(trainee, losses_of(trainee, out)[loss]))[kind]
    with torch.no_grad():
        own = trainee_of(embedder)(rows_of(embedder, inputs, thoughts)).thoughtful
        truth = trainee_of(embedder64)(rows_of(embedder64, inputs, thoughts)).thoughtful
    assert_as_good_as_torch(out.thoughtful, truth, own, "thoughtful states")


@pytest.mark.parametrize("prefill", ["embedding", None])
def test_a_thought_that_nothing_opens_is_still_reasonings_alone(prefill, embedder_of, trainee_of, inputs_of):
    """The prompt's last state, of another adapter, then predicts the first token of the thought."""
    embedder = embedder_of("llama", graph="shared_kv", prefill_adapter=prefill)
    inputs = inputs_of("llama")
    for detach in (True, False):
        trainee = trainee_of(embedder, Roles(detach=detach), opening=[])
        out = trainee(rows_of(embedder, inputs, thoughts_for(inputs)))
        told = moved(gradients(trainee, trainee.thought_loss(out)))
        assert told["reasoning"] == {True} and told["queries"] == {False}
        assert told["embedding"] == ({False} if detach or prefill is None else {True})


@pytest.mark.parametrize("prefill", ["reasoning", "embedding", None])
def test_one_adapter_for_both_jobs_is_trained_as_it_will_run(prefill, directories, trainee_of, inputs_of):
    """Saved under both names; a prompt that runs under no adapter is trained under none."""
    base, twn = directories("llama")
    checkpoint = load_checkpoint(twn)
    reasoning = checkpoint.adapters["reasoning"]
    both = {"reasoning": reasoning, "embedding": dataclasses.replace(reasoning, name="embedding")}
    config = dataclasses.replace(checkpoint.config, graph="shared_kv", prefill_adapter=prefill)
    one = dataclasses.replace(checkpoint, adapters=both, config=config)
    embedder = TWNEmbedder.from_pretrained(base, one, device="cpu")
    inputs = inputs_of("llama")
    expected = embedder.encode(inputs, think="never", convert_to_tensor=True)
    trainee = trainee_of(embedder, Roles("reasoning", "reasoning"))
    with torch.no_grad():
        got = trainee.pooled(trainee(rows_of(embedder, inputs, None)).plain)
    assert (got * expected).sum(dim=1).min() > 1 - 1e-5


@pytest.mark.parametrize("graph", ["shared_kv", "reencode"])
@pytest.mark.parametrize("name", ["reasoning", "embedding"])
def test_one_adapter_for_both_jobs_learns_from_every_loss(name, graph, embedder_of, trainee_of, inputs_of):
    embedder = embedder_of("qwen3_vl", graph=graph)
    trainee, inputs = trainee_of(embedder, Roles(name, name)), inputs_of("qwen3_vl")
    losses = losses_of(trainee, trainee(rows_of(embedder, inputs, thoughts_for(inputs))))
    for loss in LOSSES:
        told = moved(gradients(trainee, losses[loss]))
        assert told == {name: {True}, "queries": {loss != "thought"}}, loss
    with torch.no_grad():
        before = losses_of(trainee, trainee(rows_of(embedder, inputs, thoughts_for(inputs))))
        for parameter_name, parameter in trainee.named_parameters():
            if kind_of(parameter_name) == ({"reasoning", "embedding"} - {name}).pop():
                parameter.mul_(3.0)
        after = losses_of(trainee, trainee(rows_of(embedder, inputs, thoughts_for(inputs))))
    assert before == after  # the other adapter is nowhere in it


@pytest.mark.parametrize("graph", ["shared_kv", "reencode"])
def test_no_thoughts_at_all(graph, embedder_of, trainee_of, inputs_of):
    """The loss of no thoughts is zero and teaches nothing; the embedding loss is as with thoughts elsewhere."""
    embedder = embedder_of("llama", graph=graph)
    trainee, inputs = trainee_of(embedder), inputs_of("llama")
    for thoughts in (None, [[] for _ in inputs]):
        out = trainee(rows_of(embedder, inputs, thoughts))
        assert out.thoughtful is None and not len(out.thought_labels)
        loss = trainee.thought_loss(out)
        assert loss.item() == 0 and set().union(*moved(gradients(trainee, loss)).values()) == {False}
        told = moved(gradients(trainee, trainee.pooled(out.plain)[:, 0].sum()))
        assert told == {"reasoning": {False}, "embedding": {True}, "queries": {True}}


def test_without_thoughts_reencode_runs_each_row_once(embedder_of, trainee_of, inputs_of):
    embedder = embedder_of("llama", graph="reencode")
    trainee, inputs = trainee_of(embedder), inputs_of("llama")
    rows = []
    hook = trainee.backbone.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    with torch.no_grad():
        trainee(rows_of(embedder, inputs, None))
        trainee(rows_of(embedder, inputs, thoughts_for(inputs)))
    hook.remove()
    assert rows == [len(inputs), 2 * len(inputs)]


def test_what_learns_can_be_chosen(embedder_of, trainee_of):
    trainee = trainee_of(embedder_of("phi3"))

    def learning() -> set[str]:
        return {kind_of(name) for name, p in trainee.named_parameters() if p.requires_grad}

    assert learning() == {"reasoning", "embedding", "queries"}
    trainee.learn(["reasoning"], queries=False)
    assert learning() == {"reasoning"}
    trainee.learn([], queries=True)
    assert learning() == {"queries"}


def test_a_trainee_stays_in_evaluation_mode(embedder_of, trainee_of):
    trainee = trainee_of(embedder_of("llama"))
    assert trainee.train() is trainee and not any(module.training for module in trainee.modules())


def test_adapters_of_peft_are_the_ones_that_learn(directories, embedder_of, trainee_of, inputs_of):
    """A model that PEFT wrapped is trained as the same adapters from disk are."""
    import peft

    from twn_kernels import TWNEmbedder
    from twn_kernels.pipeline import loading

    base, twn = directories("qwen3_vl")
    wrapped = peft.PeftModel.from_pretrained(
        loading.base_model(base, torch.float32, "cpu", {}), twn / "reasoning", adapter_name="reasoning"
    )
    wrapped.load_adapter(twn / "embedding", adapter_name="embedding")

    def short(name: str) -> str:
        return name[name.find("layers.") :].removesuffix(".weight") if "layers." in name else name

    own, other = embedder_of("qwen3_vl"), TWNEmbedder.from_pretrained(wrapped, twn, processor=base)
    inputs, grads = inputs_of("qwen3_vl"), []
    for embedder in (own, other):
        trainee = trainee_of(embedder)
        losses = losses_of(trainee, trainee(rows_of(embedder, inputs, thoughts_for(inputs))))
        found = gradients(trainee, sum(losses.values()))
        grads.append({short(name): grad for name, grad in found.items()})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
