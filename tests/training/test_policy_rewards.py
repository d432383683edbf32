"""Rewards, advantages and the loss of policy optimisation, worked by hand and by slow loops in Python."""

from __future__ import annotations

import math
import random
import types

import pytest
import torch

from twn_kernels.pipeline.thinking import Thought
from twn_kernels.training.policy_rewards import (
    Outcome,
    advantages,
    outcome_means,
    reciprocal_ranks,
    similarity_gaps,
    thought_rewards,
    token_losses,
)

WEIGHTS = types.SimpleNamespace(format_reward=0.5, rank_reward=2.0, gap_reward=4.0)


def exactly(tensor: torch.Tensor) -> list:
    """The numbers of a tensor, rounded where binary fractions cannot be exact."""
    return [[round(value, 6) for value in row] for row in tensor.tolist()]


def thoughts_of(lengths: list[list[int]]) -> list[list[Thought]]:
    return [[Thought(ids=[7] * length) for length in row] for row in lengths]


@pytest.fixture
def outcome() -> Outcome:
    """Three queries, two thoughts each; the third document is relevant to the first query too."""
    similarities = [
        [[0.5, 0.75, 0.875], [0.5, 0.25, 0.875]],
        [[0.25, 0.5, 0.75], [0.625, 0.125, 0.25]],
        [[0.0, 0.0, 0.0], [0.25, 0.5, 0.5]],
    ]
    positives = [[True, False, True], [False, True, False], [False, False, True]]
    closed = [[True, True], [True, True], [False, True]]
    return Outcome(
        thoughts_of([[1, 2], [3, 4], [8, 6]]), torch.tensor(closed), torch.tensor(similarities), torch.tensor(positives)
    )


def test_ranks_leave_other_positives_out_and_put_ties_first(outcome):
    ranks = reciprocal_ranks(outcome.similarities, outcome.positives)
    assert exactly(ranks) == [[0.5, 1.0], [0.5, round(1 / 3, 6)], [round(1 / 3, 6), 0.5]]


def test_gaps_are_to_the_hardest_negative(outcome):
    gaps = similarity_gaps(outcome.similarities, outcome.positives)
    assert exactly(gaps) == [[-0.25, 0.25], [-0.25, -0.5], [0.0, 0.0]]


def test_without_a_negative_the_rank_is_first_and_there_is_no_gap():
    similarities, positives = torch.tensor([[[0.5, 0.75]], [[0.25, 0.125]]]), torch.ones(2, 2, dtype=torch.bool)
    assert exactly(reciprocal_ranks(similarities, positives)) == [[1.0], [1.0]]
    assert exactly(similarity_gaps(similarities, positives)) == [[0.0], [0.0]]


def test_a_closed_thought_earns_format_rank_and_gap_and_a_broken_one_nothing(outcome):
    assert exactly(thought_rewards(outcome, WEIGHTS)) == [
        [0.5 + 2 * 0.5 - 4 * 0.25, 0.5 + 2 * 1.0 + 4 * 0.25],
        [0.5 + 2 * 0.5 - 4 * 0.25, round(0.5 + 2 / 3 - 4 * 0.5, 6)],
        [0.0, 0.5 + 2 * 0.5],
    ]


def test_what_a_broken_thought_looks_like_does_not_matter_and_nan_elsewhere_shows(outcome):
    before = thought_rewards(outcome, WEIGHTS)
    outcome.similarities[2, 0] = torch.nan
    assert torch.equal(thought_rewards(outcome, WEIGHTS), before)
    outcome.similarities[0, 0, 0] = torch.nan
    assert thought_rewards(outcome, WEIGHTS)[0, 0].isnan()
    outcome.similarities[1, 0, 0] = torch.nan
    assert thought_rewards(outcome, WEIGHTS)[1, 0].isnan()


def test_means_of_rank_and_gap_are_of_closed_thoughts(outcome):
    told = outcome_means(outcome, thought_rewards(outcome, WEIGHTS))
    ranks, gaps = [0.5, 1, 0.5, 1 / 3, 0.5], [-0.25, 0.25, -0.25, -0.5, 0]
    assert told["format_share"] == pytest.approx(5 / 6) and told["tokens"] == 4
    assert told["reciprocal_rank"] == pytest.approx(sum(ranks) / 5) and told["gap"] == pytest.approx(sum(gaps) / 5)
    assert told["reward"] == pytest.approx((0.5 + 3.5 + 0.5 + (0.5 + 2 / 3 - 2) + 0 + 1.5) / 6)
    outcome.closed[:] = False
    told = outcome_means(outcome, thought_rewards(outcome, WEIGHTS))
    assert told == {"reward": 0.0, "format_share": 0.0, "reciprocal_rank": 0.0, "gap": 0.0, "tokens": 4.0}


