"""Launchers of a site group's backward pass: ``dS`` once, ``dx`` and every ``dA`` from it, ``dB`` by projection.

Owns the order of launches and what is skipped; the arithmetic is in ``group_grad_kernel``. All launches are on the
current stream of the tensors' device and none reads device data on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twn_kernels.impl.triton import launch
from twn_kernels.impl.triton.config import gemm_config, grad_config, reduce_config
from twn_kernels.impl.triton.group_dx_kernel import group_dx_kernel
from twn_kernels.impl.triton.group_grad_kernel import group_grad_kernel, group_shrink_kernel
from twn_kernels.impl.triton.produce_config import group_shrink_config
from twn_kernels.impl.triton.shrink_kernel import reduce_kernel

__all__ = ["group_backward"]

_PROJECTIONS = 3  # of the kernels


class _Group(NamedTuple):
    """The operands of all projections; pairs are (reasoning, embedding)."""

    weights: list[Tensor]
    A: tuple[list[Tensor], list[Tensor]]
    B: tuple[list[Tensor], list[Tensor]]
    scaling: tuple[list[float], list[float]]
    routes: Tensor
    present: int

    @property
    def outputs(self) -> list[int]:
        return [weight.shape[0] for weight in self.weights]

    @property
    def ranks(self) -> tuple[list[int], list[int]]:
        return [a.shape[0] for a in self.A[0]], [a.shape[0] for a in self.A[1]]

    @property
    def dtype(self) -> torch.dtype:
        return self.A[0][0].dtype


def group_backward(
    dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, needs
) -> tuple[Tensor | None, list, list, list, list, list]:
    """Gradients of a site group: of ``x``, then lists of those of ``A_r``, ``B_r``, ``A_e``, ``B_e`` and ``bias``.

    Args:
        dy: ``[tokens, sum of out_features]``, contiguous, columns by projection.
        x: ``[tokens, in_features]`` as it was multiplied: after a norm or gate.
        weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e: one entry a projection.
        s: ``[tokens, sum of ranks]`` as the forward pass returned it, (reasoning, embedding) by projection.
        routes: int8 ``[tokens]``, or None: every row uses what is in ``present``.
        needs: ``(bool, list, list, list, list, list)`` in the order of the results; what is not needed is None.
    """
    needs_x, needs_A_r, needs_B_r, needs_A_e, needs_B_e, needs_bias = needs
    present &= any(a.shape[0] for a in A_r) | any(a.shape[0] for a in A_e) << 1
    if routes is None:
        routes = torch.full((x.shape[0],), present, dtype=torch.int8, device=x.device)
    group = _Group(
        list(weights), (_readable(A_r), _readable(A_e)), (_readable(B_r), _readable(B_e)),
        (list(scaling_r), list(scaling_e)), routes, present,
    )  # fmt: skip
    dx = None
    with launch._device(x):
        ds = None
        if present and x.shape[0] and (needs_x or any(needs_A_r) or any(needs_A_e)):
            ds = _group_shrink(dy, group)
        if needs_x:
            dx = x.new_empty(x.shape)
            _group_dx(dy, ds, group, dx)
        dA_r, dA_e = _group_A_grads(x, ds, group, (needs_A_r, needs_A_e))
        dB_r, dB_e = _group_B_grads(dy, s, group, (needs_B_r, needs_B_e))
        wide = launch._wide(dy.dtype)
        dbias = [
            dy_i.sum(0, dtype=wide).to(dy.dtype) if need else None
            for need, dy_i in zip(needs_bias, dy.split(group.outputs, dim=1), strict=True)
        ]
    return dx, dA_r, dB_r, dA_e, dB_e, dbias


def _group_shrink(dy: Tensor, group: _Group) -> Tensor:
    """``dS [tokens, all ranks of reasoning + all of embedding]``: masked, scaled, rounded once."""
    tokens, (ranks_r, ranks_e) = dy.shape[0], group.ranks
    total_r, total_e = sum(ranks_r), sum(ranks_e)
    ds = dy.new_empty((tokens, total_r + total_e), dtype=group.dtype)
    blocks = [*group.B[0], *group.B[1]]
    config = group_shrink_config(
        tokens, max(group.outputs), max(*ranks_r, *ranks_e), group.dtype == torch.float32, launch._arch(dy.device),
        aligned=launch._aligned(dy, *(b for b in blocks if b.numel())) and all(n % 16 == 0 for n in group.outputs),
    )  # fmt: skip
    splits = config.splits
    out = ds if splits == 1 else dy.new_empty((splits, *ds.shape), dtype=launch._wide(dy.dtype))
    tiles = sum(-(-max(pair) // config.block_r) for pair in zip(ranks_r, ranks_e, strict=True))
    group_shrink_kernel[(-(-tokens // config.block_m) * tiles, splits)](
        dy, *_three(group.B[0]), *_three(group.B[1]), group.routes, out,
        tokens, tiles, splits, *_three(group.outputs, 0), *_three(ranks_r, 0), *_three(ranks_e, 0),
        dy.stride(0), *_three(_pitches(group.B[0]), 0), *_three(_pitches(group.B[1]), 0),
        out.stride(-2), out.stride(0) if splits > 1 else 0,
        *_three(group.scaling[0], 1.0), *_three(group.scaling[1], 1.0),
        PRESENT=group.present, PRECISION=launch._precision(dy.dtype, group.dtype),
        BLOCK_M=config.block_m, BLOCK_R=config.block_r, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch._OPTIONS,
    )  # fmt: skip
    if splits > 1:  # the parts are scaled and masked
        launch._reduce(out, (ds, ds[:, total_r:]), (total_r, total_e), (1.0, 1.0), 3, None)
    return ds


def _group_dx(dy: Tensor, ds: Tensor | None, group: _Group, dx: Tensor) -> None:
    """``dx = sum of dy_i W_i + dS_i A_i`` in one accumulator."""
    if dx.numel() == 0:
        return
    (tokens, features), (ranks_r, ranks_e) = dx.shape, group.ranks
    separate = ds is not None and group.dtype != dy.dtype
    operands = [t for t in (*group.A[0], *group.A[1]) if t.numel()]
    low_rank_aligned = ds is None or launch._aligned(ds, *operands)
    config = gemm_config(
        tokens, dy.dtype == torch.float32, separate, launch._arch(dy.device),
        base_aligned=launch._aligned(dy, dx, *group.weights) and all(n % 16 == 0 for n in group.outputs),
        low_rank_aligned=low_rank_aligned,
    )  # fmt: skip
    group_dx_kernel[(-(-tokens // config.block_m) * -(-features // config.block_n),)](
        dy, *_three(group.weights), dy if ds is None else ds, *_three(group.A[0]), *_three(group.A[1]),
        group.routes, dx, tokens, features, *_three(group.outputs, 0), *_three(ranks_r, 0), *_three(ranks_e, 0),
        dy.stride(0), *_three(_pitches(group.weights), 0), 0 if ds is None else ds.stride(0),
        *_three(_pitches(group.A[0]), 0), *_three(_pitches(group.A[1]), 0),
        COUNT=len(group.weights), PRESENT=0 if ds is None else group.present, SEPARATE=separate,
        ALIGNED=low_rank_aligned,
        BASE_PRECISION="ieee", LOW_RANK_PRECISION=launch._precision(dy.dtype, group.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch._OPTIONS,
    )  # fmt: skip


def _group_A_grads(x: Tensor, ds: Tensor | None, group: _Group, needs) -> tuple[list, list]:
    """Every ``dA_i = dS_i^T x`` over its adapter's rows; an adapter of which none is needed gets no program."""
    runs = [ds is not None and any(needs[a]) and bool(group.present >> a & 1) for a in (0, 1)]
    grads = tuple(_like(group.A[a], needs[a], everything=runs[a]) for a in (0, 1))
    if any(runs) and x.numel():
        _launch_A_grads(x, ds, group, grads, runs)
    else:
        runs = [False, False]
    for a in (0, 1):
        for i, need in enumerate(needs[a]):
            if not need:
                grads[a][i] = None
            elif not runs[a]:
                grads[a][i].zero_()
    return grads


