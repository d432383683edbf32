"""The stage of policy optimisation as a whole: it learns, keeps the better adapter, goes on, and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from policy_work import GRAPHS, METHOD, everything, examples_of, learned, settings_of, shifted

import twn_kernels
from twn_kernels.errors import DataError, OptionError, ShapeError, TrainingError
from twn_kernels.training.joint_forward import Roles
from twn_kernels.training.policy import PolicyTrainer, train_policy
from twn_kernels.training.policy_rewards import Outcome, thought_rewards


def closing(outcome: Outcome) -> torch.Tensor:
    """A reward that a tiny model can earn: a thought that is closed, the sooner the better."""
    lengths = [[len(thought.ids) for thought in group] for group in outcome.thoughts]
    return outcome.closed * (2.0 - torch.tensor(lengths) / 8)


@pytest.mark.parametrize("graph", ["shared_kv", "reencode"])
def test_a_reward_that_can_be_learned_is_learned(graph, embedder_of, trainee_of, tmp_path):
    embedder = embedder_of("llama", graph=graph, max_think_tokens=8)
    trainee, said = trainee_of(embedder), []
    before = everything(trainee)
    settings = settings_of(steps=20, batch_size=4, group_size=8, temperature=1.0, kl_weight=0.01, chunk_size=32)
    result = train_policy(
        trainee, embedder.processor, examples_of(20), tmp_path / "out", settings, reward=closing, say=said.append
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    first, last = ([row["reward"] for row in part] for part in (rows[:2], rows[-2:]))
    assert sum(first) / 2 < 0.4 and sum(last) / 2 > 1.5
    assert result.before.reward < 0.5 < 1.5 < result.after.reward and result.after.format_share == 1.0
    assert result.kept == "trained" and result.queries == 4 and said[-1].endswith("kept trained")
    assert json.loads(json.dumps(dataclasses.asdict(result)))["after"]["reward"] == result.after.reward
    names = ["loss", "reward", "format_share", "reciprocal_rank", "gap", "kl", "tokens", "zero_groups", "all_broken"]
    assert len(rows) == 20 and all(set(names) < set(row) for row in rows) and rows[-1]["kl"] > 0.01
    moved = {name for name, tensor in everything(trainee).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith(("lora_A.reasoning", "lora_B.reasoning"))}
    assert {name for name, p in trainee.named_parameters() if p.requires_grad} == moved
    assert (result.before.plain_reciprocal_rank != result.after.plain_reciprocal_rank) or graph == "reencode"


def test_the_adapter_of_the_start_is_kept_where_training_made_it_no_better(embedder_of, trainee_of, tmp_path):
    embedder = embedder_of("llama", max_think_tokens=8)
    trainee = trainee_of(embedder)
    before = everything(trainee)

    def misleading(outcome: Outcome) -> torch.Tensor:
        """Groups are rewarded for what single thoughts are not."""
        return closing(outcome) if outcome.closed.shape[1] > 1 else -closing(outcome)

    settings = settings_of(steps=12, batch_size=4, group_size=8, temperature=1.0, kl_weight=0.0, chunk_size=32)
    result = train_policy(trainee, embedder.processor, examples_of(20), tmp_path, settings, reward=misleading)
    assert result.after.reward < result.before.reward and result.kept == "start"
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(trainee).items())


@pytest.mark.parametrize(("graph", "prefill"), GRAPHS, ids=str)
def test_a_stage_with_the_reward_of_retrieval(graph, prefill, embedder_of, trainee_of, tmp_path):
    embedder = embedder_of("llama", graph=graph, prefill_adapter=prefill, **METHOD)
    trainee = trainee_of(embedder)
    result = train_policy(trainee, embedder.processor, examples_of(), tmp_path, settings_of())
    fixed = prefill != "reasoning" or graph == "reencode"
    for told in (result.before, result.after):
        assert told.reward == pytest.approx(told.format_share * (1 + told.reciprocal_rank + told.gap), abs=1e-5)
    assert (result.before.plain_reciprocal_rank == result.after.plain_reciprocal_rank) or not fixed


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_a_resumed_stage_is_the_same_bit_for_bit(inner_steps, embedder_of, trainee_of, tmp_path):
    settings = settings_of(steps=6, save_steps=2, inner_steps=inner_steps, log_steps=3)

    def trained(out, *, shift: float = 0.0, resume: bool = False, stop: int | None = None):
        embedder = embedder_of("llama", **METHOD)
        trainee = trainee_of(embedder)
        trainee.learn(("reasoning",), queries=False)
        shifted(trainee, shift)
        rounds, evaluations = [], []

        def reward(outcome: Outcome) -> torch.Tensor:
            if outcome.closed.shape[1] == 1:  # the trained adapter is the better one
                evaluations.append(outcome)
                return outcome.closed * 0.0 + len(evaluations)
            rounds.append(outcome)
            if len(rounds) == stop:
                raise KeyboardInterrupt
            return thought_rewards(outcome, settings)

        options = {"reward": reward, "resume": resume, "seed": 3}
        return train_policy(trainee, embedder.processor, examples_of(), out, settings, **options), learned(trainee)

    whole, tensors = trained(tmp_path / "whole")
    assert not all(torch.equal(t, tensors[n]) for n, t in learned_at_start(embedder_of, trainee_of).items())
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=4 // inner_steps + 1)
    states = sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*"))
    assert states == ["checkpoint-2", "checkpoint-4"]
    # What the adapter holds when a stage goes on is not read: neither as policy nor as reference.
    parts, others = trained(tmp_path / "parts", shift=0.3, resume=True)
    assert parts == whole and all(torch.equal(tensors[name], others[name]) for name in tensors)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    for one, other in zip(*[[json.loads(line) for line in log] for log in logs], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    again, same = trained(tmp_path / "parts", shift=0.3, resume=True)  # nothing is left to do
    assert again == whole and all(torch.equal(tensors[name], same[name]) for name in tensors)


def test_between_two_updates_on_the_same_thoughts_no_state_is_kept(embedder_of, trainee_of, tmp_path, monkeypatch):
    """Their thoughts are in no state: a run that went on from there would write others."""
    embedder = embedder_of("llama", **METHOD)
    trainee, real = trainee_of(embedder), PolicyTrainer.step

    def spoiled(self, model, batch):
        scalars = real(self, model, batch)
        return scalars | {"loss": scalars["loss"] * float("nan")} if self.state.global_step == 3 else scalars

    monkeypatch.setattr(PolicyTrainer, "step", spoiled)
    settings = settings_of(steps=6, save_steps=2, inner_steps=2)
    with pytest.raises(TrainingError, match=r"^step 4: loss is nan. Stopped; the newest saved state is .*checkpoint-2"):
        train_policy(trainee, embedder.processor, examples_of(), tmp_path, settings)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def learned_at_start(embedder_of, trainee_of) -> dict[str, torch.Tensor]:
    trainee = trainee_of(embedder_of("llama"))
    trainee.learn(("reasoning",), queries=False)
    return learned(trainee)


def test_errors_say_what_is_wrong(embedder_of, trainee_of, tmp_path):
    embedder = embedder_of("llama", max_think_tokens=8)
    trainee = trainee_of(embedder)

    def run(settings=None, examples=None, trainee=trainee, **options):
        train_policy(
            trainee, embedder.processor, examples or examples_of(), tmp_path, settings or settings_of(), **options
        )

    with pytest.raises(OptionError, match=r"policy\.group_size must be at least 2 to compare thoughts, got 1\."):
        run(settings_of(group_size=1))
    with pytest.raises(
        OptionError, match=r"policy\.batch_size must be at least 2 so that documents can be ranked, got"
    ):
        run(settings_of(batch_size=1))
    with pytest.raises(OptionError, match=r"policy\.temperature must be above 0 to sample thoughts, got 0\.0\."):
        run(settings_of(temperature=0.0))
    with pytest.raises(OptionError, match=r"policy\.steps must be a multiple of policy\.inner_steps, 3, .* got 2\."):
        run(settings_of(inner_steps=3, save_steps=3))
    with pytest.raises(
        OptionError, match=r"policy\.save_steps must be a multiple of policy\.inner_steps, 2, .* got 7\."
    ):
        run(settings_of(inner_steps=2, save_steps=7))
    with pytest.raises(DataError, match=r"policy optimisation needs at least 10 examples, .*; got 9\."):
        run(examples=examples_of(9))
    with pytest.raises(ShapeError, match=r"reward must give one number a thought, \[3, 4\] .*, got \[3\]\."):
        run(reward=lambda outcome: torch.zeros(3))
    with pytest.raises(OptionError, match=r'needs "reasoning" to think and "embedding" to embed.*Train two adapters\.'):
        run(trainee=trainee_of(embedder, Roles("reasoning", "reasoning")))
    run(trainee=trainee_of(embedder))
    shifted(trainee, 0.1)
    before = everything(trainee)
    with pytest.raises(OptionError, match="holds states of a run, the newest is checkpoint-2"):
        run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(trainee).items())
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(twn_kernels.errors.CheckpointError, match="start"):
        run(trainee=trainee_of(embedder), resume=True)
