"""The dropout mask as a pure function of seed, adapter, token and feature.

A counter-based mask is recomputed in the backward pass instead of being stored, and every implementation draws the same
one. The mixer is the 32-bit "lowbias32" integer hash (Wellons 2018); all arithmetic is modulo 2**32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(value: Tensor) -> Tensor:
    """One round of lowbias32 on int64 values below 2**32; int64 wrap-around leaves the low 32 bits exact."""
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def keep_mask(seed: Tensor, adapter: int, tokens: int, features: int, probability: float) -> Tensor:
    """Which inputs of one adapter's shrink survive dropout.

    Args:
        seed: int64 ``[1]``.
        adapter: 0 for ``reasoning``, 1 for ``embedding``; each draws its own mask.
        tokens, features: shape of the input.
        probability: chance of dropping, in [0, 1).

    Returns:
        bool ``[tokens, features]`` on the seed's device.
    """
    threshold = min(round(probability * 2**32), 2**32 - 1)
    low, high = seed & _MASK, (seed >> 32) & _MASK
    stream = _mix(_mix(low) ^ high ^ (((adapter + 1) * _GOLDEN) & _MASK))
    token = torch.arange(tokens, device=seed.device, dtype=torch.int64)[:, None]
    feature = torch.arange(features, device=seed.device, dtype=torch.int64)[None, :]
    return _mix((_mix(stream ^ token) + ((feature * _GOLDEN) & _MASK)) & _MASK) >= threshold
