"""Both adapters' results for the same tokens, with the base product computed once."""

from __future__ import annotations

import math

from torch import Tensor

from twn_kernels.ops import schema
from twn_kernels.ops.dual_lora_linear import autocast_like_linear, flat_arguments
from twn_kernels.ops.lora import LoRA
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.ops.validation import check_call, check_kinds


def dual_lora_linear_fanout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reasoning: LoRA | None,
    embedding: LoRA | None,
    plan: RoutePlan | None = None,
    *,
    dropout: tuple[float, float] = (0.0, 0.0),
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The layer's output under ``reasoning`` and its output under ``embedding``, sharing one base product.

    ::

        y_reasoning[t] = weight @ x[t] + bias + scaling_r * B_r @ (A_r @ x[t])    where plan.routes[t] has reasoning
        y_embedding[t] = weight @ x[t] + bias + scaling_e * B_e @ (A_e @ x[t])    where plan.routes[t] has embedding

    A token whose route lacks an adapter gets the base layer in that adapter's output.

    Args:
        x, weight, bias, reasoning, embedding, dropout, impl: as in :func:`dual_lora_linear`.
        plan: which tokens each adapter acts on; None: both adapters on every token.

    Returns:
        Two tensors ``[..., out_features]`` in ``x.dtype``.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError, ImplUnavailable: as in :func:`dual_lora_linear`.

    Numerics, differentiability, graph safety: as in :func:`dual_lora_linear`.
    """
    check_kinds(x, weight, bias, reasoning, embedding, plan, dropout)
    if plan is None:
        plan = RoutePlan.uniform("both", math.prod(x.shape[:-1]), device=x.device)
    x, *rest = autocast_like_linear(x, weight, bias, reasoning, embedding)
    check_call(x, *rest, plan, dropout)
    y_r, y_e, _ = schema.call("dual_lora_linear_fanout", *flat_arguments(x, *rest, plan, dropout, impl))
    shape = (*x.shape[:-1], weight.shape[0])
    return y_r.view(shape), y_e.view(shape)
