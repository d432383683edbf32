"""Policy optimisation of the thought: what it samples, what it updates, what it leaves alone, and what it keeps."""

from __future__ import annotations

import json

import pytest
import torch
from policy_work import GRAPHS, METHOD, examples_of, learned, settings_of, shifted

import twn_kernels
from twn_kernels.pipeline.sampling import chooser
from twn_kernels.pipeline.thinking import Thought
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.training.examples import Stream
from twn_kernels.training.policy import PolicyTrainer, held
from twn_kernels.training.policy_rewards import Outcome
from twn_kernels.training.policy_sampling import PolicyCollator, Sampler
from twn_kernels.training.sequences import Rows


@pytest.fixture
def stage(embedder_of, trainee_of, tmp_path):
    """``stage(settings, **method)``: embedder, trainee, its trainer, and a batch of three examples."""

    def make(settings=None, family: str = "llama", examples=None, dtype=torch.float32, **options):
        settings, told = settings or settings_of(), {"reward": options.pop("reward", None)}
        embedder = embedder_of(family, dtype, **(METHOD | options))
        trainee = trainee_of(embedder)
        trainee.learn(("reasoning",), queries=False)
        examples = examples or examples_of()
        stream, collate = Stream(examples, settings.steps * settings.batch_size, 0), PolicyCollator(embedder.processor)
        sampler = Sampler(trainee, embedder.processor, settings.chunk_size)
        reference = [p.detach().clone() for p in trainee.parameters() if p.requires_grad]
        parts = (stream, collate, sampler, reference)
        trainer = PolicyTrainer(trainee, tmp_path / "stage", settings, *parts, say=said.append, **told)
        return embedder, trainee, trainer, collate([stream[i] for i in range(3)])

    said: list[str] = []
    make.said = said
    return make


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=str)
def test_thoughts_and_similarities_are_those_of_the_embedder(graph, prefill, stage):
    embedder, trainee, trainer, batch = stage(graph=graph, prefill_adapter=prefill)
    examples = [trainer.train_dataset[i] for i in range(3)]
    outcome = trainer.sampler.outcome(batch, 2, chooser(0.0, 1.0, 0, torch.device("cpu")))
    options = {"convert_to_tensor": True, "return_details": True}
    vectors, details = embedder.encode([e.query.input for e in examples], think="always", **options)
    documents, _ = embedder.encode([e.document.input for e in examples], think="never", **options)
    plain, _ = embedder.encode([e.query.input for e in examples], think="never", **options)
    for row, detail in enumerate(details):
        assert [thought.text for thought in outcome.thoughts[row]] == [detail.text] * 2
        assert [thought.broken for thought in outcome.thoughts[row]] == [detail.fallback] * 2
        assert outcome.closed[row].tolist() == [detail.thought] * 2
        expected = vectors[row] @ documents.T * detail.thought
        torch.testing.assert_close(outcome.similarities[row], expected.expand(2, -1), atol=1e-5, rtol=0)
    assert 0 < outcome.closed.sum() < 6
    torch.testing.assert_close(trainer.sampler.plain_similarities(batch)[:, 0], plain @ documents.T, atol=1e-5, rtol=0)


def test_similarities_follow_the_adapter_that_learns_only_where_the_prompt_runs_under_it(stage):
    for (graph, prefill), moves in zip(GRAPHS, (True, False, False, False), strict=True):
        _, trainee, trainer, batch = stage(graph=graph, prefill_adapter=prefill)
        before = trainer.sampler.plain_similarities(batch)
        shifted(trainee, 0.05)
        after = trainer.sampler.plain_similarities(batch)
        assert torch.equal(before, after) is not moves, (graph, prefill)


def test_relevant_documents_of_other_queries_are_known(stage):
    _, _, trainer, _ = stage()
    stream = Stream(examples_of(4), 12, 0)
    whole = [stream[i] for i in range(12)]
    batch = trainer.data_collator([*whole])["batch"]
    for row, example in enumerate(whole):
        expected = [other.document.id in example.relevant for other in whole]
        assert batch.positives[row].tolist() == expected and expected[row]
    assert batch.positives.sum() > 12


