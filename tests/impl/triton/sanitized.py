"""The program that runs under compute-sanitizer: every Triton kernel on shapes with tails, forward and backward.

``python sanitized.py cuda triton blas``: the device, then the implementations of the site group; ``blas`` takes its
inputs from the Triton producer. It prints ``done`` last; the sanitizer's exit status says the rest.
"""

from __future__ import annotations

import sys

import torch

from twn_kernels.ops import (
    LoRA,
    Norm,
    Projection,
    RoutePlan,
    dual_lora_group,
    dual_lora_linear,
    dual_lora_linear_fanout,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the layer and its adapters; the interpreter pays by the tile, so a CPU runs one.
DTYPES = {"cuda": ((BF16, BF16), (FP16, FP16), (BF16, FP32)), "cpu": ((BF16, BF16),)}
# Tokens on both sides of every row tile; features, outputs and ranks that fill no tile.
TOKENS = {"cuda": (1, 17, 67, 130), "cpu": (3,)}
FEATURES, OUTPUTS, RANKS = 72, (88, 24, 40), ((17, 5), (0, 16), (3, 0))


def main(device: str, impls: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    for dtype, adapters in DTYPES[device]:
        for tokens in TOKENS[device]:
            routes = (torch.arange(tokens) % 4).to(device, torch.int8)
            uniform = [RoutePlan.uniform("reasoning", tokens, device=device)] if device == "cuda" else []
            for plan in (RoutePlan.from_routes(routes), *uniform):
                _linears(device, dtype, adapters, tokens, plan)
                _groups(device, dtype, adapters, tokens, plan, impls)
    if device == "cuda":
        torch.cuda.synchronize()
    print("done")


def _linears(device, dtype, adapters, tokens, plan) -> None:
    x = _draw(device, dtype, tokens, FEATURES)
    projection = _projection(device, dtype, adapters, OUTPUTS[0], (17, 5))
    for dropout in ((0.3, 0.0), (0.0, 0.0)) if device == "cuda" else ((0.3, 0.0),):
        y = dual_lora_linear(x, *projection, plan, dropout=dropout, impl="triton")
        outputs = dual_lora_linear_fanout(x, *projection, plan, dropout=dropout, impl="triton")
        (y.sum() + sum(outputs).sum()).backward()


def _groups(device, dtype, adapters, tokens, plan, impls) -> None:
    wide = _draw(device, dtype, tokens, 2 * FEATURES)
    x, residual = _draw(device, dtype, tokens, FEATURES), _draw(device, dtype, tokens, OUTPUTS[0])
    norm = Norm(_draw(device, dtype, FEATURES), 1e-6)
    qkv = [_projection(device, dtype, adapters, out, ranks) for out, ranks in zip(OUTPUTS, RANKS, strict=True)]
    pair, one = [_projection(device, dtype, adapters, OUTPUTS[0], (17, 5)) for _ in range(2)], [qkv[0]]
    for impl in impls:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                outputs = [
                    *dual_lora_group(x, qkv, plan, norm=norm, impl=impl),
                    *dual_lora_group(wide, one, plan, gated=True, residual=residual, impl=impl),
                ]
                if not grad or device == "cuda":
                    outputs += dual_lora_group(x, pair, plan, norm=norm, swiglu=True, impl=impl)
                    outputs += dual_lora_group(x, one, plan, residual=residual, impl=impl)
            if grad:
                sum(y.sum() for y in outputs).backward()


def _projection(device, dtype, adapters, out: int, ranks: tuple[int, int]) -> Projection:
    loras = [
        LoRA(_draw(device, adapters, rank, FEATURES), _draw(device, adapters, out, rank), scaling) if rank else None
        for rank, scaling in zip(ranks, (0.5, -1.75), strict=True)
    ]
    return Projection(_draw(device, dtype, out, FEATURES).detach(), _draw(device, dtype, out), *loras)


def _draw(device, dtype, *shape) -> torch.Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(device, dtype).requires_grad_()


if __name__ == "__main__":
    main(sys.argv[1], tuple(sys.argv[2:]))
