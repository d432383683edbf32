"""Launch configurations of a site group's product: a pure function of the problem, printable and enumerable.

No tile here was measured on a GPU yet. Each was chosen by its register and shared-memory budget, as in ``config``: no
spills on sm_80, sm_90 and sm_100, which the ahead-of-time tests hold it to. Benchmarks replace them row by row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from twn_kernels.impl.triton.config import _PROCESSORS, _SMALL_SHARED, _cdiv, _known, bucket

__all__ = ["GroupConfig", "all_group_configs", "group_config"]

_DECODE_TOKENS = 16  # one tensor-core tile of rows
_FEW_TOKENS = 64
_EXACT_ROWS = 32  # see config: plain fp32 tiles stay below the rows of Blackwell's tf32 tensor cores

# Multiplications in the time of reading one 16-bit element: an H100 does about 2,140 a cycle and processor (data
# sheet) and reads about 60 bytes from L2 (assumed, as for the A100). It decides between tiles only.
_PRODUCTS_PER_ELEMENT = 72


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Tile and schedule of the product of a site group.

    ``block_r`` is the step through the rank, ``group_m`` the tile rows of an L2 band, ``parts`` the runs of columns
    that go through the epilogue one after the other, ``resident`` the programs a processor holds at a time,
    ``descriptors`` whether x and the weights are read by tensor descriptor, ``prefetch`` how many lines (128
    bytes) of each row of its first weight tile a program asks for while the kernel in front runs (from sm_90 on).
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    parts: int = 1
    resident: int = 1
    descriptors: bool = False
    prefetch: int = 0
    group_m: int = 8

    def programs(self, tiles: int, processors: int) -> int:
        """Size of the grid: the GPU once, or fewer where there are fewer tiles."""
        return min(tiles, processors * self.resident)

    def tiles(self, tokens: int, widths: tuple[int, ...]) -> int:
        """Tiles of all outputs; ``widths`` has one entry a projection, or a single one with SwiGLU."""
        return _cdiv(tokens, self.block_m) * sum(_cdiv(width, self.block_n) for width in widths)


def group_config(
    tokens: int,
    widths: tuple[int, ...],
    wide: bool,
    swiglu: bool,
    exact: bool,
    arch: int,
    *,
    base_aligned: bool = True,
    low_rank_aligned: bool = True,
    describable: bool = True,
    processors: int | None = None,
) -> GroupConfig:
    """Configuration of the product of a site group.

    Args:
        tokens: rows of ``x``; only its power-of-two bucket matters.
        widths: out features of each projection; with ``swiglu`` of the single output.
        wide: fp32 operands in the base product.
        swiglu: a tile holds the same columns of two projections.
        exact: the adapters are fp32 next to a 16-bit ``x``.
        arch: compute capability without the dot: 80, 90, 100, ...
        base_aligned: ``x``, the weights and ``y`` can be read and written in 16-byte words.
        low_rank_aligned: the same for ``s`` and ``B`` (false for a rank that is no multiple of 16).
        describable: tensor descriptors can describe ``x`` and the weights; they are used from sm_90 on.
        processors: of the GPU; None: of the usual part of ``arch``.
    """
    kind = (wide, swiglu, exact, _known(arch), base_aligned, low_rank_aligned, describable and arch >= 90)
    return _group_config(bucket(tokens), tuple(widths), processors or _PROCESSORS[kind[3]], *kind)


@functools.lru_cache(maxsize=4096)
def _group_config(tokens: int, widths: tuple[int, ...], processors: int, *kind) -> GroupConfig:
    return min(_candidates(tokens, *kind), key=lambda config: _cost(config, config.tiles(tokens, widths), processors))


def _cost(config: GroupConfig, tiles: int, processors: int) -> int:
    """Relative time of one step through the features, by counting; the first of equals is taken.

    Tiles run in waves of one a processor. A step of a tile takes its multiplications or, where that is more, the
    reading of its operands from L2.
    """
    rows, columns = config.block_m, config.block_n
    return _cdiv(tiles, processors) * max(rows * columns, _PRODUCTS_PER_ELEMENT * (rows + columns))


def _candidates(
    tokens: int, wide: bool, swiglu: bool, exact: bool, arch: int, base_aligned: bool, low_rank_aligned: bool,
    describable: bool,
) -> tuple[GroupConfig, ...]:  # fmt: skip
    """Tiles to choose from, the largest first."""
    if wide:  # plain fp32 multiplies on CUDA cores; 16 features a step, as each unaligned element costs an address
        if tokens <= _DECODE_TOKENS:
            return (GroupConfig(16, 32, 16, 16, num_warps=4, num_stages=3, resident=2),)
        return (GroupConfig(_EXACT_ROWS, 32 if swiglu else 64, 16, 16, num_warps=8, num_stages=3),)
    if tokens <= _DECODE_TOKENS:
        return _decode_tiles(arch) if base_aligned else (GroupConfig(16, 32, 64, 16, num_warps=4, num_stages=3),)
    if not base_aligned:
        return (GroupConfig(64, 32, 32, 16, num_warps=8, num_stages=3),)
    small = GroupConfig(64, 32 if swiglu else 64, 64, 16, num_warps=8, num_stages=4)
    if tokens <= _FEW_TOKENS:
        return (small,)
    return *_prefill_tiles(swiglu, exact, arch, low_rank_aligned, describable), small


def _decode_tiles(arch: int) -> tuple[GroupConfig, ...]:
    """Bound by reading the weights: deep tiles for bytes in flight, narrow ones where columns are few."""
    resident = 1 if arch in _SMALL_SHARED else 2
    wide = GroupConfig(16, 32, 128, 32, num_warps=4, num_stages=5, resident=resident, prefetch=16)
    return wide, dataclasses.replace(wide, block_n=16)


def _prefill_tiles(
    swiglu: bool, exact: bool, arch: int, low_rank_aligned: bool, describable: bool
) -> tuple[GroupConfig, ...]:
    stages = 3 if arch in _SMALL_SHARED else 4
    # of one accumulator: SwiGLU has two; fp32 adapters that are read element by element take registers from it
    width = 128 >> int(swiglu) >> int(exact and not low_rank_aligned)
    parts = 4 if exact or arch in (90, 100) else 2  # what leaves no spills, by architecture
    middle = GroupConfig(128, width, 64, 16, 8, stages, parts=parts, descriptors=describable)
    if arch not in (90, 100) or not describable or not low_rank_aligned or exact:
        return (middle,)
    # registers for the largest tile, shared memory for four stages of it (192 KiB)
    step = 32 if arch == 90 else 16
    return GroupConfig(128, 2 * width, 64, step, 8, 4, parts=4, descriptors=True), middle


def all_group_configs(arch: int) -> dict[str, list[GroupConfig]]:
    """Every tile that :func:`group_config` can return for ``arch``, by what decides the code of the kernel."""
    known, kinds = _known(arch), {}
    for wide, swiglu, exact, base, low_rank, describable in itertools.product((True, False), repeat=6):
        name = group_kind(wide, swiglu, exact, base, low_rank)
        tiles = kinds.setdefault(name, {})
        for tokens in (_DECODE_TOKENS, _FEW_TOKENS, 2 * _FEW_TOKENS):
            found = _candidates(tokens, wide, swiglu, exact, known, base, low_rank, describable and arch >= 90)
            tiles.update(dict.fromkeys(found))
    return {name: list(tiles) for name, tiles in kinds.items()}


def group_kind(wide: bool, swiglu: bool, exact: bool, base_aligned: bool, low_rank_aligned: bool) -> str:
    """The key of :func:`all_group_configs` under which a problem's configuration is listed."""
    parts = ["swiglu"] * swiglu + ["wide"] * wide + ["exact"] * (exact and not wide)
    aligned = "none" if not base_aligned or wide else "all" if low_rank_aligned else "base"
    return "-".join([*parts, f"{aligned}_aligned"])