def test_equal_thoughts_of_a_query_are_worth_exactly_the_same(stage):
    """Rows of a batch differ by rounding, and the deviation of a group would make that large."""
    _, _, trainer, batch = stage(settings_of(chunk_size=5))
    outcome = trainer.sampler.outcome(batch, 7, chooser(0.0, 1.0, 0, torch.device("cpu")))
    assert outcome.closed.any()
    for row in outcome.similarities:
        assert all(torch.equal(row[0], other) for other in row)
    assert trainer.step(trainer.model, {"batch": batch})["zero_groups"] < 1


def test_a_step_samples_by_its_seed_and_number_alone(stage):
    def sampled(seed: int, step: int) -> list[list[int]]:
        _, _, trainer, batch = stage()
        trainer.seed, trainer.state.global_step = seed, step
        return [chunk.rows.thoughts for chunk in trainer._sampled(trainer.model, batch).chunks]

    first = sampled(0, 4)
    torch.rand(7)
    assert sampled(0, 4) == first
    assert sampled(0, 5) != first and sampled(1, 4) != first


# -- updates ----------------------------------------------------------------------------------------------------------


class Fixed:
    """A sampler whose thoughts are given."""

    def __init__(self, thoughts: list[list[list[int]]]) -> None:
        self.thoughts = [[Thought(ids=ids) for ids in group] for group in thoughts]

    def outcome(self, batch, group_size, choose) -> Outcome:
        closed = torch.ones(len(self.thoughts), group_size, dtype=torch.bool)
        return Outcome(self.thoughts, closed, torch.zeros(*closed.shape, 3), batch.positives)


IDS = [[[40, 41, 42], [43], [44, 45]], [[46], [47, 48, 49, 50], [51, 52]], [[53, 54], [55, 56], [57]]]
REWARDS = [[1.0, 0.0, 0.5], [0.25, 2.0, 0.0], [1.0, 1.0, 1.0]]


def slow_log_probs(embedder, trainee, temperature: float) -> list[list[list[torch.Tensor]]]:
    """Log probabilities of ``IDS``, one thought a forward, by HuggingFace's model with its head under ``reasoning``."""
    processor, opening = embedder.processor, trainee.opening
    stream = Stream(examples_of(), 6, 0)
    found = []
    for place, group in enumerate(IDS):
        prompt = processor.batch([processor.parse(stream[place].query.input, 0)]).tensors["input_ids"][0].tolist()
        found.append([])
        for ids in group:
            whole = torch.tensor([[*prompt, *opening, *ids]])
            with twn_kernels.route(embedder.model, "reasoning"):
                logits = embedder.model(input_ids=whole).logits[0] / temperature
            table, first = logits.log_softmax(-1), len(prompt) + len(opening)
            found[-1].append([table[first + i - 1, token] for i, token in enumerate(ids)])
    return found


def slow_loss(current, old, reference, clip: float, kl_weight: float) -> torch.Tensor:
    """The objective, token by token."""
    total, tokens = 0.0, 0
    for query, group in enumerate(REWARDS):
        mean = sum(group) / len(group)
        deviation = (sum((r - mean) ** 2 for r in group) / len(group)) ** 0.5
        for place, reward in enumerate(group):
            for now, then, start in zip(*(p[query][place] for p in (current, old, reference)), strict=True):
                advantage = (reward - mean) / (deviation + 1e-4)
                ratio = torch.exp(now - then.detach())
                limited = min(max(ratio.item(), 1 - clip), 1 + clip)
                is_limited = limited * advantage < ratio.item() * advantage
                total = total - (limited * advantage if is_limited else ratio * advantage)
                away = start.detach() - now
                total = total + kl_weight * (torch.exp(away) - away - 1)
                tokens += 1
    return total / tokens


