"""The losses: contrastive over a whole batch, with every known positive of a query left out of its negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["info_nce", "positive_scores"]


def info_nce(
    queries: Tensor, documents: Tensor, positives: Tensor, temperature: float, truncation: float = 0.0
) -> Tensor:
    """Contrastive loss of queries against all documents of a batch.

    Args:
        queries: unit vectors ``[batch, width]``; row ``i`` belongs to document ``i``.
        documents: unit vectors ``[batch, width]``.
        positives: bool ``[batch, batch]``: which documents are relevant to which query; the diagonal is.
        temperature: of the softmax.
        truncation: q of the generalised cross entropy, ``(1 - p**q) / q`` of the positive's probability p: 0 is the
            logarithm, and the nearer to 1, the less a query weighs whose positive is out of reach.

    Returns:
        The mean over the queries, a scalar. Sources: van den Oord et al. 2018, with false negatives masked; Zhang and
        Sabuncu 2018.
    """
    scores = positive_scores(queries, documents, positives, temperature)
    if truncation == 0:
        return -scores.mean()
    return -torch.expm1(truncation * scores).mean() / truncation


def positive_scores(queries: Tensor, documents: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Log probability of each query's own document among its negatives, ``[batch]``; arguments as above."""
    similarities = queries @ documents.T / temperature
    others = positives & ~torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    return F.log_softmax(similarities.masked_fill(others, -torch.inf), dim=1).diagonal()
