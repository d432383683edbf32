"""``route``: which adapters a patched model's tokens use, for as long as a ``with`` block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.errors import DtypeError, OptionError, PatchError, ShapeError, did_you_mean, quoted
from twn_kernels.modules.routing import PlanSpec, RouteSpec, RowSpec, TokenSpec, UniformSpec
from twn_kernels.ops import RoutePlan
from twn_kernels.patching.record import PatchRecord, require_record
from twn_kernels.settings import BOTH

__all__ = ["route"]


@contextlib.contextmanager
def route(model: nn.Module, spec: str | Sequence[str | None] | Tensor | RoutePlan | None) -> Iterator[nn.Module]:
    """Run the model's forwards under ``spec``; scopes nest, and the route before comes back, also after an error.

    Args:
        model: a patched model, or a wrapper of one (``torch.compile``, ``DistributedDataParallel``).
        spec: one of

            - ``"reasoning"``, ``"embedding"``, ``"both"`` or None (base only), for every token;
            - a list of those, one for each row of the batch, at any sequence length: prefill and each decode step.
              Under beams or several returned sequences, the copies of a row follow it;
            - an int8 tensor ``[batch, seq]`` of 0 base only, 1 reasoning, 2 embedding, 3 both. A forward must have
              exactly that shape; later steps of one token a row continue each row's last route;
            - a :class:`~twn_kernels.ops.RoutePlan` over the forward's tokens, whose routes may be refreshed in place.

    Yields:
        ``model``.

    Raises:
        PatchError: the model is not patched, or an adapter is not loaded.
        ShapeError, DtypeError, OptionError: the spec is malformed. A spec that does not fit a forward raises there.

    Example:
        >>> import twn_kernels
        >>> from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model
        >>> model = twn_kernels.patch(tiny_model("llama"), rank=4)
        >>> with twn_kernels.route(model, ["reasoning", None]):
        ...     logits = model(**tiny_inputs("llama", batch=2)).logits
    """
    record = require_record(model, "route")
    parsed = parse_spec(record, spec)
    before = record.state.enter(parsed)
    try:
        yield model
    finally:
        record.state.leave(before)


def parse_spec(record: PatchRecord, spec: Any) -> RouteSpec:
    """The spec as layers follow it."""
    if spec is None or isinstance(spec, str):
        return UniformSpec(_bits(record, spec))
    if isinstance(spec, RoutePlan):
        return PlanSpec(spec)
    if isinstance(spec, Tensor):
        return _token_spec(spec)
    if isinstance(spec, Sequence):
        if not spec:
            raise ShapeError("spec names no rows: give one route for each row of the batch, or one for all of them.")
        return RowSpec([_bits(record, name) for name in spec], _device(record))
    raise OptionError(
        "spec must be an adapter's name, None, one of these for each row, an int8 [batch, seq] tensor or a RoutePlan, "
        f"got {type(spec).__name__}."
    )


def _bits(record: PatchRecord, name: Any) -> int:
    if name is None:
        return 0
    if name == "both":
        return BOTH
    if isinstance(name, str) and name in record.names:
        return record.names[name]
    loaded = sorted(record.names)
    raise PatchError(
        f'adapter "{name}" is not loaded; loaded: {quoted(loaded)}.{did_you_mean(name, [*loaded, "both"])}'
    )


def _token_spec(routes: Tensor) -> TokenSpec:
    if routes.dtype != torch.int8:
        raise DtypeError(f"a tensor of routes must be int8 (one byte a token), got {routes.dtype}.")
    if routes.dim() != 2:
        raise ShapeError(
            f"a tensor of routes must be [batch, seq], got {list(routes.shape)}. "
            "For a flat one use RoutePlan.from_routes."
        )
    # Values on a GPU are not read: that would synchronise.
    if routes.device.type == "cpu" and routes.numel():
        low, high = int(routes.min()), int(routes.max())
        if low < 0 or high > BOTH:
            got = low if low < 0 else high
            raise OptionError(f"routes must lie in 0 … 3 (0 base only, 1 reasoning, 2 embedding, 3 both), got {got}.")
    return TokenSpec(routes)


def _device(record: PatchRecord) -> torch.device:
    layer = next(iter(record.layers.values()))
    return layer.weight.device
