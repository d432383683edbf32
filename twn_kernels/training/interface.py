"""The detached interface: tokens of one adapter read the keys and values of the other's, and send no gradient back.

In a sequence whose prompt and thought run under ``reasoning`` and whose queries run under ``embedding``, attention over
earlier tokens is the only way from one adapter to the other. Cutting the gradient there, and nowhere else, lets both
losses share one forward and one backward without either reaching the other's adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twn_kernels.errors import OptionError

__all__ = ["Part", "detached_attention", "require_sdpa"]

_NAME = "twn_detached_sdpa"


class Part(NamedTuple):
    """Consecutive tokens, the same in every row, that run under one adapter.

    Attributes:
        end: where they end; they begin where the part before ended.
        adapter: a name, or None for the base alone.
    """

    end: int
    adapter: str | None


def require_sdpa(config: Any) -> None:
    """Refuse an attention that may not read the masks of training, which are dense and not causal.

    Args:
        config: of the text model.

    Raises:
        OptionError: its attention is not ``"sdpa"``.
    """
    if config._attn_implementation != "sdpa":
        raise OptionError(
            f'training needs attn_implementation="sdpa", got "{config._attn_implementation}". '
            'Load the model with attn_implementation="sdpa".'
        )


@contextlib.contextmanager
def detached_attention(config: Any, parts: Sequence[Part]) -> Iterator[None]:
    """Run the attention of a model's decoder with no gradient between parts of different adapters.

    Args:
        config: of the text model.
        parts: cover the sequence in order. With one adapter in all of them nothing is cut.

    Raises:
        OptionError: as in :func:`require_sdpa`.
    """
    require_sdpa(config)
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options):
        outputs, start = [], 0
        for end, adapter in parts:
            seen_key, seen_value = (_cut(states[:, :, :end], parts, adapter) for states in (key, value))
            mask = attention_mask[:, :, start:end, :end]
            own = query[:, :, start:end]
            outputs.append(sdpa_attention_forward(module, own, seen_key, seen_value, mask, **options)[0])
            start = end
        return torch.cat(outputs, dim=1), None

    AttentionInterface.register(_NAME, attend)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _cut(states: Tensor, parts: Sequence[Part], adapter: str | None) -> Tensor:
    """``[batch, heads, tokens, width]`` with the tokens of other adapters detached."""
    pieces, start = [], 0
    for end, other in parts:
        if start >= states.shape[2]:
            break
        piece = states[:, :, start:end]
        pieces.append(piece if other == adapter else piece.detach())
        start = end
    return torch.cat(pieces, dim=2)
