"""The tensor contract of the dual-LoRA ops, stated once: each violation becomes one sentence with the fix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twn_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError
from twn_kernels.ops.lora import LoRA
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.settings import MAX_RANK

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reasoning: LoRA | None,
    embedding: LoRA | None,
    plan: RoutePlan,
    dropout: tuple[float, float],
) -> None:
    """Raise the first violation of the contract; touches no values, so it never synchronises.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: see the op's docstring.
    """
    check_base(x, weight, bias)
    for name, lora in (("reasoning", reasoning), ("embedding", embedding)):
        if lora is not None:
            check_lora(name, lora, x, weight)
    if reasoning is not None and embedding is not None and reasoning.A.dtype != embedding.A.dtype:
        raise DtypeError(
            f"both adapters must have one dtype, got reasoning {reasoning.A.dtype} and embedding {embedding.A.dtype}. "
            "Convert one of them."
        )
    check_plan(plan, x)
    _check_dropout(dropout)


def check_kinds(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reasoning: LoRA | None,
    embedding: LoRA | None,
    plan: RoutePlan | None,
    dropout: tuple[float, float],
) -> None:
    """Raise where an argument is of another kind altogether, before anything looks inside it.

    Raises:
        DtypeError, OptionError: the message names the argument and what it must be.
    """
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise DtypeError(f"{name} must be a torch tensor, got {type(value).__name__}.")
    for name, lora in (("reasoning", reasoning), ("embedding", embedding)):
        if lora is None:
            continue
        if not isinstance(lora, LoRA) or not isinstance(lora.A, Tensor) or not isinstance(lora.B, Tensor):
            raise DtypeError(
                f"{name} must be LoRA(A, B, scaling) with A and B tensors, or None, got {type(lora).__name__}. "
                "Build one with twn_kernels.ops.LoRA."
            )
        if isinstance(lora.scaling, bool) or not isinstance(lora.scaling, int | float):
            raise DtypeError(
                f"{name}.scaling must be a Python number (a tensor would have to be read), got "
                f"{type(lora.scaling).__name__}."
            )
    if plan is not None and not isinstance(plan, RoutePlan):
        raise DtypeError(f"plan must be a RoutePlan, got {type(plan).__name__}. Build one with RoutePlan.from_routes.")
    if not isinstance(dropout, tuple | list) or len(dropout) != 2:
        raise OptionError(f"dropout must be two probabilities, one an adapter, got {dropout!r}.")


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None, of: str = "") -> None:
    """Raise where a frozen linear layer does not fit ``x``; ``of`` goes before the names of its tensors."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x must be [..., in_features] and {of}weight [out_features, in_features] with the same in_features, got "
            f"x {list(x.shape)} and weight {list(weight.shape)}."
        )
    if x.dtype not in _FLOATS:
        raise DtypeError(f"x must be float32, float16 or bfloat16 (float64 on the reference), got {x.dtype}.")
    if weight.dtype != x.dtype:
        raise DtypeError(f"{of}weight must have the dtype of x ({x.dtype}), got {weight.dtype}. Convert one of them.")
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ShapeError(f"x must have a contiguous last dimension, got strides {x.stride()}. Call x.contiguous().")
    same_device(f"{of}weight", weight, x)
    if bias is None:
        return
    if bias.shape != (weight.shape[0],):
        raise ShapeError(f"{of}bias must be [{weight.shape[0]}] (out_features of weight), got {list(bias.shape)}.")
    if bias.dtype != x.dtype:
        raise DtypeError(f"{of}bias must have the dtype of x ({x.dtype}), got {bias.dtype}. Convert one of them.")
    same_device(f"{of}bias", bias, x)


def check_lora(name: str, lora: LoRA, x: Tensor, weight: Tensor) -> None:
    """Raise where an adapter does not fit the linear layer of ``weight``; ``name`` goes into the message."""
    out_features, in_features = weight.shape
    if lora.A.dim() != 2 or lora.A.shape[1] != in_features:
        raise ShapeError(f"{name}.A must be [rank, {in_features}] (in_features of weight), got {list(lora.A.shape)}.")
    rank = lora.A.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ShapeError(f"{name}.A must have a rank of 1 … {MAX_RANK} (its first dimension), got {rank}.")
    if lora.B.shape != (out_features, rank):
        raise ShapeError(
            f"{name}.B must be [{out_features}, {rank}] (out_features of weight, rank of {name}.A), "
            f"got {list(lora.B.shape)}."
        )
    allowed = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    for part, tensor in (("A", lora.A), ("B", lora.B)):
        if tensor.dtype not in allowed or tensor.dtype != lora.A.dtype:
            names = " or ".join(str(dtype) for dtype in allowed)
            raise DtypeError(
                f"{name}.{part} must be {names} next to an x of {x.dtype}, A and B alike, got {tensor.dtype}."
            )
        same_device(f"{name}.{part}", tensor, x)


def check_plan(plan: RoutePlan, x: Tensor) -> None:
    """Raise where a plan is malformed, or covers other tokens than those of ``x``."""
    routes = plan.routes
    if not isinstance(routes, Tensor) or routes.dtype != torch.int8 or routes.dim() != 1 or not routes.is_contiguous():
        got = f"{routes.dtype} {list(routes.shape)}" if isinstance(routes, Tensor) else type(routes).__name__
        raise DtypeError(
            f"plan.routes must be a contiguous int8 tensor [tokens], got {got}. Build plans with RoutePlan.from_routes."
        )
    tokens = math.prod(x.shape[:-1])
    if plan.tokens != tokens:
        raise ShapeError(
            f"plan covers {plan.tokens} tokens but x has {tokens} ({list(x.shape)}). "
            "Build the plan from the same batch."
        )
    same_device("plan.routes", plan.routes, x)


def _check_dropout(dropout: tuple[float, float]) -> None:
    if not all(0.0 <= p < 1.0 for p in dropout):
        raise OptionError(
            f"dropout must be two probabilities in [0, 1), one for reasoning and one for embedding, got {dropout!r}."
        )


def same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise where a tensor is not on the device of ``x``."""
    if tensor.device != x.device:
        raise DeviceError(f"{name} must be on the device of x ({x.device}), got {tensor.device}. Move one of them.")
