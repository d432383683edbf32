"""Pooling of query states in one launch of the extension, and what it shares with the gate: when a call is served.

A refusal is half a sentence with its fix; who asked, and what to use instead, the caller knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from twn_kernels.errors import ImplUnavailable
from twn_kernels.impl.cuda import fitness, loader

__all__ = ["device_refusal", "dtype_refusal", "gradient_refusal", "op", "pool_queries", "refusal"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_POOLINGS = ("mean", "last", "first")  # by their number in csrc/bindings/small.cpp


def refusal(states: Tensor) -> str | None:
    """Why the kernel cannot take this call, whatever the device; None where it can."""
    return dtype_refusal("states", states) or gradient_refusal([("states", states)])


def pool_queries(states: Tensor, pooling: str, normalize: bool) -> Tensor:
    """As ``impl.reference``, in one launch on the current stream.

    Raises:
        ImplUnavailable: the kernel does not run on this device.
    """
    return op("pool_queries", states.device)(states, _POOLINGS.index(pooling), normalize)


def dtype_refusal(name: str, tensor: Tensor) -> str | None:
    """Why the kernels cannot read ``tensor``; None where they can."""
    if tensor.dtype in _FLOATS:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"its kernel takes float32, float16 and bfloat16, and {name} is {dtype}. Convert it with .float()."


def gradient_refusal(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Why the kernels cannot take tensors that something is to be differentiated by; None where nothing is."""
    for name, tensor in tensors:
        if tensor is not None and _is_differentiated(tensor):
            return f"its kernel has no backward pass and {name} requires a gradient. Call it under torch.no_grad()."
    return None


def device_refusal(device: torch.device) -> str | None:
    """Why no kernel runs on ``device``; None where it does. Builds and loads the extension where that is to be done."""
    try:
        _load(device)
    except ImplUnavailable as error:
        return str(error)
    return None


def op(name: str, device: torch.device) -> Callable:
    """One of the extension's ops, for a device that it runs on.

    Raises:
        ImplUnavailable: it does not run there.
    """
    if (reason := device_refusal(device)) is not None:
        raise ImplUnavailable(f'impl="cuda" was asked for, but {reason} Or use impl="auto".')
    return _op(name)


@functools.cache
def _load(device: torch.device) -> None:
    if (reason := fitness.device_reason(device)) is not None:
        raise ImplUnavailable(reason)
    loader.load()


@functools.cache
def _op(name: str) -> Callable:
    return getattr(torch.ops.twn_cuda, name).default


def _is_differentiated(tensor: Tensor) -> bool:
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
