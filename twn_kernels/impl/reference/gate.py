"""The gate, written to be read: a small MLP over one row of features an input, down to a score in [0, 1]."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

# No checkpoint states an epsilon: torch.nn.LayerNorm's default, and the usual one of the RMS norms of language models.
_LAYER_NORM_EPS = 1e-5
_RMS_NORM_EPS = 1e-6


def gate_scores(
    features: Tensor,
    last: Tensor | None,
    steps: Sequence[tuple[Tensor, Tensor | None, bool]],
    activation: str,
    threshold: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores ``[batch]`` in fp32 (fp64 for fp64), and which of them reach ``threshold`` (None without one).

    ``features``: ``[batch, in_features]``, or ``[batch, vectors, width]``, whose mean is read; ``last`` follows them.
    ``steps``: ``(weight, bias, activated)`` in order; a 2-D weight is a linear layer, a 1-D weight a norm, without a
    bias an RMS norm. ``activated``: the activation follows.
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    with _without_autocast(features.device.type):
        x = features.to(wide)
        x = x.mean(dim=1) if x.dim() == 3 else x
        x = x if last is None else torch.cat([x, last.to(wide)], dim=1)
        for weight, bias, activated in steps:
            x = _step(x, weight.to(wide), None if bias is None else bias.to(wide))
            x = ACTIVATIONS[activation](x) if activated else x
        # The softmax of two logits is the sigmoid of their difference, which stays right where one of them is infinite.
        scores = torch.sigmoid(x[:, 0] if x.shape[1] == 1 else x[:, 1] - x[:, 0])
    # In fp64, so that a threshold which fp32 does not hold is not rounded towards the score.
    return scores, None if threshold is None else scores.double() >= threshold


def _step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, _RMS_NORM_EPS)
    return F.layer_norm(x, weight.shape, weight, bias, _LAYER_NORM_EPS)


def _without_autocast(kind: str):
    """Autocast would round the linear layers to 16 bit; a gate decides by small differences."""
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()
