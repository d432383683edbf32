"""A site group as one op: the linears that read the same input, with what stands before and after them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from twn_kernels.ops import group_schema
from twn_kernels.ops.autocast import autocast_is_on, without_autocast
from twn_kernels.ops.choice import requested
from twn_kernels.ops.group_validation import check_group
from twn_kernels.ops.lora import LoRA
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.ops.projection import Norm, Projection


def dual_lora_group(
    x: Tensor,
    projections: Sequence[Projection],
    plan: RoutePlan | None = None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    swiglu: bool = False,
    residual: Tensor | None = None,
    impl: str = "auto",
    site: str | None = None,
    packed: Sequence[Tensor] = (),
    split: bool = True,
) -> tuple[Tensor, ...]:
    """Up to three frozen linears that read the same input, with the adapters that each token's route selects.

    ``z`` is the normalised ``x``, ``silu(gate) * up`` of ``gate, up = x``, or ``x``. For token ``t`` and linear ``i``::

        y_i[t] = W_i @ z[t] + bias_i + sum_a scaling_ia * B_ia @ (A_ia @ z[t])    for a in plan.routes[t]

    Without gradients this is one launch sequence; where something requires a gradient, norm, gate, SwiGLU and residual
    are torch's own and the products are one differentiable op.

    Args:
        x: ``[..., in_features]``, or ``[..., 2 * in_features]`` where ``gated``; fp32, fp16 or bf16 (fp64 on the
            reference); last dimension contiguous.
        projections: one to three, in the dtype of ``x``; adapters in that dtype or in fp32, all alike.
        plan: over the tokens of ``x``; None: base only.
        norm: RMSNorm in front; it rounds where transformers' norms round.
        gated: ``x`` is gate and up side by side.
        swiglu: of two projections, return ``silu(y_0) * y_1``.
        residual: ``[..., out_features]``, added to the output of a single projection.
        impl: as in :func:`~twn_kernels.ops.dual_lora_linear`.
        site: ``"qkv"``, ``"o"``, ``"gate_up"`` or ``"down"``: which row of the measurements ``impl="auto"`` follows.
        packed: what ``impl="blas"`` made of the group's weights beforehand; empty: nothing.
        split: False: the outputs side by side, as a later ``gated`` call reads gate and up.

    Returns:
        One ``[..., out_features_i]`` a projection (views of one buffer), or one tensor alone with ``swiglu`` or without
        ``split``.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument breaks the contract above.
        ImplUnavailable: ``impl`` was named and cannot run here; the message says why.

    Numerics: fp32 accumulation; ``z`` and each adapter's ``scaling * A @ z`` are rounded once; gate, up and the sum
    before a residual may be rounded before they are used. NaN or Inf in a row, or in an adapter that the row does not
    use, never reaches another row.
    Differentiable in: x, norm.weight, residual, every A, B and bias (and weight, by a plain GEMM).
    Graph-safe: yes. Synchronises: never. Source: as :func:`~twn_kernels.ops.dual_lora_linear`; RMSNorm: Zhang and
    Sennrich 2019; SwiGLU: Shazeer 2020.

    Example:
        >>> import torch
        >>> from twn_kernels.ops import LoRA, Norm, Projection, RoutePlan, dual_lora_group
        >>> lora = LoRA(torch.randn(4, 16), torch.randn(8, 4), 0.5)
        >>> gate, up = Projection(torch.randn(8, 16), None, lora), Projection(torch.randn(8, 16))
        >>> plan = RoutePlan.from_segments([2, 3], ["reasoning", None])
        >>> norm = Norm(torch.ones(16), 1e-6)
        >>> (y,) = dual_lora_group(torch.randn(5, 16), [gate, up], plan, norm=norm, swiglu=True)
        >>> y.shape
        torch.Size([5, 8])
    """
    if isinstance(x, Tensor) and autocast_is_on(x.device) and x.dtype != torch.float64:
        return _under_autocast(x, projections, plan, norm, gated, swiglu, residual, impl, site, packed, split)
    check_group(x, projections, plan, norm, gated, swiglu, residual)
    lead = x.shape[:-1]
    flat = x.reshape(math.prod(lead), x.shape[-1])
    layers = _flat_layers(flat, projections, plan, packed)
    differentiable = torch.is_grad_enabled() and _wants_grad(x, norm, residual, layers)
    layers += (requested(impl, x.device, x.dtype, site, differentiable=differentiable), site)
    if differentiable:
        y = group_schema.products(_input(flat, norm, gated), *layers)[0]
        if swiglu:
            gate, up = y.chunk(2, dim=1)
            y = F.silu(gate) * up
        y = y.view(*lead, y.shape[1])
        y = y if residual is None else residual + y
    else:
        added = None if residual is None else residual.reshape(flat.shape[0], residual.shape[-1])
        weight, eps = (None, 0.0) if norm is None else (norm.weight.contiguous(), float(norm.eps))
        y = group_schema.inference(flat, weight, eps, gated, swiglu, added, *layers)
        y = y.view(*lead, y.shape[1])
    if swiglu or not split or len(projections) == 1:
        return (y,)
    return y.split([projection.weight.shape[0] for projection in projections], dim=-1)


def _flat_layers(x: Tensor, projections, plan: RoutePlan | None, packed) -> tuple:
    """Most of what both registered ops share: lists by projection, an absent adapter as rank 0."""
    present = 0
    sides = []
    dtype = next((lora.A.dtype for p in projections for lora in (p.reasoning, p.embedding) if lora), x.dtype)
    for adapter in (0, 1):
        loras = [(projection.reasoning, projection.embedding)[adapter] for projection in projections]
        if plan is not None and plan.present & (1 << adapter) and any(lora is not None for lora in loras):
            present |= 1 << adapter
        parts = [
            _absent(x, projection.weight, dtype) if lora is None else lora
            for projection, lora in zip(projections, loras, strict=True)
        ]
        sides.append(([A for A, _, _ in parts], [B for _, B, _ in parts], [float(scaling) for *_, scaling in parts]))
    (A_r, B_r, scaling_r), (A_e, B_e, scaling_e) = sides
    biases = [x.new_empty(0) if projection.bias is None else projection.bias.contiguous() for projection in projections]
    routes, is_uniform = (None, False) if plan is None else (plan.routes, plan.is_uniform)
    return (
        [projection.weight for projection in projections], biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e,
        routes, present, is_uniform, list(packed),
    )  # fmt: skip


def _absent(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    A = x.new_empty((0, weight.shape[1]), dtype=dtype)
    return A, x.new_empty((weight.shape[0], 0), dtype=dtype), 0.0


def _wants_grad(x: Tensor, norm: Norm | None, residual: Tensor | None, layers: tuple) -> bool:
    tensors = group_schema.tensors_of((x, None if norm is None else norm.weight, residual, layers))
    return any(tensor.requires_grad for tensor in tensors)


def _input(x: Tensor, norm: Norm | None, gated: bool) -> Tensor:
    """What the linears read, in torch's own differentiable ops and transformers' order of rounding."""
    if norm is not None:
        h = x if x.dtype == torch.float64 else x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (norm.weight * h.to(x.dtype)).to(x.dtype)
    if gated:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return x


def _under_autocast(
    x, projections, plan, norm, gated, swiglu, residual, impl, site, packed, split
) -> tuple[Tensor, ...]:  # fmt: skip
    """Products in autocast's dtype, as of ``nn.Linear``; norm, gate and residual in the dtypes that they have."""
    dtype = torch.get_autocast_dtype(x.device.type)
    narrow = _narrowed(projections, dtype)
    check_group(x.to(dtype), narrow, plan, _narrowed(norm, dtype), gated, swiglu, _narrowed(residual, dtype))
    z = _input(x, norm, gated).to(dtype)
    with without_autocast(x.device):
        outputs = dual_lora_group(z, narrow, plan, swiglu=swiglu, impl=impl, site=site, packed=packed, split=split)
    return outputs if residual is None else (residual + outputs[0],)


def _narrowed(value, dtype: torch.dtype):
    """Every tensor of an argument in ``dtype``; what is none stays, for the checks to name."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, Projection | LoRA | Norm):
        return type(value)(*(_narrowed(part, dtype) for part in value))
    if isinstance(value, list | tuple):
        return [part if isinstance(part, Tensor) else _narrowed(part, dtype) for part in value]
    return value
