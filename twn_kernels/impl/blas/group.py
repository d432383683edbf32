"""A site group on vendor GEMMs: one stacked shrink for all projections, then one K-augmented product a weight or panel.

Without adapters it is torch's own sequence of ops, bit for bit. With packed weights (:mod:`.panels`) no product copies
a weight and the input is written once, beside the shrinks; without, each linear is multiplied as a single one is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.impl.blas import panels
from twn_kernels.impl.blas import shrink as low_rank
from twn_kernels.impl.blas.products import joined_product, rounded_mm, summed_products, wide_mm

_HALF = (torch.float16, torch.bfloat16)


def group(
    x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present,
    swiglu, residual, packed=(), produce=None, needs_s=True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``y [tokens, sum of out_features]`` (or ``[tokens, out_features]``) and ``s [tokens, sum of ranks]``.

    Args:
        packed: of a packed group: the key of its layout, its panels, and ``poison`` where an adapter may not be finite.
        produce: a fused kernel that writes input and shrinks, where the device has one.
        needs_s: without it ``s`` is None, which saves the launch that gathers it.
        others: as every implementation.
    """
    if x.dtype not in _HALF:
        produce = None
    ranks = low_rank.ranks_of(A_r, A_e, present)
    present &= any(r for r, _ in ranks) | any(e for _, e in ranks) << 1
    front = (norm_weight, eps, gated)
    adapters = (A_r, A_e, scaling_r, scaling_e, routes, present)
    plan = panels.fitting_layout(packed, x, weights, A_r, A_e)
    if present == 0:
        y = _base(x, front, weights, biases, adapters, plan, packed, produce)
        s = x.new_zeros((x.shape[0], sum(map(len, (*A_r, *A_e)))), dtype=A_r[0].dtype) if needs_s else None
    elif plan is None:
        y, s = _unpacked(x, front, weights, biases, (B_r, B_e), adapters, produce, needs_s)
    else:
        y, s = _packed(x, front, biases, adapters, plan, packed, produce, needs_s)
    if swiglu:
        y = _silu_times(y)
    return (y if residual is None else residual + y), s


