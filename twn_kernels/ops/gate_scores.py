"""The gate as a function: features and the layers of a small MLP in, a score in [0, 1] an input out, and a decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twn_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError, did_you_mean, quoted
from twn_kernels.impl.reference import gate as reference
from twn_kernels.ops.small_ops import gate_on_cuda, gate_refusal, takes_cuda

__all__ = ["ACTIVATIONS", "GateStep", "check_activation", "gate_scores"]

ACTIVATIONS = tuple(reference.ACTIVATIONS)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class GateStep(NamedTuple):
    """One step of the gate: a linear layer or a norm.

    Attributes:
        weight: ``[out_features, in_features]`` of a linear layer, or ``[width]`` of a norm.
        bias: ``[out_features]`` or ``[width]``; None where there is none. A norm without a bias is an RMS norm.
        activated: whether the activation follows this step; None: it does where the next step is a linear layer and
            this step is, or comes after, another one.
    """

    weight: Tensor
    bias: Tensor | None = None
    activated: bool | None = None


def gate_scores(
    features: Tensor,
    layers: Sequence[GateStep | tuple[Tensor, Tensor | None]],
    *,
    activation: str = "gelu",
    last: Tensor | None = None,
    threshold: float | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """How much each input calls for thinking, by a small MLP.

    With one logit the score is ``sigmoid(logit)``; with two it is ``softmax(logits)[1]``: the second means think.

    Args:
        features: ``[batch, in_features]``, or ``[batch, num_queries, hidden]``, of which the MLP reads the mean over
            the queries; fp32, fp16, bf16 (or fp64); any strides.
        layers: :class:`GateStep` or plain ``(weight, bias)`` in order, on the device of ``features``; any of the
            dtypes above. Each reads what the one before it writes; the last is linear with 1 or 2 outputs.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        last: ``[batch, width]``, which the MLP reads after the features; None: nothing. As features otherwise.
        threshold: in [0, 1]; also return which inputs reach it.
        impl: ``"auto"`` (now the reference), ``"reference"`` or ``"cuda"``: one launch for all of it, for inference on
            a GPU with tensors of 16 or 32 bits. A named one never falls back. Of ``TWN_IMPL``, ``auto`` follows
            ``cuda`` and, as other names have no implementation here, takes the reference for them.

    Returns:
        ``[batch]`` in fp32 (fp64 for fp64 features), in [0, 1]; a row with NaN has a score of NaN, other rows do not.
        With a threshold, a pair: the scores, and bool ``[batch]``: true where the score is the threshold or more.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument breaks the contract above.
        ImplUnavailable: ``"cuda"`` was asked for and cannot serve the call; the message says why.

    Numerics: fp32 arithmetic whatever the dtypes, also under autocast; layer norms use an epsilon of 1e-5, RMS norms of
    1e-6. Differentiable in: features, last and every weight and bias; ``"cuda"`` is not.
    Graph-safe: yes. Synchronises: never.

    Example:
        >>> import torch
        >>> from twn_kernels.ops import gate_scores
        >>> layers = [(torch.randn(8, 16), torch.zeros(8)), (torch.randn(1, 8), None)]
        >>> gate_scores(torch.randn(3, 16), layers).shape
        torch.Size([3])
    """
    check_activation(activation)
    _check_features(features, last)
    _check_threshold(threshold)
    steps = _steps(layers, features, last)
    resolved = [
        (step.weight, step.bias, _default(steps, index) if step.activated is None else bool(step.activated))
        for index, step in enumerate(steps)
    ]
    cuda = takes_cuda(impl, features.device, lambda: gate_refusal(features, last, resolved))
    run = gate_on_cuda if cuda else reference.gate_scores
    scores, think = run(features, last, resolved, activation, threshold)
    return scores if think is None else (scores, think)


def check_activation(activation: object) -> None:
    """Raise OptionError unless ``activation`` is one of :data:`ACTIVATIONS`."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise OptionError(
            f"activation must be one of {quoted(ACTIVATIONS)}, got {activation!r}."
            f"{did_you_mean(activation, ACTIVATIONS)}"
        )


