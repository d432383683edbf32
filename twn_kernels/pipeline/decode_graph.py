"""``DecodeGraph``: one-token steps of a patched model on buffers of fixed address, replayed from CUDA graphs on a GPU.

A step reads token ids, positions, masks, routes and the cache from buffers that stay where they are, and writes hidden
states and logits into others. On a GPU each bucket of rows and columns is captured once and then replayed; elsewhere,
and where capture is off, the very same step runs eagerly. Rows that the batch does not fill are spare: they follow the
base alone and nobody reads them. Owns buffers, buckets and capture; who thinks, and when, is ``thinking``'s business.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import twn_kernels.patching as patching
from twn_kernels.errors import OptionError, ShapeError
from twn_kernels.modules.packing import steady_shadows
from twn_kernels.ops import RoutePlan
from twn_kernels.ops.plan import route_bits
from twn_kernels.patching.record import find_record
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.captured_steps import CapturedSteps
from twn_kernels.pipeline.decode_choice import choose, why_not_captured
from twn_kernels.pipeline.fingerprint import fingerprint
from twn_kernels.pipeline.fixed_masks import FixedMasks
from twn_kernels.pipeline.grouped_attention import grouped_attention
from twn_kernels.pipeline.shadows import Shadows
from twn_kernels.pipeline.static_cache import StaticKV, as_index
from twn_kernels.settings import ADAPTERS, REASONING, ROUTE_BITS

__all__ = ["DecodeGraph", "column_bucket", "row_bucket"]

_BLOCK = 256  # columns: the finest step of a bucket
_HEADROOM = 512  # columns that a new allocation leaves beyond the prompt, where a thought may be that long


def row_bucket(rows: int) -> int:
    """Rows that a step runs for a batch of ``rows``: a power of two up to 32, then a multiple of 32."""
    return 1 << max(rows - 1, 0).bit_length() if rows <= 32 else -(-rows // 32) * 32


def column_bucket(columns: int, block: int = _BLOCK) -> int:
    """Columns that a step reads: a multiple of ``block``, and beyond four blocks at most a quarter more than needed."""
    step = max(block, (1 << max(columns - 1, 0).bit_length()) // 8)
    return -(-columns // step) * step


class DecodeGraph:
    """One-token steps of a patched model, or of a plain one, which has no routes.

    Args:
        backbone: of the model.
        capture: None captures on a GPU and runs eagerly elsewhere; False always runs eagerly, on the same buffers;
            True raises where nothing can be captured.
        block: finest step of a column bucket.

    Raises:
        ImplUnavailable: the model cannot decode on fixed buffers, or ``capture=True`` and it cannot be captured.

    Graph-safe: every step is the same launches on the same addresses. Synchronises: :meth:`step` only while it captures
    or grows, or after an adapter that is packed was edited; the other methods may.

    Example:
        >>> import torch, twn_kernels
        >>> from twn_kernels.pipeline.decode_graph import DecodeGraph
        >>> from twn_kernels.pipeline.backbone import Backbone
        >>> from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model
        >>> backbone = Backbone(twn_kernels.patch(tiny_model("llama"), rank=4))
        >>> prompt, cache = backbone.prompt(tiny_inputs("llama", batch=3)), backbone.new_cache()
        >>> with torch.no_grad():
        ...     hidden = backbone.read(prompt, None, cache)
        >>> graph = DecodeGraph(backbone)
        >>> graph.load(cache, prompt.mask, prompt.next_position, routes=["reasoning", None, "embedding"])
        >>> graph.step(torch.tensor([5, 6, 7])).shape
        torch.Size([3, 160])
    """

    def __init__(self, backbone: Backbone, *, capture: bool | None = None, block: int = _BLOCK) -> None:
        choose(backbone, "cuda_graph" if capture else "static")
        failure = why_not_captured(backbone) if capture is None else None
        active = capture or (capture is None and failure is None)
        self.backbone, self.block = backbone, block
        self._steps = CapturedSteps(active, demanded=bool(capture), failure=failure)
        self._masks = FixedMasks(backbone)
        self._patched = find_record(backbone.model) is not None
        self.release()

    def release(self) -> None:
        """Free buffers and graphs; :meth:`load` makes new ones."""
        self._steps.forget()
        self._plans: dict[tuple[int, int], RoutePlan] = {}
        self._kv: StaticKV | None = None
        self._fingerprint = None
        self._slots: list[int] = []
        self._routes: list[int] = []
        self._rows = self._length = self._present = 0
        self._hidden = self._logits = self._index = None

    @property
    def capture(self) -> bool:
        """Whether steps are captured; turned off where capture was not demanded and failed."""
        return self._steps.active

    @property
    def failure(self) -> str | None:
        """Why steps are not captured although nobody turned capture off, or None."""
        return self._steps.failure

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Rows and columns of the graphs held now."""
        return [(rows, columns) for rows, columns, _ in self._steps.keys]

    @property
    def capacity(self) -> int:
        """Tokens a row that the buffers hold without growing."""
        return 0 if self._kv is None else self._kv.capacity

    @property
    def length(self) -> int:
        """Tokens a row now, padding included."""
        return self._length

    @property
    def bytes(self) -> int:
        """Memory of the key-value buffers."""
        return 0 if self._kv is None else self._kv.bytes

    @torch.no_grad()
    def load(
        self,
        cache,
        mask: Tensor,
        next_position: Tensor,
        *,
        room: int = 0,
        routes: str | Sequence[str | None] | None = REASONING,
        adapters: Sequence[str] = (),
    ) -> None:
        """Take over a batch; what was loaded before is gone. The cache is copied and may be dropped.

        Args:
            cache: a transformers cache that holds equally many tokens of every row, padding included.
            mask: ``[rows, cached]``, 1 on tokens and 0 on padding.
            next_position: int64 ``[rows]``: the position of each row's next token.
            room: steps that will follow, where known; buffers grow when they are full.
            routes: of the steps: a name for all rows, or one for each.
            adapters: those that later :meth:`set_routes` will select beside those of ``routes``: one graph then serves
                them all, and every step prepares for all of them.

        Raises:
            ShapeError: the arguments do not fit one another.
            OptionError: a name that is no route.
            ImplUnavailable: capture was demanded and the model, as it is now, cannot be captured.
        """
        _check_batch(cache, mask, next_position)
        rows, length = mask.shape
        bits = _route_list(routes, rows)
        present = _union(route_bits(name) for name in adapters)
        if self.capture and (reason := why_not_captured(self.backbone)) is not None:
            self._steps.give_up(reason)
        self._allocate(cache, row_bucket(rows), column_bucket(length + min(max(room, 1), _HEADROOM), self.block))
        self._rows, self._length, self._slots = row_bucket(rows), length, list(range(rows))
        self._index = None
        self._kv.fill(cache)
        self._ids.zero_()
        self._next_position.zero_()
        self._next_position[:rows].copy_(next_position)
        # Spare rows see all columns: a row that sees none would be NaN.
        self._valid.fill_(True)
        self._valid[:rows, :length].copy_(mask)
        self._routes, self._present = bits, present | _union(bits)
        self._refresh()

    def set_routes(self, routes: str | Sequence[str | None] | None) -> None:
        """Routes of the coming steps, refreshed in place: captured graphs follow them.

        Args:
            routes: ``"reasoning"``, ``"embedding"``, ``"both"`` or None for every row, or one of these for each row.

        Raises:
            OptionError: a name that is no route.
            ShapeError: not one for each row.
        """
        self._require_rows()
        self._routes = _route_list(routes, len(self._slots))
        self._present |= _union(self._routes)
        self._refresh()

    def _require_rows(self) -> None:
        if not self._slots:
            raise ShapeError("no rows are loaded; call load(...) first.")

    def _refresh(self) -> None:
        bits = [0] * self._rows
        for slot, route in zip(self._slots, self._routes, strict=True):
            bits[slot] = route
        routes, key = torch.tensor(bits, dtype=torch.int8), (self._rows, self._present)
        if key not in self._plans:
            names = [name for name in ADAPTERS if self._present & ROUTE_BITS[name]]
            self._plans[key] = RoutePlan.from_routes(routes.to(self._kv.column.device), adapters=names)
        self._plans[key].refresh_(routes)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Append one token to each row.

        Args:
            ids: int64 ``[rows]``, in the order of the rows that are left.

        Returns:
            fp32 ``[rows, vocabulary]`` for the token after it; overwritten by the next step.

        Raises:
            ShapeError: not one id for each row.
        """
        self._require_rows()
        count = len(self._slots)
        if tuple(ids.shape) != (count,):
            raise ShapeError(f"ids must be [{count}], one for each row that is loaded, got {list(ids.shape)}.")
        if self._length == self._kv.capacity:
            self._steps.forget()
            self._kv.grow(column_bucket(self._length + self._length // 2 + 1, self.block), self._length)
            self._valid = _widened(self._valid, self._kv.capacity)
        index = self._slot_index()
        if index is None:
            self._ids[:count].copy_(ids)
        else:
            self._ids.index_copy_(0, index, ids)
        rows, columns = self._rows, min(column_bucket(self._length + 1, self.block), self._kv.capacity)
        counters = (self._kv.column, self._next_position)
        if self.capture and self._shadows.refresh_if_edited():
            self._steps.forget()
        with steady_shadows():
            self._steps.run((rows, columns, self._present), lambda: self._compute(rows, columns), counters)
        self._length += 1
        return self._logits[:count] if index is None else self._logits.index_select(0, index)

    @property
    def hidden(self) -> Tensor:
        """``[rows, hidden]`` of the last layer after the last step, in the order of the rows that are left.

        Overwritten by the next step and by :meth:`keep`.
        """
        index = self._slot_index()
        return self._hidden[: len(self._slots)] if index is None else self._hidden.index_select(0, index)

    def rewind(self, length: int) -> None:
        """Forget all tokens of every row past the first ``length``.

        Args:
            length: tokens a row to keep, padding included; at most :attr:`length`.

        Raises:
            OptionError: out of range.
        """
        self._require_rows()
        if not 0 <= length <= self._length:
            raise OptionError(f"length must be in [0, {self._length}] (what the rows hold), got {length}.")
        self._kv.clear(length, self._length)
        self._kv.column.sub_(self._length - length)
        self._next_position.sub_(self._length - length)
        self._length = length

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some rows alone; a batch that halves moves to a smaller bucket.

        Args:
            places: in the present batch, each at most once, in the order that the rows shall have.

        Raises:
            ShapeError: a place twice, or one that is not there.
        """
        if len(set(places)) < len(places) or not set(places) <= set(range(len(self._slots))):
            raise ShapeError(f"places must be distinct and in [0, {len(self._slots)}), got {list(places)}.")
        self._slots = [self._slots[place] for place in places]
        self._routes = [self._routes[place] for place in places]
        self._index = None
        if not self._slots:
            return
        if (rows := row_bucket(len(self._slots))) < self._rows:
            self._compact(rows)
        self._refresh()

    def _compact(self, rows: int) -> None:
        free = iter(sorted(set(range(rows)) - set(self._slots)))
        moves = {slot: next(free) for slot in self._slots if slot >= rows}
        if moves:
            source, target = (as_index(side, self._kv.column.device) for side in (moves.keys(), moves.values()))
            self._kv.move(source, target, self._length)
            for buffer in (self._next_position, self._valid, self._hidden):
                buffer.index_copy_(0, target, buffer.index_select(0, source))
        self._slots = [moves.get(slot, slot) for slot in self._slots]
        self._rows = rows

    def take(self, places: Sequence[int]) -> tuple[object, Tensor, Tensor]:
        """Cache, mask ``[rows, cached]`` and next positions of some rows, by place in the present batch; copies."""
        rows = as_index([self._slots[place] for place in places], self._kv.column.device)
        cache = self.backbone.new_cache()
        self._kv.take(rows, self._length, cache)
        return cache, self._valid[:, : self._length].index_select(0, rows).long(), self._next_position[rows]

    def _slot_index(self) -> Tensor | None:
        """Rows of the buffers that the batch fills; None where these are the first ones, in order."""
        if self._index is None and self._slots != list(range(len(self._slots))):
            self._index = as_index(self._slots, self._kv.column.device)
        return self._index

    def _allocate(self, cache, rows: int, capacity: int) -> None:
        self._shadows = Shadows(self.backbone)
        now = (fingerprint(self.backbone), self._shadows.refresh()) if self.capture else None
        if now != self._fingerprint:
            self._steps.forget()
            self._fingerprint = now
        if self._kv is not None and self._kv.fits(cache, rows, capacity):
            return
        old, self._kv = self._kv, None
        self._steps.forget()
        self._plans.clear()
        rows, capacity = max(rows, getattr(old, "rows", 0)), max(capacity, getattr(old, "capacity", 0))
        del old
        self._kv = StaticKV(cache, rows, capacity)
        device, config = self._kv.column.device, self.backbone.config
        with torch.inference_mode(False):
            self._ids = torch.zeros(rows, dtype=torch.long, device=device)
            self._next_position = torch.zeros(rows, dtype=torch.long, device=device)
            self._valid = torch.ones(rows, capacity, dtype=torch.bool, device=device)
            self._hidden = torch.zeros(rows, config.hidden_size, dtype=self.backbone.dtype, device=device)
            vocabulary = getattr(self.backbone.head, "out_features", config.vocab_size)
            self._logits = torch.zeros(rows, vocabulary, device=device)

    def _compute(self, rows: int, columns: int) -> None:
        """The step itself: buffers in, buffers out. Everything here is what a graph holds."""
        backbone, kv = self.backbone, self._kv
        mask = self._masks(self._valid[:rows, :columns], kv.column, kv.dtype)
        first = self._next_position[:rows]
        with self._routed(rows), grouped_attention(backbone.config):
            vectors = backbone.embeddings(self._ids[:rows, None])
            hidden = backbone.continue_(vectors, mask, first, kv.view(rows, columns))[:, -1]
        self._hidden[:rows].copy_(hidden)
        self._logits[:rows].copy_(backbone.logits(hidden))
        first.add_(1)
        kv.column.add_(1)

    def _routed(self, rows: int):
        if not self._patched:
            return contextlib.nullcontext()
        return patching.route(self.backbone.model, self._plans[rows, self._present])


