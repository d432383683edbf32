"""What the launchers can ask the compiler for: every kernel in every configuration, with realistic argument types.

Ahead-of-time tests and the static report compile this list; nothing at run time reads it. A kernel's arguments are
described as the launcher would find them: pointers and sizes that are multiples of 16 (or not, by name), strides of 1
where memory is contiguous.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from twn_kernels.impl.triton.config import all_configs
from twn_kernels.impl.triton.gemm_kernel import gemm_kernel
from twn_kernels.impl.triton.grad_kernel import grad_kernel
from twn_kernels.impl.triton.group_variants import group_compilations
from twn_kernels.impl.triton.produce_variants import produce_compilations
from twn_kernels.impl.triton.shrink_kernel import reduce_kernel, shrink_kernel

__all__ = ["Variant", "variants"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, the types and constants of its arguments, and its configuration."""

    name: str
    kernel: Any
    config: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    tensor_core: bool  # whether the machine code must hold tensor-core instructions


def variants(arch: int) -> list[Variant]:
    """All compilations for one architecture (80, 90, 100, ...)."""
    configs = all_configs(arch)
    return [
        *_gemm_variants(configs),
        *_separate_variants(configs),
        *_wide_variants(configs["gemm_wide"]),
        *_shrink_variants(configs),
        *_grad_variants(configs),
        *_reduce_variants(configs["reduce"]),
        *(Variant(*fields) for fields in produce_compilations(arch)),
        *(Variant(*fields) for fields in group_compilations(arch)),
    ]


def _gemm_variants(configs: dict[str, list]) -> Iterator[Variant]:
    for kind, aligned in (("gemm", "all"), ("gemm_low_rank_unaligned", "base"), ("gemm_unaligned", "none")):
        for config in configs[kind]:
            yield _gemm("forward", config, "bf16", bias=True, aligned=aligned)
            if aligned == "all" or config == configs[kind][-1]:
                yield _gemm("dx", config, "bf16", aligned=aligned)
    largest = configs["gemm"][-1]
    yield _gemm("forward", largest, "fp16", bias=True)
    yield _gemm("base", largest, "fp16", bias=True, present=0)


def _separate_variants(configs: dict[str, list]) -> Iterator[Variant]:
    for kind, aligned in (("gemm_separate", "all"), ("gemm_separate_unaligned", "none")):
        for config in configs[kind]:
            for adapters in ("bf16", "fp32") if aligned == "all" else ("fp32",):
                yield _gemm("fanout", config, "bf16", adapters, bias=True, fanout=True, separate=True, aligned=aligned)
                yield _gemm("dx_dropout", config, "bf16", adapters, separate=True, dropout=True, aligned=aligned)
    yield _gemm("forward", configs["gemm_separate"][-1], "fp16", "fp32", bias=True, separate=True)


def _wide_variants(configs: list) -> Iterator[Variant]:
    for config in configs:
        yield _gemm("forward", config, "fp32", bias=True, aligned="none")
        yield _gemm("dx", config, "fp32")
        yield _gemm("dx_dropout", config, "fp32", separate=True, dropout=True, aligned="none")
        yield _gemm("fanout", config, "fp32", bias=True, fanout=True, separate=True)


def _gemm(
    use, config, dtype, adapters=None, *,
    bias=False, fanout=False, separate=False, dropout=False, present=3, aligned="all",
) -> Variant:  # fmt: skip
    adapters = adapters or dtype
    pointers = {"x": dtype, "w": dtype, "y": dtype}
    if present:
        pointers |= {"s": adapters, "b_r": adapters, "b_e": adapters, "routes": "i8"}
    if bias:
        pointers["bias"] = dtype
    if fanout:
        pointers["y_e"] = dtype
    if dropout:
        pointers["seed"] = "i64"
    transposed = use.startswith("dx")
    ones = ["stride_xk"]
    ones += ["stride_wn", "stride_brn", "stride_ben"] if transposed else ["stride_wk", "stride_brk", "stride_bek"]
    mixed = adapters == "fp32" and dtype != "fp32"
    constants = {
        "PRESENT": present, "FANOUT": fanout, "SEPARATE": separate, "DROPOUT": dropout,
        "BASE_PRECISION": "ieee", "LOW_RANK_PRECISION": "tf32x3" if mixed else "ieee",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": config.block_r,
        "GROUP_M": config.group_m,
    }  # fmt: skip
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    name = f"gemm-{use}-{dtype}-{adapters}-{tile}-{config.num_warps}w-{aligned}_aligned"
    return _variant(name, gemm_kernel, config, pointers, ones, constants, aligned, dtype != "fp32")


def _shrink_variants(configs: dict[str, list]) -> Iterator[Variant]:
    for config in configs["shrink"]:
        yield _shrink("forward_dropout", config, "bf16", dropout=True)
        yield _shrink("ds", config, "bf16")
    yield _shrink("forward", configs["shrink"][-1], "fp16")
    for config in configs["shrink_wide"]:
        yield _shrink("ds", config, "bf16", aligned="none")
        for aligned in ("all", "none"):
            yield _shrink("forward_dropout", config, "bf16", "fp32", dropout=True, aligned=aligned)
        yield _shrink("forward_dropout", config, "fp32", dropout=True, aligned="none")


