"""Packed form of a site group: where base weights and ``lora_B`` lie side by side, and what that makes of a product.

A panel is a 16-bit matrix with one row an output feature. Its columns are a base weight and, beside it, the adapters'
``lora_B``; ``x_aug`` has the input and the shrinks in matching columns. So base and adapters are one product over one
contiguous range of columns, which the host picks from the adapters that can occur. With one projection::

    x_aug = [S_R | x | S_E]        panel = [B_R | W | B_E]

With several, the first reads to the left of the input and the others to its right, so that no panel holds zeros for a
projection that it does not serve (but for k and v, which share one)::

    x_aug = [S_E0 S_R0 | x | S_R1 S_R2 S_E1 S_E2]        panels = [B_E0 B_R0 | W_0]  and  [W_1 | B_R1     B_E1     ]
                                                                                         [W_2 |      B_R2      B_E2]

Reasoning lies nearest to the input: a batch under it alone multiplies nothing else. A batch under the embedding adapter
alone does so with one projection, and passes over reasoning's (zeroed) columns with several.

The B columns hold ``lora_B`` itself where that is known to be finite, and else a shadow of it with non-finite entries
zeroed, since 0 * NaN would reach rows that do not use the adapter; ``poison`` tells which columns were not finite, and
rows that use these get NaN through their shrink. In a row that uses it, an adapter of k that is not finite makes v NaN
too, and the reverse, as they share a product.

This file holds the layout (plain numbers), filling, and the products. Who owns panels is not its business.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of 16 bits: 128 bytes, a cache line and the widest swizzle of a bulk copy. Vendor kernels ask for 16 bytes.
_PITCH = 64
# 16 bytes: a block of columns that starts or ends a product starts where a vector load may.
_BLOCK = 8


class Block(NamedTuple):
    """The columns of one adapter of one projection.

    Attributes:
        projection, adapter: 0 reasoning, 1 embedding.
        rank: columns in use.
        width: columns kept, a multiple of 8; those beyond the rank are zero.
        column: the first, in ``x_aug``.
    """

    projection: int
    adapter: int
    rank: int
    width: int
    column: int


class Panel(NamedTuple):
    """One matrix of base weights and ``lora_B``.

    Attributes:
        projections: which, in order of rows.
        first_row: of each projection.
        rows, pitch: of the matrix.
        shift: column of ``x_aug`` that the first column meets.
        blocks: the adapters in it.
    """

    projections: tuple[int, ...]
    first_row: tuple[int, ...]
    rows: int
    pitch: int
    shift: int
    blocks: tuple[Block, ...]

    @property
    def numel(self) -> int:
        return self.rows * self.pitch


class Layout(NamedTuple):
    """Columns of ``x_aug`` and of every panel.

    Attributes:
        in_features: of the group.
        outputs: out_features of each projection.
        ranks: (reasoning, embedding) of each projection.
        left: first column of the input in ``x_aug``.
        pitch: columns of ``x_aug``.
        panels: one or two.
    """

    in_features: int
    outputs: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]
    left: int
    pitch: int
    panels: tuple[Panel, ...]

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order reasoning, embedding of the first projection, then of the second."""
        return sorted(block for panel in self.panels for block in panel.blocks)

    def columns(self, panel: Panel, present: int) -> tuple[int, int]:
        """The columns of ``x_aug`` that one product needs for the adapters in ``present``."""
        used = [block for block in panel.blocks if present & (1 << block.adapter) and block.rank]
        first = min([self.left, *(block.column for block in used)])
        last = max([self.left + self.in_features, *(block.column + block.width for block in used)])
        return first, last

    def gaps(self, present: int, written: Sequence[int]) -> list[tuple[int, int]]:
        """Column ranges to zero before the shrinks are written, one a side at most.

        Args:
            present: adapters that can occur.
            written: rank that is written into each of :attr:`blocks`.
        """
        reach = [self.columns(panel, present) for panel in self.panels]
        right = self.left + self.in_features
        sides = [(min(first for first, _ in reach), self.left), (right, max(last for _, last in reach))]
        full = {block for block, rank in zip(self.blocks, written, strict=True) if rank == block.width}
        return [
            (first, last)
            for first, last in sides
            if first < last and sum(b.width for b in full if first <= b.column < last) < last - first
        ]


@functools.lru_cache(maxsize=256)
def layout(in_features: int, outputs: tuple[int, ...], ranks: tuple[tuple[int, int], ...]) -> Layout:
    """The layout of a group of one to three projections; a pure function of its sizes."""
    widths = [tuple(_up(rank, _BLOCK) for rank in pair) for pair in ranks]
    first = widths[0]
    alone = len(outputs) == 1
    left = _up(first[0] if alone else sum(first), _PITCH)
    right = left + in_features
    blocks = [Block(0, 0, ranks[0][0], first[0], left - first[0])]
    if alone:
        blocks.append(Block(0, 1, ranks[0][1], first[1], right))
        pitch = _up(right + first[1], _PITCH)
        return Layout(in_features, outputs, ranks, left, pitch, (_panel((0,), outputs, 0, pitch, blocks),))
    blocks.append(Block(0, 1, ranks[0][1], first[1], left - sum(first)))
    others, at, beside = tuple(range(1, len(outputs))), right, []
    for adapter in (0, 1):
        for i in others:
            beside.append(Block(i, adapter, ranks[i][adapter], widths[i][adapter], at))
            at += widths[i][adapter]
    panels = (
        _panel((0,), outputs, 0, _up(right, _PITCH), blocks),
        _panel(others, outputs, left, _up(at - left, _PITCH), beside),
    )
    return Layout(in_features, outputs, ranks, left, _up(at, _PITCH), panels)


