"""Which adapters each token uses: built once a forward on the device, shared by every layer.

A kernel reads the routes of its own tile (one byte a token) and derives its k-range from them, so the plan holds
nothing else on the device. What the host knows without asking the device (which adapters can occur at all, whether
every token has the same route) travels beside the tensor and lets an implementation leave work out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twn_kernels.errors import DtypeError, OptionError, PatchError, ShapeError, did_you_mean, quoted
from twn_kernels.settings import BOTH, ROUTE_BITS


class RoutePlan(NamedTuple):
    """Routes of a batch of tokens.

    Attributes:
        routes: int8 ``[tokens]``: 0 base only, 1 reasoning, 2 embedding, 3 both.
        present: union of the routes that can occur, known on the host; 3 where only the device knows.
        is_uniform: True where the host knows that every token's route equals ``present``.
    """

    routes: Tensor
    present: int = BOTH
    is_uniform: bool = False

    @property
    def tokens(self) -> int:
        return self.routes.shape[0]

    @classmethod
    def from_routes(cls, routes: Tensor, *, adapters: Sequence[str] | None = None) -> RoutePlan:
        """A plan over a tensor of routes, which it copies; its values may change later with :meth:`refresh_`.

        Args:
            routes: int8 ``[tokens]``, values 0 … 3. Values on a GPU are not read (that would synchronise): of a value
                outside the range only the two lowest bits count there.
            adapters: those that routes may ever select, now or when they are refreshed; work for the others is left
                out. None: both. A route on a GPU that selects another one takes the base for it.

        Raises:
            DtypeError, ShapeError, OptionError: not int8, not one-dimensional, or (on a CPU) a value out of range.
        """
        present = BOTH if adapters is None else 0
        for adapter in adapters or ():
            present |= route_bits(adapter)
        _check_routes(routes, present)
        with _for_every_mode():
            return cls(routes.contiguous().clone(), present, False)

    @classmethod
    def from_segments(
        cls,
        lengths: Sequence[int],
        adapters: Sequence[str | None],
        *,
        device: torch.device | str | None = None,
    ) -> RoutePlan:
        """A plan from consecutive segments: ``lengths[i]`` tokens under ``adapters[i]``.

        Args:
            lengths: tokens of each segment, 0 or more.
            adapters: ``"reasoning"``, ``"embedding"``, ``"both"`` or None, one for each segment.
            device: where the plan lives; nothing is read back from it.
        """
        if len(lengths) != len(adapters):
            raise ShapeError(
                f"lengths and adapters must name the same segments, got {len(lengths)} lengths and "
                f"{len(adapters)} adapters."
            )
        bits = [route_bits(adapter) for adapter in adapters]
        for index, length in enumerate(lengths):
            if isinstance(length, float) or length < 0:
                raise ShapeError(f"lengths[{index}] must be a whole number of 0 or more tokens, got {length}.")
        with _for_every_mode():
            routes = torch.empty(sum(lengths), dtype=torch.int8, device=device)
            start = 0
            for length, bit in zip(lengths, bits, strict=True):
                routes[start : start + length].fill_(bit)
                start += length
        used = {bit for length, bit in zip(lengths, bits, strict=True) if length > 0}
        present = 0
        for bit in used:
            present |= bit
        return cls(routes, present, len(used) <= 1)

    @classmethod
    def from_rows(
        cls,
        adapters: Sequence[str | None],
        tokens_per_row: int,
        *,
        device: torch.device | str | None = None,
    ) -> RoutePlan:
        """A plan from one name a row: row ``i`` is ``tokens_per_row`` consecutive tokens under ``adapters[i]``."""
        if tokens_per_row < 0:
            raise ShapeError(f"tokens_per_row must be 0 or more, got {tokens_per_row}.")
        return cls.from_segments([tokens_per_row] * len(adapters), adapters, device=device)

    @classmethod
    def uniform(cls, adapter: str | None, tokens: int, *, device: torch.device | str | None = None) -> RoutePlan:
        """A plan that gives every one of ``tokens`` tokens the same route."""
        bits = route_bits(adapter)
        with _for_every_mode():
            return cls(torch.full((tokens,), bits, dtype=torch.int8, device=device), bits, True)

    def refresh_(self, routes: Tensor) -> RoutePlan:
        """Overwrite the routes in place: same address, so a captured CUDA graph replays with the new ones.

        Args:
            routes: int8 ``[tokens]`` on any device.

        Raises:
            PatchError: the plan says that every token has one route, which kernels have relied on.
            OptionError: on a CPU: a route selects an adapter that the plan was built without.
        """
        if self.is_uniform:
            raise PatchError(
                "refresh_ needs a plan built with RoutePlan.from_routes: this one was built from names, and kernels "
                f"have left out what its routes ({self.present}) do not need. Build it from an int8 tensor."
            )
        _check_routes(routes, self.present)
        if routes.shape != self.routes.shape:
            raise ShapeError(f"routes must keep the plan's {self.tokens} tokens, got {routes.shape[0]}.")
        self.routes.copy_(routes)
        return self


def route_bits(adapter: str | None) -> int:
    """The bitmask of a route's name.

    Raises:
        OptionError: the name is none of ``"reasoning"``, ``"embedding"``, ``"both"``, None.
    """
    if adapter in ROUTE_BITS:
        return ROUTE_BITS[adapter]
    names = [name for name in ROUTE_BITS if name]
    raise OptionError(f"route must be {quoted(names)} or None, got {adapter!r}.{did_you_mean(adapter, names)}")


def _for_every_mode():
    """A plan made in inference mode must serve a later training step, so its tensor is made outside of it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _check_routes(routes: Tensor, present: int) -> None:
    if not isinstance(routes, Tensor) or routes.dtype != torch.int8:
        got = routes.dtype if isinstance(routes, Tensor) else type(routes).__name__
        raise DtypeError(f"routes must be an int8 tensor (one byte a token), got {got}.")
    if routes.dim() != 1:
        raise ShapeError(f"routes must be [tokens], got {list(routes.shape)}. Flatten a [batch, seq] tensor first.")
    if routes.device.type == "cpu" and not torch.compiler.is_compiling() and routes.numel():
        low, high = int(routes.min()), int(routes.max())
        if low < 0 or high > BOTH:
            raise OptionError(
                f"routes must lie in 0 … 3 (0 base only, 1 reasoning, 2 embedding, 3 both), "
                f"got {low if low < 0 else high}."
            )
        if present != BOTH and bool((routes & ~present).any()):
            raise OptionError(
                f"routes select adapters that the plan was built without: it has {route_name(present)}. "
                "Build it with RoutePlan.from_routes(routes, adapters=...) that names them."
            )


def route_name(bits: int) -> str:
    """A route's bitmask in words."""
    return {bit: name or "base only" for name, bit in ROUTE_BITS.items()}[bits]
