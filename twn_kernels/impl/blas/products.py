"""Matrix products that keep the contract (fp32 accumulation, one rounding) whatever the vendor GEMM's output dtype.

:func:`joined_product` is the K-augmentation: ``x W^T + low L^T = [x | low] [W | L]^T``, one GEMM, one rounding.
Building ``[W | L]`` copies W, so it is taken where that is the cheapest exact form; elsewhere a wide
output accumulates both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and returned in fp32 (fp64 for fp64 operands)."""
    if a.dtype == b.dtype and a.dtype in _WIDE:
        return a @ b
    if a.dtype == b.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(wide) @ b.to(wide)


def rounded_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` accumulated in fp32 and rounded once to ``dtype``."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    return wide_mm(a, b).to(dtype)


def joined_product(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, matrix: Tensor) -> Tensor:
    """``x weight^T + low matrix^T + bias`` with one rounding.

    Args:
        x: ``[tokens, in_features]``.
        weight: ``[out_features, in_features]``, dtype of ``x``.
        bias: ``[out_features]`` or None.
        low: ``[tokens, rank]``; dtype of ``x`` or fp32.
        matrix: ``[out_features, rank]``; dtype of ``low``.

    Returns:
        ``[tokens, out_features]`` in the dtype of ``x``.
    """
    if x.dtype in _WIDE:
        return F.linear(x, weight, bias).addmm_(low, matrix.t())
    if low.dtype == x.dtype and not _accumulates_cheaper(x):
        return F.linear(torch.cat([x, low], dim=1), torch.cat([weight, matrix], dim=1), bias)
    y = wide_mm(x, weight.t()) + wide_mm(low, matrix.t())
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _accumulates_cheaper(x: Tensor) -> bool:
    """Whether an fp32 output (8 more bytes an element moved) beats copying W (4 bytes an element): below K / 2 tokens.

    A count of bytes, not a measurement. Only CUDA has a 16-bit GEMM with an fp32 output; elsewhere W would be upcast.
    """
    return x.is_cuda and x.shape[0] < x.shape[1] // 2
