"""Launcher of the producer: the input of a site group and its shrinks, written where the caller wants them.

Owns the choice of the tiles, the order of both launches where a sum is split, and what to skip; the arithmetic is in
``produce_kernel``.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from twn_kernels.impl.triton import launch
from twn_kernels.impl.triton.config import reduce_config
from twn_kernels.impl.triton.primitives import INTERPRETING
from twn_kernels.impl.triton.produce_config import ProduceConfig, produce_config, produce_tiles
from twn_kernels.impl.triton.produce_kernel import produce_kernel
from twn_kernels.impl.triton.shrink_kernel import reduce_kernel

__all__ = ["produce_"]

_BLOCKS = 6  # of the kernel: three projections, two adapters


class _Stack(NamedTuple):
    """The adapters of a group, one block each: reasoning's and embedding's of a projection side by side."""

    A: list[Tensor]
    scaling: list[float]
    columns: list[int]

    @property
    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.A]

    @property
    def arguments(self) -> tuple[list, list, list, list, list]:
        """``A``, ranks, columns, row pitches and scalings, filled up with blocks of rank 0 to what the kernel takes."""
        missing = _BLOCKS - len(self.A)
        pitches = [a.stride(0) if a.shape[0] else 0 for a in self.A]
        return (
            self.A + self.A[:1] * missing,
            self.ranks + [0] * missing,
            [*self.columns, *[0] * missing],
            pitches + [0] * missing,
            self.scaling + [1.0] * missing,
        )


def produce_(
    x, norm_weight, eps, gated, A_r, A_e, scaling_r, scaling_e, routes, present, x_out, s_out, s_columns
) -> None:
    """Write ``x^`` into ``x_out`` and the masked, scaled shrink of every adapter into columns of ``s_out``.

    ``x^`` is ``x``, or ``norm_weight * rmsnorm(x)`` rounded twice as transformers does, or ``silu(x[:, :K]) *
    x[:, K:]`` rounded twice as eager PyTorch does; the shrinks are of the rounded values.

    Args:
        x: ``[tokens, K]``, or ``[tokens, 2 K]`` where ``gated``; any row pitch, last dimension contiguous. Only read.
        norm_weight: ``[K]`` or None; eps: of the norm.
        gated: the input is ``silu(gate) * up``, side by side in ``x``.
        A_r, A_e: one ``[rank, K]`` a projection, one to three of them; rank 0 where a projection lacks the adapter.
        scaling_r, scaling_e: one float a projection.
        routes: int8 ``[tokens]``; None: every row uses what is in ``present``.
        present: bitmask of the adapters that can occur; those of others are not read.
        x_out: ``[tokens, K]`` in ``x.dtype``, any row pitch, not overlapping ``x``; None: not wanted.
        s_out: ``[tokens, *]``, any row pitch; rows that do not use an adapter get exact zeros.
        s_columns: first column of each block in the order ``A_r[0], A_e[0], A_r[1], ...``, one an adapter also where
            its rank is 0. Other columns are not touched.

    Launches nothing without tokens, one kernel else, or two where few tokens meet many features. No host reads.
    """
    stack = _Stack(
        [_readable(a) for a in chain.from_iterable(zip(A_r, A_e, strict=True))],
        list(chain.from_iterable(zip(scaling_r, scaling_e, strict=True))),
        list(s_columns),
    )
    tokens, features = x.shape[0], x.shape[1] // (2 if gated else 1)
    ranks = stack.ranks
    if tokens == 0 or (sum(ranks) == 0 and x_out is None):
        return
    present &= any(ranks[0::2]) | any(ranks[1::2]) << 1
    with launch._device(x):
        aligned = _aligned(x, norm_weight, x_out, *stack.A) and features % 16 == 0
        config = produce_config(
            tokens, features, sum(ranks), stack.A[0].dtype == torch.float32, bool(gated), launch._arch(x.device),
            aligned=aligned,
        )  # fmt: skip
        if config.splits == 1 or not present:
            _launch(x, norm_weight, eps, gated, stack, routes, present, x_out, s_out, 1, config, aligned)
            return
        parts = x.new_empty((config.splits, tokens, sum(ranks)), dtype=launch._wide(x.dtype))
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        part_stack = _Stack(stack.A, [1.0] * len(ranks), starts)
        _launch(x, norm_weight, eps, gated, part_stack, routes, present, x_out, parts, config.splits, config, aligned)
        _add_parts(parts, stack, s_out)


def _launch(
    x, norm_weight, eps, gated, stack: _Stack, routes, present, x_out, out, splits: int, config: ProduceConfig, aligned
) -> None:
    """The producer; ``out`` is ``s_out``, or ``parts [splits, tokens, sum of ranks]``."""
    tokens, features = x.shape[0], x.shape[1] // (2 if gated else 1)
    blocks, ranks, columns, pitches, scaling = stack.arguments
    arch = launch._arch(x.device)
    dependent = arch >= 90 and not INTERPRETING.value
    tiles = produce_tiles(config, tokens, features, sum(ranks))
    chunks = -(-features // config.block_k)
    produce_kernel[(-(-tokens // config.block_m) * tiles, splits)](
        x, norm_weight, *blocks, routes if present else None, x_out, x_out if out is None else out,
        tokens, features, *ranks, *columns,
        x.stride(0), *pitches, 0 if x_out is None else x_out.stride(0),
        0 if out is None else out.stride(-2), out.stride(0) if splits > 1 else 0,
        *scaling, eps, tiles, -(-chunks // splits),
        PRESENT=present, GATED=bool(gated), PRECISION=launch._precision(x.dtype, blocks[0].dtype), DEPENDENT=dependent,
        ALIGNED=aligned,
        BLOCK_M=config.block_m, BLOCK_R=config.block_r, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent, **launch._OPTIONS,
    )  # fmt: skip


def _add_parts(parts: Tensor, stack: _Stack, s_out: Tensor) -> None:
    """Add the parts of every projection in their order, scale and round; rows were selected in the parts."""
    config, ranks = reduce_config(), stack.ranks
    for i in range(0, len(ranks), 2):
        (rank_r, rank_e), start = ranks[i : i + 2], sum(ranks[:i])
        if rank_r + rank_e == 0:
            continue
        outs = [s_out[:, column:] for column in stack.columns[i : i + 2]]
        tiles = -(-rank_r // config.block_r) + -(-rank_e // config.block_r)
        reduce_kernel[(-(-parts.shape[1] // config.block_l), tiles)](
            parts[:, :, start:], *outs, None, parts.shape[1], rank_r, rank_e, parts.shape[0],
            parts.stride(0), parts.stride(1), *outs[0].stride(), *outs[1].stride(), *stack.scaling[i : i + 2],
            PRESENT=3, MASKED=False, BLOCK_L=config.block_l, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch._OPTIONS,
        )  # fmt: skip


def _readable(a: Tensor) -> Tensor:
    """``a`` with a contiguous last dimension: adapters are stored so; any other layout costs a copy."""
    return a if a.shape[0] == 0 or a.shape[1] == 1 or a.stride(1) == 1 else a.contiguous()


def _aligned(x: Tensor, *others: Tensor | None) -> bool:
    return launch._aligned(x, *(t for t in others if t is not None and t.numel() > 0))
