"""What a site group is made of: its linears with their adapters, and the norm in front of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from twn_kernels.ops.lora import LoRA


class Projection(NamedTuple):
    """One frozen linear layer of a site group and the adapters that touch it.

    Attributes:
        weight: ``[out_features, in_features]``, last dimension contiguous; rows may be pitched.
        bias: ``[out_features]`` or None.
        reasoning, embedding: its adapters; None where an adapter does not touch it.
    """

    weight: Tensor
    bias: Tensor | None = None
    reasoning: LoRA | None = None
    embedding: LoRA | None = None


class Norm(NamedTuple):
    """The RMSNorm in front of a site group.

    Attributes:
        weight: ``[in_features]``.
        eps: added to the mean square.
    """

    weight: Tensor
    eps: float
