"""The compiled CUDA implementation, for inference: one persistent launch a site group, weights streamed once.

What is built, or why not, is :mod:`.loader`'s to say; which calls are served, :mod:`.fitness`'.
"""

from __future__ import annotations

from twn_kernels.impl.cuda.fitness import device_reason, refusal
from twn_kernels.impl.cuda.launch import backward, fanout, forward, group, group_backward
from twn_kernels.impl.cuda.loader import build_info, unavailable_reason

UNIFORM = True  # ``forward`` takes ``routes=None``: every row uses what is in ``present``
GROUP_UNIFORM = True  # and so does ``group``

__all__ = [
    "GROUP_UNIFORM",
    "UNIFORM",
    "backward",
    "build_info",
    "device_reason",
    "fanout",
    "forward",
    "group",
    "group_backward",
    "refusal",
    "unavailable_reason",
]
