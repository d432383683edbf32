"""What the launcher of a site group's product can ask the compiler for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twn_kernels.impl.triton.group_config import GroupConfig, all_group_configs
from twn_kernels.impl.triton.group_kernel import group_kernel

__all__ = ["every_group_compilation", "group_compilations"]

_SITES = {"qkv": 3, "o": 1, "gate_up": 2}
_LOW_RANK = ("b_r", "b_e", "rank_", "stride_sm", "stride_b")


def group_compilations(arch: int) -> list[tuple]:
    """Name, kernel, configuration, signature, constants, divisible arguments and whether tensor cores must show.

    Of :func:`every_group_compilation` the ones that a model spends its time in; on sm_90 also a residual beside the
    largest accumulator, and fp32 adapters.
    """
    configs = all_group_configs(arch)
    aligned = configs["all_aligned"]
    chosen = [
        _group("qkv", _largest(aligned), arch, "bf16"),
        _group("gate_up", _largest(configs["swiglu-all_aligned"]), arch, "bf16"),
        _group("qkv", aligned[0], arch, "bf16"),  # decode
    ]
    if arch == 90:
        chosen += [
            _group("o", _largest(aligned), arch, "bf16"),
            _group("o", _largest(configs["exact-all_aligned"]), arch, "bf16", "fp32"),
        ]
    return chosen


def every_group_compilation(arch: int) -> Iterator[tuple]:
    """Each configuration of each kind on each site; more than a test run should compile."""
    for kind, configs in all_group_configs(arch).items():
        swiglu, wide, exact = (word in kind for word in ("swiglu", "wide", "exact"))
        aligned = kind.rsplit("-", 1)[-1].removesuffix("_aligned")
        for config in configs:
            for site in ("gate_up",) if swiglu else ("qkv", "o"):
                for dtype in ("fp32",) if wide else ("bf16", "fp16"):
                    adapters = "fp32" if exact else dtype
                    yield _group(site, config, arch, dtype, adapters, aligned=aligned)
                yield _group(site, config, arch, "fp32" if wide else "bf16", aligned=aligned, present=0)


def _largest(configs: list[GroupConfig]) -> GroupConfig:
    return max(configs, key=lambda config: (config.block_m * config.block_n, config.descriptors))


def _group(site, config: GroupConfig, arch, dtype, adapters=None, *, aligned="all", present=3) -> tuple:
    """``aligned``: multiples of 16 are all sizes ("all"), not those of the low-rank operands ("base"), or "none".

    "o" adds a residual, the others have biases.
    """
    adapters = adapters or dtype
    count, swiglu, mixed = _SITES[site], site == "gate_up", adapters == "fp32" and dtype != "fp32"
    types = _pointers(count, site == "o", dtype, adapters if present else None)
    if config.descriptors:
        types["x_descriptor"] = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
        for i in range(count):
            types[f"w_{i}_descriptor"] = f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>"
    constants: dict[str, Any] = {
        "COUNT": count, "SWIGLU": swiglu, "PRESENT": present,
        "DESCRIPTORS": config.descriptors, "DEPENDENT": arch >= 90, "PREFETCH": config.prefetch,
        "BASE_PRECISION": "ieee", "LOW_RANK_PRECISION": "tf32x3" if mixed else "ieee",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": config.block_r,
        "GROUP_M": config.group_m, "PARTS": config.parts,
    }  # fmt: skip
    signature = {}
    for argument in group_kernel.arg_names:
        if argument in types:
            signature[argument] = types[argument]
        elif argument.startswith(("M", "N_", "K", "rank_", "stride_")):
            signature[argument] = "i32"
        elif argument not in constants:
            constants[argument] = None
    divisible = tuple(
        name for name, kind in signature.items()
        if aligned != "none" and name != "M" and not kind.startswith("tensordesc")
        and not (aligned == "base" and (name == "s" or name.startswith(_LOW_RANK)))
    )  # fmt: skip
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}-{config.num_warps}w"
    use = f"{site}{'' if present else '_base'}-{dtype}-{adapters}"
    name = f"group-{use}-{tile}-{'descriptors' if config.descriptors else 'pointers'}-{aligned}_aligned"
    return name, group_kernel, config, signature, constants, divisible, dtype != "fp32"


def _pointers(count: int, residual: bool, dtype: str, adapters: str | None) -> dict[str, str]:
    """Types of the pointers that are given; ``adapters`` None: no adapter can occur."""
    types = {"x": f"*{dtype}", "y": f"*{dtype}"}
    if residual:
        types["residual"] = f"*{dtype}"
    if adapters:
        types |= {"s": f"*{adapters}", "routes": "*i8"}
    for i in range(count):
        types[f"w_{i}"] = f"*{dtype}"
        if not residual:
            types[f"bias_{i}"] = f"*{dtype}"
        if adapters:
            types |= {f"b_r{i}": f"*{adapters}", f"b_e{i}": f"*{adapters}"}
    return types
