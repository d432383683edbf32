"""Labels of the gate: whether thinking improved a query's own retrieval, by what margin, and what a thought may cost.

Vectors in, labels out: nothing here knows where the vectors are from or how the gate learns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.errors import DataError, OptionError

__all__ = ["GateLabels", "gate_labels", "ndcg", "priced_margin", "priced_threshold"]

_ROWS = 512  # queries scored at once, so that their similarities to 10,000 documents take 40 MB


class GateLabels(NamedTuple):
    """Labels of queries and the scores behind them.

    Attributes:
        labels: bool ``[queries]``: thinking improved the score by more than the margin.
        plain_scores, thoughtful_scores: fp64 ``[queries]``.
    """

    labels: Tensor
    plain_scores: Tensor
    thoughtful_scores: Tensor


def gate_labels(
    plain: Tensor, thoughtful: Tensor, documents: Tensor, positives: Tensor, temperature: float, margin: float
) -> GateLabels:
    """Label the queries that thinking improved.

    A query's score is the log probability of a positive among that positive and all documents that are none, so other
    positives are masked; the mean over its positives where it has several.

    Args:
        plain, thoughtful: unit vectors ``[queries, width]``. Where a thought was not closed they are the same, hence
            the label is 0.
        documents: unit vectors ``[documents, width]``.
        positives: bool ``[queries, documents]``: which documents are relevant to which query; one or more to each.
        temperature: of the softmax, above 0.
        margin: at least 0.

    Raises:
        OptionError: ``temperature`` or ``margin`` is out of range.
        DataError: a query has no positive.
    """
    if not 0 < temperature < float("inf"):
        raise OptionError(f"temperature must be above 0, got {temperature!r}.")
    if not 0 <= margin < float("inf"):
        raise OptionError(f"margin must be at least 0, got {margin!r}.")
    without = (~positives.any(dim=1)).nonzero()[:, 0].tolist()
    if without:
        raise DataError(
            f"{len(without)} of {len(positives)} queries have no positive among the documents, the first is at place "
            f"{without[0]}. Give every query at least one positive."
        )
    scores = [_scores(vectors, documents, positives, temperature) for vectors in (plain, thoughtful)]
    return GateLabels(scores[1] - scores[0] > margin, *scores)


def priced_margin(gains: Tensor, plain: Tensor, thoughtful: Tensor, price: float) -> float:
    """The margin that pays best when a thought costs a price.

    Thinking exactly where the gain is above a margin retrieves with some mean quality and writes some number of
    thoughts. The margin returned has the highest mean quality less ``price`` a thought; of equally good ones the
    largest, which thinks least.

    Args:
        gains: of the score by thinking, ``[queries]``.
        plain, thoughtful: quality of retrieval without and with a thought, ``[queries]``, as :func:`ndcg` gives it.
        price: the quality that a thought must bring on average, at least 0.

    Raises:
        OptionError: ``price`` is out of range.

    >>> priced_margin(torch.tensor([5.0, 0.5, -1.0]), torch.tensor([0.1, 1, 1]), torch.tensor([1.0, 1, 1]), 0.02)
    0.5
    """
    if not 0 <= price < float("inf"):
        raise OptionError(f"price must be at least 0, got {price!r}.")
    ordered, places = gains.double().sort()
    # What it brings not to think, summed from the query that gains least by thinking.
    saved = (plain.double() - thoughtful.double() + price)[places].cumsum(0)
    last = torch.ones(len(ordered), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]  # equal gains fall on one side of any margin
    allowed = last & (ordered > 0)
    at_zero = saved[ordered <= 0][-1].item() if (ordered <= 0).any() else 0.0
    if not allowed.any() or saved[allowed].max() < at_zero:
        return 0.0
    best = saved[allowed].max()
    return ordered[allowed][saved[allowed] == best][-1].item()


def priced_threshold(scores: Tensor, plain: Tensor, thoughtful: Tensor, price: float) -> float:
    """The threshold of a gate's scores that pays best when a thought costs a price; arguments as above.

    A thought that is missing costs far more than one too many, so that the best threshold is rarely a half. It lies
    halfway between two scores; of equally good ones it is the highest.
    """
    ordered, places = scores.double().sort()
    saved = (plain.double() - thoughtful.double() + price)[places].cumsum(0)
    saved = torch.cat([saved.new_zeros(1), saved])
    edges = torch.cat([ordered.new_zeros(1), (ordered[:-1] + ordered[1:]) / 2, ordered.new_ones(1)])
    allowed = torch.ones(len(edges), dtype=torch.bool)
    allowed[1:-1] = ordered[:-1] != ordered[1:]
    return edges[allowed][saved[allowed] == saved[allowed].max()][-1].item()


def ndcg(queries: Tensor, documents: Tensor, positives: Tensor, cutoff: int = 10) -> Tensor:
    """fp64 ``[queries]``: nDCG at a cutoff, all positives worth the same; other arguments as in :func:`gate_labels`."""
    places = min(cutoff, len(documents))
    discounts = 1.0 / torch.arange(2, places + 2, dtype=torch.float64, device=queries.device).log2()
    found = [queries.new_empty(0, dtype=torch.float64)]
    for start in range(0, len(queries), _ROWS):
        own = positives[start : start + _ROWS].double()
        nearest = (queries[start : start + _ROWS].double() @ documents.double().T).topk(places, dim=1).indices
        ideal = discounts.cumsum(0)[own.sum(dim=1).long().clamp(1, places) - 1]
        found.append((own.gather(1, nearest) * discounts).sum(dim=1) / ideal)
    return torch.cat(found)


def _scores(queries: Tensor, documents: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """fp64 ``[queries]``; arguments as in :func:`gate_labels`."""
    found, columns = [queries.new_empty(0, dtype=torch.float64)], documents.double().T
    for start in range(0, len(queries), _ROWS):
        own = positives[start : start + _ROWS]
        similarities = queries[start : start + _ROWS].double() @ columns / temperature
        negatives = similarities.masked_fill(own, -torch.inf).logsumexp(dim=1, keepdim=True)
        # exp(s) / (exp(s) + sum over negatives) is the sigmoid of the difference; 1 where there are no negatives.
        found.append(F.logsigmoid(similarities - negatives).masked_fill(~own, 0.0).sum(dim=1) / own.sum(dim=1))
    return torch.cat(found)
