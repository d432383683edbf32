"""From logits to a token: greedy, or temperature with nucleus sampling from a seeded generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["chooser"]


def chooser(temperature: float, top_p: float, seed: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from fp32 logits ``[rows, vocabulary]`` to token ids ``[rows]``.

    Args:
        temperature: 0 takes the largest logit.
        top_p: mass of the nucleus in (0, 1]; the likeliest token is always in it.
        seed: of the generator that this chooser draws from.
        device: of the logits.
    """
    if temperature == 0.0:
        return lambda logits: logits.argmax(dim=-1)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        place = torch.multinomial(probabilities, 1, generator=generator)
        return order.gather(1, place).squeeze(1)

    return draw