def _base(x, front, weights, biases, adapters, plan, packed, produce) -> Tensor:
    A_r, A_e, *others = adapters
    if produce is not None and _is_written(front):
        z = x.new_empty((x.shape[0], weights[0].shape[1]))
        none = [A[:0] for A in A_r]
        produce(x, *front, none, none, *others, z, None, [0] * (2 * len(none)))
    else:
        z = _input(x, *front)
    if plan is not None and x.is_cuda:
        y = x.new_empty((x.shape[0], sum(plan.outputs)))
        panels.multiply_(plan, packed[1 : 1 + len(plan.panels)], z, plan.left, biases, 0, y)
        return y
    outputs = [F.linear(z, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _unpacked(x, front, weights, biases, B, adapters, produce, needs_s) -> tuple[Tensor, Tensor | None]:
    A_r, A_e, scaling_r, scaling_e, routes, present = adapters
    ranks, left = low_rank.ranks_of(A_r, A_e), low_rank.ranks_of(A_r, A_e, present)
    unused = low_rank.unused_rows(routes, present)
    if produce is not None:
        s = x.new_empty((x.shape[0], sum(map(sum, ranks))), dtype=A_r[0].dtype)
        z = x.new_empty((x.shape[0], weights[0].shape[1])) if _is_written(front) else None
        produce(x, *front, *adapters, z, s, _columns(A_r, A_e))
        z, low = x if z is None else z, low_rank.narrowed(s, ranks, present)
    else:
        z = _input(x, *front)
        low = low_rank.shrink(z, A_r, A_e, scaling_r, scaling_e, unused, present)
        s = low_rank.widened(low, ranks, present) if needs_s else None
    matrices = [_expansion(*pair, present) for pair in zip(*B, strict=True)]
    low, matrices = low_rank.isolated(low, matrices, left, unused)
    lows = low.split([sum(pair) for pair in left], dim=1)
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty((x.shape[0], sum(sizes)))
    for out, weight, bias, part, matrix in zip(y.split(sizes, dim=1), weights, biases, lows, matrices, strict=True):
        joined_product(z, weight, bias, part, matrix, out)
    return y, s if needs_s else None


def _packed(x, front, biases, adapters, plan, packed, produce, needs_s) -> tuple[Tensor, Tensor | None]:
    A_r, A_e, scaling_r, scaling_e, routes, present = adapters
    aug = x.new_empty((x.shape[0], plan.pitch))
    z = aug[:, plan.left : plan.left + plan.in_features]
    ranks, left = low_rank.ranks_of(A_r, A_e), low_rank.ranks_of(A_r, A_e, present)
    gaps = plan.gaps(present, low_rank.interleaved(*zip(*left, strict=True)))
    for first, last in gaps:
        aug[:, first:last].zero_()
    if produce is not None:
        produce(x, *front, *adapters, z, aug, [block.column for block in plan.blocks])
        kept = zip(plan.blocks, low_rank.interleaved(*zip(*ranks, strict=True)), strict=True)
        parts = [aug[:, block.column : block.column + rank] for block, rank in kept]
        s = torch.cat(parts, dim=1) if needs_s else None
    else:
        _input(x, *front, out=z)
        unused = low_rank.unused_rows(routes, present)
        low = low_rank.shrink(z, A_r, A_e, scaling_r, scaling_e, unused, present)
        parts = low.split(low_rank.interleaved(*zip(*left, strict=True)), dim=1)
        for block, part in zip(plan.blocks, parts, strict=True):
            if part.shape[1]:
                aug[:, block.column : block.column + part.shape[1]].copy_(part)
        s = low_rank.widened(low, ranks, present) if needs_s else None
    count = len(plan.panels)
    if len(packed) > 1 + count:
        _poison_(plan, aug, packed[1 + count], routes, present)
    y = x.new_empty((x.shape[0], sum(plan.outputs)))
    panels.multiply_(plan, packed[1 : 1 + count], aug, 0, biases, present, y)
    return y, s


def _poison_(plan: panels.Layout, aug: Tensor, poison: Tensor, routes: Tensor | None, present: int) -> None:
    """NaN into the shrinks of rows that use a B which is not finite."""
    reach = [plan.columns(panel, present) for panel in plan.panels]
    right = plan.left + plan.in_features
    for first, last in ((min(a for a, _ in reach), plan.left), (right, max(b for _, b in reach))):
        if first < last:
            bits = poison[first:last]
            hit = bits & present if routes is None else routes[:, None] & (bits & present)
            aug[:, first:last].masked_fill_(hit.ne(0), torch.nan)


def group_backward(
    dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, needs
) -> tuple[Tensor | None, list, list, list, list, list]:
    """Gradients of x, then lists of those of A_r, B_r, A_e, B_e and bias; None where ``needs`` says so.

    ``x`` is what the weights were multiplied with: a norm or gate in front is differentiated outside.
    """
    need_x, *need_adapters, need_bias = needs
    ranks, left = low_rank.ranks_of(A_r, A_e), low_rank.ranks_of(A_r, A_e, present)
    unused = low_rank.unused_rows(routes, present)
    flows = dy.split([weight.shape[0] for weight in weights], dim=1)
    expansions = [_expansion(*pair, present) for pair in zip(B_r, B_e, strict=True)]
    ds = None
    if any(map(any, left)) and (need_x or any(need_adapters[0]) or any(need_adapters[2])):
        ds = _side_by_side([wide_mm(flow, matrix) for flow, matrix in zip(flows, expansions, strict=True)])
        low_rank.scale_and_mask_(ds, left, (scaling_r, scaling_e), unused)
        ds = ds.to(A_r[0].dtype)
    dx = _input_gradient(flows, weights, ds, (A_r, A_e), left, unused, x.dtype) if need_x else None
    lists: list[list] = []
    for adapter, (A, B) in enumerate(((A_r, B_r), (A_e, B_e))):
        used, rows = present & (1 << adapter), unused[adapter]
        need_A, need_B = need_adapters[2 * adapter : 2 * adapter + 2]
        low = low_rank.adapter_columns(ds, left, adapter, False) if used and ds is not None else None
        shrinks = low_rank.adapter_columns(s, ranks, adapter, False) if used else None
        lists += [_gradients_of_A(x, A, low, rows, need_A), _gradients_of_B(dy, flows, B, shrinks, rows, need_B)]
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    biases = [
        flow.sum(0, dtype=wide).to(dy.dtype) if need else None for flow, need in zip(flows, need_bias, strict=True)
    ]
    return dx, *lists, biases


def _input_gradient(flows, weights, ds, A, ranks, unused, dtype) -> Tensor:
    pairs = list(zip(flows, weights, strict=True))
    if ds is not None:
        kept = zip(low_rank.interleaved(*A), low_rank.interleaved(*zip(*ranks, strict=True)), strict=True)
        stack = [A_i for A_i, rank in kept if rank]
        matrix = stack[0] if len(stack) == 1 else torch.cat(stack)
        low, (columns,) = low_rank.isolated(ds, [matrix.t()], ranks, unused)
        pairs.append((low, columns.t()))
    return summed_products(pairs, dtype)


def _gradients_of_A(x, A, low, rows, need) -> list[Tensor | None]:
    """One product for the projections that need theirs: they share ``x`` with the rows of this adapter."""
    wanted = [i for i, wants in enumerate(need) if wants]
    grads: list[Tensor | None] = [None] * len(A)
    if low is None:
        for i in wanted:
            grads[i] = torch.zeros_like(A[i], memory_format=torch.contiguous_format)
    elif wanted:
        stacked = rounded_mm(_side_by_side([low[i] for i in wanted]).t(), low_rank.masked(x, rows), A[0].dtype)
        parts = stacked.split([A[i].shape[0] for i in wanted])
        for i, part in zip(wanted, parts, strict=True):
            grads[i] = part.clone() if len(wanted) > 1 else part  # gradients of several inputs may not share memory
    return grads


def _gradients_of_B(dy, flows, B, shrinks, rows, need) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(B)
    if shrinks is not None and any(need):
        flows = low_rank.masked(dy, rows).split([flow.shape[1] for flow in flows], dim=1)
    for i, wants in enumerate(need):
        if wants and shrinks is None:
            grads[i] = torch.zeros_like(B[i], memory_format=torch.contiguous_format)
        elif wants:
            grads[i] = rounded_mm(flows[i].t(), shrinks[i], B[i].dtype)
    return grads


def _input(x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool, out: Tensor | None = None) -> Tensor:
    """What the linears read, in torch's ops and transformers' order of rounding; into ``out`` where given."""
    if norm_weight is not None:
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        return (norm_weight * h).to(x.dtype) if out is None else torch.mul(norm_weight, h, out=out)
    if gated:
        return _silu_times(x, out)
    return x if out is None else out.copy_(x)


def _silu_times(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` of both side by side, with the bits that a model gets from two tensors."""
    gate, up = x.chunk(2, dim=1)
    # On a CPU the last columns of every row of a view go through another exp than they do in a whole tensor.
    return torch.mul(F.silu(gate if x.is_cuda else gate.contiguous()), up, out=out)


def _is_written(front: tuple) -> bool:
    norm_weight, _, gated = front
    return norm_weight is not None or gated


def _columns(A_r, A_e) -> list[int]:
    """The first column of each block of ``s``."""
    sizes = [A.shape[0] for A in low_rank.interleaved(A_r, A_e)]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _expansion(B_r: Tensor, B_e: Tensor, present: int) -> Tensor:
    """``[out_features, ranks]`` of the adapters in ``present``."""
    parts = [B for bit, B in ((1, B_r), (2, B_e)) if present & bit and B.shape[1]]
    return _side_by_side(parts) if parts else B_r[:, :0]


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
