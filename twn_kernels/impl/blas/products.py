"""Matrix products that keep the contract (fp32 accumulation, one rounding) whatever the vendor GEMM's output dtype.

:func:`joined_product` is the K-augmentation: ``x W^T + low L^T = [x | low] [W | L]^T``, one GEMM, one rounding.
Building ``[W | L]`` copies W, so it is taken where that is the cheapest exact form; elsewhere a wide
output accumulates both.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def summed_products(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """``sum of a @ b`` over pairs ``[M, K_i], [K_i, N]``, accumulated in fp32 and rounded once to ``dtype``."""
    a, b = pairs[0]
    if len(pairs) == 1:
        return rounded_mm(a, b, dtype)
    if dtype in _WIDE:
        y = a.to(dtype) @ b.to(dtype)
        for a, b in pairs[1:]:
            y.addmm_(a.to(dtype), b.to(dtype))
        return y
    if all(part.dtype == dtype for pair in pairs for part in pair) and not _accumulates_cheaper(a):
        return torch.cat([a for a, _ in pairs], dim=1) @ torch.cat([b for _, b in pairs])
    y = wide_mm(a, b)
    for a, b in pairs[1:]:
        y += wide_mm(a, b)
    return y.to(dtype)


def joined_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, matrix: Tensor, out: Tensor | None = None
) -> Tensor:
    """``x weight^T + low matrix^T + bias`` with one rounding.

    Args:
        x: ``[tokens, in_features]``.
        weight: ``[out_features, in_features]``, dtype of ``x``.
        bias: ``[out_features]`` or None.
        low: ``[tokens, rank]``; dtype of ``x`` or fp32.
        matrix: ``[out_features, rank]``; dtype of ``low``.
        out: where to write; any row pitch.

    Returns:
        ``[tokens, out_features]`` in the dtype of ``x``.
    """
    if low.shape[1] == 0:
        return _affine(x, weight, bias, out)
    if x.dtype in _WIDE:
        return _affine(x, weight, bias, out).addmm_(low, matrix.t())
    if low.dtype == x.dtype and not _accumulates_cheaper(x):
        return _affine(torch.cat([x, low], dim=1), torch.cat([weight, matrix], dim=1), bias, out)
    y = wide_mm(x, weight.t()) + wide_mm(low, matrix.t())
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype) if out is None else out.copy_(y)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _accumulates_cheaper(x: Tensor) -> bool:
    """Whether an fp32 output (8 more bytes an element moved) beats copying W (4 bytes an element): below K / 2 tokens.

    A count of bytes, not a measurement. Only CUDA has a 16-bit GEMM with an fp32 output; elsewhere W would be upcast.
    """
    return x.is_cuda and x.shape[0] < x.shape[1] // 2
