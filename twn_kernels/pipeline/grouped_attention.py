"""One-token attention that reads each key-value head once for the whole group of query heads that shares it.

With a mask, transformers' ``sdpa`` first repeats keys and values for every query head, which at one token a row moves
the cache several times over. With one token the query heads of a group can stand where several tokens of one head
would, so that torch's own attention serves all of them from the cache as it lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouped_attention", "grouped_sdpa"]

_NAME = "twn_grouped_sdpa"


def grouped_sdpa(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout=0.0, scaling=None, **_
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer; not read.
        query: ``[rows, heads, 1, width]``.
        key, value: ``[rows, key-value heads, columns, width]``.
        attention_mask: ``[rows, 1, 1, columns]``, additive or boolean.
        dropout: probability; 0 outside training.
        scaling: of the scores; None: one over the root of the width.

    Returns:
        ``[rows, 1, heads, width of value]`` and None for the weights.
    """
    rows, heads, _, width = query.shape
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


@contextlib.contextmanager
def grouped_attention(config) -> Iterator[None]:
    """Run layers of this configuration with :func:`grouped_sdpa` where they would run ``sdpa``."""
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, grouped_sdpa)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
