"""Forward and backward of the dual-LoRA linear layer, written to be read.

Every implementation is held to these three functions. Tensors are flat: ``x [tokens, in_features]``; ``_r`` is the
``reasoning`` adapter, ``_e`` the ``embedding`` adapter; ``s`` is the masked, scaled shrink of both, side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twn_kernels.impl.reference.dropout import keep_mask


def forward(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor]:
    """``y [tokens, out_features]`` and ``s [tokens, rank_r + rank_e]``."""
    s_r = _shrink(x, A_r, scaling_r, _rows(routes, present, 0), dropout_r, seed, 0)
    s_e = _shrink(x, A_e, scaling_e, _rows(routes, present, 1), dropout_e, seed, 1)
    y = _base(x, weight, bias)
    y = y + _expand(s_r, B_r, _rows(routes, present, 0), y.dtype)
    y = y + _expand(s_e, B_e, _rows(routes, present, 1), y.dtype)
    return y.to(x.dtype), torch.cat([s_r, s_e], dim=1)


def fanout(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor, Tensor]:
    """``y_reasoning``, ``y_embedding`` (each ``[tokens, out_features]``) and ``s``: one base product, two results."""
    s_r = _shrink(x, A_r, scaling_r, _rows(routes, present, 0), dropout_r, seed, 0)
    s_e = _shrink(x, A_e, scaling_e, _rows(routes, present, 1), dropout_e, seed, 1)
    base = _base(x, weight, bias)
    y_r = base + _expand(s_r, B_r, _rows(routes, present, 0), base.dtype)
    y_e = base + _expand(s_e, B_e, _rows(routes, present, 1), base.dtype)
    return y_r.to(x.dtype), y_e.to(x.dtype), torch.cat([s_r, s_e], dim=1)


def backward(
    dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present,
    dropout_r, dropout_e, seed, needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, A_r, B_r, A_e, B_e and bias, in this order; None where ``needs`` says so.

    ``dy`` reaches the base product and the bias; ``dy_r`` and ``dy_e`` (None: the same as ``dy``) reach the adapters.
    """
    wide = _accumulator(dy.dtype)
    rank_r = A_r.shape[0]
    dx = dy.to(wide) @ weight.to(wide)
    grads: list[Tensor | None] = []
    for adapter, (dy_a, A, B, scaling, s_a, dropout) in enumerate(
        [(dy_r, A_r, B_r, scaling_r, s[:, :rank_r], dropout_r), (dy_e, A_e, B_e, scaling_e, s[:, rank_r:], dropout_e)]
    ):
        rows = _rows(routes, present, adapter)
        dy_a = _select(rows, (dy if dy_a is None else dy_a).to(wide))
        kept = _dropped_input(_select(rows, x.to(wide)), dropout, seed, adapter)
        ds = _select(rows, scaling * (dy_a @ B.to(wide)))
        dx_a = _dropped_input(_select(rows, ds @ A.to(wide)), dropout, seed, adapter)
        dx = dx + dx_a
        grads += [(ds.T @ kept).to(A.dtype), (dy_a.T @ _select(rows, s_a.to(wide))).to(B.dtype)]
    results = [dx.to(x.dtype), *grads, dy.to(wide).sum(0).to(dy.dtype)]
    return tuple(result if need else None for result, need in zip(results, needs, strict=True))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(routes: Tensor, present: int, adapter: int) -> Tensor:
    """bool ``[tokens, 1]``: the rows that use adapter 0 (``reasoning``) or 1 (``embedding``)."""
    bit = 1 << adapter
    return ((routes & (bit & present)) != 0)[:, None]


def _select(rows: Tensor, value: Tensor) -> Tensor:
    """Zero elsewhere by selection: multiplying by 0 would keep a NaN."""
    return torch.where(rows, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = _accumulator(x.dtype)
    y = x.to(wide) @ weight.to(wide).T
    return y if bias is None else y + bias.to(wide)


def _dropped_input(value: Tensor, probability: float, seed: Tensor | None, adapter: int) -> Tensor:
    if probability == 0.0:
        return value
    keep = keep_mask(seed, adapter, value.shape[0], value.shape[1], probability)
    return _select(keep, value) / (1.0 - probability)


def _shrink(x, A, scaling, rows, dropout, seed, adapter) -> Tensor:
    """``scaling * x A^T`` on the rows of one adapter, rounded once to the adapter's dtype: ``[tokens, rank]``."""
    wide = _accumulator(x.dtype)
    h = scaling * (_dropped_input(x.to(wide), dropout, seed, adapter) @ A.to(wide).T)
    return _select(rows, h).to(A.dtype)


def _expand(s: Tensor, B: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
    """``s B^T`` on the rows of one adapter: ``[tokens, out_features]``; a NaN in B stays with the rows that use it."""
    return _select(rows, s.to(wide) @ B.to(wide).T)
