"""Attention masks of a one-token step in the shape that does not change: every column, the ones ahead masked out.

Prepared here and not by the model: the model would ask the device whether anything is masked at all, and would build
its mask anew from the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_choice import layer_kinds

__all__ = ["FixedMasks"]


class FixedMasks:
    """Builds the masks that one model's layers take.

    Args:
        backbone: of a model that :func:`~twn_kernels.pipeline.decode_choice.why_not_static` has no reason against.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.config = backbone.config
        self.kinds = sorted(set(layer_kinds(backbone.config)))

    def __call__(self, valid: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The masks of a step.

        Args:
            valid: bool ``[rows, columns]``: False on padding.
            column: int64 ``[1]``: where the step's token lies.
            dtype: of keys and queries.

        Returns:
            ``[rows, 1, 1, columns]``, 0 where a column is seen and minus infinity elsewhere (additive: a boolean mask
            would be turned into one in every layer); or one by kind where layers differ.
        """
        columns = torch.arange(valid.shape[1], device=valid.device)
        masks = {kind: _additive(valid & self._reach(kind, columns, column), dtype) for kind in self.kinds}
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def _reach(self, kind: str, columns: Tensor, column: Tensor) -> Tensor:
        reach = columns <= column
        if kind == "sliding_attention":
            reach &= columns > column - self.config.sliding_window
        return reach


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)[:, None, None, :]