def test_advantages_are_deviations_from_the_group():
    gained = advantages(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]], dtype=torch.float64))
    deviation, other = math.sqrt(1.25), math.sqrt(0.75)
    assert gained[0].tolist() == pytest.approx([x / (deviation + 1e-4) for x in (-1.5, -0.5, 0.5, 1.5)], rel=1e-12)
    assert gained[1].tolist() == pytest.approx([x / (other + 1e-4) for x in (-0.5, -0.5, -0.5, 1.5)], rel=1e-12)


def test_equal_rewards_teach_exactly_nothing():
    """The mean of numbers that are all the same is often another number."""
    differ = False
    for dtype in (torch.float32, torch.float64):
        for size in (2, 3, 7, 64):
            rewards = torch.tensor([[0.1], [1 / 3], [0.7], [0.0], [-2.3]], dtype=dtype).expand(-1, size).clone()
            assert torch.equal(advantages(rewards), torch.zeros_like(rewards))
            differ |= bool((rewards.mean(1) != rewards[:, 0]).any())
    assert differ


def test_rounding_alone_is_no_advantage():
    noisy = 1 + torch.tensor([[0.0, 1.0, 0.0, 1.0]]) * torch.finfo(torch.float32).eps
    assert 0 < advantages(noisy).abs().max() < 2e-3


def losses_at(ratio: float, advantage: float, reference: float = 0.0) -> tuple[float, float, float]:
    """Loss, divergence and gradient of one token; ``reference`` is relative to the policy."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    current = (old + math.log(ratio)).requires_grad_()
    loss, kl = token_losses(
        current, old, current.detach() + reference, torch.tensor([advantage]).double(), clip=0.2, kl_weight=0.5
    )
    loss.sum().backward()
    return loss.item(), kl.item(), current.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # worse than before is not clipped
        (1.5, -2.0, 3.0, 3.0),  # nor is this
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_ratio_is_clipped_where_it_would_be_rewarded_for_more(ratio, advantage, loss, gradient):
    found, kl, slope = losses_at(ratio, advantage)
    assert (found, slope) == (pytest.approx(loss), pytest.approx(gradient)) and kl == 0.0


@pytest.mark.parametrize("away", [math.log(2), -math.log(2), 3.0])
def test_the_divergence_is_never_negative_and_pulls_towards_the_reference(away):
    loss, kl, slope = losses_at(1.0, 0.0, away)
    assert kl == pytest.approx(math.exp(away) - away - 1) and kl > 0 and loss == pytest.approx(0.5 * kl)
    assert slope == pytest.approx(0.5 * (1 - math.exp(away)))


def test_losses_equal_a_loop_over_tokens():
    draw = random.Random(0)
    tokens = [[draw.uniform(-3, -0.1) for _ in range(3)] + [draw.uniform(-2, 2)] for _ in range(200)]
    columns = torch.tensor(tokens, dtype=torch.float64).T
    losses, kls = token_losses(*columns, clip=0.3, kl_weight=0.7)
    clipped = 0
    for (current, old, reference, advantage), loss, kl in zip(tokens, losses.tolist(), kls.tolist(), strict=True):
        ratio = math.exp(current) / math.exp(old)
        within = min(max(ratio, 0.7), 1.3)
        expected = math.exp(reference) / math.exp(current) - math.log(math.exp(reference) / math.exp(current)) - 1
        assert kl == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert loss == pytest.approx(0.7 * expected - min(ratio * advantage, within * advantage), rel=1e-9, abs=1e-12)
        clipped += ratio != within
    assert 50 < clipped < 190


def test_where_the_policy_is_its_old_self_the_gradient_is_the_plain_policy_gradient():
    current = torch.randn(9, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(9, dtype=torch.float64)
    losses, _ = token_losses(current, current.detach(), current.detach(), advantage, clip=0.2, kl_weight=0.1)
    (found,) = torch.autograd.grad(losses.sum(), current)
    (plain,) = torch.autograd.grad(-(advantage * current).sum(), current)
    assert torch.equal(found, plain)
