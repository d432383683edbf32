"""Which implementation serves a call, and why: named ones never fall back, ``auto`` follows what was measured."""

from __future__ import annotations

import bisect
import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from twn_kernels.errors import ImplUnavailable, OptionError, did_you_mean, quoted
from twn_kernels.ops.choice_table import DEFAULT, SITES, Row, packaged
from twn_kernels.settings import ENV_IMPL, IMPLS, impl_override

AUTO = "auto"
# What :func:`requested` calls "auto" in a call that may be differentiated: an implementation without a backward pass is
# no choice there. A traced op knows of gradients when it is traced, and of its token count when it runs.
DIFFERENTIABLE = "auto, differentiable"

_AUTO = (AUTO, DIFFERENTIABLE)
_LINEAR = SITES[0]
_INFERENCE_ONLY = ("cuda",)
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TRITON_MIN_CAPABILITY = (8, 0)  # bf16 tensor cores begin there


class Choice(NamedTuple):
    """An implementation and the reason for taking it."""

    impl: str
    reason: str


def resolve(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    site: str | None = None,
    tokens: int | None = None,
    differentiable: bool = False,
) -> str:
    """The implementation that serves ``impl`` on this device and dtype; asks the device nothing where it can avoid it.

    Args:
        impl: a name, or ``"auto"``: what ``TWN_IMPL`` says, else what the table of measurements says for the site and
            the token count, else ``blas``.
        device, dtype: of ``x``.
        site: site group (``"qkv"``, ``"o"``, ``"gate_up"``, ``"down"``); None: one linear by itself.
        tokens: rows of ``x``, a plain integer; None: not known, which no row of the table serves.
        differentiable: the call may need a backward pass.

    Raises:
        OptionError: no such implementation or site.
        ImplUnavailable: a named implementation cannot run here.
        TableError: the package's table of measurements is damaged.
    """
    _check_site(site)
    differentiable = differentiable or impl == DIFFERENTIABLE
    source = "impl"
    if impl in _AUTO:
        override = impl_override()
        if override is None or override == "auto":
            taken = _auto(device, dtype, site, tokens)
            return DEFAULT if differentiable and taken in _INFERENCE_ONLY else taken
        impl, source = override, ENV_IMPL
    check_name(impl, source)
    if differentiable:
        _check_backward(impl, source)
    _check_available(impl, device, dtype, source)
    return impl


def serving(
    impl: str,
    x: torch.Tensor,
    layers: Sequence[Sequence[torch.Tensor | None]],
    *,
    site: str | None = None,
    tokens: int | None = None,
    differentiable: bool = False,
) -> Choice:
    """What serves a call on these very tensors, and why it is not what the table says; the reason is empty otherwise.

    An implementation may offer ``refusal(x, weights, A_r, B_r, A_e, B_e)``: why it cannot serve such tensors. It is
    asked where ``"auto"`` picked it; a named one raises by itself.

    Args:
        impl, site, tokens, differentiable: as in :func:`resolve`.
        x: the input, or a tensor of its dtype and device.
        layers: ``weights, A_r, B_r, A_e, B_e``, one entry a projection each; None or rank 0: no such adapter.

    Raises:
        As :func:`resolve`.
    """
    taken = resolve(impl, x.device, x.dtype, site=site, tokens=tokens, differentiable=differentiable)
    if taken == DEFAULT or impl not in _AUTO or impl_override() not in (None, "auto"):
        return Choice(taken, "")
    reason = refusal_of(taken, x, layers)
    return Choice(taken, "") if reason is None else Choice(DEFAULT, reason)


def refusal_of(impl: str, x: torch.Tensor, layers: Sequence[Sequence[torch.Tensor | None]]) -> str | None:
    """Why ``impl`` cannot serve such tensors, arguments as in :func:`serving`; None where it can."""
    ask = getattr(load(impl), "refusal", None)
    return None if ask is None else ask(x, *layers)


def candidates(impl: str, device: torch.device, dtype: torch.dtype, *, site: str | None) -> list[str]:
    """Every implementation that may serve calls of a site that ask for ``impl``, by their token count."""
    if impl == "auto":
        impl = impl_override() or "auto"
    if impl != "auto":
        return [impl]
    if device.type != "cuda" or dtype == torch.float64:
        return [_auto(device, dtype, site, None)]
    return sorted({DEFAULT, *(row.impl for row in _usable(device, dtype, site or _LINEAR)[1])})


