"""What the launchers of the producer and of the group's backward pass can ask the compiler for."""

from __future__ import annotations

from collections.abc import Iterator

from twn_kernels.impl.triton.produce_config import all_configs
from twn_kernels.impl.triton.produce_kernel import produce_kernel

__all__ = ["produce_compilations"]


def produce_compilations(arch: int) -> Iterator[tuple]:
    """Name, kernel, configuration, signature, constants, divisible arguments and whether tensor cores must show."""
    configs = all_configs(arch)
    for config in configs["produce"]:
        yield _produce("norm", config, arch, "bf16", norm=True)
    for config in configs["produce_gated"]:
        yield _produce("gated", config, arch, "bf16", gated=True)
    yield _produce("plain", configs["produce"][-1], arch, "fp16", write=False)
    for config in configs["produce_wide"]:
        yield _produce("norm", config, arch, "bf16", "fp32", norm=True)
        yield _produce("gated", config, arch, "fp32", gated=True, aligned=False)
        yield _produce("norm", config, arch, "bf16", norm=True, aligned=False)


def _produce(use, config, arch, dtype, adapters=None, *, norm=False, gated=False, write=True, aligned=True) -> tuple:
    adapters = adapters or dtype
    mixed = adapters == "fp32" and dtype != "fp32"
    pointers = {"x": dtype, "out": adapters, "routes": "i8"} | {f"a_{i}": adapters for i in range(6)}
    if norm:
        pointers["norm_weight"] = dtype
    if write:
        pointers["x_out"] = dtype
    constants = {
        "PRESENT": 3, "GATED": gated, "PRECISION": "tf32x3" if mixed else "ieee", "DEPENDENT": arch >= 90,
        "BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k,
    }  # fmt: skip
    tile = f"{config.block_m}x{config.block_r}x{config.block_k}"
    kind = "all" if aligned else "none"
    name = f"produce-{use}-{dtype}-{adapters}-{tile}-{config.num_warps}w-{kind}_aligned"
    return name, produce_kernel, config, pointers, constants, aligned, mixed or dtype != "fp32"
