"""Run the launcher of a site group through Triton's real JIT for a GPU that is not there, and name what it compiled.

    python group_jit_process.py ARCH

Prints one line a launch of the product: its grid, then which of ``MARKS`` its PTX holds. See ``jit_process``.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from jit_process import NamedTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MARKS = {
    "descriptors": "cp.async.bulk.tensor",
    "waits": "griddepcontrol.wait",
    "releases": "griddepcontrol.launch_dependents",
    "prefetches": "prefetch.global.L2",
}
RANKS = ((16, 16), (5, 0), (0, 1))


def main(arch: int) -> None:
    driver.set_active(NamedTarget(arch))
    launch_on_gpu = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = launch_on_gpu(self, *args, grid=grid, warmup=True, **options)
        if self.__name__ == "group_kernel":
            marks = [name for name, text in MARKS.items() if text in compiled.asm["ptx"]]
            print(*grid, "pdl" if options["launch_pdl"] else "", *marks, flush=True)
        return compiled

    JITFunction.run = compile_only
    from twn_kernels.impl.triton import group_product, launch

    launch._arch = lambda device: arch
    launch._device = lambda x: contextlib.nullcontext()
    group_product._processors = lambda device: 132
    bf16, fp32 = torch.bfloat16, torch.float32
    call(group_product, 1, (96, 32, 32), bf16, bf16, bias=True)
    call(group_product, 8192, (96, 32, 32), bf16, bf16, bias=True)
    call(group_product, 300, (81, 81), torch.float16, fp32, swiglu=True, front="norm")
    call(group_product, 40, (1,), fp32, fp32, residual=True, present=1, front="gated")
    call(group_product, 7, (16, 16), bf16, bf16, present=0)
    ones = {"features": 1, "ranks": ((1, 1),) * 3}  # Triton makes constants of sizes and strides of 1
    call(group_product, 5, (1, 1, 1), bf16, bf16, bias=True, **ones)
    call(group_product, 5, (1, 1), bf16, bf16, swiglu=True, **ones)
    call(group_product, 0, (16,), bf16, bf16)


def call(
    group_product, tokens, widths, dtype, adapters, *,
    bias=False, swiglu=False, residual=False, present=3, front="", features=96, ranks=RANKS,
) -> None:  # fmt: skip
    count = len(widths)

    def zeros(*shape, dtype=dtype):
        return torch.zeros(*shape, dtype=dtype)

    A = [[zeros(pair[a], features, dtype=adapters) for pair in ranks[:count]] for a in (0, 1)]
    B = [[zeros(n, len(A[a][i]), dtype=adapters) for i, n in enumerate(widths)] for a in (0, 1)]
    group_product.group(
        zeros(tokens, features * (2 if front == "gated" else 1)), zeros(features) if front == "norm" else None, 1e-6,
        front == "gated", [zeros(n, features) for n in widths], [zeros(n) if bias else None for n in widths],
        A[0], B[0], A[1], B[1], [0.5] * count, [2.0] * count,
        torch.zeros(tokens, dtype=torch.int8) if present == 3 else None, present, swiglu,
        zeros(tokens, widths[0]) if residual else None,
    )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
