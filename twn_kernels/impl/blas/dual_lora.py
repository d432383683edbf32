"""Forward, fan-out and backward of the dual-LoRA linear layer on vendor GEMMs.

Masking happens in the shrink, by selection. A product over a shared B would still turn 0 * NaN into NaN on rows that do
not use the adapter, so in mixed batches non-finite entries of B are zeroed and the rows that use it get NaN through S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.impl.blas.dropout import keep_mask
from twn_kernels.impl.blas.products import joined_product, rounded_mm, wide_mm

UNIFORM = True  # ``routes=None`` is understood: every row takes exactly the adapters in ``present``


def forward(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor]:
    """``y [tokens, out_features]`` and ``s [tokens, rank_r + rank_e]``."""
    shrinks = _shrinks(x, (A_r, A_e), (scaling_r, scaling_e), routes, present, (dropout_r, dropout_e), seed)
    y = _base_plus(x, weight, bias, shrinks, (B_r, B_e), routes, present)
    return y, torch.cat(shrinks, dim=1)


def fanout(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor, Tensor]:
    """``y_reasoning``, ``y_embedding`` (each ``[tokens, out_features]``) and ``s``, from one base product in fp32."""
    shrinks = _shrinks(x, (A_r, A_e), (scaling_r, scaling_e), routes, present, (dropout_r, dropout_e), seed)
    base = wide_mm(x, weight.t())
    if bias is not None:
        base = base + bias
    outputs = []
    for adapter, (s, B) in enumerate(zip(shrinks, (B_r, B_e), strict=True)):
        y = base
        if present & (1 << adapter):
            s, B = _isolated(s, B, _rows(routes, adapter))
            y = base + wide_mm(s, B.t())
        outputs.append(y.to(x.dtype, copy=True))
    return *outputs, torch.cat(shrinks, dim=1)


def backward(
    dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present,
    dropout_r, dropout_e, seed, needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, A_r, B_r, A_e, B_e and bias, in this order; None where ``needs`` says so."""
    parts = s.split([A_r.shape[0], A_e.shape[0]], dim=1)
    flows = [dy if flow is None else flow for flow in (dy_r, dy_e)]
    dropouts = (dropout_r, dropout_e)
    ds = [
        _masked(scaling * wide_mm(flow, B), _rows(routes, adapter)).to(B.dtype)
        if present & (1 << adapter)
        else torch.zeros_like(part)
        for adapter, (flow, B, scaling, part) in enumerate(
            zip(flows, (B_r, B_e), (scaling_r, scaling_e), parts, strict=True)
        )
    ]
    grads: list[Tensor | None] = [None] * 6
    if needs[0]:
        grads[0] = _input_gradient(dy, weight, ds, (A_r, A_e), routes, present, dropouts, seed)
    for adapter, (flow, A, B, part) in enumerate(zip(flows, (A_r, A_e), (B_r, B_e), parts, strict=True)):
        rows, used = _rows(routes, adapter), present & (1 << adapter)
        if needs[1 + 2 * adapter]:
            kept = _dropped(_masked(x, rows), dropouts[adapter], seed, adapter) if used else None
            grads[1 + 2 * adapter] = (
                rounded_mm(ds[adapter].t(), kept, A.dtype)
                if used
                else torch.zeros_like(A, memory_format=torch.contiguous_format)
            )
        if needs[2 + 2 * adapter]:
            grads[2 + 2 * adapter] = (
                rounded_mm(_masked(flow, rows).t(), part, B.dtype)
                if used
                else torch.zeros_like(B, memory_format=torch.contiguous_format)
            )
    if needs[5]:
        grads[5] = dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32).to(dy.dtype)
    return tuple(grads)


def _rows(routes: Tensor | None, adapter: int) -> Tensor | None:
    """bool ``[tokens, 1]``: the rows that use the adapter; None where the host knows that all do."""
    return None if routes is None else ((routes & (1 << adapter)) != 0)[:, None]


def _masked(value: Tensor, rows: Tensor | None) -> Tensor:
    return value if rows is None else torch.where(rows, value, value.new_zeros(()))


def _shrinks(x, A, scaling, routes, present, dropout, seed) -> list[Tensor]:
    """``[tokens, rank]`` of each adapter; both in one product where no dropout tells their inputs apart."""
    if present == 3 and dropout == (0.0, 0.0):
        widths = [A[0].shape[0], A[1].shape[0]]
        raw = list(wide_mm(x, torch.cat(A).t()).split(widths, dim=1))
    else:
        raw = [
            wide_mm(_dropped(x, dropout[adapter], seed, adapter), A[adapter].t()) if present & (1 << adapter) else None
            for adapter in (0, 1)
        ]
    return [
        x.new_zeros((x.shape[0], A[adapter].shape[0]), dtype=A[adapter].dtype)
        if h is None
        else _masked(h * scaling[adapter], _rows(routes, adapter)).to(A[adapter].dtype)
        for adapter, h in enumerate(raw)
    ]


def _isolated(s: Tensor, matrix: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same product, with non-finite entries of the shared factor kept away from the rows that do not use it."""
    if rows is None:
        return s, matrix
    poisoned = rows & ~torch.isfinite(matrix).all()
    return torch.where(poisoned, s.new_full((), torch.nan), s), torch.nan_to_num(matrix, 0.0, 0.0, 0.0)


def _base_plus(x, weight, bias, low, matrices, routes, present) -> Tensor:
    """``x weight^T + bias + sum_a low_a matrix_a^T`` over the adapters in ``present``."""
    pairs = [
        _isolated(low[adapter], matrices[adapter], _rows(routes, adapter))
        for adapter in (0, 1)
        if present & (1 << adapter)
    ]
    if not pairs:
        return F.linear(x, weight, bias)
    if len(pairs) == 1:
        return joined_product(x, weight, bias, *pairs[0])
    return joined_product(x, weight, bias, *(torch.cat(side, dim=1) for side in zip(*pairs, strict=True)))


def _input_gradient(dy, weight, ds, A, routes, present, dropout, seed) -> Tensor:
    if dropout == (0.0, 0.0):
        return _base_plus(dy, weight.t(), None, ds, [a.t() for a in A], routes, present)
    dx = wide_mm(dy, weight)
    for adapter in (0, 1):
        if present & (1 << adapter):
            low, matrix = _isolated(ds[adapter], A[adapter].t(), _rows(routes, adapter))
            dx = dx + _dropped(wide_mm(low, matrix.t()), dropout[adapter], seed, adapter)
    return dx.to(dy.dtype)


def _dropped(value: Tensor, probability: float, seed: Tensor | None, adapter: int) -> Tensor:
    if probability == 0.0:
        return value
    keep = keep_mask(seed, adapter, value.shape[0], value.shape[1], probability)
    return torch.where(keep, value.to(_wide(value.dtype)) / (1.0 - probability), 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
