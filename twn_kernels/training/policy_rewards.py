"""What policy optimisation computes from thoughts that are already written: rewards, advantages and the loss.

Pure functions of tensors; who writes the thoughts and who embeds them is :mod:`.policy_sampling`'s. Shapes: Q queries,
G thoughts of each (its group), D documents, the first Q of which are the queries' own, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twn_kernels.pipeline.thinking import Thought

__all__ = [
    "Outcome",
    "advantages",
    "outcome_means",
    "reciprocal_ranks",
    "similarity_gaps",
    "thought_rewards",
    "token_losses",
]

# Of the division by a group's deviation, as in TRL's GRPOTrainer: a group that differs by rounding alone stays small.
_EPS = 1e-4


@dataclass
class Outcome:
    """What the thoughts of some queries came to.

    Attributes:
        thoughts: Q lists of G thoughts.
        closed: bool ``[Q, G]``: whose format is whole.
        similarities: fp32 ``[Q, G, D]``: cosine of each thoughtful vector and each document; 0 for a broken thought.
        positives: bool ``[Q, D]``: which documents are relevant to which query; each query's own is.
    """

    thoughts: Sequence[Sequence[Thought]]
    closed: Tensor
    similarities: Tensor
    positives: Tensor


def reciprocal_ranks(similarities: Tensor, positives: Tensor) -> Tensor:
    """1 / rank of each query's own document among itself and the documents that are not relevant.

    Args:
        similarities: ``[Q, G, D]``.
        positives: bool ``[Q, D]``; a query's other positives count neither for nor against it.

    Returns:
        ``[Q, G]`` in (0, 1]. A document that is exactly as similar as the own one comes before it, so that vectors
        which are all the same earn nothing.
    """
    own, others = _own_and_others(similarities, positives)
    return 1.0 / (1 + (others >= own[..., None]).sum(-1)).to(similarities)


def similarity_gaps(similarities: Tensor, positives: Tensor) -> Tensor:
    """How much more similar the own document is than the most similar one that is not relevant; arguments as above.

    Returns:
        ``[Q, G]``; 0 where every document is relevant.
    """
    own, others = _own_and_others(similarities, positives)
    hardest = others.amax(-1)
    return (own - hardest).masked_fill(hardest == -torch.inf, 0.0)


def _own_and_others(similarities: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """``[Q, G]`` of the own document, and ``[Q, G, D]`` with minus infinity at all that are relevant."""
    own = similarities.diagonal(dim1=0, dim2=2).T
    return own, similarities.masked_fill(positives[:, None, :], -torch.inf)


def thought_rewards(outcome: Outcome, weights: Any) -> Tensor:
    """The reward of each thought: for its format, and where that is whole for what it does to retrieval.

    Args:
        outcome: of the thoughts.
        weights: with ``format_reward``, ``rank_reward`` and ``gap_reward``.

    Returns:
        ``[Q, G]``: ``format_reward + rank_reward * reciprocal rank + gap_reward * similarity gap`` of a closed thought,
        0 of a broken one.
    """
    ranks = reciprocal_ranks(outcome.similarities, outcome.positives)
    gaps = similarity_gaps(outcome.similarities, outcome.positives)
    whole = weights.format_reward + weights.rank_reward * ranks + weights.gap_reward * gaps
    return torch.where(outcome.closed, whole, 0.0)


def outcome_means(outcome: Outcome, rewards: Tensor) -> dict[str, float]:
    """Figures of a log.

    Args:
        outcome: of the thoughts.
        rewards: ``[Q, G]``, of the same thoughts.

    Returns:
        ``reward``, ``format_share`` (closed thoughts of all), ``reciprocal_rank`` and ``gap`` (of the closed thoughts;
        0 where there is none) and ``tokens`` (of a thought): means.
    """
    closed = outcome.closed
    count = closed.sum().clamp_min(1)
    ranks = reciprocal_ranks(outcome.similarities, outcome.positives)
    gaps = similarity_gaps(outcome.similarities, outcome.positives)
    lengths = [len(thought.ids) for group in outcome.thoughts for thought in group]
    return {
        "reward": float(rewards.mean()),
        "format_share": float(closed.float().mean()),
        "reciprocal_rank": float((ranks * closed).sum() / count),
        "gap": float((gaps * closed).sum() / count),
        "tokens": sum(lengths) / len(lengths),
    }


def advantages(rewards: Tensor) -> Tensor:
    """By how many deviations each reward differs from the mean of its group.

    Args:
        rewards: ``[Q, G]``.

    Returns:
        ``[Q, G]``: ``(reward - mean) / (deviation + 1e-4)``, the deviation without Bessel's correction; exactly 0 in a
        group of equal rewards, where rounding of the mean would leave something. Source: Shao et al. 2024
        (DeepSeekMath), section 4.1.2.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred / (rewards.std(1, correction=0, keepdim=True) + _EPS)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return scaled.masked_fill(equal, 0.0)


def token_losses(
    current: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, *, clip: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Loss and divergence of each token.

    Args:
        current: log probability of each sampled token under the policy, ``[tokens]``, with a graph.
        old: the same under the policy that sampled it.
        reference: the same under the policy that training began with.
        advantage: of the thought that each token belongs to.
        clip: how far the probability ratio ``exp(current - old)`` may go from 1 and still be rewarded.
        kl_weight: of the divergence.

    Returns:
        ``-min(ratio * advantage, clipped ratio * advantage) + kl_weight * kl`` and ``kl``, both ``[tokens]``, with
        ``kl = exp(reference - current) - (reference - current) - 1``. Source: Shao et al. 2024 (DeepSeekMath),
        equations 3 and 4. Where they average each thought by itself first, a step's loss is the mean over all tokens of
        its batch (Yu et al. 2025, DAPO, section 3.3): a token counts the same in a long thought as in a short one.
    """
    ratio = (current - old).exp()
    rewarded = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    away = reference - current
    kl = away.exp() - away - 1
    return kl_weight * kl - rewarded, kl
