"""``DecodeGraph``: one-token steps of a patched model on buffers of fixed address, replayed from CUDA graphs on a GPU.

A step reads token ids, positions, masks, routes and the cache from buffers that stay where they are, and writes hidden
states and logits into others. On a GPU each bucket of rows and columns is captured once and then replayed; elsewhere,
and where capture is off, the very same step runs eagerly. Rows that the batch does not fill are spare: they follow the
base alone and nobody reads them. Owns buffers, buckets and capture; who thinks, and when, is ``thinking``'s business.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import twn_kernels.patching as patching
from twn_kernels.errors import ImplUnavailable, OptionError, ShapeError, TWNWarning
from twn_kernels.ops import RoutePlan
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_choice import choose, why_not_captured
from twn_kernels.pipeline.fingerprint import fingerprint
from twn_kernels.pipeline.fixed_masks import FixedMasks
from twn_kernels.pipeline.static_cache import StaticKV, as_index
from twn_kernels.settings import REASONING, ROUTE_BITS

__all__ = ["DecodeGraph", "column_bucket", "row_bucket"]

_BLOCK = 256  # columns: the finest step of a bucket
_HEADROOM = 512  # columns that a new allocation leaves beyond the prompt, where a thought may be that long
_KEPT_GRAPHS = 64  # of other shapes; the oldest goes first


def row_bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def column_bucket(columns: int, block: int = _BLOCK) -> int:
    """Columns that a step reads: a multiple of ``block``, and beyond four blocks at most a quarter more than needed."""
    step = max(block, (1 << max(columns - 1, 0).bit_length()) // 8)
    return -(-columns // step) * step


class DecodeGraph:
    """One-token steps of a patched model.

    Args:
        backbone: of the patched model.
        capture: None captures on a GPU and runs eagerly elsewhere; False always runs eagerly, on the same buffers;
            True raises where nothing can be captured.
        block: finest step of a column bucket.

    Attributes:
        capture: whether steps are captured; turned off where capture was not demanded and failed.
        failure: why a capture failed, or None.
        hidden: ``[rows, hidden]`` of the last step's bucket; its first rows are the batch's until rows end.

    Raises:
        ImplUnavailable: the model cannot decode on fixed buffers, or ``capture=True`` and it cannot be captured.

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
        mode = "cuda_graph" if capture or (capture is None and backbone.device.type == "cuda") else "static"
        if capture is None and mode == "cuda_graph":
            choose(backbone, "static")
            mode = "static" if why_not_captured(backbone) else mode
        else:
            choose(backbone, mode)
        self.backbone, self.capture, self.block = backbone, mode == "cuda_graph", block
        self._demanded = bool(capture)
        self.failure: str | None = why_not_captured(backbone) if capture is None and not self.capture else None
        self._masks = FixedMasks(backbone)
        self.release()

    def release(self) -> None:
        """Free buffers and graphs; :meth:`load` makes new ones."""
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._plans: dict[int, RoutePlan] = {}
        self._kv: StaticKV | None = None
        self._pool = self._fingerprint = None
        self._slots: list[int] = []
        self._routes: list[int] = []
        self._rows = self._length = 0
        self.hidden = self._logits = self._index = None

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Rows and columns of the graphs held now."""
        return list(self._graphs)

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
    ) -> None:
        """Take over a batch; what was loaded before is gone. The cache is copied and may be dropped.

        Args:
            cache: a transformers cache that holds equally many tokens of every row, padding included.
            mask: ``[rows, cached]``, 1 on tokens and 0 on padding.
            next_position: int64 ``[rows]``: the position of each row's next token.
            room: steps that will follow, where known; buffers grow when they are full.
            routes: of the steps: a name for all rows, or one for each.

        Raises:
            ShapeError: the arguments do not fit one another.
            PatchError, OptionError: a route names no adapter.
        """
        _check_batch(cache, mask, next_position)
        rows, length = mask.shape
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
        self.set_routes(routes)

    def set_routes(self, routes: str | Sequence[str | None] | None) -> None:
        """Routes of the coming steps, refreshed in place: captured graphs follow them.

        Args:
            routes: ``"reasoning"``, ``"embedding"``, ``"both"`` or None for every row, or one of these for each row.

        Raises:
            OptionError: a name that is no route.
            ShapeError: not one for each row.
        """
        names = [routes] * len(self._slots) if routes is None or isinstance(routes, str) else list(routes)
        if len(names) != len(self._slots):
            raise ShapeError(f"routes must name one for each of {len(self._slots)} rows, got {len(names)}.")
        self._routes = [_bits(name) for name in names]
        self._refresh()

    def _refresh(self) -> None:
        bits = [0] * self._rows
        for slot, route in zip(self._slots, self._routes, strict=True):
            bits[slot] = route
        routes = torch.tensor(bits, dtype=torch.int8)
        if self._rows not in self._plans:
            self._plans[self._rows] = RoutePlan.from_routes(routes.to(self._kv.column.device))
        self._plans[self._rows].refresh_(routes)

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
        count = len(self._slots)
        if tuple(ids.shape) != (count,) or not count:
            raise ShapeError(f"ids must be [{count}], one for each row that is loaded, got {list(ids.shape)}.")
        if self._length == self._kv.capacity:
            self._forget_graphs()
            self._kv.grow(column_bucket(self._length + self._length // 2 + 1, self.block), self._length)
            self._valid = _widened(self._valid, self._kv.capacity)
        index = self._slot_index()
        if index is None:
            self._ids[:count].copy_(ids)
        else:
            self._ids.index_copy_(0, index, ids)
        self._run(self._rows, min(column_bucket(self._length + 1, self.block), self._kv.capacity))
        self._length += 1
        return self._logits[:count] if index is None else self._logits.index_select(0, index)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some rows alone, by place in the present batch; a batch that halves moves to a smaller bucket."""
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
            for buffer in (self._next_position, self._valid):
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
        now = fingerprint(self.backbone) if self.capture else None
        if now != self._fingerprint:
            self._forget_graphs()
            self._fingerprint = now
        if self._kv is not None and self._kv.fits(cache, rows, capacity):
            return
        old, self._kv = self._kv, None
        self._forget_graphs()
        rows, capacity = max(rows, getattr(old, "rows", 0)), max(capacity, getattr(old, "capacity", 0))
        del old
        self._kv = StaticKV(cache, rows, capacity)
        device, config = self._kv.column.device, self.backbone.config
        with torch.inference_mode(False):
            self._ids = torch.zeros(rows, dtype=torch.long, device=device)
            self._next_position = torch.zeros(rows, dtype=torch.long, device=device)
            self._valid = torch.ones(rows, capacity, dtype=torch.bool, device=device)
            self.hidden = torch.zeros(rows, config.hidden_size, dtype=self.backbone.dtype, device=device)
            vocabulary = getattr(self.backbone.head, "out_features", config.vocab_size)
            self._logits = torch.zeros(rows, vocabulary, device=device)

    def _forget_graphs(self) -> None:
        if self._graphs:
            torch.cuda.synchronize(self.backbone.device)  # a replay may be running still
        self._graphs.clear()
        self._pool = None

    def _run(self, rows: int, columns: int) -> None:
        if not self.capture:
            self._compute(rows, columns)
            return
        graph = self._graphs.get((rows, columns))
        if graph is None:
            graph = self._try_to_capture(rows, columns)
        if graph is None:
            self._compute(rows, columns)
        else:
            graph.replay()

    def _compute(self, rows: int, columns: int) -> None:
        """The step itself: buffers in, buffers out. Everything here is what a graph holds."""
        backbone, kv = self.backbone, self._kv
        mask = self._masks(self._valid[:rows, :columns], kv.column, self.hidden.dtype)
        first = self._next_position[:rows]
        with patching.route(backbone.model, self._plans[rows]):
            vectors = backbone.embeddings(self._ids[:rows, None])
            hidden = backbone.continue_(vectors, mask, first, kv.view(rows, columns))[:, -1]
        self.hidden[:rows].copy_(hidden)
        self._logits[:rows].copy_(backbone.logits(hidden))
        first.add_(1)
        kv.column.add_(1)

    def _try_to_capture(self, rows: int, columns: int):
        """The captured step; None, with the reason noted, where capture failed and was not demanded."""
        try:
            graph = self._capture(rows, columns)
        except (RuntimeError, ValueError) as error:  # what a forward may raise when it touches the host
            reason = f"capturing a step of {rows} rows failed: {(str(error).strip().splitlines() or ['no message'])[0]}"
            if self._demanded:
                raise ImplUnavailable(f'{reason}. Use capture=None, or decode="static" in the embedder.') from error
            self.capture, self.failure = False, reason
            self._forget_graphs()
            warnings.warn(f"{reason}. Steps run eagerly from here on.", TWNWarning, stacklevel=4)
            return None
        if len(self._graphs) >= _KEPT_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[rows, columns] = graph
        return graph

    def _capture(self, rows: int, columns: int):
        device = self._kv.column.device
        with torch.cuda.device(device):
            self._warm_up(rows, columns)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads (data loading) may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._compute(rows, columns)
        return graph

    def _warm_up(self, rows: int, columns: int) -> None:
        """Run the step twice beside the main stream, so that nothing is compiled, tuned or allocated in a capture."""
        counters = (self._kv.column, self._next_position)
        before = [counter.clone() for counter in counters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(rows, columns)
                for counter, value in zip(counters, before, strict=True):
                    counter.copy_(value)
        torch.cuda.current_stream().wait_stream(side)


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


def _bits(name: str | None) -> int:
    if name not in ROUTE_BITS:
        raise OptionError(f"route must be reasoning, embedding, both or None, got {name!r}.")
    return ROUTE_BITS[name]


def _widened(valid: Tensor, columns: int) -> Tensor:
    with torch.inference_mode(False):
        wide = torch.ones(valid.shape[0], columns, dtype=torch.bool, device=valid.device)
        wide[:, : valid.shape[1]].copy_(valid)
    return wide
