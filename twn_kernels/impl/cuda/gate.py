"""The gate in one launch of the extension: pool, MLP, sigmoid, threshold.

The kernel reads weights as they lie; one that it cannot read is refused by name, never copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from twn_kernels.impl.cuda.pooling import dtype_refusal, gradient_refusal, op

__all__ = ["MAX_STEPS", "gate_scores", "refusal"]

MAX_STEPS = 16  # of a launch: kMaxSteps in csrc/include/twn/small/gate.h
_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")  # by their number there


def refusal(features: Tensor, last: Tensor | None, steps: Sequence[tuple[Tensor, Tensor | None, bool]]) -> str | None:
    """Why the kernel cannot take this call, whatever the device; None where it can."""
    if len(steps) > MAX_STEPS:
        return f"its kernel takes at most {MAX_STEPS} layers and norms, and layers has {len(steps)}."
    tensors = [("features", features), ("last", last)]
    for place, (weight, bias, _) in enumerate(steps):
        tensors += [(f"layers[{place}].weight", weight), (f"layers[{place}].bias", bias)]
    for place, (name, tensor) in enumerate(tensors):
        if tensor is None:
            continue
        if (reason := dtype_refusal(name, tensor)) is not None:
            return reason
        is_weight = place > 1
        if is_weight and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return (
                f"its kernel reads {name} with a contiguous last dimension, and its strides are "
                f"{tuple(tensor.stride())}. Store it so: .contiguous()."
            )
    return gradient_refusal(tensors)


def gate_scores(
    features: Tensor,
    last: Tensor | None,
    steps: Sequence[tuple[Tensor, Tensor | None, bool]],
    activation: str,
    threshold: float | None,
) -> tuple[Tensor, Tensor | None]:
    """As ``impl.reference``, in one launch on the current stream.

    Raises:
        ImplUnavailable: the kernel does not run on this device.
    """
    run = op("gate_scores", features.device)
    states = features if features.dim() == 3 else features[:, None]
    none = features.new_empty(0)
    scores, think = run(
        states,
        last,
        [weight for weight, _, _ in steps],
        [none if bias is None else bias for _, bias, _ in steps],
        [int(activated) for _, _, activated in steps],
        _ACTIVATIONS.index(activation),
        threshold,
    )
    return scores, None if threshold is None else think
