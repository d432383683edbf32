"""Autocast at the edge of an op: whether it is on for a device, and switching it off inside."""

from __future__ import annotations

import contextlib

import torch


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast narrows what runs on ``device``; devices that know no autocast, such as meta, never do."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device):
    """A context in which products keep the dtypes of their operands."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else contextlib.nullcontext()
