"""Launcher of a site group's forward: the producer, then one persistent product of all projections.

Owns the order of both launches, the choice of the tiles and how operands are handed over (by pointer or by tensor
descriptor); the arithmetic is in ``produce_kernel`` and ``group_kernel``.
"""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from twn_kernels.impl.triton import launch
from twn_kernels.impl.triton.group_config import GroupConfig, group_config
from twn_kernels.impl.triton.group_kernel import group_kernel
from twn_kernels.impl.triton.primitives import INTERPRETING
from twn_kernels.impl.triton.produce import produce_

__all__ = ["group"]

_PROJECTIONS = 3  # of the kernel
_INTERPRETED_PROCESSORS = 2  # few, so that each interpreted program walks several tiles, as on a GPU
# A tile's rows of residual and B are reached from the first by 32-bit offsets: 256 at most, below 2^31 elements.
_LARGEST_PITCH = 2**23 - 1


class _Operands(NamedTuple):
    """What the product reads and writes; lists have one entry a projection, ``b`` is reasoning's, embedding's, ..."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    s: Tensor
    b: list[Tensor]
    routes: Tensor | None
    present: int
    residual: Tensor | None
    swiglu: bool
    y: Tensor

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each output."""
        widths = tuple(weight.shape[0] for weight in self.weights)
        return widths[:1] if self.swiglu else widths


def group(
    x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present,
    swiglu, residual,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y [tokens, sum of out_features]`` (or ``[tokens, out_features]``) and ``s [tokens, sum of ranks]``.

    See ``impl.reference`` for the contract. ``routes`` may be None: every row uses what is in ``present``.
    """
    tokens, features = x.shape[0], weights[0].shape[1]
    ranks = [a.shape[0] for a in chain.from_iterable(zip(A_r, A_e, strict=True))]
    present &= any(ranks[0::2]) | any(ranks[1::2]) << 1
    with launch._device(x):
        s = A_r[0].new_empty((tokens, sum(ranks)))
        produced = None if norm_weight is None and not gated else x.new_empty((tokens, features))
        columns = [sum(ranks[:i]) for i in range(len(ranks))]
        produce_(
            x, norm_weight, eps, gated, A_r, A_e, scaling_r, scaling_e, routes, present, produced, s, columns,
        )  # fmt: skip
        outputs = weights[0].shape[0] if swiglu else sum(weight.shape[0] for weight in weights)
        operands = _Operands(
            x=x if produced is None else produced,
            weights=list(weights),
            biases=list(biases),
            s=s,
            b=[_readable(b) for b in chain.from_iterable(zip(B_r, B_e, strict=True))],
            routes=routes if present else None,
            present=present,
            residual=None if residual is None else _readable(residual),
            swiglu=bool(swiglu),
            y=x.new_empty((tokens, outputs)),
        )
        _product(operands)
    return operands.y, s


def _product(operands: _Operands) -> None:
    """Fill ``y``; launches nothing where it is empty."""
    x, weights, y = operands.x, operands.weights, operands.y
    if y.numel() == 0:
        return
    arch = launch._arch(x.device)
    config = _config(operands, arch)
    missing = _PROJECTIONS - len(weights)
    tiles = config.tiles(x.shape[0], operands.widths)
    dependent = arch >= 90 and not INTERPRETING.value
    group_kernel[(config.programs(tiles, _processors(x.device)),)](
        x, *weights, *[None] * missing, *_descriptors(operands, config), *operands.biases, *[None] * missing,
        *_low_rank(operands), operands.routes, operands.residual, y,
        x.shape[0], *(weight.shape[0] for weight in weights), *[0] * missing, x.shape[1],
        *(b.shape[1] for b in operands.b), *[0] * (2 * missing),
        x.stride(0), *(weight.stride(0) for weight in weights), *[0] * missing,
        operands.s.stride(0), *(b.stride(0) if b.shape[1] else 0 for b in operands.b), *[0] * (2 * missing),
        0 if operands.residual is None else operands.residual.stride(0), y.stride(0),
        COUNT=len(weights), SWIGLU=operands.swiglu, PRESENT=operands.present,
        DESCRIPTORS=config.descriptors, DEPENDENT=dependent, PREFETCH=config.prefetch,
        BASE_PRECISION="ieee", LOW_RANK_PRECISION=launch._precision(x.dtype, operands.s.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        GROUP_M=config.group_m, PARTS=config.parts,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent, **launch._OPTIONS,
    )  # fmt: skip


def _config(operands: _Operands, arch: int) -> GroupConfig:
    x, weights, y, s = operands.x, operands.weights, operands.y, operands.s
    outputs = [y] if operands.residual is None else [y, operands.residual]
    used = [b for b in operands.b if b.shape[1] > 0]
    return group_config(
        x.shape[0], operands.widths, x.dtype == torch.float32, operands.swiglu,
        operands.present != 0 and s.dtype != x.dtype, arch,
        base_aligned=launch._aligned(x, *weights, *outputs) and _multiples_of_16(operands.widths),
        low_rank_aligned=operands.present == 0 or launch._aligned(s, *used),
        describable=x.element_size() == 2 and all(map(_describable, (x, *weights))),
        processors=_processors(x.device),
    )  # fmt: skip


def _descriptors(operands: _Operands, config: GroupConfig) -> list[Any]:
    """Of x and of each weight; None where the kernel reads by pointer."""
    missing: list[Any] = [None] * (_PROJECTIONS - len(operands.weights))
    if not config.descriptors:
        return [None, *[None] * len(operands.weights), *missing]
    x = TensorDescriptor.from_tensor(operands.x, [config.block_m, config.block_k])
    block = [config.block_n, config.block_k]
    return [x, *(TensorDescriptor.from_tensor(weight, block) for weight in operands.weights), *missing]


def _low_rank(operands: _Operands) -> list[Tensor | None]:
    """``s`` and every ``B``; None where no adapter can occur."""
    if operands.present == 0:
        return [None] * (1 + 2 * _PROJECTIONS)
    return [operands.s, *operands.b, *[None] * (2 * _PROJECTIONS - len(operands.b))]


def _readable(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension and a pitch that the kernel can step: so they are stored; else a copy."""
    fits = tensor.stride(1) == 1 or tensor.shape[1] <= 1
    return tensor if fits and 0 <= tensor.stride(0) <= _LARGEST_PITCH else tensor.contiguous()


def _multiples_of_16(widths: tuple[int, ...]) -> bool:
    return INTERPRETING.value or all(width % 16 == 0 for width in widths)


def _describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: 16-byte words, rows that do not overlap."""
    pitch = tensor.stride(0)
    return (
        tensor.data_ptr() % 16 == 0
        and pitch * tensor.element_size() % 16 == 0
        and tensor.stride(1) == 1
        and pitch >= tensor.shape[1] > 0
    )


@functools.cache
def _processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return _processors_of(torch.cuda.current_device() if device.index is None else device.index)
