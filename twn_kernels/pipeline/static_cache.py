"""A key-value cache at fixed addresses: room for so many rows and tokens, written in place, one token a row at a time.

All rows hold equally many tokens (prompts are padded on the left), so one number on the device says where the next one
goes. Buckets of rows and tokens are views of one allocation: a smaller batch or a longer thought moves to another view
and copies nothing. Everything past the last token is zero, so that a masked place adds exactly nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["StaticKV", "as_index"]


class StaticKV:
    """Keys and values of every layer for one batch.

    Args:
        like: a filled cache whose layers it takes number, heads, widths, dtypes and devices from.
        rows: of the batch.
        capacity: tokens a row.

    Attributes:
        rows, capacity: as given.
        column: int64 ``[1]`` on the device: the place of the next token.
    """

    def __init__(self, like, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._geometry = _geometry(like)
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.column = torch.zeros(1, dtype=torch.long, device=like.layers[0].keys.device)
            self._keys = [_zeros_like(layer.keys, rows, capacity) for layer in like.layers]
            self._values = [_zeros_like(layer.values, rows, capacity) for layer in like.layers]

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys, hence of the queries that meet them."""
        return self._keys[0].dtype

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._keys, *self._values))

    def fits(self, like, rows: int, capacity: int) -> bool:
        """Whether a cache such as ``like`` finds room here."""
        return self._geometry == _geometry(like) and self.rows >= rows and self.capacity >= capacity

    def fill(self, cache) -> None:
        """Hold what ``cache`` holds, from row 0 on, and zeros elsewhere."""
        for own, other in self._pairs(cache):
            own.zero_()
            own[: other.shape[0], :, : other.shape[2]].copy_(other)
        self.column.fill_(cache.get_seq_length())

    def _pairs(self, cache):
        for keys, values, layer in zip(self._keys, self._values, cache.layers, strict=True):
            yield keys, layer.keys
            yield values, layer.values

    def take(self, rows: Tensor, length: int, into) -> None:
        """Append the first ``length`` tokens of some rows to the empty cache ``into``; copies."""
        for index, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            into.update(*(tensor[:, :, :length].index_select(0, rows) for tensor in (keys, values)), index)

    def clear(self, first: int, last: int) -> None:
        """Forget the tokens from ``first`` to before ``last``: where one was NaN, a mask alone would not."""
        for tensor in (*self._keys, *self._values):
            tensor[:, :, first:last].zero_()

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of the rows ``source`` to the rows ``target``; the two share no row."""
        for tensor in (*self._keys, *self._values):
            part = tensor[:, :, :length]
            part.index_copy_(0, target, part.index_select(0, source))

    def grow(self, capacity: int, length: int) -> None:
        """Make room for ``capacity`` tokens, one layer after another; addresses change."""
        with torch.inference_mode(False):
            for tensors in (self._keys, self._values):
                for index, old in enumerate(tensors):
                    tensors[index] = _zeros_like(old, self.rows, capacity)
                    tensors[index][:, :, :length].copy_(old[:, :, :length])
        self.capacity = capacity

    def view(self, rows: int, columns: int):
        """The leading ``rows`` and ``columns`` as a cache of transformers; writing through it writes here."""
        from transformers.cache_utils import Cache

        return Cache(
            layers=[
                _LayerView(keys[:rows, :, :columns], values[:rows, :, :columns], self.column)
                for keys, values in zip(self._keys, self._values, strict=True)
            ]
        )


class _LayerView:
    """One layer of a view, with the methods that transformers' ``Cache`` calls."""

    is_compileable = True
    is_sliding = False
    is_croppable = False
    is_initialized = True
    supports_early_init = True

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        self.keys, self.values, self.column = keys, values, column

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write one token a row at ``column``; all columns come back, those past it still zero."""
        # Under autocast values may be narrower than keys; a growing cache widens them by concatenation.
        self.keys.index_copy_(2, self.column, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, values.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> Tensor:
        return self.column[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _zeros_like(tensor: Tensor, rows: int, capacity: int) -> Tensor:
    return tensor.new_zeros(rows, tensor.shape[1], capacity, tensor.shape[3])


def _geometry(cache) -> list[tuple]:
    """Of each layer: heads, widths, dtype and device."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [(tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device) for tensor in tensors]


def as_index(places: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[places]`` on the device."""
    return torch.tensor(list(places), dtype=torch.long, device=device)
