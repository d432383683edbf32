"""The tensors of one linear or site group: random, never zero, in as many copies as it takes to leave the cache cold.

Weights keep the variance of their input, every 17th channel of the input is eight times as large (trained models have
such channels), and B is as large as training makes it: an adapter's term is about a third of the base's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twn_kernels.benchmarking.cases import Case, Site
from twn_kernels.ops import LoRA, RoutePlan

__all__ = ["DTYPES", "NORM_EPS", "SCALINGS", "Inputs", "Problem", "draw_lora", "plan_of", "rotation", "seed_of"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORM_EPS = 1e-6
SCALINGS = (2.0, -0.5)  # of reasoning and embedding: unlike, and of opposite sign, so that a mix-up shows
_OUTLIER_EVERY, _OUTLIER = 17, 8.0
_ADAPTER_SHARE = 0.3
_CACHE_MULTIPLE = 4
_MAX_SETS = 256


@dataclass
class Inputs:
    """One set of tensors for one site.

    Attributes:
        x: ``[tokens, in_features]``.
        norm: ``[in_features]`` or None.
        weights: ``[out_features, in_features]`` of each projection.
        loras: of each projection, reasoning and embedding.
        residual: ``[tokens, out_features]`` or None.
        dy: ``[tokens, width]``, the gradient of the output.
        then: of an MLP, the tensors of ``down``, which reads what this gives and adds ``x``; its own ``x`` is empty.
    """

    x: Tensor
    norm: Tensor | None
    weights: list[Tensor]
    loras: list[tuple[LoRA, LoRA]]
    residual: Tensor | None
    dy: Tensor
    then: Inputs | None = None

    @property
    def all_loras(self) -> list[tuple[LoRA, LoRA]]:
        """Of every projection, those of ``then`` last."""
        return self.loras + ([] if self.then is None else self.then.loras)

    def tensors(self) -> Iterator[Tensor]:
        """All that a call reads."""
        yield from (t for t in (self.x, self.norm, self.residual) if t is not None and t.numel())
        yield from self.weights
        for pair in self.loras:
            for lora in pair:
                yield from (lora.A, lora.B)
        if self.then is not None:
            yield from self.then.tensors()


@dataclass
class Problem:
    """One case as tensors on a device.

    Attributes:
        case: what is measured.
        site: its shape; of an MLP, that of ``gate_up``.
        device: where.
        sets: equal in shape and unlike in values; calls go round them so that no call finds its data in the cache.
        plan: the routes.
        compile_backend: of torch.compile, for contenders that compile.
    """

    case: Case
    site: Site
    device: torch.device
    sets: list[Inputs]
    plan: RoutePlan
    compile_backend: str = "inductor"

    @classmethod
    def build(cls, case: Case, device: torch.device, *, cache_bytes: int, compile_backend: str = "inductor") -> Problem:
        """Draw the tensors of a case of suite ``linear`` or ``group``."""
        site = case.sites[0]
        generator = torch.Generator(device).manual_seed(seed_of(case))
        first = _draw(case, case.sites, generator)
        count = rotation(sum(tensor.nbytes for tensor in first.tensors()), cache_bytes)
        sets = [first, *(_draw(case, case.sites, generator) for _ in range(count - 1))]
        return cls(case, site, device, sets, plan_of(case, device), compile_backend)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.case.sites[-1].width

    @property
    def used(self) -> list[int]:
        """Adapters (0 reasoning, 1 embedding) that some token uses."""
        return [adapter for adapter, rows in enumerate(self.case.uses()) if rows]

    def masks(self) -> list[Tensor]:
        """Bool ``[tokens]`` of each adapter."""
        return [(self.plan.routes & (1 << adapter)) != 0 for adapter in (0, 1)]


def rotation(set_bytes: int, cache_bytes: int) -> int:
    """Sets to rotate: at least two, and together more than four times the cache (at most 256).

    Args:
        set_bytes: that one call reads.
        cache_bytes: of the last-level cache.
    """
    return min(_MAX_SETS, max(2, _CACHE_MULTIPLE * cache_bytes // max(1, set_bytes) + 1))


def seed_of(case: Case) -> int:
    """The same numbers for a case on every machine of one kind, and others for each case."""
    return zlib.crc32(case.id.encode())


def plan_of(case: Case, device: torch.device | str) -> RoutePlan:
    """The case's routes as the ops take them."""
    segments = case.segments()
    lengths, names = zip(*segments, strict=True)
    # Filled on the host: a launch for each of thousands of alternating rows would take longer than the case.
    plan = RoutePlan.from_segments(lengths, names)
    return plan._replace(routes=plan.routes.to(device))


def draw_lora(
    in_features: int, out_features: int, rank: int, scaling: float, generator: torch.Generator, dtype: torch.dtype
) -> LoRA:
    """An adapter whose term has about a third of the variance-preserving base's size."""
    like = {"generator": generator, "device": generator.device}
    A = torch.randn(rank, in_features, **like) / math.sqrt(in_features)
    B = torch.randn(out_features, rank, **like) * (_ADAPTER_SHARE / (abs(scaling) * math.sqrt(rank)))
    return LoRA(A.to(dtype), B.to(dtype), scaling)


def _draw(case: Case, sites: tuple[Site, ...], generator: torch.Generator, *, is_second: bool = False) -> Inputs:
    site, dtype, tokens = sites[0], DTYPES[case.dtype], case.tokens
    width = site.in_features

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)

    x = normal(0 if is_second else tokens, width)
    x[:, ::_OUTLIER_EVERY] *= _OUTLIER
    weights = [normal(out, width, scale=width**-0.5) for out in site.out_features]
    loras = [
        tuple(
            draw_lora(width, out, rank, scaling, generator, dtype)
            for rank, scaling in zip(case.ranks, SCALINGS, strict=True)
        )
        for out in site.out_features
    ]
    return Inputs(
        x=x,
        norm=1 + normal(width, scale=0.1) if site.norm else None,
        weights=weights,
        loras=loras,
        residual=normal(tokens, site.width) if site.residual and not is_second else None,
        dy=normal(0 if is_second else tokens, sites[-1].width),
        then=_draw(case, sites[1:], generator, is_second=True) if sites[1:] else None,
    )
