"""The compiled CUDA implementation: what is built, why not, and a refusal until it holds the dual-LoRA kernels."""

from __future__ import annotations

from typing import NoReturn

from twn_kernels.errors import ImplUnavailable
from twn_kernels.impl.cuda.loader import unavailable_reason

__all__ = ["backward", "fanout", "forward", "unavailable_reason"]


def forward(*args, **kwargs) -> NoReturn:
    """Refuse: the extension has no dual-LoRA kernel yet.

    Raises:
        ImplUnavailable: always; the message says whether the extension is built and what to use instead.
    """
    raise ImplUnavailable(f'impl="cuda" was asked for, but {unavailable_reason()} Or use impl="auto".')


fanout = forward
backward = forward
