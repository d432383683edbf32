"""How good a trained gate is, on queries that it did not learn from.

Owns the figures and the warning about labels that teach nothing. Scores are those of the tensors as they are saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.checkpoint import Checkpoint
from twn_kernels.evaluation.gating import calibration
from twn_kernels.modules import GateMLP
from twn_kernels.training.gate_collecting import THOUGHTS_FILE, Collected

__all__ = ["GateReport", "gate_figures", "one_class", "report_on"]


@dataclass(frozen=True)
class GateReport:
    """What was learned, on queries held out of the gate's training unless stated otherwise.

    Attributes:
        queries, documents: that labels were made from, the queries held out included.
        held_out: queries of the figures below.
        closed_rate: of all thoughts, how many were closed; the others are labelled 0.
        margin: of the labels, in nats.
        train_rate: of the queries that were trained on, how many are labelled 1.
        base_rate: of the queries held out.
        threshold: of the configuration.
        think_rate: of the queries held out, how many reach it.
        accuracy: of that decision.
        bce: binary cross-entropy in nats.
        bce_of_rate: of a gate that always says ``base_rate``, to compare with.
        train_bce: on the queries that were trained on; far below ``bce`` where the gate learned them by heart.
        ece: expected calibration error over ten bins of equal width.
        auc: probability that a query with label 1 scores above one with label 0; None where one of them is missing.
        warning: what makes the gate useless, or None.
    """

    queries: int
    documents: int
    held_out: int
    closed_rate: float
    margin: float
    train_rate: float
    base_rate: float
    threshold: float
    think_rate: float
    accuracy: float
    bce: float
    bce_of_rate: float
    train_bce: float
    ece: float
    auc: float | None
    warning: str | None


def one_class(labels: Tensor, margin: float, setting: str) -> str | None:
    """What is wrong with labels that are all the same, and which setting to change; None where they are not."""
    count, ones = len(labels), int(labels.sum())
    if 0 < ones < count:
        return None
    found, fix = ("none", f"lower {setting}") if ones == 0 else ("all", f"raise {setting}")
    return (
        f"thinking improved {found} of the {count} queries that the gate learned from by more than {margin}, so it "
        f"cannot tell queries apart. Look at the thoughts in {THOUGHTS_FILE}; {fix}, or keep more queries for the gate."
    )


def report_on(
    checkpoint: Checkpoint,
    collected: Collected,
    labels: Tensor,
    learned: list[int],
    held: list[int],
    margin: float,
    warning: str | None,
) -> GateReport:
    """Judge a checkpoint's gate.

    Args:
        checkpoint: with the gate.
        collected: what the labels were made from.
        labels: bool ``[queries]``.
        learned, held: places of the queries that were trained on, and of those held out.
        margin, warning: for the report.
    """
    config = checkpoint.config
    gate = GateMLP(
        *(checkpoint.gate, checkpoint.gate_layout().layers),
        activation=config.gate_activation,
        gate_input=config.gate_input,
        impl="reference",
    )
    with torch.no_grad():
        scores = gate(collected.query_states, collected.prompt_states)
    return GateReport(
        queries=len(labels),
        documents=len(collected.documents),
        held_out=len(held),
        closed_rate=sum(thought["fallback"] is None for thought in collected.thoughts) / len(labels),
        margin=margin,
        train_rate=labels[learned].double().mean().item(),
        train_bce=_bce(scores[learned], labels[learned]),
        warning=warning,
        **gate_figures(scores[held], labels[held], config.think_threshold),
    )


def gate_figures(scores: Tensor, labels: Tensor, threshold: float) -> dict[str, float | None]:
    """How good scores in [0, 1] are for bool labels, both ``[queries]``.

    Returns:
        ``base_rate``, ``threshold``, ``think_rate``, ``accuracy``, ``bce``, ``bce_of_rate``, ``ece`` and ``auc``, as
        :class:`GateReport` has them.
    """
    thinks = scores.double() >= threshold
    rate = labels.double().mean()
    found = calibration(scores.double().numpy(), labels.numpy())
    gaps = [cell["queries"] * abs(cell["mean_score"] - cell["improved_rate"]) for cell in found["reliability"]]
    return {
        "base_rate": rate.item(),
        "threshold": threshold,
        "think_rate": thinks.double().mean().item(),
        "accuracy": (thinks == labels).double().mean().item(),
        "bce": _bce(scores, labels),
        "bce_of_rate": _bce(rate.expand(len(labels)), labels),
        "ece": sum(gaps) / len(labels),
        "auc": found["auroc"],
    }


def _bce(scores: Tensor, labels: Tensor) -> float:
    return F.binary_cross_entropy(scores.double(), labels.double()).item()
