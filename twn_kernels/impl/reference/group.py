"""A site group, written to be read: norm or gate in front, one shared input, up to three linears, an epilogue.

Tensors are flat, as in :mod:`twn_kernels.impl.reference.dual_lora`. Lists have one entry a projection; columns of ``s``
are (reasoning, embedding) of the first projection, then of the second, and so on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.impl.reference.dual_lora import _accumulator, _base, _expand, _rows, _shrink, backward


def group(
    x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present,
    swiglu, residual,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y [tokens, sum of out_features]`` (or ``[tokens, out_features]``) and ``s [tokens, sum of ranks]``."""
    x = _input(x, norm_weight, eps, gated)
    wide = _accumulator(x.dtype)
    outputs, shrinks = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = _base(x, weight, bias)
        for adapter, (A, B, scaling) in enumerate([(A_r[i], B_r[i], scaling_r[i]), (A_e[i], B_e[i], scaling_e[i])]):
            rows = _rows(_known(routes, x), present, adapter)
            shrinks.append(_shrink(x, A, scaling, rows, 0.0, None, adapter))
            y = y + _expand(shrinks[-1], B, rows, wide)
        outputs.append(y)
    y = F.silu(outputs[0]) * outputs[1] if swiglu else torch.cat(outputs, dim=1)
    if residual is not None:
        y = residual.to(wide) + y
    return y.to(x.dtype), torch.cat(shrinks, dim=1)


def group_backward(
    dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, needs
) -> tuple[Tensor | None, list, list, list, list, list]:
    """Gradients of x, then lists of those of A_r, B_r, A_e, B_e and bias; None where ``needs`` says so.

    ``x`` is what the weights were multiplied with: a norm or gate in front is differentiated outside.
    """
    lists: list[list] = [[], [], [], [], []]
    dx = torch.zeros(x.shape, dtype=_accumulator(x.dtype), device=x.device)
    sizes = [weight.shape[0] for weight in weights]
    ranks = [a.shape[0] + b.shape[0] for a, b in zip(A_r, A_e, strict=True)]
    for i, (dy_i, s_i) in enumerate(zip(dy.split(sizes, dim=1), s.split(ranks, dim=1), strict=True)):
        needs_i = (needs[0], *(needed[i] for needed in needs[1:]))
        # The sum over projections is rounded once, so each term is computed in the accumulator's dtype.
        grads = backward(
            dy_i, None, None, x.to(dx.dtype), weights[i], A_r[i], B_r[i], A_e[i], B_e[i], scaling_r[i], scaling_e[i],
            s_i, _known(routes, x), present, 0.0, 0.0, None, needs_i,
        )  # fmt: skip
        dx = dx + grads[0] if needs[0] else dx
        for collected, grad in zip(lists, grads[1:], strict=True):
            collected.append(grad)
    return dx.to(x.dtype) if needs[0] else None, *lists


def _input(x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool) -> Tensor:
    """What the weights are multiplied with, in the dtype of ``x``; the norm rounds where transformers' norms round."""
    wide = _accumulator(x.dtype)
    if norm_weight is not None:
        h = x.to(wide)
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        return (norm_weight * h).to(x.dtype)
    if gated:
        gate, up = x.to(wide).chunk(2, dim=1)
        return (F.silu(gate) * up).to(x.dtype)
    return x


def _known(routes: Tensor | None, x: Tensor) -> Tensor:
    """Routes of a call that gave none because no adapter is present."""
    return torch.zeros(x.shape[0], dtype=torch.int8, device=x.device) if routes is None else routes