def _default(steps: Sequence[GateStep], index: int) -> bool:
    """Between any two linear layers the activation comes once, right before the second of them."""
    before = any(step.weight.dim() == 2 for step in steps[: index + 1])
    return before and index + 1 < len(steps) and steps[index + 1].weight.dim() == 2


def _check_features(features: Tensor, last: Tensor | None) -> None:
    if not isinstance(features, Tensor):
        raise DtypeError(f"features must be a tensor [batch, in_features], got {type(features).__name__}.")
    if features.dim() not in (2, 3) or 0 in features.shape[1:-1]:
        raise ShapeError(
            "features must be [batch, in_features] or [batch, num_queries, hidden] with one query or more, "
            f"got {list(features.shape)}."
        )
    if features.dtype not in _FLOATS:
        raise DtypeError(f"features must be float32, float16, bfloat16 or float64, got {features.dtype}.")
    if last is None:
        return
    if not isinstance(last, Tensor):
        raise DtypeError(f"last must be a tensor [batch, width] or None, got {type(last).__name__}.")
    if last.dim() != 2 or last.shape[0] != features.shape[0] or last.shape[1] == 0:
        raise ShapeError(f"last must be [{features.shape[0]}, width] (batch of features), got {list(last.shape)}.")
    if last.dtype not in _FLOATS:
        raise DtypeError(f"last must be float32, float16, bfloat16 or float64, got {last.dtype}.")
    if last.device != features.device:
        raise DeviceError(
            f"last must be on the device of features ({features.device}), got {last.device}. Move one of them."
        )


def _check_threshold(threshold: float | None) -> None:
    if threshold is None:
        return
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)
    if not is_number or not 0.0 <= threshold <= 1.0:
        raise OptionError(f"threshold must be a number in [0, 1] or None, got {threshold!r}.")


def _steps(layers: Sequence, features: Tensor, last: Tensor | None) -> list[GateStep]:
    if not isinstance(layers, Sequence) or not layers:
        got = "none" if isinstance(layers, Sequence) else type(layers).__name__
        raise ShapeError(f"layers must be a sequence of one or more (weight, bias) steps, got {got}.")
    steps, width, source = [], features.shape[-1] + (0 if last is None else last.shape[1]), "features"
    read = "in_features of features" if last is None else "features, then last"
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        if not isinstance(layer, tuple) or not 1 <= len(layer) <= 3:
            raise DtypeError(f"{name} must be a GateStep or a tuple (weight, bias), got {_kind(layer)}.")
        step = GateStep(*layer)
        _check_step(step, name, width, read if index == 0 else f"what {source} writes", features)
        steps.append(step)
        width, source = step.weight.shape[0], name
    last = steps[-1]
    if last.weight.dim() != 2 or width not in (1, 2):
        raise ShapeError(
            f"the last of layers must be linear with 1 output (sigmoid) or 2 (softmax; the second means think), "
            f"got a {source}.weight of {list(last.weight.shape)}."
        )
    if last.activated:
        raise OptionError(f"{source}.activated must be False or None: its outputs are the logits, got True.")
    return steps


def _check_step(step: GateStep, name: str, width: int, reads: str, features: Tensor) -> None:
    weight, bias = step.weight, step.bias
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and part == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name}.{part} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype not in _FLOATS:
            raise DtypeError(f"{name}.{part} must be float32, float16, bfloat16 or float64, got {tensor.dtype}.")
        if tensor.device != features.device:
            raise DeviceError(
                f"{name}.{part} must be on the device of features ({features.device}), got {tensor.device}. "
                "Move one of them."
            )
    if weight.dim() not in (1, 2) or weight.shape[-1] != width or 0 in weight.shape:
        raise ShapeError(
            f"{name}.weight must be [out_features, {width}] of a linear layer or [{width}] of a norm ({reads}), none "
            f"of them 0, got {list(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"{name}.bias must be [{weight.shape[0]}] (first dimension of {name}.weight), got {list(bias.shape)}."
        )


def _kind(layer: object) -> str:
    return f"a tuple of {len(layer)}" if isinstance(layer, tuple) else type(layer).__name__