def _panel(projections, outputs, shift, pitch, blocks) -> Panel:
    sizes = [outputs[i] for i in projections]
    return Panel(
        projections, tuple(sum(sizes[:i]) for i in range(len(sizes))), sum(sizes), pitch, shift, tuple(sorted(blocks))
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def weight_view(plan: Layout, panel: Panel, storage: Tensor, projection: int) -> Tensor:
    """The part of a panel ``[rows, pitch]`` that is the base weight of one of its projections."""
    row = panel.first_row[panel.projections.index(projection)]
    column = plan.left - panel.shift
    return storage[row : row + plan.outputs[projection], column : column + plan.in_features]


def adapter_view(plan: Layout, panels: Sequence[Tensor], block: Block) -> Tensor:
    """The part of the panels that is one adapter's ``lora_B``, ``[out_features, rank]``."""
    index = next(i for i, panel in enumerate(plan.panels) if block.projection in panel.projections)
    panel = plan.panels[index]
    row = panel.first_row[panel.projections.index(block.projection)]
    column = block.column - panel.shift
    return panels[index][row : row + plan.outputs[block.projection], column : column + block.rank]


def adapter_bits(plan: Layout, device: torch.device) -> Tensor:
    """int8 ``[plan.pitch]``: the adapter's bit in each column of a shrink, 0 elsewhere."""
    bits = torch.zeros(plan.pitch, dtype=torch.int8)
    for block in plan.blocks:
        bits[block.column : block.column + block.rank] = 1 << block.adapter
    return bits.to(device)


def fill_adapters_(
    plan: Layout, panels: Sequence[Tensor], B: Sequence[Tensor | None], bits: Tensor, poison: Tensor
) -> None:
    """Bring the shadow of every ``lora_B`` up to date. No host reads.

    Args:
        plan: the layout.
        panels: its panels.
        B: of each block in the order of ``plan.blocks``; None where the rank is 0 or the panel has itself.
        bits: of :func:`adapter_bits`.
        poison: int8 ``[plan.pitch]``: gets the adapter's bit in each column whose B is not finite, 0 elsewhere.
    """
    peaks = panels[0].new_zeros(plan.pitch)
    for block, b in zip(plan.blocks, B, strict=True):
        if b is None or not b.numel():
            continue
        torch.nan_to_num(b, 0.0, 0.0, 0.0, out=adapter_view(plan, panels, block))
        torch.linalg.vector_norm(b, torch.inf, dim=0, out=peaks[block.column : block.column + block.rank])
    # 0 * finite is 0; 0 * inf and 0 * NaN are NaN, which alone differs from itself.
    peaks.mul_(0)
    torch.mul(bits, peaks.ne(peaks), out=poison)


def clear_padding_(plan: Layout, panel: Panel, storage: Tensor) -> None:
    """Zeros in every column of a new panel that is no base weight."""
    column = plan.left - panel.shift
    storage[:, :column].zero_()
    storage[:, column + plan.in_features :].zero_()


def key(plan: Layout, like: Tensor) -> Tensor:
    """The layout as a tensor without elements: its shape is (0, in_features, out_features and two ranks of each).

    So a list of tensors carries the layout through a registered op without anything to read.
    """
    sizes = [n for output, pair in zip(plan.outputs, plan.ranks, strict=True) for n in (output, *pair)]
    shape = (0, plan.in_features, *sizes)
    # Contiguous strides would be products of these sizes, and those of a real model overflow.
    return like.new_empty_strided(shape, (0,) * len(shape))


def layout_of(key: Tensor) -> Layout:
    """The layout that :func:`key` wrote down."""
    _, in_features, *sizes = key.shape
    return layout(in_features, tuple(sizes[::3]), tuple(zip(sizes[1::3], sizes[2::3], strict=True)))


def fitting_layout(
    packed: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], A_r: Sequence[Tensor], A_e: Sequence[Tensor]
) -> Layout | None:
    """The layout of ``packed``, or None where it holds nothing that fits this call's dtypes and sizes."""
    if not packed or packed[1].dtype != x.dtype or A_r[0].dtype != x.dtype:
        return None
    plan = layout_of(packed[0])
    if plan.in_features != weights[0].shape[1] or plan.outputs != tuple(weight.shape[0] for weight in weights):
        return None
    for rank, kept in zip(plan.ranks, zip(A_r, A_e, strict=True), strict=True):
        if any(A.shape[0] not in (0, size) for A, size in zip(kept, rank, strict=True)):
            return None
    return plan


def multiply_(plan: Layout, panels: Sequence[Tensor], aug: Tensor, start: int, biases, present: int, y: Tensor) -> None:
    """Every product of the group, each over the columns that ``present`` needs.

    Args:
        plan, panels: the packed weights.
        aug: columns ``start ...`` of ``x_aug``: ``[tokens, *]``.
        start: its first column.
        biases: of each projection; None where absent.
        present: adapters that can occur.
        y: ``[tokens, sum of out_features]``; written.
    """
    at = 0
    for panel, storage in zip(plan.panels, panels, strict=True):
        first, last = plan.columns(panel, present)
        a = aug[:, first - start : last - start]
        b = storage[:, first - panel.shift : last - panel.shift].t()
        out = y[:, at : at + panel.rows]
        bias = _joined([biases[i] for i in panel.projections], plan, panel)
        if bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
        at += panel.rows


def _joined(biases: Sequence[Tensor | None], plan: Layout, panel: Panel) -> Tensor | None:
    given = next((bias for bias in biases if bias is not None), None)
    if given is None or len(biases) == 1:
        return given
    sizes = [plan.outputs[i] for i in panel.projections]
    parts = [given.new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes, strict=True)]
    return torch.cat(parts)
