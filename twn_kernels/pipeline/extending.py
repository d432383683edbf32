"""Append token ids to the rows of an encoded batch, each its own number, keeping the left padding and the media."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["extend_rows"]


def extend_rows(tensors: dict[str, Tensor], suffixes: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    """The batch with ``suffixes[i]`` after row ``i``.

    Args:
        tensors: ``input_ids``, ``attention_mask`` and perhaps ``mm_token_type_ids`` ``[batch, tokens]``, left-padded;
            anything else (media) is passed on.
        suffixes: text token ids, one list a row.
        pad_id: written into the padding.

    Returns:
        new tensors, left-padded to the longest row.
    """
    mask = tensors["attention_mask"].bool()
    fills = {"input_ids": pad_id, "attention_mask": 0, "mm_token_type_ids": 0}
    rows = {
        name: [row[keep] for row, keep in zip(tensors[name], mask, strict=True)] for name in fills if name in tensors
    }
    longest = max(len(row) + len(suffix) for row, suffix in zip(rows["input_ids"], suffixes, strict=True))
    out = dict(tensors)
    for name, pieces in rows.items():
        new = tensors[name].new_full((len(suffixes), longest), fills[name])
        for place, (row, suffix) in enumerate(zip(pieces, suffixes, strict=True)):
            added = suffix if name == "input_ids" else [1 if name == "attention_mask" else 0] * len(suffix)
            whole = torch.cat([row, row.new_tensor(added)])
            new[place, longest - len(whole) :] = whole
        out[name] = new
    return out
