"""The op the package is named for: one frozen linear layer, two adapters, a route for each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twn_kernels.ops import schema
from twn_kernels.ops.autocast import autocast_is_on
from twn_kernels.ops.choice import requested
from twn_kernels.ops.lora import LoRA
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.ops.validation import check_call, check_kinds


def dual_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reasoning: LoRA | None,
    embedding: LoRA | None,
    plan: RoutePlan,
    *,
    dropout: tuple[float, float] = (0.0, 0.0),
    impl: str = "auto",
) -> Tensor:
    """Frozen linear layer plus the LoRA adapters that each token's route selects.

    For token ``t``::

        y[t] = weight @ x[t] + bias + sum_a scaling_a * B_a @ (A_a @ x[t])    for a in plan.routes[t]

    Args:
        x: ``[..., in_features]``; fp32, fp16 or bf16 (fp64 on the reference); last dimension contiguous.
        weight: ``[out_features, in_features]``; dtype of ``x``.
        bias: ``[out_features]`` in the dtype of ``x``, or None.
        reasoning, embedding: ``LoRA(A=[rank, in_features], B=[out_features, rank], scaling)`` in the dtype of ``x`` or
            in fp32; ranks 1 … 256, which may differ. None: that adapter does not touch this layer.
        plan: :class:`RoutePlan` over the same tokens, in the order of ``x.reshape(-1, in_features)``.
        dropout: LoRA dropout of ``reasoning`` and of ``embedding``, in [0, 1), on the input of ``A``; for training.
            The mask is drawn from torch's generator of the device.
        impl: ``"auto"``, ``"blas"``, ``"triton"``, ``"cuda"`` or ``"reference"``. A named one never falls back.
            ``"cuda"`` has no backward pass: it is refused where a tensor requires a gradient, in grad mode.

    Returns:
        ``[..., out_features]`` in ``x.dtype``.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument breaks the contract above.
        ImplUnavailable: ``impl`` was named and cannot run here; the message says why.
        TableError: the table of measurements that ``"auto"`` follows is damaged.

    Numerics: fp32 accumulation, one final rounding; ``scaling * A @ x`` is rounded once to the adapter's dtype. NaN or
    Inf in a row, or in an adapter that the row does not use, never reaches another row. A row that uses an adapter
    whose B is not finite may be NaN in every column.
    Under autocast, all tensors are cast as ``nn.Linear`` casts them.
    Differentiable in: x, both A and B, bias (and weight, by a plain GEMM, where it requires grad).
    Graph-safe: yes. Synchronises: never. Source: Hu et al. 2021, eq. 3; segments after Punica (Chen et al. 2023).

    Example:
        >>> import torch
        >>> from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear
        >>> x, weight = torch.randn(5, 16), torch.randn(8, 16)
        >>> reasoning = LoRA(torch.randn(4, 16), torch.randn(8, 4), 0.5)
        >>> embedding = LoRA(torch.randn(2, 16), torch.randn(8, 2), 1.0)
        >>> plan = RoutePlan.from_segments([2, 3], ["reasoning", "embedding"])
        >>> dual_lora_linear(x, weight, None, reasoning, embedding, plan).shape
        torch.Size([5, 8])
    """
    check_kinds(x, weight, bias, reasoning, embedding, plan, dropout)
    x, *rest = autocast_like_linear(x, weight, bias, reasoning, embedding)
    check_call(x, *rest, plan, dropout)
    y, _ = schema.call("dual_lora_linear", *flat_arguments(x, *rest, plan, dropout, impl))
    return y.view(*x.shape[:-1], weight.shape[0])


def flat_arguments(x, weight, bias, reasoning, embedding, plan, dropout, impl) -> tuple:
    """The arguments of the registered op: flat tensors, an absent adapter as rank 0 and its bit cleared."""
    present = plan.present & ((reasoning is not None) | (embedding is not None) << 1)
    dtype = next((lora.A.dtype for lora in (reasoning, embedding) if lora is not None), x.dtype)
    A_r, B_r, scaling_r = reasoning if reasoning is not None else _absent(x, weight, dtype)
    A_e, B_e, scaling_e = embedding if embedding is not None else _absent(x, weight, dtype)
    dropout_r = float(dropout[0]) if present & 1 else 0.0
    dropout_e = float(dropout[1]) if present & 2 else 0.0
    seed = None
    if dropout_r or dropout_e:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    tensors = (x, weight, bias, A_r, B_r, A_e, B_e)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return (
        # reshape(-1, ...) has no answer for zero features, and numel() would fix the token count in an export.
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight, None if bias is None else bias.contiguous(),
        A_r, B_r, A_e, B_e, float(scaling_r), float(scaling_e),
        plan.routes, present, plan.is_uniform, dropout_r, dropout_e, seed,
        requested(impl, x.device, x.dtype, differentiable=differentiable),
    )  # fmt: skip


def autocast_like_linear(x, weight, bias, reasoning, embedding) -> tuple:
    """Under autocast, every operand in the autocast dtype, as ``nn.Linear`` and PEFT cast them; else unchanged."""
    if x.dtype == torch.float64 or not x.is_floating_point() or not autocast_is_on(x.device):
        return x, weight, bias, reasoning, embedding
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [
        None if lora is None else LoRA(lora.A.to(dtype), lora.B.to(dtype), lora.scaling)
        for lora in (reasoning, embedding)
    ]
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *cast


def _absent(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    A = x.new_empty((0, weight.shape[1]), dtype=dtype)
    return A, x.new_empty((weight.shape[0], 0), dtype=dtype), 0.0