def slow_updates(embedder, trainee, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradients of two updates on the same thoughts, the adapter having moved before and between them."""
    with torch.no_grad():
        reference = slow_log_probs(embedder, trainee, settings.temperature)
    losses, grads, old = [], [], None
    for _ in range(2):
        shifted(trainee, 0.02)
        current = slow_log_probs(embedder, trainee, settings.temperature)
        old = current if old is None else old
        loss = slow_loss(current, old, reference, settings.clip, settings.kl_weight)
        found = torch.autograd.grad(loss, [p for p in trainee.parameters() if p.requires_grad])
        losses.append(loss.detach())
        grads.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(losses), torch.stack(grads)


@pytest.mark.parametrize(("graph", "prefill"), [GRAPHS[0], GRAPHS[3]], ids=str)
@pytest.mark.parametrize("chunk_size", [2, 16])
def test_updates_equal_a_slow_objective(graph, prefill, chunk_size, stage):
    """In the graphs where the prompt that is thought about runs under ``reasoning``; loss, divergence and gradients."""
    settings = settings_of(chunk_size=chunk_size, group_size=3, inner_steps=2, clip=0.05, kl_weight=0.5)
    method = {"graph": graph, "prefill_adapter": prefill}
    slow = {}
    for dtype in (torch.float64, torch.float32):
        embedder, trainee, *_ = stage(settings, dtype=dtype, **method)
        slow[dtype] = slow_updates(embedder, trainee, settings)
    _, trainee, trainer, batch = stage(settings, reward=lambda outcome: torch.tensor(REWARDS), **method)
    trainer.sampler = Fixed(IDS)
    losses, grads, kls = [], [], []
    for step in range(2):
        shifted(trainee, 0.02)
        trainee.zero_grad()
        trainer.state.global_step = step
        told = trainer.step(trainee, {"batch": batch})
        losses.append(told["loss"])
        kls.append(told["kl"])
        grads.append(torch.cat([p.grad.flatten() for p in trainee.parameters() if p.requires_grad]))
    truth, own = slow[torch.float64], slow[torch.float32]
    assert_as_good_as_torch(torch.stack(losses), truth[0], own[0], "losses")
    assert_as_good_as_torch(torch.stack(grads), truth[1], own[1], "gradients")
    assert 0 < kls[0] < kls[1] and told["zero_groups"] == pytest.approx(1 / 3) and told["tokens"] == 2


def test_the_first_update_is_the_plain_policy_gradient_and_has_no_divergence(stage):
    """Whatever the weight of the divergence and the clip, and however many updates follow."""
    settings = settings_of(group_size=3, inner_steps=2)
    embedder, trainee, trainer, batch = stage(settings, reward=lambda outcome: torch.tensor(REWARDS))
    trainer.sampler = Fixed(IDS)
    told = trainer.step(trainee, {"batch": batch})
    assert told["kl"] == 0
    for chunk in trainer._round.chunks:
        assert torch.equal(trainer._log_probs(trainee, chunk.rows)[0], chunk.old)
        assert torch.equal(chunk.old, chunk.reference)
    plain, tokens = 0.0, 0
    for chunk in trainer._round.chunks:
        log_probs, rows = trainer._log_probs(trainee, chunk.rows)
        plain, tokens = plain - (chunk.advantages[rows] * log_probs).sum(), tokens + len(rows)
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain / tokens, parameters)
    assert tokens == 18 and any(g.any() for g in expected)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=str)
def test_probabilities_are_those_that_thoughts_are_sampled_by(graph, prefill, stage):
    """Of every token that the decode loop chose, from the logits that it chose it by."""
    _, trainee, trainer, batch = stage(graph=graph, prefill_adapter=prefill)
    draw, seen = chooser(1.3, 1.0, 3, torch.device("cpu")), []

    def choose(logits):
        tokens = draw(logits)
        seen.append((logits / 1.3).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        return tokens

    trainer.sampler.chunk_size = 99
    outcome = trainer.sampler.outcome(batch, 2, choose)
    thoughts = [thought for group in outcome.thoughts for thought in group]
    rows = Rows(batch.queries.select([0, 0, 1, 1, 2, 2]), [thought.ids for thought in thoughts])
    with torch.no_grad():
        found, owners = trainer._log_probs(trainee, rows)
    steps = [[step for step in range(8) if step < len(thought.ids)] for thought in thoughts]
    rest = {step: iter(values) for step, values in enumerate(seen)}
    expected = torch.zeros(len(found))
    places = {row: (owners == row).nonzero()[:, 0].tolist() for row in range(6)}
    for step in range(8):  # within a step, rows that still think come in their order
        for row in range(6):
            if step in steps[row]:
                expected[places[row][step]] = next(rest[step])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_thoughts_are_new_in_every_round_of_updates_and_only_there(stage):
    _, trainee, trainer, batch = stage(settings_of(inner_steps=2))
    rounds = []
    for step in range(4):
        trainer.state.global_step = step
        trainer.step(trainee, {"batch": batch})
        rounds.append(trainer._round)
    assert rounds[0] is rounds[1] and rounds[2] is rounds[3] and rounds[1] is not rounds[2]
    repeated = [trainer.train_dataset[i].query.id for i in range(6)]
    assert repeated[:3] == repeated[3:] and len(trainer.train_dataset) == 6


def test_the_reference_is_held_for_its_forward_alone_and_given_back_after_an_error(stage):
    _, trainee, trainer, batch = stage()
    shifted(trainee, 0.1)
    own, versions = learned(trainee), [p._version for p in trainee.parameters() if p.requires_grad]
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    addresses = [p.data_ptr() for p in parameters]
    seen = []

    def failing(model, rows):
        seen.append([torch.equal(p, r) for p, r in zip(parameters, trainer.reference, strict=True)])
        raise RuntimeError("out of memory")

    trainer._log_probs = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step(trainee, {"batch": batch})
    assert seen == [[True] * len(parameters)]
    assert all(torch.equal(p, own[name]) for name, p in trainee.named_parameters() if name in own)
    assert [p.data_ptr() for p in parameters] == addresses
    assert all(p._version > v for p, v in zip(parameters, versions, strict=True))
    with pytest.raises(ValueError, match="shorter"), held(parameters, trainer.reference[:-1]):
        pass
    assert all(torch.equal(p, own[name]) for name, p in trainee.named_parameters() if name in own)


def test_where_every_thought_is_broken_the_loss_is_zero_and_the_log_says_so(stage):
    settings = settings_of(steps=1)
    _, trainee, trainer, batch = stage(settings, max_think_tokens=1, think_end=("</think>",))
    before = learned(trainee)
    trainer.run()
    (row,) = map(json.loads, (trainer.out / "log.jsonl").read_text().splitlines())
    assert row["all_broken"] == row["zero_groups"] == row["tokens"] == 1
    assert row["loss"] == row["reward"] == row["format_share"] == row["reciprocal_rank"] == row["kl"] == 0
    assert "step 1: every sampled thought is broken; one of them: the thought was not closed within 1 tokens." in (
        stage.said
    )
    assert all(torch.equal(p, before[name]) for name, p in learned(trainee).items())
    shifted(trainee, 0.1)  # what is left pulls back to the start
    told = trainer.step(trainee, {"batch": batch})
    assert told["kl"] > 0 and told["loss"] == pytest.approx(0.1 * told["kl"].item())


def test_images_are_thought_about_too(stage, tmp_path):
    from PIL import Image

    paths = []
    for place, size in enumerate([(32, 48), (24, 64)]):
        paths.append(str(tmp_path / f"{place}.png"))
        Image.new("RGB", size, (place * 200, 90, 30)).save(paths[-1])
    _, trainee, trainer, batch = stage(family="qwen3_vl", examples=examples_of(12, paths))
    assert sum(batch.queries.images_per_row) > 0
    told = trainer.step(trainee, {"batch": batch})
    assert torch.isfinite(told["loss"]) and told["kl"] < 1e-6
