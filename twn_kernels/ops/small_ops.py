"""Which of two implementations serves the gate and the pooling: the reference, or one launch of the extension.

A traced call meets the extension behind a registered op, which finds out what the device can do when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twn_kernels.errors import ImplUnavailable, OptionError, did_you_mean, quoted
from twn_kernels.ops.choice import check_name
from twn_kernels.settings import ENV_IMPL, impl_override

__all__ = ["SMALL_IMPLS", "check_impl", "gate_on_cuda", "gate_refusal", "pool_on_cuda", "pool_refusal", "takes_cuda"]

SMALL_IMPLS = ("auto", "cuda", "reference")

_LIBRARY = torch.library.Library("twn", "FRAGMENT")
_LIBRARY.define("pool_queries_cuda(Tensor states, str pooling, bool normalize) -> Tensor")
_LIBRARY.define(
    "gate_scores_cuda(Tensor features, Tensor? last, Tensor[] weights, Tensor?[] biases, bool[] activated, "
    "str activation, float? threshold) -> (Tensor, Tensor)"
)


def takes_cuda(impl: str, device: torch.device, refusal: Callable[[], str | None]) -> bool:
    """Whether the extension serves a call; ``False`` means the reference.

    ``"auto"`` takes the reference: nothing was measured. Where ``TWN_IMPL`` is ``"cuda"``, it asks for that. ``"blas"``
    and ``"triton"`` name no implementation of these ops, so there ``TWN_IMPL`` leaves them to the reference.

    Args:
        impl: as the op takes it.
        device: of its tensors.
        refusal: why the kernel cannot take the call, whatever the device.

    Raises:
        OptionError: no such implementation.
        ImplUnavailable: the extension was asked for and cannot serve the call.
    """
    check_impl(impl)
    source = "impl"
    if impl == "auto":
        impl, source = _override(), ENV_IMPL
    if impl != "cuda":
        return False
    reason = refusal()
    if reason is None and not torch.compiler.is_compiling():
        from twn_kernels.impl.cuda import pooling

        reason = pooling.device_refusal(device)
    if reason is not None:
        other = 'use impl="auto"' if source == "impl" else f'unset {ENV_IMPL}, or use impl="reference"'
        raise ImplUnavailable(f'{source}="cuda" was asked for, but {reason} Or {other} (now: reference).')
    return True


def check_impl(impl: object) -> None:
    """Raise OptionError unless ``impl`` is one of :data:`SMALL_IMPLS`."""
    if not isinstance(impl, str) or impl not in SMALL_IMPLS:
        raise OptionError(
            f"impl must be one of {quoted(SMALL_IMPLS)} for this op, got {impl!r}.{did_you_mean(impl, SMALL_IMPLS)}"
        )


def pool_refusal(states: Tensor) -> str | None:
    """Why the extension cannot pool these states, whatever the device; None where it can."""
    from twn_kernels.impl.cuda import pooling

    return pooling.refusal(states)


def gate_refusal(features: Tensor, last: Tensor | None, steps: Sequence) -> str | None:
    """Why the extension cannot run this gate, whatever the device; None where it can."""
    from twn_kernels.impl.cuda import gate

    return gate.refusal(features, last, steps)


def pool_on_cuda(states: Tensor, pooling: str, normalize: bool) -> Tensor:
    """One launch of the extension."""
    run = torch.ops.twn.pool_queries_cuda if torch.compiler.is_compiling() else _pool
    return run(states, pooling, normalize)


def gate_on_cuda(
    features: Tensor,
    last: Tensor | None,
    steps: Sequence[tuple[Tensor, Tensor | None, bool]],
    activation: str,
    threshold: float | None,
) -> tuple[Tensor, Tensor | None]:
    """One launch of the extension."""
    run = torch.ops.twn.gate_scores_cuda if torch.compiler.is_compiling() else _gate
    weights, biases, activated = ([step[part] for step in steps] for part in range(3))
    scores, think = run(features, last, weights, biases, activated, activation, threshold)
    return scores, None if threshold is None else think


def _override() -> str:
    override = impl_override() or "auto"
    check_name(override, ENV_IMPL)
    return override


def _pool(states: Tensor, pooling: str, normalize: bool) -> Tensor:
    from twn_kernels.impl.cuda import pooling as cuda

    return cuda.pool_queries(states, pooling, normalize)


def _gate(features, last, weights, biases, activated, activation, threshold) -> tuple[Tensor, Tensor]:
    from twn_kernels.impl.cuda import gate

    steps = list(zip(weights, biases, activated, strict=True))
    scores, think = gate.gate_scores(features, last, steps, activation, threshold)
    return scores, features.new_empty(0, dtype=torch.bool) if think is None else think


def _fake_pool(states, pooling, normalize):
    return states.new_empty((states.shape[0], states.shape[2]), dtype=torch.float32)


def _fake_gate(features, last, weights, biases, activated, activation, threshold):
    batch = features.shape[0]
    decisions = features.new_empty(0 if threshold is None else batch, dtype=torch.bool)
    return features.new_empty(batch, dtype=torch.float32), decisions


for _name, _kernel, _fake in (("pool_queries_cuda", _pool, _fake_pool), ("gate_scores_cuda", _gate, _fake_gate)):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"twn::{_name}", _fake, lib=_LIBRARY)
