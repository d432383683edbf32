"""What the machine can do, measured in the same run: the denominators of every percentage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from twn_kernels.benchmarking import environment
from twn_kernels.benchmarking.timers import CannotCapture, Timed, Timer, interleave

__all__ = ["PITCHES", "measure"]

PITCHES = (0, 64, 128)  # columns that K-augmentation adds for one, or for both adapters of rank 64
_NODES = 200


class _Sizes(NamedTuple):
    """What is measured with, by device."""

    copy_bytes: int
    matmul: int
    gemms: tuple[tuple[int, int, int], ...]  # tokens, out_features, in_features
    dtype: torch.dtype


# 1 GiB is far above every cache; the GEMMs are sites of the 8B and 4B models in prefill and decode.
_GPU = _Sizes(
    2**30, 8192, ((4096, 6144, 4096), (4096, 4096, 12288), (4096, 2560, 9728), (16, 6144, 4096)), torch.bfloat16
)
_CPU = _Sizes(2**20, 128, ((16, 96, 64),), torch.float32)


def measure(device: torch.device | str, *, seconds: float = 10.0, rounds: int = 30) -> dict[str, Any]:
    """Measure the roofs.

    Args:
        device: a GPU; a CPU gives numbers of the same shape from small sizes.
        seconds: for all of them together, roughly.
        rounds: samples of each at most.

    Returns:
        ``copy_gb_per_s``: a large device-to-device copy, bytes read plus bytes written. ``matmul_tflops``: a large
        square product in bf16 (fp32 on a CPU). ``clocks_after_matmul``: of the GPU under that load.
        ``launch_gap_us``: one more launch inside a graph (on a CPU: one small op). ``pitched_gemm``: the vendor's GEMM
        at ``in_features`` + 0, 64 and 128 columns, operands with a pitched leading dimension, each ``tokens``,
        ``out_features``, ``in_features``, ``extra``, ``time_us`` (median), ``over_unpitched`` (time over that of the
        plain layout) and ``ideal_over_unpitched`` (what the added columns alone cost).
    """
    timer = Timer(device)
    sizes = _GPU if timer.on_gpu else _CPU
    share = seconds / (3 + len(sizes.gemms))
    return {
        "copy_gb_per_s": _copy_gb_per_s(timer, sizes.copy_bytes, share, rounds),
        "matmul_tflops": _matmul_tflops(timer, sizes, share, rounds),
        "clocks_after_matmul": environment.clocks(device),
        "launch_gap_us": _launch_gap_us(timer, share, rounds),
        "pitched_gemm": [
            entry for shape in sizes.gemms for entry in _pitched(timer, shape, sizes.dtype, share, rounds)
        ],
    }


def _median_us(timer: Timer, call: Callable[[], object], seconds: float, rounds: int) -> float:
    timed = timer.prepare([call], "never")
    return interleave(timer, {"roof": timed}, seconds=seconds, rounds=rounds)["roof"].median


def _copy_gb_per_s(timer: Timer, size: int, seconds: float, rounds: int) -> float:
    source = torch.randn(size // 4, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / _median_us(timer, lambda: target.copy_(source), seconds, rounds) / 1e3


def _matmul_tflops(timer: Timer, sizes: _Sizes, seconds: float, rounds: int) -> float:
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=timer.device).to(sizes.dtype) for _ in range(2))
    return 2 * n**3 / _median_us(timer, lambda: a @ b, seconds, rounds) / 1e6


def _launch_gap_us(timer: Timer, seconds: float, rounds: int) -> float:
    """What one more small kernel costs in a chain of dependent ones."""
    value = torch.ones(32, device=timer.device)

    def chain() -> None:
        for _ in range(_NODES):
            value.mul_(1.0)

    try:
        timed = timer.prepare([chain], "always" if timer.on_gpu else "never")
    except CannotCapture:
        timed = timer.prepare([chain], "never")
    per_node = Timed(timed.run, timed.calls * _NODES, timed.in_graph)
    return interleave(timer, {"chain": per_node}, seconds=seconds, rounds=rounds)["chain"].median


def _pitched(
    timer: Timer, shape: tuple[int, int, int], dtype: torch.dtype, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    tokens, out_features, in_features = shape
    widest = in_features + max(PITCHES)
    x = torch.randn(tokens, widest, device=timer.device).to(dtype)
    weight = (torch.randn(out_features, widest, device=timer.device) * in_features**-0.5).to(dtype)
    y = torch.empty(tokens, out_features, dtype=dtype, device=timer.device)

    def product(width: int, pitched: bool) -> Callable[[], object]:
        left, right = x[:, :width], weight[:, :width]
        if not pitched:
            left, right = left.contiguous(), right.contiguous()
        return lambda: torch.mm(left, right.t(), out=y)

    # "plain" is the stock layout; a pitch of 0 extra columns already has the wider leading dimension.
    calls = {"plain": product(in_features, False)} | {extra: product(in_features + extra, True) for extra in PITCHES}
    timed = {name: timer.prepare([call], "where_possible") for name, call in calls.items()}
    times = interleave(timer, timed, seconds=seconds, rounds=rounds)
    plain = times["plain"].median
    return [
        {
            "tokens": tokens,
            "out_features": out_features,
            "in_features": in_features,
            "extra": extra,
            "time_us": times[extra].median,
            "over_unpitched": times[extra].median / plain,
            "ideal_over_unpitched": (in_features + extra) / in_features,
        }
        for extra in PITCHES
    ]
