"""Packed copies of adapters, kept up to date between replays of graphs that read them as they are.

A graph that refreshed every copy in every replay would launch more kernels for that than for the model. The host sees
in-place edits of the adapters, so it refreshes the copies when there are any.
"""

from __future__ import annotations

import torch

from twn_kernels.patching.record import find_record
from twn_kernels.pipeline.backbone import Backbone

__all__ = ["Shadows"]


class Shadows:
    """The packed site groups of one model, as they are when this is made.

    Args:
        backbone: of the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        record = find_record(backbone.model)
        blocks = () if record is None else record.blocks.values()
        groups = (group.packing for block in blocks for group in block.site_groups.values())
        self._groups = [packing for packing in groups if packing is not None]
        # Inference tensors have no version; their groups refresh themselves in every call.
        self._adapters = [B for group in self._groups for B in group.shadowed() if not B.is_inference()]
        self._edits, self._clean, self._device = -1, (), backbone.device

    def refresh(self) -> tuple[bool, ...]:
        """Bring all copies up to date; which of them hold finite values alone. May wait for the device."""
        self._edits = self._count()
        for group in self._groups:
            group.panels()
        settling = [group for group in self._groups if group.is_settling]
        if settling:
            torch.cuda.synchronize(self._device)
            for group in settling:
                group.panels()
        self._clean = tuple(group.is_clean for group in self._groups)
        return self._clean

    def refresh_if_edited(self) -> bool:
        """Refresh where an adapter was edited in place; whether graphs captured before may no longer be replayed."""
        if self._count() == self._edits:
            return False
        before = self._clean
        return self.refresh() != before

    def _count(self) -> int:
        """Grows with every edit in place."""
        return sum(B._version for B in self._adapters)
