"""Run the launchers through Triton's real JIT for a GPU that is not there: bind, specialise, compile, but never launch.

    python jit_process.py ARCH        prints one line a launch: kernel and grid

A driver that only names its target stands in for CUDA's, and every launch becomes Triton's own warm-up. Must run
without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NamedTarget:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(arch: int) -> None:
    driver.set_active(NamedTarget(arch))
    launch_on_gpu = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = launch_on_gpu(self, *args, grid=grid, warmup=True, **options)
        print(self.__name__, *grid, flush=True)
        return compiled

    JITFunction.run = compile_only
    from twn_kernels.impl.triton import launch

    launch._arch = lambda device: arch
    launch._device = lambda x: contextlib.nullcontext()
    for tokens, dtype, adapter_dtype in (
        (1, torch.bfloat16, torch.bfloat16),
        (300, torch.float16, torch.float32),
        (0, torch.bfloat16, torch.bfloat16),
    ):
        call_all(launch, tokens, dtype, adapter_dtype)
        call_group(tokens, dtype, adapter_dtype)


def call_all(launch, tokens: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    features, outputs, ranks = 96, 81, (16, 5)
    x, weight = torch.zeros(tokens, features, dtype=dtype), torch.zeros(outputs, features, dtype=dtype)
    bias, routes = torch.zeros(outputs, dtype=dtype), torch.zeros(tokens, dtype=torch.int8)
    loras = [torch.zeros(shape, dtype=adapter_dtype) for rank in ranks for shape in ((rank, features), (outputs, rank))]
    for dropout, seed in ((0.0, None), (0.1, torch.tensor([3]))):
        tail = (routes, 3, dropout, dropout, seed)
        y, s = launch.forward(x, weight, bias, *loras, 0.5, 2.0, *tail)
        launch.fanout(x, weight, bias, *loras, 0.5, 2.0, *tail)
        launch.backward(y, None, None, x, weight, *loras, 0.5, 2.0, s, *tail, (True,) * 6)


def call_group(tokens: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """The producer with each front and kind of routes, a split sum among them, and the backward pass."""
    from twn_kernels.impl.triton import group_backward, produce_

    features, routes = 96, torch.zeros(tokens, dtype=torch.int8)
    widths, ranks = (81, 16, 7), ((16, 5), (0, 1), (3, 0))
    A_r, A_e = ([torch.zeros(pair[a], features, dtype=adapter_dtype) for pair in ranks] for a in (0, 1))
    B_r, B_e = (
        [torch.zeros(n, pair[a], dtype=adapter_dtype) for n, pair in zip(widths, ranks, strict=True)] for a in (0, 1)
    )
    s, columns, scaling = torch.zeros(tokens, 25, dtype=adapter_dtype), [0, 16, 21, 21, 22, 25], [0.5, 1.0, 2.0]
    x, x_out = torch.zeros(tokens, 2 * features, dtype=dtype), torch.zeros(tokens, features, dtype=dtype)
    norm = (x[:, :features], torch.ones(features, dtype=dtype), 1e-6, False)
    for front, rows, present in ((norm, routes, 3), ((x, None, 0.0, True), None, 1), (norm, None, 0)):
        produce_(*front, A_r, A_e, scaling, scaling, rows, present, x_out, s, columns)
    weights = [torch.zeros(n, features, dtype=dtype) for n in widths]
    dy, needs = torch.zeros(tokens, sum(widths), dtype=dtype), (True, *([[True] * len(widths)] * 5))
    for rows, present in ((routes, 3), (None, 0)) if tokens == 1 else ((routes, 3),):
        group_backward(dy, x_out, weights, A_r, B_r, A_e, B_e, scaling, scaling, s, rows, present, needs)
    if tokens == 1:
        long, A = torch.zeros(tokens, 12288, dtype=dtype), [torch.zeros(9, 12288, dtype=adapter_dtype)]
        produce_(long, None, 0.0, False, A, A, [1.0], [1.0], routes, 3, None, s, [0, 9])


if __name__ == "__main__":
    main(int(sys.argv[1]))
