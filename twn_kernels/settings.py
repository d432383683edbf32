"""Names and switches that the whole package shares; imports nothing of it."""

from __future__ import annotations

import os

REASONING = "reasoning"
EMBEDDING = "embedding"
ADAPTERS = (REASONING, EMBEDDING)

# A route is a bitmask, so that "both" is the union and a tile's need is an OR over its rows.
ROUTE_BITS = {None: 0, REASONING: 1, EMBEDDING: 2, "both": 3}
BOTH = 3

IMPLS = ("auto", "blas", "cuda", "reference", "triton")

DECODE_MODES = ("auto", "cuda_graph", "static", "dynamic")

MAX_RANK = 256

# The only environment variables that the package reads (five at most; a test counts them).
ENV_IMPL = "TWN_IMPL"
ENV_BUILD_CUDA = "TWN_BUILD_CUDA"


def impl_override() -> str | None:
    """The implementation that ``TWN_IMPL`` asks for where the caller left ``impl="auto"``; None when unset."""
    return os.environ.get(ENV_IMPL) or None
