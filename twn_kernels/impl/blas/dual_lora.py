"""Forward, fan-out and backward of the dual-LoRA linear layer on vendor GEMMs.

Masking happens in the shrink, by selection; :mod:`twn_kernels.impl.blas.shrink` says how adapters stay apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.impl.blas import shrink as low_rank
from twn_kernels.impl.blas.dropout import keep_mask
from twn_kernels.impl.blas.products import joined_product, rounded_mm, wide_mm

UNIFORM = True  # ``routes=None`` is understood: every row takes exactly the adapters in ``present``


def forward(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor]:
    """``y [tokens, out_features]`` and ``s [tokens, rank_r + rank_e]``."""
    unused = low_rank.unused_rows(routes, present)
    low = _shrunk(x, (A_r, A_e), (scaling_r, scaling_e), unused, present, (dropout_r, dropout_e), seed)
    y = _base_plus(x, weight, bias, low, (B_r, B_e), unused, present)
    return y, low_rank.widened(low, [(A_r.shape[0], A_e.shape[0])], present)


def fanout(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor, Tensor]:
    """``y_reasoning``, ``y_embedding`` (each ``[tokens, out_features]``) and ``s``, from one base product in fp32."""
    unused, ranks = low_rank.unused_rows(routes, present), [(A_r.shape[0], A_e.shape[0])]
    low = _shrunk(x, (A_r, A_e), (scaling_r, scaling_e), unused, present, (dropout_r, dropout_e), seed)
    s = low_rank.widened(low, ranks, present)
    base = wide_mm(x, weight.t())
    if bias is not None:
        base = base + bias
    outputs = []
    for adapter, (part, B) in enumerate(zip(s.split(ranks[0], dim=1), (B_r, B_e), strict=True)):
        y = base
        if present & (1 << adapter):
            part, B = _isolated(part, B, unused, adapter)
            y = base + wide_mm(part, B.t())
        outputs.append(y.to(x.dtype, copy=True))
    return *outputs, s


def backward(
    dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present,
    dropout_r, dropout_e, seed, needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, A_r, B_r, A_e, B_e and bias, in this order; None where ``needs`` says so."""
    parts = s.split([A_r.shape[0], A_e.shape[0]], dim=1)
    flows = [dy if flow is None else flow for flow in (dy_r, dy_e)]
    dropouts = (dropout_r, dropout_e)
    unused = low_rank.unused_rows(routes, present)
    ds = [
        low_rank.masked(scaling * wide_mm(flow, B), unused[adapter]).to(B.dtype) if present & (1 << adapter) else None
        for adapter, (flow, B, scaling) in enumerate(zip(flows, (B_r, B_e), (scaling_r, scaling_e), strict=True))
    ]
    grads: list[Tensor | None] = [None] * 6
    if needs[0]:
        grads[0] = _input_gradient(dy, weight, ds, (A_r, A_e), unused, present, dropouts, seed)
    for adapter, (flow, A, B, part) in enumerate(zip(flows, (A_r, A_e), (B_r, B_e), parts, strict=True)):
        used = present & (1 << adapter)
        if needs[1 + 2 * adapter]:
            kept = _dropped(low_rank.masked(x, unused[adapter]), dropouts[adapter], seed, adapter) if used else None
            grads[1 + 2 * adapter] = (
                rounded_mm(ds[adapter].t(), kept, A.dtype)
                if used
                else torch.zeros_like(A, memory_format=torch.contiguous_format)
            )
        if needs[2 + 2 * adapter]:
            grads[2 + 2 * adapter] = (
                rounded_mm(low_rank.masked(flow, unused[adapter]).t(), part, B.dtype)
                if used
                else torch.zeros_like(B, memory_format=torch.contiguous_format)
            )
    if needs[5]:
        grads[5] = dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32).to(dy.dtype)
    return tuple(grads)


def _shrunk(x, A, scaling, unused, present, dropout, seed) -> Tensor:
    """``[tokens, ranks]`` of the adapters in ``present``, in one product where no dropout tells their inputs apart."""
    together = ([(A[0],), (A[1],)], [(scaling[0],), (scaling[1],)])
    if dropout == (0.0, 0.0):
        return low_rank.shrink(x, *together[0], *together[1], unused, present)
    parts = [
        low_rank.shrink(_dropped(x, dropout[adapter], seed, adapter), *together[0], *together[1], unused, 1 << adapter)
        for adapter in (0, 1)
        if present & (1 << adapter)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _isolated(part: Tensor, matrix: Tensor, unused: low_rank.Masks, adapter: int) -> tuple[Tensor, Tensor]:
    """One adapter's shrink and matrix, isolated."""
    rank = part.shape[1]
    part, (matrix,) = low_rank.isolated(part, [matrix], [(0, rank) if adapter else (rank, 0)], unused)
    return part, matrix


def _base_plus(x, weight, bias, low, matrices, unused, present) -> Tensor:
    """``x weight^T + bias + low [matrices in present]^T``."""
    used = [matrices[adapter] for adapter in (0, 1) if present & (1 << adapter)]
    if not used:
        return F.linear(x, weight, bias)
    ranks = [tuple(matrix.shape[1] if present & bit else 0 for bit, matrix in zip((1, 2), matrices, strict=True))]
    low, (matrix,) = low_rank.isolated(low, [used[0] if len(used) == 1 else torch.cat(used, dim=1)], ranks, unused)
    return joined_product(x, weight, bias, low, matrix)


def _input_gradient(dy, weight, ds, A, unused, present, dropout, seed) -> Tensor:
    if dropout == (0.0, 0.0):
        used = [part for part in ds if part is not None]
        low = torch.cat(used, dim=1) if used else None
        return _base_plus(dy, weight.t(), None, low, [a.t() for a in A], unused, present)
    dx = wide_mm(dy, weight)
    for adapter in (0, 1):
        if present & (1 << adapter):
            low, matrix = _isolated(ds[adapter], A[adapter].t(), unused, adapter)
            dx = dx + _dropped(wide_mm(low, matrix.t()), dropout[adapter], seed, adapter)
    return dx.to(dy.dtype)


def _dropped(value: Tensor, probability: float, seed: Tensor | None, adapter: int) -> Tensor:
    if probability == 0.0:
        return value
    keep = keep_mask(seed, adapter, value.shape[0], value.shape[1], probability)
    return torch.where(keep, value.to(_wide(value.dtype)) / (1.0 - probability), 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
