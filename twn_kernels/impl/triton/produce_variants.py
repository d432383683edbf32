"""What the launchers of the producer and of a group's backward pass can ask the compiler for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twn_kernels.impl.triton.config import all_configs
from twn_kernels.impl.triton.group_dx_kernel import group_dx_kernel
from twn_kernels.impl.triton.group_grad_kernel import group_grad_kernel, group_shrink_kernel
from twn_kernels.impl.triton.produce_config import all_produce_configs
from twn_kernels.impl.triton.produce_kernel import produce_kernel

__all__ = ["every_produce_compilation", "produce_compilations"]

# Sizes that the kernels do not specialise on, or that are no multiples of 16 where the others are.
_NEVER_DIVISIBLE = {"M", "tiles", "splits", "steps_per_split", "tokens_per_split"}


def produce_compilations(arch: int) -> list[tuple]:
    """Name, kernel, configuration, signature, constants, divisible arguments and whether tensor cores must show.

    Of :func:`every_produce_compilation` those that the main paths of a model take.
    """
    configs, tiles = all_produce_configs(arch), all_configs(arch)
    return [
        _produce("norm", configs["produce"][0], arch, "bf16", norm=True),
        _produce("gated", configs["produce_gated"][0], arch, "bf16", gated=True),
        _produce("norm", configs["produce"][-1], arch, "bf16", norm=True),
        _produce("gated", configs["produce_gated"][-1], arch, "bf16", gated=True),
        _shrink(configs["group_shrink"][-1], "bf16"),
        _dx(tiles["gemm"][-1], 3, "bf16"),
        _grad(tiles["grad"][-1], "bf16"),
    ]


def every_produce_compilation(arch: int) -> Iterator[tuple]:
    """Every configuration of every kernel with the dtypes and alignments that it serves; too many for a test run."""
    configs, tiles = all_produce_configs(arch), all_configs(arch)
    for dtype in ("bf16", "fp16"):
        for config in configs["produce"]:
            yield _produce("norm", config, arch, dtype, norm=True)
            yield _produce("plain", config, arch, dtype, write=False)
        for config in configs["produce_gated"]:
            yield _produce("gated", config, arch, dtype, gated=True)
    for config in configs["produce_wide"]:
        for use, front in (("norm", {"norm": True}), ("gated", {"gated": True}), ("plain", {"write": False})):
            yield _produce(use, config, arch, "bf16", "fp32", **front)
            for dtype in ("fp32", "bf16"):
                yield _produce(use, config, arch, dtype, **front, aligned=False)
    for config in configs["group_shrink"]:
        yield _shrink(config, "bf16")
    for config in configs["group_shrink_wide"]:
        yield _shrink(config, "bf16", "fp32")
        yield _shrink(config, "bf16", aligned=False)
        yield _shrink(config, "fp32", aligned=False)
    for count in (1, 2, 3):
        for config in tiles["gemm"]:
            yield _dx(config, count, "bf16")
        yield _dx(tiles["gemm_low_rank_unaligned"][-1], count, "bf16", aligned="base")
        yield _dx(tiles["gemm_unaligned"][-1], count, "bf16", aligned="none")
        for config in tiles["gemm_separate"]:
            yield _dx(config, count, "bf16", "fp32")
        yield _dx(tiles["gemm_separate_unaligned"][-1], count, "bf16", "fp32", aligned="none")
        for config in tiles["gemm_wide"]:
            yield _dx(config, count, "fp32", aligned="none")
    yield _grad(tiles["grad"][-1], "bf16")
    for adapters in ("bf16", "fp32"):
        yield _grad(tiles["grad_wide"][-1], "bf16", adapters, aligned=False)
    yield _grad(tiles["grad_wide"][-1], "fp32", aligned=False)


def _produce(use, config, arch, dtype, adapters=None, *, norm=False, gated=False, write=True, aligned=True) -> tuple:
    adapters = adapters or dtype
    pointers = {"x": dtype, "out": adapters, "routes": "i8"} | {f"a_{i}": adapters for i in range(6)}
    if norm:
        pointers["norm_weight"] = dtype
    if write:
        pointers["x_out"] = dtype
    constants = {
        "PRESENT": 3, "GATED": gated, "PRECISION": _precision(dtype, adapters), "DEPENDENT": arch >= 90,
        "ALIGNED": aligned,
        "BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k,
    }  # fmt: skip
    name = f"produce-{use}-{dtype}-{adapters}-{config.block_m}x{config.block_r}x{config.block_k}"
    return _compilation(name, produce_kernel, config, pointers, constants, aligned)


_BLOCKS = [f"{adapter}{i}" for adapter in "re" for i in range(3)]


def _shrink(config, dtype, adapters=None, *, aligned=True) -> tuple:
    adapters = adapters or dtype
    pointers = {"dy": dtype, "routes": "i8", "out": adapters} | {f"b_{block}": adapters for block in _BLOCKS}
    constants = {
        "PRESENT": 3, "PRECISION": _precision(dtype, adapters),
        "BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k,
    }  # fmt: skip
    name = f"group_shrink-{dtype}-{adapters}-{config.block_m}x{config.block_r}x{config.block_k}"
    return _compilation(name, group_shrink_kernel, config, pointers, constants, aligned)


def _dx(config, count, dtype, adapters=None, *, aligned="all") -> tuple:
    adapters = adapters or dtype
    pointers = {"dy": dtype, "ds": adapters, "routes": "i8", "dx": dtype}
    pointers |= {f"w_{i}": dtype for i in range(3)} | {f"a_{block}": adapters for block in _BLOCKS}
    constants = {
        "COUNT": count, "PRESENT": 3, "SEPARATE": dtype != adapters, "ALIGNED": aligned == "all",
        "BASE_PRECISION": "ieee",
        "LOW_RANK_PRECISION": _precision(dtype, adapters),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": config.block_r,
        "GROUP_M": config.group_m,
    }  # fmt: skip
    low_rank = {"ds", "stride_sm", *(f"rank_{block}" for block in _BLOCKS)} if aligned == "base" else set()
    low_rank |= {f"{kind}{block}" for block in _BLOCKS for kind in ("a_", "stride_a")} if low_rank else set()
    name = f"group_dx{count}-{dtype}-{adapters}-{config.block_m}x{config.block_n}x{config.block_k}"
    return _compilation(
        name, group_dx_kernel, config, pointers, constants, aligned != "none", low_rank
    )  # fmt: skip


def _grad(config, dtype, adapters=None, *, aligned=True) -> tuple:
    adapters = adapters or dtype
    pointers = {"x": dtype, "ds": adapters, "routes": "i8"} | {f"out_{block}": adapters for block in _BLOCKS}
    constants = {
        "COUNT": 3, "PRECISION": _precision(dtype, adapters), "stride_of": 1,
        "BLOCK_F": config.block_f, "BLOCK_R": config.block_r, "BLOCK_T": config.block_t, "STRETCH": config.stretch,
    }  # fmt: skip
    name = f"group_grad-{dtype}-{adapters}-{config.block_f}x{config.block_r}x{config.block_t}"
    return _compilation(name, group_grad_kernel, config, pointers, constants, aligned)


def _precision(dtype: str, adapters: str) -> str:
    return "tf32x3" if adapters == "fp32" and dtype != "fp32" else "ieee"


def _compilation(name, kernel, config, pointers, constants, aligned, unaligned=()) -> tuple:
    """Fill in the other arguments: int32 sizes and strides, fp32 scales, None for pointers that are not given."""
    constants: dict[str, Any] = dict(constants)
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
        elif argument in ("norm_weight", "x_out"):
            constants[argument] = None
        elif argument not in constants:
            signature[argument] = "fp32" if argument.startswith(("scaling", "eps")) else "i32"
    excluded = _NEVER_DIVISIBLE | set(unaligned)
    if kernel is produce_kernel:
        excluded |= {a for a in signature if a.startswith(("rank_", "column_"))}
    divisible = tuple(a for a, kind in signature.items() if aligned and kind != "fp32" and a not in excluded)
    alignment = "none" if not aligned else "base" if unaligned else "all"
    name = f"{name}-{config.num_warps}w-{alignment}_aligned"
    tensor_core = next(iter(pointers.values())) != "fp32"  # plain fp32 products stay on CUDA cores
    return name, kernel, config, signature, constants, divisible, tensor_core
