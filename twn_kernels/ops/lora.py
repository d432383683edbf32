"""The three things that make one LoRA adapter on one linear layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoRA(NamedTuple):
    """One adapter on one linear layer: ``scaling * B @ (A @ x)``.

    Attributes:
        A: ``[rank, in_features]``, PEFT's ``lora_A``.
        B: ``[out_features, rank]``, PEFT's ``lora_B``; dtype of ``A``.
        scaling: ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
