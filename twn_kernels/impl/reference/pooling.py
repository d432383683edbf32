"""From the query states of the last layer to one vector an input, written to be read."""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("mean", "last", "first")


def pool_queries(states: Tensor, pooling: str, normalize: bool) -> Tensor:
    """``[batch, hidden]`` of ``states [batch, num_queries, hidden]``, in fp32 (fp64 for fp64)."""
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    if pooling == "mean":
        pooled = states.to(wide).mean(dim=1)
    else:
        pooled = states[:, -1 if pooling == "last" else 0].to(wide)
    return _unit(pooled) if normalize else pooled


def _unit(x: Tensor) -> Tensor:
    """Rows of L2 norm 1; a zero row stays zero, with a zero gradient.

    The largest element is divided out first, or the squares of large and of tiny rows would overflow and vanish. The
    direction does not depend on that factor, so the gradient is right with the factor held constant.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest == 0
    one = torch.ones((), dtype=x.dtype, device=x.device)
    scaled = x / torch.where(zero, one, largest)
    norm = torch.where(zero, one, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
    return torch.where(zero, torch.zeros_like(x), scaled / norm)
