"""The program that runs under compute-sanitizer: every kernel of the extension on shapes with tails.

``python sanitized.py cuda``: the device. It prints ``done`` last; the sanitizer's exit status says the rest. Any other
device takes the tests' stand-in for the extension, which shows that the program itself runs.
"""

from __future__ import annotations

import sys

import torch

from twn_kernels.impl.cuda import launch
from twn_kernels.ops import (
    LoRA,
    Norm,
    Projection,
    RoutePlan,
    dual_lora_group,
    dual_lora_linear,
    gate_scores,
    pool_queries,
)

BF16, FP16 = torch.bfloat16, torch.float16
# On both sides of every tile of rows; features, outputs and ranks that fill no tile.
TOKENS = (1, 7, 9, 17, 33, 64, 65, 130)
FEATURES, OUTPUTS, RANKS = 136, (88, 24, 41), ((17, 5), (0, 16), (200, 0))


@torch.no_grad()
def main(device: str) -> None:
    torch.manual_seed(0)
    for dtype in (BF16, FP16):
        for tokens in TOKENS:
            mixed = RoutePlan.from_routes((torch.arange(tokens) % 4).to(device, torch.int8))
            for plan in (mixed, RoutePlan.uniform("reasoning", tokens, device=device), None):
                _groups(device, dtype, tokens, plan)
    _chain(device)
    for dtype in (BF16, FP16, torch.float32):
        for rows in (1, 3, 37):
            _small(device, dtype, rows)
    if device == "cuda":
        torch.cuda.synchronize()
    print("done")


def _groups(device: str, dtype: torch.dtype, tokens: int, plan: RoutePlan | None) -> None:
    wide = _draw(device, dtype, tokens, 2 * FEATURES)
    x, residual = _draw(device, dtype, tokens, FEATURES), _draw(device, dtype, tokens, OUTPUTS[0])
    norm = Norm(_draw(device, dtype, FEATURES), 1e-6)
    qkv = [_projection(device, dtype, out, ranks) for out, ranks in zip(OUTPUTS, RANKS, strict=True)]
    pair, one = [_projection(device, dtype, OUTPUTS[0], (17, 5)) for _ in range(2)], [qkv[0]]
    dual_lora_group(x, qkv, plan, norm=norm, impl="cuda")
    dual_lora_group(wide, one, plan, gated=True, residual=residual, impl="cuda")
    dual_lora_group(x, pair, plan, norm=norm, swiglu=True, impl="cuda")
    dual_lora_group(x, one, plan, residual=residual, impl="cuda")
    if plan is not None:
        dual_lora_linear(x, *one[0], plan, impl="cuda")


def _chain(device: str) -> None:
    """Launches that wait for each other on the device alone."""
    x, plan = _draw(device, BF16, 5, FEATURES), RoutePlan.uniform("both", 5, device=device)
    for layer in [_projection(device, BF16, FEATURES, (17, 5)) for _ in range(4)]:
        (x,) = dual_lora_group(x, [layer], plan, impl="cuda")


def _small(device: str, dtype: torch.dtype, rows: int) -> None:
    """Gate, pooling, and what stands in front of a prefill, on rows of whole and of broken words."""
    for width in (136, 84):
        states, last = _draw(device, dtype, rows, 3, width), _draw(device, dtype, rows, 21)
        norm, head = (_draw(device, dtype, 70), None), (_draw(device, dtype, 2, 70), _draw(device, dtype, 2))
        layers = [(_draw(device, dtype, 70, width + 21), _draw(device, dtype, 70)), norm, head]
        gate_scores(states, layers, last=last, threshold=0.5, impl="cuda")
        pool_queries(states, impl="cuda")
        if dtype != torch.float32:
            x = _draw(device, dtype, rows, 2 * width)
            launch._op("front")(x, _draw(device, torch.float32, 2 * width), 1e-6, False)
            launch._op("front")(x, None, 0.0, True)


def _projection(device: str, dtype: torch.dtype, out: int, ranks: tuple[int, int]) -> Projection:
    loras = [
        LoRA(_draw(device, dtype, rank, FEATURES), _draw(device, dtype, out, rank), scaling) if rank else None
        for rank, scaling in zip(ranks, (0.5, -1.75), strict=True)
    ]
    return Projection(_draw(device, dtype, out, FEATURES), _draw(device, dtype, out), *loras)


def _draw(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(device, dtype)


if __name__ == "__main__":
    main(sys.argv[1])
