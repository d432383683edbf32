"""The small kernels' own programs on a CPU: what a GPU would compute, thread by thread in the same order."""

from __future__ import annotations

import ctypes

import torch
from host_program import library

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POOLINGS = ("mean", "last", "first")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
GATE_REPORT = 0x47415445

_Strides = ctypes.c_int64 * 3


class _Step(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("pitch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("inputs", "out", "kind", "weight_number", "bias_number", "activated")),
    ]  # fmt: skip


class _Side(ctypes.Structure):
    _fields_ = [
        ("states", ctypes.c_void_p), ("strides", _Strides),
        *((name, ctypes.c_int32) for name in ("number", "count", "width")),
    ]  # fmt: skip


def pool_queries(states: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    """As the op, for fp32, fp16 and bf16."""
    batch, queries, hidden = states.shape
    first, count = {"mean": (0, queries), "last": (queries - 1, 1), "first": (0, 1)}[pooling]
    out = torch.full((batch, hidden), torch.nan)
    library("small").pool(
        _pointer(states), NUMBERS[states.dtype], _Strides(*states.stride()), batch, first, count, hidden,
        int(normalize), _pointer(out),
    )  # fmt: skip
    return out


def front(x: torch.Tensor, norm_weight: torch.Tensor | None, eps: float, *, one_warp: bool) -> torch.Tensor:
    """RMSNorm, or silu(gate) * up without a weight; ``one_warp``: as for short rows."""
    features = x.shape[1] if norm_weight is not None else x.shape[1] // 2
    z = torch.full((x.shape[0], features), torch.nan, dtype=x.dtype)
    library("small").front(
        _pointer(x), ctypes.c_int64(x.stride(0)), ctypes.c_int64(x.shape[0]), features, NUMBERS[x.dtype],
        _pointer(norm_weight), int(norm_weight is not None and norm_weight.dtype == torch.float32),
        ctypes.c_float(eps), _pointer(z), int(one_warp),
    )  # fmt: skip
    return z


def gate_scores(features, last, steps, activation, threshold=None, *, blocks=3, launches=1, deaf=False):
    """Scores, decisions (or None) and the reported code, by ``blocks`` threads; ``deaf``: every wait runs out."""
    states = features if features.dim() == 3 else features[:, None]
    sides = (_Side * 2)(_side(states), _Side() if last is None else _side(last[:, None]))
    own = (_Step * len(steps))(*(_step(*step) for step in steps))
    scores = torch.full((features.shape[0],), torch.nan)
    think = torch.full((features.shape[0],), 7, dtype=torch.uint8)
    run = library("small").gate
    run.restype = ctypes.c_uint32
    report = run(
        sides, features.shape[0], own, len(steps), ACTIVATIONS.index(activation), ctypes.c_double(threshold or 0.0),
        _pointer(scores), _pointer(None if threshold is None else think), blocks, launches, int(deaf),
    )  # fmt: skip
    return scores, None if threshold is None else think, report


def _side(states: torch.Tensor) -> _Side:
    return _Side(states.data_ptr(), _Strides(*states.stride()), NUMBERS[states.dtype], states.shape[1], states.shape[2])


def _step(weight, bias, activated) -> _Step:
    kind = 0 if weight.dim() == 2 else 1 if bias is not None else 2
    number = 0 if bias is None else NUMBERS[bias.dtype]
    address = None if bias is None else bias.data_ptr()
    return _Step(
        weight.data_ptr(), address, weight.stride(0), weight.shape[-1], weight.shape[0], kind, NUMBERS[weight.dtype],
        number, int(activated),
    )  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
