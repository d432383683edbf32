"""From the states of the queries to one embedding an input."""

from __future__ import annotations

import torch
from torch import Tensor

from twn_kernels.errors import DtypeError, OptionError, ShapeError, did_you_mean, quoted
from twn_kernels.impl.reference import pooling as reference
from twn_kernels.ops.small_ops import pool_on_cuda, pool_refusal, takes_cuda

__all__ = ["POOLINGS", "pool_queries"]

POOLINGS = reference.POOLINGS
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def pool_queries(states: Tensor, *, pooling: str = "mean", normalize: bool = True, impl: str = "auto") -> Tensor:
    """One vector an input from the states of its queries.

    Args:
        states: ``[batch, num_queries, hidden]``, the last layer's; fp32, fp16, bf16 (or fp64); any strides.
        pooling: over the queries: their ``"mean"``, the ``"last"`` or the ``"first"`` one.
        normalize: divide by the L2 norm; a zero vector stays zero.
        impl: ``"auto"`` (now the reference), ``"reference"`` or ``"cuda"``: one launch, for inference on a GPU with
            states of 16 or 32 bits. A named one never falls back. Of ``TWN_IMPL``, ``auto`` follows ``cuda`` and, as
            other names have no implementation here, takes the reference for them.

    Returns:
        ``[batch, hidden]`` in fp32 (fp64 for fp64 states).

    Raises:
        ShapeError, DtypeError, OptionError: an argument breaks the contract above.
        ImplUnavailable: ``"cuda"`` was asked for and cannot serve the call; the message says why.

    Numerics: fp32 arithmetic whatever the dtype; the norm neither overflows nor underflows. NaN or Inf in a row stays
    in that row. Differentiable in: states (a zero vector has a zero gradient where normalized); ``"cuda"`` is not.
    Graph-safe: yes. Synchronises: never.

    Example:
        >>> import torch
        >>> from twn_kernels.ops import pool_queries
        >>> pool_queries(torch.ones(2, 3, 4))[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    if not isinstance(states, Tensor):
        raise DtypeError(f"states must be a tensor [batch, num_queries, hidden], got {type(states).__name__}.")
    if states.dim() != 3 or 0 in states.shape[1:]:
        raise ShapeError(
            f"states must be [batch, num_queries, hidden] with one query or more, got {list(states.shape)}."
        )
    if states.dtype not in _FLOATS:
        raise DtypeError(f"states must be float32, float16, bfloat16 or float64, got {states.dtype}.")
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise OptionError(
            f"pooling must be one of {quoted(POOLINGS)}, got {pooling!r}.{did_you_mean(pooling, POOLINGS)}"
        )
    if not isinstance(normalize, bool):
        raise OptionError(f"normalize must be True or False, got {normalize!r}.")
    if takes_cuda(impl, states.device, lambda: pool_refusal(states)):
        return pool_on_cuda(states, pooling, normalize)
    return reference.pool_queries(states, pooling, normalize)
