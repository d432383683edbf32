"""The masked, scaled shrink of one linear or of a whole group, and the isolation of adapters that are not finite.

Blocks stand in the order reasoning, embedding of the first projection, then of the second. ``ranks`` has one pair a
projection. Masks select and never multiply: 0 * NaN is NaN. Few small ops, since each costs a launch: all blocks come
from one product, and an adapter is scaled and masked in all projections at once where these are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twn_kernels.impl.blas.products import wide_mm

Ranks = Sequence[tuple[int, int]]
Masks = tuple[Tensor | None, Tensor | None]


def unused_rows(routes: Tensor | None, present: int) -> Masks:
    """bool ``[tokens]`` of each adapter: rows that do not use it; None where all do, or the adapter is not present."""
    return tuple(
        None if routes is None or not present & bit else torch.bitwise_and(routes, bit).eq(0) for bit in (1, 2)
    )


def masked(value: Tensor, unused: Tensor | None) -> Tensor:
    """``value [tokens, *]`` with zeros in the unused rows."""
    return value if unused is None else value.masked_fill(unused[:, None], 0)


def ranks_of(A_r: Sequence[Tensor], A_e: Sequence[Tensor], present: int = 3) -> list[tuple[int, int]]:
    """The ranks that ``present`` leaves."""
    return [(r.shape[0] if present & 1 else 0, e.shape[0] if present & 2 else 0) for r, e in zip(A_r, A_e, strict=True)]


def interleaved(first: Sequence, second: Sequence) -> list:
    """Reasoning's and embedding's lists as one, in the order of blocks."""
    return [value for pair in zip(first, second, strict=True) for value in pair]


def shrink(x: Tensor, A_r, A_e, scaling_r, scaling_e, unused: Masks, present: int) -> Tensor:
    """``scaling * mask * (x A^T)`` of the adapters in ``present``, rounded once.

    Returns:
        ``[tokens, sum of ranks_of(A_r, A_e, present)]`` in the adapters' dtype.
    """
    ranks = ranks_of(A_r, A_e, present)
    if not any(map(any, ranks)):
        return x.new_zeros((x.shape[0], 0), dtype=A_r[0].dtype)
    stack = [A for A, rank in zip(interleaved(A_r, A_e), interleaved(*zip(*ranks, strict=True)), strict=True) if rank]
    h = wide_mm(x, (stack[0] if len(stack) == 1 else torch.cat(stack)).t())
    scale_and_mask_(h, ranks, (scaling_r, scaling_e), unused)
    return h.to(A_r[0].dtype)


def scale_and_mask_(h: Tensor, ranks: Ranks, scaling: tuple[Sequence[float], Sequence[float]], unused: Masks) -> None:
    """Scale and mask ``h [tokens, sum of ranks]`` in place."""
    for adapter in (0, 1):
        together = len(set(scaling[adapter])) == 1
        views = adapter_columns(h, ranks, adapter, together)
        for view, factor in zip(views, scaling[adapter], strict=False):
            if view.numel() and factor != 1.0:
                view.mul_(factor)
        clear_unused_(h, ranks, adapter, unused[adapter])


def clear_unused_(s: Tensor, ranks: Ranks, adapter: int, unused: Tensor | None) -> None:
    """Zeros in the columns of one adapter where rows do not use it."""
    if unused is None:
        return
    for view in adapter_columns(s, ranks, adapter):
        if view.numel():
            view.masked_fill_(unused.view(-1, *[1] * (view.dim() - 1)), 0)


def adapter_columns(s: Tensor, ranks: Ranks, adapter: int, together: bool = True) -> list[Tensor]:
    """The columns of one adapter in every projection: one strided view where all ranks are alike, else one each."""
    if together and len(set(ranks)) == 1:
        rank_r, rank_e = ranks[0]
        whole = s.view(s.shape[0], len(ranks), rank_r + rank_e)
        return [whole[:, :, rank_r:] if adapter else whole[:, :, :rank_r]]
    views, start = [], 0
    for pair in ranks:
        first = start + (pair[0] if adapter else 0)
        views.append(s[:, first : first + pair[adapter]])
        start += sum(pair)
    return views


def widened(low: Tensor, ranks: Ranks, present: int) -> Tensor:
    """``low``, which holds the adapters in ``present`` alone, with columns of zeros for the others."""
    left = [(r if present & 1 else 0, e if present & 2 else 0) for r, e in ranks]
    if left == list(ranks):
        return low
    s = low.new_zeros((low.shape[0], sum(map(sum, ranks))))
    for adapter in (0, 1):
        if present & (1 << adapter):
            pairs = zip(
                adapter_columns(s, ranks, adapter, False), adapter_columns(low, left, adapter, False), strict=True
            )
            for target, source in pairs:
                target.copy_(source)
    return s


def narrowed(s: Tensor, ranks: Ranks, present: int) -> Tensor:
    """The columns of ``s`` that belong to the adapters in ``present``."""
    left = [(r if present & 1 else 0, e if present & 2 else 0) for r, e in ranks]
    if left == list(ranks):
        return s
    if present == 0:
        return s[:, :0]
    views = adapter_columns(s, ranks, 0 if present == 1 else 1, False)
    return views[0] if len(views) == 1 else torch.cat(views, dim=1)


def isolated(low: Tensor, matrices: Sequence[Tensor], ranks: Ranks, unused: Masks) -> tuple[Tensor, list[Tensor]]:
    """The same products ``low_i matrix_i^T``, with non-finite columns of a matrix kept from the rows not using them.

    A product over a shared matrix would turn 0 * NaN into NaN on rows that do not use the adapter. So non-finite
    entries are zeroed, and the rows that do use it get NaN through ``low``.

    Args:
        low: ``[tokens, sum of ranks]``, zero where a row does not use the adapter.
        matrices: one ``[*, rank_r + rank_e]`` a projection.
        ranks: of each projection.
        unused: as :func:`unused_rows`; where both are None, every row uses every adapter and nothing is done.
    """
    if (unused[0] is None and unused[1] is None) or not low.shape[1]:
        return low, list(matrices)
    poison = [m.new_zeros(m.shape[1]) if m.shape[0] == 0 else _peaks(m) for m in matrices]
    # 0 * finite is 0 and 0 * inf is NaN.
    low = low + (poison[0] if len(poison) == 1 else torch.cat(poison)).mul_(0)
    for adapter in (0, 1):
        clear_unused_(low, ranks, adapter, unused[adapter])
    return low, [torch.nan_to_num(m, 0.0, 0.0, 0.0) for m in matrices]


def _peaks(matrix: Tensor) -> Tensor:
    """The largest magnitude of each column; NaN or infinite where the column is not finite. One pass, one launch."""
    return torch.linalg.vector_norm(matrix, torch.inf, dim=0)
