"""Launchers: allocate outputs, choose the configuration, start the kernels. No host reads of device data, no copies.

Owns the order of launches behind ``forward``, ``fanout`` and ``backward``; the arithmetic is in the kernels, the tiles
are in ``config``. Everything runs on the current stream of the tensors' device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from twn_kernels.errors import DtypeError, ImplUnavailable
from twn_kernels.impl.triton.config import MAX_REGISTERS, gemm_config, grad_config, reduce_config, shrink_config
from twn_kernels.impl.triton.gemm_kernel import gemm_kernel
from twn_kernels.impl.triton.grad_kernel import grad_kernel
from twn_kernels.impl.triton.primitives import INTERPRETING
from twn_kernels.impl.triton.shrink_kernel import reduce_kernel, shrink_kernel

__all__ = ["backward", "fanout", "forward"]

# Both have defaults that differ between Triton versions or hurt: fused multiply-add, and a register limit.
_OPTIONS = {"enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}

_INTERPRETED_ARCH = 90  # the interpreter walks the tiles of this architecture, the largest: it pays by the tile


class _Pair(NamedTuple):
    """Both adapters' operands and what they share; index 0 is ``reasoning``, 1 is ``embedding``."""

    A: tuple[Tensor, Tensor]
    B: tuple[Tensor, Tensor]
    scaling: tuple[float, float]
    dropout: tuple[float, float]
    routes: Tensor
    present: int
    seed: Tensor | None

    @property
    def ranks(self) -> tuple[int, int]:
        return self.A[0].shape[0], self.A[1].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.A[0].dtype

    @property
    def drops(self) -> bool:
        return any(p > 0 for p in self.dropout)

    @property
    def thresholds(self) -> tuple[int, int]:
        return _threshold(self.dropout[0]), _threshold(self.dropout[1])

    @property
    def inverse_keep(self) -> tuple[float, float]:
        return 1.0 / (1.0 - self.dropout[0]), 1.0 / (1.0 - self.dropout[1])


def forward(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor]:
    """``y [tokens, out_features]`` and ``s [tokens, rank_r + rank_e]``; see ``impl.reference`` for the contract."""
    pair = _pair(A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed)
    with _device(x):
        s = _shrink(x, x, pair)
        y = x.new_empty((x.shape[0], weight.shape[0]))
        _gemm(x, weight, bias, s, pair.B, pair._replace(dropout=(0.0, 0.0)), y)
    return y, s


def fanout(
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed
) -> tuple[Tensor, Tensor, Tensor]:
    """``y_reasoning``, ``y_embedding`` and ``s``: one base product, two results."""
    pair = _pair(A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed)
    with _device(x):
        s = _shrink(x, x, pair)
        y_r, y_e = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
        _gemm(x, weight, bias, s, pair.B, pair._replace(dropout=(0.0, 0.0)), y_r, y_e)
    return y_r, y_e, s


