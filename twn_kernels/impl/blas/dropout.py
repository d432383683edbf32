"""The seeded dropout mask of the reference, built with in-place arithmetic: one int64 buffer of the input's shape."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32_BITS = 2**32 - 1
_STRIDE = 0x9E3779B9  # 2**32 / golden ratio: spreads adapters and features over the hash's domain


def keep_mask(seed: Tensor, adapter: int, tokens: int, features: int, probability: float) -> Tensor:
    """bool ``[tokens, features]``: the inputs of one adapter (0 reasoning, 1 embedding) that survive."""
    device = seed.device
    stream = _hash_(
        _hash_(seed & _LOW_32_BITS) ^ (seed >> 32 & _LOW_32_BITS) ^ ((adapter + 1) * _STRIDE & _LOW_32_BITS)
    )
    per_token = _hash_(torch.arange(tokens, device=device).bitwise_xor_(stream)).unsqueeze(1)
    per_feature = torch.arange(features, device=device).mul_(_STRIDE).unsqueeze(0)
    bits = _hash_((per_token + per_feature).bitwise_and_(_LOW_32_BITS))
    return bits >= min(round(probability * 2**32), _LOW_32_BITS)


def _hash_(bits: Tensor) -> Tensor:
    """lowbias32 in place, on int64 values below 2**32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(_LOW_32_BITS)
    return bits.bitwise_xor_(bits >> 16)
