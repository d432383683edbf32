"""The contrastive loss, by hand and by a loop."""

from __future__ import annotations

import math

import pytest
import torch

from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.training.losses import info_nce, positive_scores

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
DOCUMENTS = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


def test_by_hand():
    """Similarities 1, 0.6 and 0, 0.8 at temperature 0.5: logits 2, 1.2 and 0, 1.6."""
    positives = torch.eye(2, dtype=torch.bool)
    scores = positive_scores(QUERIES, DOCUMENTS, positives, 0.5).tolist()
    assert scores == pytest.approx([-math.log(1 + math.exp(-0.8)), -math.log(1 + math.exp(-1.6))], rel=1e-14)
    assert info_nce(QUERIES, DOCUMENTS, positives, 0.5).item() == pytest.approx(0.2775007, abs=1e-7)


def test_truncation_by_hand():
    """Of the positives' probabilities p the mean of (1 - p**q) / q; the logarithm is its limit at 0."""
    positives = torch.eye(2, dtype=torch.bool)
    p = [1 / (1 + math.exp(-0.8)), 1 / (1 + math.exp(-1.6))]
    for q in (0.7, 1.0):
        loss = info_nce(QUERIES, DOCUMENTS, positives, 0.5, q).item()
        assert loss == pytest.approx(sum(1 - value**q for value in p) / q / 2, rel=1e-14)
    assert info_nce(QUERIES, DOCUMENTS, positives, 0.5, 1e-9).item() == pytest.approx(0.2775007, abs=1e-6)


def test_truncation_gives_up_on_what_is_out_of_reach():
    """A query whose own document is the farthest weighs less than one that is nearly there."""
    queries = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    documents = torch.tensor([[-1.0, 0.0], [0.8, 0.6]])
    norms = {}
    for q in (0.0, 0.7):
        (grad,) = torch.autograd.grad(info_nce(queries, documents, torch.eye(2).bool(), 0.5, q), queries)
        norms[q] = grad.norm(dim=1).tolist()
    assert norms[0.0][0] > norms[0.0][1] > 0
    assert 0 < norms[0.7][0] < 0.2 * norms[0.0][0] and norms[0.7][1] > 0.8 * norms[0.0][1]


def test_another_positive_of_a_query_is_no_negative():
    """With its second positive left out, the first query has no negative at all."""
    positives = torch.tensor([[True, True], [False, True]])
    scores = positive_scores(QUERIES, DOCUMENTS, positives, 0.5).tolist()
    assert scores == pytest.approx([0.0, -math.log(1 + math.exp(-1.6))], rel=1e-14)


@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_by_a_loop(temperature):
    draw = torch.randn(2, 7, 16, dtype=torch.float64)
    queries, documents = torch.nn.functional.normalize(draw, dim=2)
    positives = torch.eye(7, dtype=torch.bool) | (torch.rand(7, 7) < 0.3)

    def looped(queries, documents):
        total = 0.0
        for i in range(7):
            kept = [j for j in range(7) if j == i or not positives[i, j]]
            terms = torch.stack([queries[i] @ documents[j] / temperature for j in kept])
            total = total + terms.logsumexp(0) - queries[i] @ documents[i] / temperature
        return total / 7

    results = []
    for loss, dtype in ((info_nce, torch.float32), (looped, torch.float64), (looped, torch.float32)):
        given = [tensor.to(dtype).requires_grad_() for tensor in (queries, documents)]
        value = loss(*given, *((positives, temperature) if loss is info_nce else ()))
        results.append([value.detach(), *torch.autograd.grad(value, given)])
    for name, actual, truth, own in zip(("loss", "of queries", "of documents"), *results, strict=True):
        assert_as_good_as_torch(actual, truth, own, name)
    assert results[0][2].isfinite().all()


def test_a_masked_document_gets_no_gradient_from_that_query():
    positives = torch.tensor([[True, True], [False, True]])
    documents = DOCUMENTS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(positive_scores(QUERIES, documents, positives, 0.5)[0], documents)
    assert not grad.any()
