"""A CUDA graph's contract on any device: record the operators of a function once, then run them again without it.

Like a graph, a replay sees the tensors that the function read, at their present values, and none of its Python: host
numbers are baked in, and a read of the device by the host fails while recording. Unlike a graph, it launches eagerly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["RecordedGraph", "record"]

_aten = torch.ops.aten
# Operators whose result, or whose result's shape, only the device knows.
_HOST_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.unique_consecutive.default,
    _aten._unique2.default,
}


class RecordedGraph(TorchDispatchMode):
    """The operators that ran inside its ``with`` block.

    Raises:
        RuntimeError: inside the block: an operator that would make the host wait for the device, or copy a list of
            numbers to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _HOST_READS or (func is _aten.lift_fresh.default and args[0].numel() > 1):
            raise RuntimeError(f"{func} makes host and device wait for each other, which a CUDA graph cannot capture")
        if func in (_aten.index.Tensor, _aten.index_put_.default) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            raise RuntimeError(f"{func} with a boolean index has a shape that only the device knows")
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> None:
        """Run the recorded operators in order, on the recorded inputs as they are now."""
        made: dict[int, Tensor] = {}

        def present(tensor: Tensor) -> Tensor:
            return made.get(id(tensor), tensor)

        for func, args, kwargs, out in self._calls:
            new = func(*tree_map_only(Tensor, present, args), **tree_map_only(Tensor, present, kwargs))
            for before, after in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if isinstance(before, Tensor) and before is not after:
                    made[id(before)] = after


@torch.no_grad()
def record(function: Callable[[], object]) -> RecordedGraph:
    """The operators of one call of ``function``, which has run once when this returns."""
    with RecordedGraph() as graph:
        function()
    return graph
