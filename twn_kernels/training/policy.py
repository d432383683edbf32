"""Group-relative policy optimisation of the thought: ``reasoning`` learns to write what ``embedding`` can use.

The embedder is the reward and stays as it is: base, ``embedding``, queries and gate are frozen. Under ``shared_kv``
with ``prefill_adapter="reasoning"`` the prompt runs under the adapter that learns, so plain embeddings and documents'
vectors move with it: they are computed anew in every step, and the divergence from the adapter at the start limits how
far they go. Owns the updates, the evaluation on queries held out, and which of the two adapters is kept.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.errors import DataError, OptionError, ShapeError
from twn_kernels.pipeline.processor import Processor
from twn_kernels.pipeline.sampling import chooser
from twn_kernels.settings import EMBEDDING, REASONING
from twn_kernels.training.config import check_policy
from twn_kernels.training.examples import Example, Examples, Stream
from twn_kernels.training.joint_forward import Trainee
from twn_kernels.training.policy_rewards import (
    Outcome,
    advantages,
    outcome_means,
    reciprocal_ranks,
    thought_rewards,
    token_losses,
)
from twn_kernels.training.policy_sampling import PolicyBatch, PolicyCollator, Sampler
from twn_kernels.training.sequences import Rows
from twn_kernels.training.stage_trainer import StageTrainer
from twn_kernels.training.states import load_learned, newest_state, save_learned

__all__ = ["LEAST_EXAMPLES", "HeldOut", "PolicyResult", "PolicyTrainer", "train_policy"]

Reward = Callable[[Outcome], Tensor]

_START = "start"  # folder of the adapter that the stage began with
# Of the examples, kept out to compare both adapters on; the mean reciprocal rank of 128 is known to 0.04 or better.
_HELD_OUT, _MOST_HELD_OUT_SHARE = 128, 0.2
LEAST_EXAMPLES = 10  # of which two are held out


@dataclass(frozen=True)
class HeldOut:
    """Means over the queries held out, each thought written greedily, all their documents being the candidates.

    Attributes:
        reward: of all thoughts.
        format_share: of the thoughts that were closed.
        reciprocal_rank, gap: of the closed thoughts; 0 where there is none.
        tokens: of a thought.
        plain_reciprocal_rank: of the plain embeddings, which no reward is for.
    """

    reward: float
    format_share: float
    reciprocal_rank: float
    gap: float
    tokens: float
    plain_reciprocal_rank: float


@dataclass(frozen=True)
class PolicyResult:
    """What a stage came to.

    Attributes:
        before, after: with the adapter of the start and with the trained one.
        kept: ``"trained"``, or ``"start"`` where training did not raise the reward; what the trainee holds now.
        queries: that were held out.
    """

    before: HeldOut
    after: HeldOut
    kept: str
    queries: int


@dataclass
class _Chunk:
    """Sequences of one forward, and all that their losses need beside it; tensors of tokens are ``[tokens]``."""

    rows: Rows
    advantages: Tensor  # [rows]
    reference: Tensor | None = None
    old: Tensor | None = None


@dataclass
class _Round:
    """The thoughts that a number of updates learn from."""

    chunks: list[_Chunk]
    tokens: int
    scalars: dict[str, float]


class PolicyTrainer(StageTrainer):
    """Updates of the adapter that thinks.

    The thoughts of a step depend on the adapter, the examples, ``seed`` and the number of the step alone. Where every
    thought of a step is broken, its rewards are equal and teach nothing: what is left of the loss is the divergence
    from the start, ``all_broken`` is logged, and ``say`` gets the reason.

    Args:
        trainee: model, queries and method; its parameters that require a gradient are the policy.
        out: folder of the stage.
        settings: beside a stage's own: ``group_size``, ``temperature``, ``clip``, ``kl_weight``, ``chunk_size``,
            the rewards' weights as in :func:`~.policy_rewards.thought_rewards` and, if not 1, ``inner_steps``.
        examples: a dataset by index, as long as all steps.
        collate: examples to a :class:`~.policy_sampling.PolicyBatch`.
        sampler: of the same trainee.
        reference: values of the policy's parameters that it may not go far from, in the parameters' order.
        reward: an outcome to ``[Q, G]``; None: :func:`~.policy_rewards.thought_rewards`.
        seed: of sampling and of the trainer's own draws.
        say: receives a line at each log.
    """

    def __init__(
        self,
        trainee: Trainee,
        out: Path,
        settings: Any,
        examples: Sequence[Example],
        collate: Callable[[Sequence[Example]], PolicyBatch],
        sampler: Sampler,
        reference: Sequence[Tensor],
        *,
        reward: Reward | None = None,
        seed: int = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.seed, self.say, self.sampler = seed, say or (lambda line: None), sampler
        self.reference = list(reference)
        self.reward = reward or partial(thought_rewards, weights=settings)
        self.inner_steps = getattr(settings, "inner_steps", 1)
        self._round: _Round | None = None
        repeated = _Repeated(examples, settings.batch_size, self.inner_steps)
        super().__init__(trainee, out, settings, repeated, lambda batch: {"batch": collate(batch)}, seed=seed, say=say)

    def step(self, model: Trainee, batch: dict[str, PolicyBatch]) -> dict[str, Tensor]:
        """One update; thoughts are new in the first of ``inner_steps``."""
        if self._round is None or self.state.global_step % self.inner_steps == 0:
            self._round = self._sampled(model, batch["batch"])
        current, settings = self._round, self.settings
        total, divergence = torch.zeros((), device=model.backbone.device), 0.0
        for chunk in current.chunks:
            log_probs, rows = self._log_probs(model, chunk.rows)
            if chunk.old is None:  # the policy that sampled is the policy now: this forward has both
                chunk.old = log_probs.detach()
            losses, kl = token_losses(
                *(log_probs, chunk.old, chunk.reference, chunk.advantages[rows]),
                clip=settings.clip,
                kl_weight=settings.kl_weight,
            )
            loss = losses.sum() / current.tokens
            self.accelerator.backward(loss)
            total, divergence = total + loss.detach(), divergence + kl.detach().sum() / current.tokens
        return {"loss": total, "kl": divergence} | current.scalars

    def _can_go_on_after(self, step: int) -> bool:
        return step % self.inner_steps == 0  # the thoughts that the next update reads are not in a state

    def rewards(self, outcome: Outcome) -> Tensor:
        """The reward of each thought, ``[Q, G]``.

        Raises:
            ShapeError: the reward that was given makes something else.
        """
        rewards = self.reward(outcome)
        if rewards.shape != outcome.closed.shape:
            raise ShapeError(
                f"reward must give one number a thought, {list(outcome.closed.shape)} (queries, thoughts of each), got "
                f"{list(rewards.shape)}."
            )
        return rewards

    def _sampled(self, model: Trainee, batch: PolicyBatch) -> _Round:
        settings, step = self.settings, self.state.global_step
        draws = random.Random(f"thoughts {self.seed}: {step}").getrandbits(63)
        # The whole distribution, which is what log probabilities are of.
        choose = chooser(settings.temperature, 1.0, draws, model.backbone.device)
        outcome = self.sampler.outcome(batch, settings.group_size, choose)
        rewards = self.rewards(outcome)
        gained = advantages(rewards)
        thoughts = [thought for group in outcome.thoughts for thought in group]
        scalars = outcome_means(outcome, rewards) | {
            "zero_groups": float((gained == 0).all(1).float().mean()),
            "all_broken": float(not outcome.closed.any()),
        }
        if scalars["all_broken"]:
            self.say(f"step {step + 1}: every sampled thought is broken; one of them: {thoughts[0].broken}.")
        chunks, size = [], settings.chunk_size
        for start in range(0, len(thoughts), size):
            part = range(start, min(start + size, len(thoughts)))
            queries = batch.queries.select([row // settings.group_size for row in part])
            rows = Rows(queries, [thoughts[row].ids for row in part])
            chunks.append(_Chunk(rows, gained.flatten()[start : part.stop]))
        with torch.no_grad(), held(_learned(model), self.reference):
            for chunk in chunks:
                chunk.reference, _ = self._log_probs(model, chunk.rows)
        return _Round(chunks, sum(len(thought.ids) for thought in thoughts), scalars)

    def _log_probs(self, model: Trainee, rows: Rows) -> tuple[Tensor, Tensor]:
        """Log probability of each token of the thoughts at the temperature of sampling, and the row it belongs to."""
        out = model(rows)
        logits = model.backbone.logits(out.thought_states) / self.settings.temperature
        return -F.cross_entropy(logits, out.thought_labels, reduction="none"), out.thought_rows


class _Repeated:
    """Examples such that ``inner_steps`` batches on end are the same."""

    def __init__(self, examples: Sequence[Example], batch_size: int, inner_steps: int) -> None:
        self.examples, self.batch_size, self.inner_steps = examples, batch_size, inner_steps

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        step, place = divmod(index, self.batch_size)
        return self.examples[step // self.inner_steps * self.batch_size + place]


def _learned(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def held(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters hold other values for a while; they get their own back, also after an error.

    The values are copied in place: packed copies and captured graphs notice that by the parameters' versions, which
    torch's fused optimizers do not raise.
    """
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        _fill(parameters, values)
        yield
    finally:
        _fill(parameters, own)


