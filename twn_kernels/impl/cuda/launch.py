"""Launchers of a site group and of one linear on the extension's kernels: for inference, without host reads.

Owns what is launched and in which order; :mod:`.dispatch` says which kernel, :mod:`.fitness` what it can serve.
Allocates through torch on the current stream alone, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from twn_kernels.errors import ImplUnavailable, OptionError
from twn_kernels.impl.cuda import loader
from twn_kernels.impl.cuda.dispatch import DECODE, PREFILL, Problem, dispatch
from twn_kernels.impl.cuda.fitness import WORD, capability_of, device_reason, misfit

__all__ = ["backward", "fanout", "forward", "group", "group_backward"]

_BYTES = 16
_INSTEAD = 'Use impl="triton", impl="blas" or impl="auto".'


def group(
    x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present,
    swiglu, residual,
) -> tuple[Tensor, None]:  # fmt: skip
    """``y [tokens, sum of out_features]`` (or ``[tokens, out_features]``); no ``s``: nothing here has a backward pass.

    See ``impl.reference`` for the contract. ``routes`` may be None: every row uses what is in ``present``. Up to 64
    rows are one launch; ``dispatch`` says what more rows are.

    Base weights are frozen: a launch of up to 64 rows on compute capability 9.0 or later begins to read them while the
    kernel in front of it ends. Where that kernel writes one of them, call ``torch.cuda.synchronize`` first.

    Raises:
        ImplUnavailable, DtypeError, ShapeError: the kernels cannot serve these tensors; the message says what can.
    """
    if (error := misfit(x, weights, A_r, B_r, A_e, B_e)) is not None:
        raise error
    tokens = x.shape[0]
    outputs = weights[0].shape[0] if swiglu else sum(weight.shape[0] for weight in weights)
    if tokens == 0 or outputs == 0:
        return x.new_empty((tokens, outputs)), None
    none = _none(x.device, x.dtype)
    layers = (
        list(weights), [none if bias is None else bias for bias in biases], list(A_r), list(B_r), list(A_e), list(B_e),
        list(scaling_r), list(scaling_e),
    )  # fmt: skip
    back = (present, bool(swiglu))
    chosen = dispatch(Problem(tokens, capability_of(x.device.index), _kernels(x.device, x.dtype)))
    x, residual = _in_words(x), _in_rows(residual)
    if chosen.kernel == PREFILL:
        if norm_weight is not None or gated:
            x, norm_weight, gated = _op("front")(x, norm_weight, eps, bool(gated)), None, False
        return _op(PREFILL)(x, None, 0.0, False, *layers, routes, *back, residual), None
    front = (norm_weight, float(eps), bool(gated))
    decode = _op(DECODE)
    if chosen.launches == 1:
        return decode(x, *front, *layers, routes, *back, residual), None
    parts = [
        decode(x[rows], *front, *layers, _rows(routes, rows), *back, _rows(residual, rows))
        for rows in _slices(tokens, chosen.rows)
    ]
    return torch.cat(parts), None


def forward(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, None]:
    """``y [tokens, out_features]``: a site group of one linear.

    Raises:
        As :func:`group`; OptionError for LoRA dropout, which is for training.
    """
    if dropout_r or dropout_e:
        raise OptionError(
            'dropout must be 0 for impl="cuda", which has no backward pass to train with, got '
            f"{(dropout_r, dropout_e)}. {_INSTEAD}"
        )
    return group(
        x, None, 0.0, False, [weight], [bias], [A_r], [B_r], [A_e], [B_e], [scaling_r], [scaling_e], routes, present,
        False, None,
    )  # fmt: skip


def fanout(*args, **kwargs) -> NoReturn:
    """Refuse: the kernels route each token to one result.

    Raises:
        ImplUnavailable: always.
    """
    raise ImplUnavailable(
        f'dual_lora_linear_fanout was asked for with impl="cuda", which has no kernel for it. {_INSTEAD} Or call '
        "dual_lora_linear once under each adapter."
    )


def backward(*args, **kwargs) -> NoReturn:
    """Refuse: the kernels are for inference.

    Raises:
        ImplUnavailable: always.
    """
    raise ImplUnavailable(
        'impl="cuda" has no backward pass: its kernels are for inference. Call it under torch.no_grad(), or use '
        'impl="triton" or impl="auto" where gradients are needed.'
    )


group_backward = backward


@functools.cache
def _op(name: str) -> Callable[..., Tensor]:
    loader.load()
    return getattr(torch.ops.twn_cuda, name).default


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> str:
    """What is in the extension, where it serves this device; builds and loads it where that is still to be done.

    Raises:
        ImplUnavailable: it does not run here.
    """
    reason = device_reason(device, dtype)
    if reason is not None:
        raise ImplUnavailable(f'impl="cuda" was asked for, but {reason} Or {_INSTEAD[0].lower()}{_INSTEAD[1:]}')
    loader.load()
    return loader.build_info().kernels


@functools.cache
def _none(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for an absent bias; without elements, so it is no memory of a graph."""
    return torch.empty(0, device=device, dtype=dtype)


def _in_words(x: Tensor) -> Tensor:
    """``x`` as it is where its rows start at 16-byte words and do not overlap, else a copy: it is small."""
    pitch, step = x.stride()
    if step == 1 and pitch % WORD == 0 and pitch >= x.shape[1] and x.data_ptr() % _BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _in_rows(residual: Tensor | None) -> Tensor | None:
    if residual is None or residual.stride(1) == 1 or residual.shape[1] == 1:
        return residual
    return residual.contiguous()


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _slices(tokens: int, rows: int) -> list[slice]:
    return [slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows)]
