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


if __name__ == "__main__":
    main(int(sys.argv[1]))