def requested(
    impl: str, device: torch.device, dtype: torch.dtype, site: str | None = None, *, differentiable: bool = False
) -> str:
    """``impl`` for a registered op: a name, checked now; or ``"auto"``, which the op resolves when it runs.

    A traced call must not look at its token count: it is symbolic, and choosing by it would bind the graph to it.

    Args:
        impl, device, dtype, site, differentiable: as in :func:`resolve`.

    Raises:
        As :func:`resolve`.
    """
    _check_site(site)
    if impl == "auto":
        return DIFFERENTIABLE if differentiable else impl
    return resolve(impl, device, dtype, differentiable=differentiable)


def chosen(
    impl: str, device: torch.device, dtype: torch.dtype, *, site: str | None = None, tokens: int | None = None
) -> Choice:
    """What :func:`resolve` takes, with the reason; raises as it does."""
    taken = resolve(impl, device, dtype, site=site, tokens=tokens)
    if impl != "auto":
        return Choice(taken, f'impl="{impl}" was asked for')
    if impl_override() not in (None, "auto"):
        return Choice(taken, f"{ENV_IMPL}={taken} is set")
    return explain(device, dtype, site=site, tokens=tokens)


def explain(
    device: torch.device | str, dtype: torch.dtype, *, site: str | None = None, tokens: int | None = None
) -> Choice:
    """What ``impl="auto"`` takes here, and why; arguments as in :func:`resolve`.

    Without a token count, the implementation is what serves counts that no row covers, and the reason lists the rows.
    """
    device = torch.device(device)
    if dtype == torch.float64:
        reason = "float64 is served by the reference alone"
    elif device.type != "cuda":
        reason = f"{device.type} runs the vendor GEMM; the fused kernels need a GPU"
    else:
        reason = _measured_reason(device, dtype, site or _LINEAR, tokens)
    return Choice(_auto(device, dtype, site, tokens), reason)


def is_deliberate(impl: str, device: torch.device, dtype: torch.dtype, *, site: str | None, tokens: int) -> bool:
    """Whether what serves a call was asked for or measured, rather than taken for want of either."""
    if impl not in _AUTO or impl_override() not in (None, "auto"):
        return True
    if device.type != "cuda" or dtype == torch.float64:
        return False
    row = _row(device, dtype, site, tokens)
    return row is not None and not (impl == DIFFERENTIABLE and row.impl in _INFERENCE_ONLY)


def unavailable_reason(
    impl: str, device: torch.device | str, dtype: torch.dtype | None = None, *, may_build: bool = True
) -> str | None:
    """Why ``impl`` cannot run on ``device``, as a sentence with the fix; None when it can.

    Args:
        impl, device, dtype: which, where, and the dtype of ``x`` where it is known.
        may_build: what naming it in a call would build counts as there.
    """
    device = torch.device(device)
    if impl == "reference":
        return None
    if dtype == torch.float64:
        return f"{impl} takes float32, float16 and bfloat16, not float64, which the reference takes."
    if impl == "triton":
        return _triton_reason(device)
    if impl == "cuda":
        return load("cuda").device_reason(device, dtype, may_build=may_build)
    return None


def extension() -> str:
    """What of the CUDA extension is built, for what and where, or why it is not; builds and loads nothing."""
    return str(load("cuda").build_info())


def load(impl: str) -> ModuleType:
    """The package of one implementation, imported on first use."""
    return importlib.import_module(f"twn_kernels.impl.{impl}")


def _check_site(site: str | None) -> None:
    if site is not None and site not in SITES:
        raise OptionError(f"site must be None or one of {quoted(SITES[1:])}, got {site!r}.{did_you_mean(site, SITES)}")


def _check_available(impl: str, device: torch.device, dtype: torch.dtype, source: str) -> None:
    # A traced call is checked when it runs: what a device can do is no part of a graph.
    traced = torch.compiler.is_compiling() and dtype != torch.float64
    reason = None if traced else unavailable_reason(impl, device, dtype)
    if reason is None:
        return
    other = 'use impl="auto"' if source == "impl" else f"unset {source}"
    now = _auto(device, dtype, None, None)
    raise ImplUnavailable(f'{source}="{impl}" was asked for, but {reason} Or {other} (now: {now}).')