def _launch_A_grads(x: Tensor, ds: Tensor, group: _Group, grads, runs) -> None:
    tokens, features = x.shape
    ranks = [ranks if run else [0] * len(ranks) for ranks, run in zip(group.ranks, runs, strict=True)]
    totals = [sum(r) for r in ranks]
    config = grad_config(
        tokens, features, *totals, group.dtype == torch.float32, launch._arch(x.device),
        aligned=launch._aligned(x, ds) and sum(group.ranks[0]) % 16 == 0,
    )  # fmt: skip
    splits, parts = config.splits, None
    outs, strides = grads, (1, features, 0)
    if splits > 1:
        parts = x.new_empty((splits, features, sum(totals)), dtype=launch._wide(x.dtype))
        starts = _starts(ranks)
        outs = tuple([parts[:, :, start:] for start in s] for s in starts)
        strides = (parts.stride(1), 1, parts.stride(0))
    # an adapter without a program has no outputs: the other's stand in, since the kernel selects between their pointers
    outs = [outs[a] if runs[a] else outs[1 - a] for a in (0, 1)]
    stretches = -(-tokens // config.stretch)
    group_grad_kernel[(-(-features // config.block_f), sum(-(-total // config.block_r) for total in totals), splits)](
        x, ds, group.routes, *_three(outs[0]), *_three(outs[1]),
        tokens, features, *_three(ranks[0], 0), *_three(ranks[1], 0), sum(group.ranks[0]),
        -(-stretches // splits) * config.stretch, x.stride(0), ds.stride(0), *strides,
        COUNT=len(group.weights), PRECISION=launch._precision(x.dtype, group.dtype),
        BLOCK_F=config.block_f, BLOCK_R=config.block_r, BLOCK_T=config.block_t, STRETCH=config.stretch,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch._OPTIONS,
    )  # fmt: skip
    if parts is not None:
        _add_parts(parts, grads, ranks)


def _add_parts(parts: Tensor, grads, ranks) -> None:
    """Add the parts of each projection's ``dA`` in their order and round; columns are (reasoning, embedding) by it."""
    config = reduce_config()
    start = 0
    for i, (rank_r, rank_e) in enumerate(zip(*ranks, strict=True)):
        if rank_r + rank_e == 0:
            continue
        outs = [grad[i].t() if rank else parts[0] for grad, rank in zip(grads, (rank_r, rank_e), strict=True)]
        tiles = -(-rank_r // config.block_r) + -(-rank_e // config.block_r)
        reduce_kernel[(-(-parts.shape[1] // config.block_l), tiles)](
            parts[:, :, start:], *outs, None, parts.shape[1], rank_r, rank_e, parts.shape[0],
            parts.stride(0), parts.stride(1), *outs[0].stride(), *outs[1].stride(), 1.0, 1.0,
            PRESENT=3, MASKED=False, BLOCK_L=config.block_l, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch._OPTIONS,
        )  # fmt: skip
        start += rank_r + rank_e


def _group_B_grads(dy: Tensor, s: Tensor, group: _Group, needs) -> tuple[list, list]:
    """``dB_i = dy_i^T S_i`` over each adapter's rows, both adapters of a projection in one launch."""
    grads: tuple[list, list] = ([], [])
    sizes = [r + e for r, e in zip(*group.ranks, strict=True)]
    for i, (dy_i, s_i) in enumerate(zip(dy.split(group.outputs, dim=1), s.split(sizes, dim=1), strict=True)):
        pair = launch._pair(
            group.A[0][i], group.B[0][i], group.A[1][i], group.B[1][i], group.scaling[0][i], group.scaling[1][i],
            group.routes, group.present, 0.0, 0.0, None,
        )  # fmt: skip
        both = launch._weight_grads((dy_i, dy_i), s_i, pair, (needs[0][i], needs[1][i]), pair.B, transposed=False)
        grads[0].append(both[0])
        grads[1].append(both[1])
    return grads


def _like(tensors: list[Tensor], needed, *, everything: bool) -> list:
    """A gradient for each tensor; ``everything``: also where none is needed, because the launch writes it."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need or everything else None
        for t, need in zip(tensors, needed, strict=True)
    ]


def _starts(ranks) -> tuple[list[int], list[int]]:
    """First column of each block where reasoning's and embedding's of a projection stand side by side."""
    starts: tuple[list[int], list[int]] = ([], [])
    column = 0
    for rank_r, rank_e in zip(*ranks, strict=True):
        starts[0].append(column)
        starts[1].append(column + rank_r)
        column += rank_r + rank_e
    return starts


def _three(values: list, missing=None) -> list:
    """As many values as the kernels take; projections that the group does not have have no width or rank."""
    return [*values, *[values[0] if missing is None else missing] * (_PROJECTIONS - len(values))]


def _pitches(tensors: list[Tensor]) -> list[int]:
    return [t.stride(0) if t.numel() else 0 for t in tensors]


def _readable(adapters: list[Tensor]) -> list[Tensor]:
    """With a contiguous last dimension: adapters are stored so; any other layout costs a copy."""
    return [a if a.numel() == 0 or a.shape[1] == 1 or a.stride(1) == 1 else a.contiguous() for a in adapters]