@torch.no_grad()
def _fill(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def train_policy(
    trainee: Trainee,
    processor: Processor,
    examples: Examples,
    out: str | Path,
    settings: Any,
    *,
    seed: int = 0,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    reward: Reward | None = None,
    prompts: tuple[str | None, str | None] = (None, None),
) -> PolicyResult:
    """Train the thought by its reward, and keep the result where it is better.

    Some of the examples are held out, drawn by ``seed``; on these the adapter at the start and the trained one write
    greedily, and the one with the higher reward is left in the trainee.

    Args:
        trainee: after joint training; its adapter that thinks learns, all else is frozen, also afterwards. Where
            training goes on from a state, what that adapter holds is not read.
        processor: the model's.
        examples: to learn from.
        out: folder of the stage: states, log, and ``start/``, the adapter that it began with.
        settings: as :class:`PolicyTrainer` reads them.
        seed: of all that is drawn.
        resume: go on from the newest state in ``out``, if there is one.
        say: receives a line at each log.
        reward: instead of the one from retrieval; an outcome to ``[Q, G]``.
        prompts: instructions of queries and documents, as the embedder would be given.

    Raises:
        OptionError: a setting leaves nothing to learn from, one adapter does both jobs, or ``out`` holds a run and
            ``resume`` is False.
        DataError: there are too few examples.
        TrainingError, CheckpointError: as in :meth:`~.stage_trainer.StageTrainer.run`.
    """
    _check(trainee, settings)
    out, say = Path(out), say or (lambda line: None)
    learning, held_out = _divided(examples, seed)
    trainee.learn((REASONING,), queries=False)
    start = _start(trainee, out)
    stream = Stream(learning, settings.steps * settings.batch_size, seed)
    collate, sampler = PolicyCollator(processor, *prompts), Sampler(trainee, processor, settings.chunk_size)
    trainer = PolicyTrainer(
        *(trainee, out, settings, stream, collate, sampler, start), reward=reward, seed=seed, say=say
    )
    trainer.run(resume=resume)
    batch = collate(held_out)
    with held(_learned(trainee), start):
        before = _evaluated(trainer, batch)
    after = _evaluated(trainer, batch)
    sampler.release()
    kept = "trained" if after.reward > before.reward else "start"
    if kept == "start":
        _fill(_learned(trainee), start)
    say(
        f"reward of {len(held_out)} queries held out: {before.reward:.4f} before, {after.reward:.4f} after; kept {kept}"
    )
    return PolicyResult(before, after, kept, len(held_out))


def _check(trainee: Trainee, settings: Any) -> None:
    roles = trainee.roles
    if (roles.thought, roles.queries) != (REASONING, EMBEDDING):
        raise OptionError(
            f'policy optimisation needs "{REASONING}" to think and "{EMBEDDING}" to embed, frozen as its reward; got '
            f'"{roles.thought}" and "{roles.queries}". Train two adapters.'
        )
    check_policy(settings)


def _divided(examples: Examples, seed: int) -> tuple[Examples, list[Example]]:
    """The examples to learn from, and those held out, each with a positive that does not change."""
    count = min(_HELD_OUT, int(len(examples) * _MOST_HELD_OUT_SHARE))
    if count < 2:
        raise DataError(
            f"policy optimisation needs at least {LEAST_EXAMPLES} examples, a part of which is held out; "
            f"got {len(examples)}."
        )
    learning, rest = examples.divided(count / len(examples), seed)
    return learning, [rest.example(place, random.Random(f"held out {seed}: {place}")) for place in range(len(rest))]


def _start(trainee: Trainee, out: Path) -> list[Tensor]:
    """The adapter that the stage began with: of a stage that goes on, from its folder. The trainee stays as it is."""
    parameters = _learned(trainee)
    own = [parameter.detach().clone() for parameter in parameters]
    if newest_state(out) is None:
        save_learned(trainee, out / _START)
        return own
    with held(parameters, own):
        load_learned(trainee, out / _START)
        return [parameter.detach().clone() for parameter in parameters]


def _evaluated(trainer: PolicyTrainer, batch: PolicyBatch) -> HeldOut:
    device = trainer.model.backbone.device
    outcome = trainer.sampler.outcome(batch, 1, chooser(0.0, 1.0, 0, device))
    plain = reciprocal_ranks(trainer.sampler.plain_similarities(batch), outcome.positives)
    return HeldOut(**outcome_means(outcome, trainer.rewards(outcome)), plain_reciprocal_rank=float(plain.mean()))