def _shrink(use, config, dtype, adapters=None, *, dropout=False, aligned="all") -> Variant:
    adapters = adapters or dtype
    pointers = {"x_r": dtype, "x_e": dtype, "a_r": adapters, "a_e": adapters, "routes": "i8"}
    pointers |= {"out_r": adapters, "out_e": adapters}
    if dropout:
        pointers["seed"] = "i64"
    ones = ["stride_xrk", "stride_xek"]
    ones += ["stride_arr", "stride_aer"] if use == "ds" else ["stride_ark", "stride_aek"]
    mixed = adapters == "fp32" and dtype != "fp32"
    constants = {
        "PRESENT": 3, "DROPOUT": dropout, "PRECISION": "tf32x3" if mixed else "ieee",
        "BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k,
    }  # fmt: skip
    tile = f"{config.block_m}x{config.block_r}x{config.block_k}"
    name = f"shrink-{use}-{dtype}-{adapters}-{tile}-{config.num_warps}w-{aligned}_aligned"
    return _variant(name, shrink_kernel, config, pointers, ones, constants, aligned, mixed or dtype != "fp32")


def _grad_variants(configs: dict[str, list]) -> Iterator[Variant]:
    for config in configs["grad"]:
        yield _grad("db", config, "bf16")
        yield _grad("da_dropout", config, "bf16", dropout=True)
    for config in configs["grad_wide"]:
        yield _grad("da_dropout", config, "bf16", dropout=True, aligned="none")
        for aligned in ("all", "none"):
            yield _grad("da_dropout", config, "bf16", "fp32", dropout=True, aligned=aligned)
        yield _grad("da_dropout", config, "fp32", dropout=True, aligned="none")
        yield _grad("db", config, "bf16", "fp32")


def _grad(use, config, dtype, adapters=None, *, dropout=False, aligned="all") -> Variant:
    adapters = adapters or dtype
    pointers = {"wide_r": dtype, "wide_e": dtype, "narrow_r": adapters, "narrow_e": adapters, "routes": "i8"}
    pointers |= {"out_r": adapters, "out_e": adapters}
    if dropout:
        pointers["seed"] = "i64"
    ones = ["stride_wrf", "stride_wef"]
    ones += ["stride_orr", "stride_oer"] if use == "db" else ["stride_orf", "stride_oef"]
    mixed = adapters == "fp32" and dtype != "fp32"
    constants = {
        "DROPOUT": dropout, "PRECISION": "tf32x3" if mixed else "ieee", "STRETCH": config.stretch,
        "BLOCK_F": config.block_f, "BLOCK_R": config.block_r, "BLOCK_T": config.block_t,
    }  # fmt: skip
    tile = f"{config.block_f}x{config.block_r}x{config.block_t}"
    name = f"grad-{use}-{dtype}-{adapters}-{tile}-{config.num_warps}w-{aligned}_aligned"
    return _variant(name, grad_kernel, config, pointers, ones, constants, aligned, mixed or dtype != "fp32")


def _reduce_variants(configs: list) -> Iterator[Variant]:
    for config in configs:
        for masked in (True, False):
            pointers = {"parts": "fp32", "out_r": "bf16", "out_e": "bf16"} | ({"routes": "i8"} if masked else {})
            ones = ["stride_orr", "stride_oer"] if masked else ["stride_orl", "stride_oel"]
            constants = {"PRESENT": 3, "MASKED": masked, "BLOCK_L": config.block_l, "BLOCK_R": config.block_r}
            name = f"reduce-{'s' if masked else 'grad'}-bf16-{config.block_l}x{config.block_r}"
            yield _variant(name, reduce_kernel, config, pointers, ones, constants, "all", False)


def _variant(name, kernel, config, pointers, ones, constants, aligned, tensor_core) -> Variant:
    """Fill in the other arguments: int32 sizes and strides, fp32 scales, None for absent pointers.

    ``aligned``: which of them are multiples of 16: "all", "base" (not those of the low-rank operands) or "none".
    """
    constants = dict(constants) | dict.fromkeys(ones, 1)
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
        elif argument in _POINTERS:
            constants[argument] = None
        elif argument not in constants:
            signature[argument] = "fp32" if argument.startswith(("scaling", "inverse_keep")) else "i32"
    return Variant(name, kernel, config, signature, constants, _divisible(signature, aligned), tensor_core)


def _divisible(signature: dict[str, str], aligned: str) -> tuple[str, ...]:
    if aligned == "none":
        return ()
    excluded = _NOT_SPECIALISED if aligned == "all" else _NOT_SPECIALISED | _LOW_RANK
    return tuple(name for name, kind in signature.items() if kind != "fp32" and name not in excluded)


_POINTERS = ("bias", "seed", "y_e", "routes", "s", "b_r", "b_e")
_NOT_SPECIALISED = {"M", "L", "splits", "tokens_per_split", "threshold_r", "threshold_e"}
_LOW_RANK = {"s", "b_r", "b_e", "rank_r", "rank_e", "stride_sm", "stride_brn", "stride_brk", "stride_ben", "stride_bek"}
