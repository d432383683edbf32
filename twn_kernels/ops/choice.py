"""Which implementation serves a call, and why: named ones never fall back, ``auto`` follows what was measured."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

from twn_kernels.errors import ImplUnavailable, OptionError, did_you_mean, quoted
from twn_kernels.settings import ENV_IMPL, IMPLS, impl_override

_TRITON_MIN_CAPABILITY = (8, 0)  # bf16 tensor cores begin there


class Choice(NamedTuple):
    """An implementation and the reason for taking it."""

    impl: str
    reason: str


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that serves ``impl`` on this device and dtype; asks the device nothing where it can avoid it.

    Raises:
        OptionError: no such implementation.
        ImplUnavailable: a named implementation cannot run here.
    """
    _check_name(impl, "impl")
    source = "impl="
    if impl == "auto":
        override = impl_override()
        if override is None or override == "auto":
            return _auto(device, dtype)
        _check_name(override, ENV_IMPL)
        impl, source = override, f"{ENV_IMPL}="
    # A traced call is checked when it runs: what a device can do is no part of a graph.
    traced = torch.compiler.is_compiling() and dtype != torch.float64
    reason = None if traced else unavailable_reason(impl, device, dtype)
    if reason is not None:
        other = 'use impl="auto"' if source == "impl=" else f"unset {ENV_IMPL}"
        raise ImplUnavailable(f'{source}"{impl}" was asked for, but {reason} Or {other} (now: {_auto(device, dtype)}).')
    return impl


def chosen(impl: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What :func:`resolve` takes, with the reason; raises as it does."""
    taken = resolve(impl, device, dtype)
    if impl != "auto":
        return Choice(taken, f'impl="{impl}" was asked for')
    return explain(device, dtype) if impl_override() in (None, "auto") else Choice(taken, f"{ENV_IMPL}={taken} is set")


def explain(device: torch.device | str, dtype: torch.dtype) -> Choice:
    """What ``impl="auto"`` takes on this device and dtype, and why."""
    device = torch.device(device)
    if dtype == torch.float64:
        reason = "float64 is served by the reference alone"
    elif device.type == "cuda":
        reason = f"no committed measurement for {_device_name(device)} yet; the vendor GEMM is the safe choice"
    else:
        reason = f"{device.type} runs the vendor GEMM; the fused kernels need a GPU"
    return Choice(_auto(device, dtype), reason)


def unavailable_reason(impl: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str | None:
    """Why ``impl`` cannot run on ``device``, as a sentence with the fix; None when it can."""
    device = torch.device(device)
    if impl == "reference":
        return None
    if dtype == torch.float64:
        return f"{impl} takes float32, float16 and bfloat16, not float64, which the reference takes."
    if impl == "triton":
        return _triton_reason(device)
    if impl == "cuda":
        return load("cuda").unavailable_reason()
    return None


def load(impl: str) -> ModuleType:
    """The package of one implementation, imported on first use."""
    return importlib.import_module(f"twn_kernels.impl.{impl}")


def _check_name(impl: str, source: str) -> None:
    if impl not in IMPLS:
        raise OptionError(f"{source} must be one of {quoted(IMPLS)}, got {impl!r}.{did_you_mean(impl, IMPLS)}")


def _triton_reason(device: torch.device) -> str | None:
    if not _has_triton():
        return "Triton is not installed. Install it: pip install triton."
    if device.type == "cuda":
        capability = _capability(device.index)
        if capability < _TRITON_MIN_CAPABILITY:
            return (
                f"it needs a GPU of compute capability 8.0 or newer; {_device_name(device)} has "
                f"{capability[0]}.{capability[1]}."
            )
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"Triton kernels need a GPU and the tensors are on {device.type}. "
        "Set TRITON_INTERPRET=1 before Python starts to run them in the (slow) interpreter."
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def _auto(device: torch.device, dtype: torch.dtype) -> str:
    return "reference" if dtype == torch.float64 else "blas"
