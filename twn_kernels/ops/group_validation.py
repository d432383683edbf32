"""The tensor contract of a site group, stated once: each violation becomes one sentence with the fix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twn_kernels.errors import DtypeError, OptionError, ShapeError
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.ops.projection import Norm, Projection
from twn_kernels.ops.validation import check_base, check_kinds, check_lora, check_plan, same_device

MAX_PROJECTIONS = 3
_NO_DROPOUT = (0.0, 0.0)


def check_group(
    x: Tensor,
    projections: Sequence[Projection],
    plan: RoutePlan | None,
    norm: Norm | None,
    gated: bool,
    swiglu: bool,
    residual: Tensor | None,
) -> None:
    """Raise the first violation of the contract; touches no values, so it never synchronises.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: the message names the argument.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise DtypeError(f"x must be a torch tensor [..., in_features], got {_kind(x)}.")
    _check_form(projections, norm, gated, swiglu, residual)
    if gated and x.shape[-1] % 2:
        raise ShapeError(f"x must be [..., 2 * in_features] (gate, then up) where gated, got {list(x.shape)}.")
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ShapeError(f"x must have a contiguous last dimension, got strides {x.stride()}. Call x.contiguous().")
    read = x[..., : x.shape[-1] // 2] if gated else x
    for place, projection in enumerate(projections):
        _check_projection(f"projections[{place}]", projection, read, plan)
    dtypes = {
        lora.A.dtype for projection in projections for lora in (projection.reasoning, projection.embedding) if lora
    }
    if len(dtypes) > 1:
        raise DtypeError(f"all adapters of a group must have one dtype, got {sorted(map(str, dtypes))}. Convert some.")
    if plan is not None:
        check_plan(plan, read)
    _check_norm(norm, read)
    _check_epilogue(x, projections, swiglu, residual)


def _check_form(projections, norm, gated: bool, swiglu: bool, residual) -> None:
    if not isinstance(projections, Sequence) or isinstance(projections, Projection):
        raise DtypeError(f"projections must be a list of Projection(weight, ...), got {_kind(projections)}.")
    for place, projection in enumerate(projections):
        if not isinstance(projection, Projection):
            raise DtypeError(f"projections[{place}] must be Projection(weight, ...), got {_kind(projection)}.")
    if not 1 <= len(projections) <= MAX_PROJECTIONS:
        raise ShapeError(f"projections must be 1 … {MAX_PROJECTIONS} linears that read x, got {len(projections)}.")
    if norm is not None and gated:
        raise OptionError("norm and gated exclude each other: x is either normalised or gate and up side by side.")
    if swiglu and len(projections) != 2:
        raise ShapeError(f"swiglu needs two projections (gate, then up), got {len(projections)}.")
    if residual is not None and (swiglu or len(projections) != 1):
        raise OptionError("residual is added to the output of a single projection without swiglu.")


def _check_projection(name: str, projection: Projection, x: Tensor, plan: RoutePlan | None) -> None:
    try:
        check_kinds(x, *projection, plan, _NO_DROPOUT)
    except DtypeError as error:
        raise DtypeError(f"{name}: {error}") from None
    check_base(x, projection.weight, projection.bias, f"{name}.")
    weight = projection.weight
    if weight.numel() and weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ShapeError(
            f"{name}.weight must have a contiguous last dimension in a group, got strides {weight.stride()}. "
            "Call weight.contiguous(), or use dual_lora_linear, which takes any strides."
        )
    for part, lora in (("reasoning", projection.reasoning), ("embedding", projection.embedding)):
        if lora is not None:
            check_lora(f"{name}.{part}", lora, x, weight)


def _check_norm(norm: Norm | None, x: Tensor) -> None:
    if norm is None:
        return
    if not isinstance(norm, Norm) or not isinstance(norm.weight, Tensor):
        raise DtypeError(f"norm must be Norm(weight, eps), got {_kind(norm)}.")
    if isinstance(norm.eps, bool) or not isinstance(norm.eps, int | float):
        raise DtypeError(
            f"norm.eps must be a Python number (a tensor would have to be read), got {type(norm.eps).__name__}."
        )
    if not 0 <= norm.eps < float("inf"):
        raise OptionError(f"norm.eps must be a finite number of 0 or more, got {norm.eps}.")
    if norm.weight.shape != (x.shape[-1],):
        raise ShapeError(f"norm.weight must be [{x.shape[-1]}] (in_features), got {list(norm.weight.shape)}.")
    allowed = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    if norm.weight.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise DtypeError(f"norm.weight must be {names} next to an x of {x.dtype}, got {norm.weight.dtype}.")
    same_device("norm.weight", norm.weight, x)


def _check_epilogue(x: Tensor, projections: Sequence[Projection], swiglu: bool, residual: Tensor | None) -> None:
    outputs = [projection.weight.shape[0] for projection in projections]
    if swiglu and outputs[0] != outputs[1]:
        raise ShapeError(f"swiglu needs gate and up of equal out_features, got {outputs[0]} and {outputs[1]}.")
    if residual is None:
        return
    if not isinstance(residual, Tensor) or residual.dtype != x.dtype:
        raise DtypeError(f"residual must be a tensor in the dtype of x ({x.dtype}), got {_kind(residual)}.")
    expected = [*x.shape[:-1], outputs[0]]
    if list(residual.shape) != expected:
        raise ShapeError(f"residual must be {expected} (the output's shape), got {list(residual.shape)}.")
    same_device("residual", residual, x)


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
