"""``QueryBank``: the learned input vectors that the embedding pass appends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twn_kernels.errors import DtypeError, OptionError, ShapeError

__all__ = ["QueryBank"]


class QueryBank(nn.Module):
    """The learned queries, the same for every input.

    Args:
        queries: ``[num_queries, hidden]``, floating point, copied into the parameter ``queries`` in its dtype.

    Raises:
        ShapeError, DtypeError: ``queries`` is not such a tensor.

    Example:
        >>> import torch
        >>> from twn_kernels.modules import QueryBank
        >>> QueryBank(torch.randn(4, 16))(batch_size=2).shape
        torch.Size([2, 4, 16])
    """

    def __init__(self, queries: Tensor) -> None:
        super().__init__()
        if not isinstance(queries, Tensor):
            raise DtypeError(f"queries must be a tensor [num_queries, hidden], got {type(queries).__name__}.")
        if queries.dim() != 2 or 0 in queries.shape:
            raise ShapeError(
                f"queries must be [num_queries, hidden] with one query or more, got {list(queries.shape)}."
            )
        if not queries.is_floating_point():
            raise DtypeError(f"queries must be floating point, got {queries.dtype}.")
        self.queries = nn.Parameter(queries.detach().clone())

    @property
    def num_queries(self) -> int:
        """How many queries there are."""
        return self.queries.shape[0]

    @property
    def hidden(self) -> int:
        """The width of a query."""
        return self.queries.shape[1]

    def forward(self, batch_size: int, dtype: torch.dtype | None = None) -> Tensor:
        """The queries once an input, as a view: read it, do not write to it.

        Args:
            batch_size: inputs; 0 is allowed.
            dtype: of the result; None: the parameter's.

        Returns:
            ``[batch_size, num_queries, hidden]``, expanded over the batch, so one copy in memory at most.

        Raises:
            OptionError: ``batch_size`` is not a whole number >= 0.
            DtypeError: ``dtype`` is not a floating-point dtype.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, torch.SymInt)) or batch_size < 0:
            raise OptionError(f"batch_size must be a whole number >= 0, got {batch_size!r}.")
        queries = self.queries
        if dtype is not None:
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise DtypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}.")
            queries = queries.to(dtype)
        return queries.expand(batch_size, -1, -1)

    def extra_repr(self) -> str:
        return f"num_queries={self.num_queries}, hidden={self.hidden}"
