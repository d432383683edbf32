"""The options of one ``encode`` call, checked before anything runs, and what it tells about each input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from twn_kernels.checkpoint import TWNConfig
from twn_kernels.errors import OptionError, did_you_mean, quoted

__all__ = ["EncodeDetails", "EncodeOptions"]

MODES = ("never", "auto", "always")


@dataclass(frozen=True)
class EncodeDetails:
    """What happened to one input.

    Attributes:
        gate_score: in [0, 1]; None where the checkpoint has no gate.
        thought: whether the vector is the thoughtful one.
        text: the thought, without what opens and closes it; None where the input was not sent to think.
        tokens: tokens that were decoded for it.
        fallback: why a thought was begun and yet the plain embedding returned; None otherwise.
        decode: how the thought was decoded: ``"cuda_graph"``, ``"static"`` or ``"dynamic"`` (why:
            ``TWNEmbedder.decode_choice``); None where the input was not sent to think.
    """

    gate_score: float | None
    thought: bool
    text: str | None = None
    tokens: int = 0
    fallback: str | None = None
    decode: str | None = None


@dataclass(frozen=True)
class EncodeOptions:
    """Options as the caller gave them.

    Raises:
        OptionError: one is out of range or not a name; the message says which.
    """

    batch_size: int = 32
    truncate_dim: int | None = None
    think: str = "auto"
    think_threshold: float | None = None
    max_think_tokens: int | None = None

    def __post_init__(self) -> None:
        _whole("batch_size", self.batch_size)
        if self.truncate_dim is not None:
            _whole("truncate_dim", self.truncate_dim)
        if self.max_think_tokens is not None:
            _whole("max_think_tokens", self.max_think_tokens)
        if self.think not in MODES:
            raise OptionError(
                f"think must be one of {quoted(MODES)}, got {self.think!r}.{did_you_mean(self.think, MODES)}"
            )
        threshold = self.think_threshold
        if threshold is not None and not (_is_number(threshold) and 0.0 <= threshold <= 1.0):
            raise OptionError(f"think_threshold must be a number in [0, 1], got {threshold!r}.")

    def check_dim(self, hidden_size: int) -> None:
        """Raise OptionError where ``truncate_dim`` is wider than the vectors."""
        if self.truncate_dim is not None and self.truncate_dim > hidden_size:
            raise OptionError(
                f"truncate_dim must be at most the model's hidden size, {hidden_size}, got {self.truncate_dim}."
            )

    def applied_to(self, config: TWNConfig) -> TWNConfig:
        """The checkpoint's configuration with this call's overrides."""
        changes: dict[str, Any] = {}
        if self.think_threshold is not None:
            changes["think_threshold"] = float(self.think_threshold)
        if self.max_think_tokens is not None:
            changes["max_think_tokens"] = self.max_think_tokens
        return replace(config, **changes) if changes else config

    def decide(self, threshold: float) -> Callable[[list[float] | None, int], list[int]] | None:
        """Who thinks, given gate scores; None where nobody ever does."""
        if self.think == "never":
            return None
        if self.think == "always":
            return lambda scores, count: list(range(count))
        return lambda scores, count: [place for place, score in enumerate(scores) if score >= threshold]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}.")