def backward(
    dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present,
    dropout_r, dropout_e, seed, needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, A_r, B_r, A_e, B_e and bias, in this order; None where ``needs`` says so."""
    pair = _pair(A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed)
    dy_pair = (dy if dy_r is None else dy_r, dy if dy_e is None else dy_e)
    needs_x, needs_A_r, needs_B_r, needs_A_e, needs_B_e, needs_bias = needs
    dx = dbias = None
    with _device(x):
        ds = None
        if needs_x or needs_A_r or needs_A_e:
            transposed = pair._replace(A=(B_r.t(), B_e.t()), dropout=(0.0, 0.0))
            ds = _shrink(*dy_pair, transposed)
        if needs_x:
            dx = x.new_empty(x.shape)
            _gemm(dy, weight.t(), None, ds, (A_r.t(), A_e.t()), pair, dx)
        dA_r, dA_e = _weight_grads((x, x), ds, pair, (needs_A_r, needs_A_e), pair.A, transposed=True)
        undropped = pair._replace(dropout=(0.0, 0.0))
        dB_r, dB_e = _weight_grads(dy_pair, s, undropped, (needs_B_r, needs_B_e), pair.B, transposed=False)
        if needs_bias:
            dbias = dy.sum(0, dtype=_wide(dy.dtype)).to(dy.dtype)
    return dx, dA_r, dB_r, dA_e, dB_e, dbias


def _pair(A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, dropout_r, dropout_e, seed) -> _Pair:
    """An adapter of rank 0 is not present, nor is its dropout."""
    present &= (A_r.shape[0] > 0) | (A_e.shape[0] > 0) << 1
    dropout = (dropout_r if present & 1 else 0.0, dropout_e if present & 2 else 0.0)
    return _Pair((A_r, A_e), (B_r, B_e), (scaling_r, scaling_e), dropout, routes, present, seed)


def _shrink(x_r: Tensor, x_e: Tensor, pair: _Pair) -> Tensor:
    """``[tokens, rank_r + rank_e]``: masked, scaled, rounded once to the adapters' dtype."""
    tokens, features = x_r.shape
    (a_r, a_e), (rank_r, rank_e) = pair.A, pair.ranks
    s = a_r.new_empty((tokens, rank_r + rank_e))
    if s.numel() == 0:
        return s
    if pair.present == 0:
        return s.zero_()
    config = shrink_config(
        tokens, features, rank_r, rank_e, pair.dtype == torch.float32, _arch(x_r.device),
        aligned=_aligned(x_r, x_e, a_r, a_e),
    )  # fmt: skip
    scaling = tuple(scale * inverse for scale, inverse in zip(pair.scaling, pair.inverse_keep, strict=True))
    splits = config.splits
    out = s if splits == 1 else x_r.new_empty((splits, tokens, rank_r + rank_e), dtype=_wide(x_r.dtype))
    steps = -(-features // config.block_k)
    tiles = -(-rank_r // config.block_r) + -(-rank_e // config.block_r)
    shrink_kernel[(-(-tokens // config.block_m), tiles, splits)](
        x_r, x_e, a_r, a_e, pair.routes, pair.seed if pair.drops else None, out, out[..., rank_r:],
        tokens, features, rank_r, rank_e, -(-steps // splits) * config.block_k,
        *x_r.stride(), *x_e.stride(), *a_r.stride(), *a_e.stride(), rank_r + rank_e, tokens * (rank_r + rank_e),
        *(scaling if splits == 1 else (1.0, 1.0)), *pair.thresholds,
        PRESENT=pair.present, DROPOUT=pair.drops, PRECISION=_precision(x_r.dtype, pair.dtype),
        BLOCK_M=config.block_m, BLOCK_R=config.block_r, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **_OPTIONS,
    )  # fmt: skip
    if splits > 1:
        _reduce(out, (s, s[:, rank_r:]), pair.ranks, scaling, pair.present, pair.routes)
    return s


def _gemm(x, weight, bias, s, b, pair: _Pair, y: Tensor, y_e: Tensor | None = None) -> None:
    """Fill ``y`` (and ``y_e``) with ``x weight^T + bias`` plus the low-rank terms ``s b^T``."""
    (tokens, features), outputs = x.shape, weight.shape[0]
    if y.numel() == 0:
        return
    drops = pair.drops
    separate = pair.present != 0 and (y_e is not None or drops or pair.dtype != x.dtype)
    config = gemm_config(
        tokens, x.dtype == torch.float32, separate, _arch(x.device),
        base_aligned=_aligned(x, weight, y), low_rank_aligned=pair.present == 0 or _aligned(s, *b),
    )  # fmt: skip
    gemm_kernel[(-(-tokens // config.block_m) * -(-outputs // config.block_n),)](
        x, weight, bias, s, *b, pair.routes, pair.seed if drops else None, y, y_e,
        tokens, outputs, features, *pair.ranks,
        *x.stride(), *weight.stride(), s.shape[1], *b[0].stride(), *b[1].stride(),
        *pair.thresholds, *pair.inverse_keep,
        PRESENT=pair.present, FANOUT=y_e is not None, SEPARATE=separate, DROPOUT=drops,
        BASE_PRECISION="ieee", LOW_RANK_PRECISION=_precision(x.dtype, pair.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages, **_OPTIONS,
    )  # fmt: skip


def _weight_grads(wide, narrow, pair: _Pair, needed, like, *, transposed: bool) -> tuple[Tensor | None, Tensor | None]:
    """``wide^T narrow`` over each adapter's rows, in the shapes of ``like``; None where not ``needed``.

    ``transposed``: the gradients are ``[rank, features]`` (dA), else ``[features, rank]`` (dB).
    """
    grads = [
        None if not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for need, t in zip(needed, like, strict=True)
    ]
    tokens, features = wide[0].shape
    active = [grad is not None and grad.numel() > 0 and bool(pair.present >> a & 1) for a, grad in enumerate(grads)]
    for grad, runs in zip(grads, active, strict=True):
        if grad is not None and (tokens == 0 or not runs):
            grad.zero_()
    if tokens == 0 or not any(active):
        return grads[0], grads[1]
    ranks = tuple(rank if runs else 0 for rank, runs in zip(pair.ranks, active, strict=True))
    # an adapter that is not wanted gets no program; any tensor stands in for its pointer
    outs = [g.t() if transposed else g for g in (grads[a] if active[a] else like[a].new_empty((0, 0)) for a in (0, 1))]
    config = grad_config(
        tokens, features, *ranks, pair.dtype == torch.float32, _arch(wide[0].device),
        aligned=_aligned(*wide, narrow, *like),
    )  # fmt: skip
    splits, total = config.splits, ranks[0] + ranks[1]
    parts = None if splits == 1 else narrow.new_empty((splits, features, total), dtype=_wide(narrow.dtype))
    targets = outs if parts is None else [parts[0], parts[0, :, ranks[0] :]]
    stretches = -(-tokens // config.stretch)
    grad_kernel[(-(-features // config.block_f), sum(-(-rank // config.block_r) for rank in ranks), splits)](
        *wide, narrow, narrow[:, pair.ranks[0] :], pair.routes, pair.seed if pair.drops else None, *targets,
        tokens, features, *ranks, -(-stretches // splits) * config.stretch,
        *wide[0].stride(), *wide[1].stride(), narrow.stride(0), *targets[0].stride(), *targets[1].stride(),
        features * total, *(pair.inverse_keep if parts is None else (1.0, 1.0)), *pair.thresholds,
        DROPOUT=pair.drops, PRECISION=_precision(wide[0].dtype, pair.dtype),
        BLOCK_F=config.block_f, BLOCK_R=config.block_r, BLOCK_T=config.block_t, STRETCH=config.stretch,
        num_warps=config.num_warps, num_stages=config.num_stages, **_OPTIONS,
    )  # fmt: skip
    if parts is not None:
        _reduce(parts, outs, ranks, pair.inverse_keep, pair.present, None)
    return grads[0], grads[1]


def _reduce(parts: Tensor, outs, ranks, scaling, present: int, routes: Tensor | None) -> None:
    """Add the parts in their order, scale, select rows where ``routes`` is given, round once into ``outs``."""
    splits, rows, total = parts.shape
    config = reduce_config()
    reduce_kernel[(-(-rows // config.block_l), sum(-(-rank // config.block_r) for rank in ranks))](
        parts, *outs, routes, rows, *ranks, splits, rows * total, total, *outs[0].stride(), *outs[1].stride(), *scaling,
        PRESENT=present, MASKED=routes is not None, BLOCK_L=config.block_l, BLOCK_R=config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages, **_OPTIONS,
    )  # fmt: skip


def _aligned(*tensors: Tensor) -> bool:
    """Whether kernels can read 16-byte words: Triton learns that from addresses, sizes and strides divisible by 16."""
    if INTERPRETING.value:
        return True  # it reads element by element in any case
    return all(
        t.data_ptr() % 16 == 0 and t.shape[-1] % 16 == 0 and all(step == 1 or step % 16 == 0 for step in t.stride())
        for t in tensors
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulator's dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _precision(x: torch.dtype, adapters: torch.dtype) -> str:
    """fp32 adapters next to a 16-bit ``x`` use tensor cores at fp32's accuracy class; all-fp32 problems plain fp32."""
    return "tf32x3" if adapters == torch.float32 and x != torch.float32 else "ieee"


def _threshold(probability: float) -> int:
    """The dropout threshold, a uint32, as the int32 of the same bits: one kernel type for every probability."""
    threshold = min(round(probability * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make ``x``'s device current; the interpreter alone runs on a CPU, and it alone takes float64."""
    if x.is_cuda:
        if x.dtype == torch.float64:
            raise DtypeError(
                'x must be float32, float16 or bfloat16 for impl="triton", got float64. Use impl="reference".'
            )
        return torch.cuda.device(x.device)
    if not INTERPRETING.value:
        raise ImplUnavailable(
            f'impl="triton" needs a CUDA tensor, got one on {x.device}. Use impl="auto", or set TRITON_INTERPRET=1 '
            "before Triton is imported to interpret the kernels."
        )
    return contextlib.nullcontext()


@functools.cache
def _arch_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_ARCH
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)