def is_for_inference(impl: str) -> bool:
    """Whether a named implementation has no backward pass."""
    return impl in _INFERENCE_ONLY


def _check_backward(impl: str, source: str) -> None:
    if is_for_inference(impl):
        other = 'use impl="triton" or impl="auto"' if source == "impl" else f'unset {source} or use impl="triton"'
        raise ImplUnavailable(
            f'{source}="{impl}" was asked for, but it has no backward pass and a tensor of this call requires a '
            f"gradient. Run it under torch.no_grad(), or {other} where gradients are needed."
        )


def check_name(impl: object, source: str) -> None:
    """Raise OptionError unless ``impl``, which ``source`` gave (``"impl"`` or ``"TWN_IMPL"``), is an implementation."""
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
    return f"{torch.cuda.get_device_name(device)} ({arch(device)})"


def _auto(device: torch.device, dtype: torch.dtype, site: str | None, tokens: int | None) -> str:
    if dtype == torch.float64:
        return "reference"
    if device.type != "cuda" or tokens is None:
        return DEFAULT
    row = _row(device, dtype, site, tokens)
    return DEFAULT if row is None else row.impl


def _row(device: torch.device, dtype: torch.dtype, site: str | None, tokens: int) -> Row | None:
    """The row of the table that serves a call on a GPU."""
    starts, rows = _usable(device, dtype, site or _LINEAR)
    at = bisect.bisect_right(starts, tokens) - 1
    return rows[at] if at >= 0 and tokens <= rows[at].max_tokens else None


@functools.cache
def _usable(device: torch.device, dtype: torch.dtype, site: str) -> tuple[list[int], list[Row]]:
    """First token counts and rows, in order, of what was measured here and can run here."""
    rows = [row for row in _rows(device, dtype, site) if _row_refusal(row, device, dtype) is None]
    return [row.min_tokens for row in rows], rows


def _row_refusal(row: Row, device: torch.device, dtype: torch.dtype) -> str | None:
    # Who left the choice open does not wait minutes for a compiler.
    return unavailable_reason(row.impl, device, dtype, may_build=False)


def _rows(device: torch.device, dtype: torch.dtype, site: str) -> list[Row]:
    key = (arch(device), _dtype_name(dtype), site)
    return sorted((row for row in packaged() if row.key == key), key=lambda row: row.min_tokens)


def _measured_reason(device: torch.device, dtype: torch.dtype, site: str, tokens: int | None) -> str:
    """Why the table gives what it gives on a GPU."""
    rows = _rows(device, dtype, site)
    if not rows:
        others = sorted({row.arch for row in packaged() if row.key[1:] == (_dtype_name(dtype), site)})
        hint = f" (there are measurements of {', '.join(others)}, which are not borrowed)" if others else ""
        what = f"{site} in {_dtype_name(dtype)} on {_device_name(device)}"
        missing = unavailable_reason("triton", device, dtype)
        only = "" if missing is None else f"; triton cannot serve: {missing.rstrip('.')}"
        return f"nothing was measured for {what}{hint}; the vendor GEMM is the safe choice{only}"
    if tokens is None:
        return f"by token count: {'; '.join(_row_reason(row, device, dtype) for row in rows)}; {DEFAULT} elsewhere"
    for row in rows:
        if row.min_tokens <= tokens <= row.max_tokens:
            return _row_reason(row, device, dtype)
    ranges = ", ".join(f"{row.min_tokens} to {row.max_tokens}" for row in rows)
    return (
        f"nothing was measured for {site} at {tokens} tokens (measured: {ranges}); the vendor GEMM is the safe choice"
    )


def _row_reason(row: Row, device: torch.device, dtype: torch.dtype) -> str:
    reason = _row_refusal(row, device, dtype)
    fact = f"{row.impl} was the fastest at {row.min_tokens} to {row.max_tokens} tokens ({row.source})"
    if row.impl in _INFERENCE_ONLY:
        fact += f", and {DEFAULT} serves where gradients are needed"
    return fact if reason is None else f"{fact}, but cannot run here, so {DEFAULT} serves: {reason.rstrip('.')}"


@functools.cache
def arch(device: torch.device) -> str:
    """The architecture of a GPU as the table of measurements names it: ``"sm_90"``."""
    major, minor = _capability(device.index)
    return f"sm_{major}{minor}"


def _dtype_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")