def _route_list(routes: str | Sequence[str | None] | None, rows: int) -> list[int]:
    names = [routes] * rows if routes is None or isinstance(routes, str) else list(routes)
    if len(names) != rows:
        raise ShapeError(f"routes must name one for each of {rows} rows, got {len(names)}.")
    return [route_bits(name) for name in names]


def _union(bits: Iterable[int]) -> int:
    return functools.reduce(operator.or_, bits, 0)


def _check_batch(cache, mask: Tensor, next_position: Tensor) -> None:
    length = cache.get_seq_length()
    if mask.dim() != 2 or not len(mask) or mask.shape[1] != length or next_position.shape != mask.shape[:1]:
        raise ShapeError(
            f"mask must be [rows, {length}] (the cache's tokens) with one or more rows and next_position [rows], got "
            f"{list(mask.shape)} and {list(next_position.shape)}."
        )
    for index, layer in enumerate(cache.layers):
        if tuple(layer.keys.shape[::2]) != tuple(mask.shape):
            raise ShapeError(
                f"layer {index} of the cache holds {list(layer.keys.shape[::2])} rows and tokens, expected "
                f"{list(mask.shape)}. Fill a cache that keeps every token: transformers' DynamicCache()."
            )


def _widened(valid: Tensor, columns: int) -> Tensor:
    with torch.inference_mode(False):
        wide = torch.ones(valid.shape[0], columns, dtype=torch.bool, device=valid.device)
        wide[:, : valid.shape[1]].copy_(valid)
    return wide
