"""The static report: resources and machine code of each compiled kernel, with its work on a real shape; and a baseline.

The work is counted by :mod:`twn_kernels.testing.kernel_work` on a shape of Qwen3-VL 8B: the smallest tiles on 16
tokens (decode), the largest of a kind on 4096 (prefill), those between on 64; ranks 64 and 64; the first half of the
rows on the reasoning adapter, the rest on the embedding adapter (a fan-out: both on every row). A baseline is the
compiler's part of the report in a file, which later reports are held to: :func:`regressions`.

``python -m twn_kernels.testing.aot`` prints it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twn_kernels.errors import TableError
from twn_kernels.testing.aot import AotReport
from twn_kernels.testing.kernel_work import (
    Count,
    Projection,
    grad_count,
    group_shrink_count,
    produce_count,
    product_count,
    reduce_count,
    shrink_count,
)

__all__ = ["BASELINE_FORMAT", "Counted", "baseline_text", "counted", "growth", "read_baseline", "regressions", "table"]

BASELINE_FORMAT = 1
RANKS = (64, 64)
_DECODE, _BETWEEN, _PREFILL = 16, 64, 4096
_HIDDEN, _KEYS, _INTERMEDIATE = 4096, 1024, 12288  # Qwen3-VL 8B
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_RECORDED = ("registers", "spill_bytes", "shared_bytes", "tensor_core", "bulk_copy")


@dataclasses.dataclass(frozen=True)
class Counted:
    """The work of one variant: on which shape, and what was counted there."""

    shape: str
    count: Count

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        done, ideal = self.count
        return {
            "shape": self.shape,
            "moved_bytes": done.bytes,
            "ideal_bytes": ideal.bytes,
            "done_flops": done.flops,
            "ideal_flops": ideal.flops,
        }


def counted(variant: Any, arch: int) -> Counted | None:
    """What ``variant`` of ``impl="triton"`` does on its stated shape; None for a kernel that is not counted here."""
    counter = _COUNTERS.get(kernel_name(variant))
    if counter is None:
        return None
    tokens = _tokens(variant, arch)
    shape, routes, count = counter(variant, tokens, arch)
    return Counted(f"8B {shape}, {tokens} tokens, {routes}", count)


def kernel_name(variant: Any) -> str:
    """The name of a variant's kernel, compiled or interpreted."""
    return getattr(variant.kernel, "__name__", None) or variant.kernel.fn.__name__


def _tokens(variant: Any, arch: int) -> int:
    rows = variant.constants.get("BLOCK_M")
    if rows == _DECODE:
        return _DECODE
    return _PREFILL if rows is None or rows == _largest_tiles(arch)[_family(variant)] else _BETWEEN


@functools.cache
def _largest_tiles(arch: int) -> dict[str, int]:
    """``BLOCK_M`` of the largest tile by family: the variants that differ in nothing but their tile."""
    from twn_kernels.impl.triton.variants import variants

    largest: dict[str, int] = {}
    for variant in variants(arch):
        family = _family(variant)
        largest[family] = max(largest.get(family, 0), variant.constants.get("BLOCK_M", 0))
    return largest


def _family(variant: Any) -> str:
    return re.sub(r"-\d+(x\d+)+(-\d+w)?", "", variant.name)


def _size(variant: Any, *pointers: str) -> int:
    """Bytes of an element of the first of ``pointers`` that the variant has."""
    return next(_SIZES[variant.signature[name].lstrip("*")] for name in pointers if name in variant.signature)


def _halves(tokens: int) -> tuple[list[tuple[int, int]], str]:
    return [(tokens // 2, 1), (tokens - tokens // 2, 2)], f"half and half, ranks {RANKS[0]}+{RANKS[1]}"


def _gemm(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    constants = variant.constants
    segments, routes = _halves(tokens)
    if constants["FANOUT"]:
        segments, routes = [(tokens, 3)], f"both, ranks {RANKS[0]}+{RANKS[1]}"
    if not constants["PRESENT"]:
        segments, routes = [(tokens, 0)], "base only"
    count = product_count(
        segments, _HIDDEN, [Projection(_HIDDEN, RANKS)], **_tile(variant, "M", "N", "K", "R"), size=_size(variant, "x"),
        low_size=_size(variant, "s", "x"), present=constants["PRESENT"], bias="bias" in variant.signature,
        fanout=constants["FANOUT"],
    )  # fmt: skip
    return f"o ({_HIDDEN} -> {_HIDDEN})", routes, count


def _shrink(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    from twn_kernels.impl.triton.config import shrink_config

    segments, routes = _halves(tokens)
    wide, aligned = "fp32" in variant.signature["a_r"], variant.name.endswith("all_aligned")
    chosen = shrink_config(tokens, _HIDDEN, *RANKS, wide, arch, aligned=aligned)
    count = shrink_count(
        segments, _HIDDEN, RANKS, **_tile(variant, "M", "R", "K"), splits=_splits(variant, chosen),
        size=_size(variant, "x_r"), low_size=_size(variant, "a_r"), present=variant.constants["PRESENT"],
    )  # fmt: skip
    return f"o ({_HIDDEN} -> ranks)", routes, count


def _grad(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    from twn_kernels.impl.triton.config import grad_config

    segments, routes = _halves(tokens)
    wide, aligned = "fp32" in variant.signature["narrow_r"], variant.name.endswith("all_aligned")
    chosen = grad_config(tokens, _HIDDEN, *RANKS, wide, arch, aligned=aligned)
    count = grad_count(
        segments, _HIDDEN, RANKS, **_tile(variant, "F", "R", "T"), stretch=variant.constants["STRETCH"],
        splits=_splits(variant, chosen), size=_size(variant, "wide_r"), low_size=_size(variant, "narrow_r"),
    )  # fmt: skip
    return f"o ({_HIDDEN} x ranks)", routes, count


def _reduce(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    masked = variant.constants["MASKED"]
    length = tokens if masked else _HIDDEN
    count = reduce_count(
        length, RANKS, block_r=variant.constants["BLOCK_R"], splits=4, low_size=_size(variant, "out_r"), masked=masked
    )
    return f"o, 4 parts of [{length}, ranks]", _halves(tokens)[1], count


# out_features of each projection, and the input: 8B's site groups.
_SITES = {
    "qkv": (_HIDDEN, (_HIDDEN, _KEYS, _KEYS)),
    "o": (_HIDDEN, (_HIDDEN,)),
    "gate_up": (_HIDDEN, (_INTERMEDIATE, _INTERMEDIATE)),
    "down": (_INTERMEDIATE, (_HIDDEN,)),
}


def _site(name: str) -> tuple[int, list[Projection], str]:
    """Features, projections, and both in words."""
    features, outputs = _SITES[name]
    return (
        features,
        [Projection(out, RANKS) for out in outputs],
        f"{name} ({features} -> {'+'.join(map(str, outputs))})",
    )


def _group(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    constants, given = variant.constants, variant.signature
    features, projections, shape = _site({1: "o", 2: "gate_up", 3: "qkv"}[constants["COUNT"]])
    segments, routes = _halves(tokens) if constants["PRESENT"] else ([(tokens, 0)], "base only")
    count = product_count(
        segments, features, projections, **_tile(variant, "M", "N", "K", "R"), size=_size(variant, "x"),
        low_size=_size(variant, "s", "x"), present=constants["PRESENT"], bias="bias_0" in given,
        joined=constants["SWIGLU"], residual="residual" in given,
    )  # fmt: skip
    return shape, routes, count


def _produce(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    from twn_kernels.impl.triton.produce_config import produce_config, produce_tiles

    gated, norm = variant.constants["GATED"], "norm_weight" in variant.signature
    features, projections, _ = _site("down" if gated else "qkv" if norm else "o")
    ranks, (segments, routes) = [projection.ranks for projection in projections], _halves(tokens)
    wide, aligned = "fp32" in variant.signature["a_0"], variant.name.endswith("all_aligned")
    total = sum(map(sum, ranks))
    chosen = produce_config(tokens, features, total, wide, gated, arch, aligned=aligned)
    config = dataclasses.replace(variant.config, splits=_splits(variant, chosen))
    count = produce_count(
        segments, features, ranks, **_tile(variant, "M", "R", "K"), splits=config.splits,
        tiles=produce_tiles(config, tokens, features, total), size=_size(variant, "x"), low_size=_size(variant, "out"),
        norm=norm, gated=gated, writes="x_out" in variant.signature, present=variant.constants["PRESENT"],
    )  # fmt: skip
    what = "gate and up" if gated else "norm" if norm else "plain"
    return f"{'down' if gated else 'qkv' if norm else 'o'} ({what}, {features} -> ranks)", routes, count


def _group_shrink(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    from twn_kernels.impl.triton.produce_config import group_shrink_config

    _, projections, _ = _site("qkv")
    segments, routes = _halves(tokens)
    wide, aligned = "fp32" in variant.signature["out"], variant.name.endswith("all_aligned")
    chosen = group_shrink_config(tokens, _HIDDEN, max(RANKS), wide, arch, aligned=aligned)
    count = group_shrink_count(
        segments, projections, **_tile(variant, "M", "R", "K"), splits=_splits(variant, chosen),
        size=_size(variant, "dy"), low_size=_size(variant, "out"),
    )  # fmt: skip
    return "qkv (gradient -> ranks)", routes, count


def _group_dx(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    features, projections, _ = _site({1: "o", 2: "gate_up", 3: "qkv"}[variant.constants["COUNT"]])
    segments, routes = _halves(tokens)
    outputs, ranks = sum(p.outputs for p in projections), tuple(len(projections) * rank for rank in RANKS)
    count = product_count(
        segments, outputs, [Projection(features, ranks)], **_tile(variant, "M", "N", "K", "R"),
        size=_size(variant, "dy"), low_size=_size(variant, "ds"), present=variant.constants["PRESENT"],
    )  # fmt: skip
    return f"gradient of {len(projections)} projections ({outputs} -> {features})", routes, count


def _group_grad(variant: Any, tokens: int, arch: int) -> tuple[str, str, Count]:
    from twn_kernels.impl.triton.config import grad_config

    features, projections, _ = _site("qkv")
    (segments, routes), ranks = _halves(tokens), tuple(len(projections) * rank for rank in RANKS)
    wide, aligned = "fp32" in variant.signature["ds"], variant.name.endswith("all_aligned")
    chosen = grad_config(tokens, features, *ranks, wide, arch, aligned=aligned)
    count = grad_count(
        segments, features, ranks, **_tile(variant, "F", "R", "T"), stretch=variant.constants["STRETCH"],
        splits=_splits(variant, chosen), size=_size(variant, "x"), low_size=_size(variant, "ds"),
    )  # fmt: skip
    return f"qkv ({features} x ranks)", routes, count


def _tile(variant: Any, *letters: str) -> dict[str, int]:
    return {f"block_{letter.lower()}": variant.constants[f"BLOCK_{letter}"] for letter in letters}


def _splits(variant: Any, chosen: Any) -> int:
    """Parts that the launcher makes of the stated shape; 1 where it would take another tile there."""
    return chosen.splits if dataclasses.replace(chosen, splits=1) == variant.config else 1


_COUNTERS = {
    "gemm_kernel": _gemm,
    "shrink_kernel": _shrink,
    "grad_kernel": _grad,
    "reduce_kernel": _reduce,
    "group_kernel": _group,
    "produce_kernel": _produce,
    "group_shrink_kernel": _group_shrink,
    "group_dx_kernel": _group_dx,
    "group_grad_kernel": _group_grad,
}


def table(entries: Iterable[tuple[AotReport, Counted | None]]) -> str:
    """Aligned lines for people: one a kernel, under its architecture and the shape that its work was counted on."""
    titles = ["variant", "registers", "spills", "shared KiB", "tensor cores", "bulk copies", "bytes", "operations"]
    sections: dict[str, list[list[str]]] = {}
    for report, work in entries:
        heading = f"sm_{report.arch}, {work.shape if work else 'not counted'}"
        sections.setdefault(heading, []).append([report.variant, *_cells(report, work)])
    everything = [titles, *(row for rows in sections.values() for row in rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(titles))]

    def line(row: list[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    lines = ["bytes, operations: moved and done by the tiling over the least that the shape needs", line(titles)]
    for heading, rows in sections.items():
        lines += ["", heading, *map(line, rows)]
    return "\n".join(lines)


def _cells(report: AotReport, work: Counted | None) -> list[str]:
    ratios = ["-", "-"]
    if work is not None:
        done, ideal = work.count
        ratios = [f"{a / b:.2f}x" if b else "-" for a, b in zip(done, ideal, strict=True)]
    shared = f"{report.shared_bytes / 1024:.0f} of {report.shared_limit_bytes // 1024}"
    mnemonics = [" ".join(names) or "-" for names in (report.tensor_core, report.bulk_copy)]
    return [str(report.registers), str(report.spill_bytes), shared, *mnemonics, *ratios]


def baseline_text(reports: Iterable[Any], version: str, compiler: str = "triton", more: tuple[str, ...] = ()) -> str:
    """A baseline file of ``reports``: JSON with one line a kernel, so that a change shows line by line.

    Args:
        reports: :class:`AotReport`, or others with its fields.
        version: of the compiler.
        compiler: its name.
        more: fields to record beside those of every report.
    """
    lines = []
    for report in reports:
        entry = {name: getattr(report, name) for name in (*_RECORDED, *more)}
        lines.append(f"  {json.dumps(f'sm_{report.arch} {report.variant}')}: {json.dumps(entry)}")
    head = f'{{\n "format": {BASELINE_FORMAT},\n "{compiler}": {json.dumps(version)},\n "kernels": {{\n'
    return head + ",\n".join(lines) + "\n }\n}\n"


def read_baseline(
    path: str | Path, compiler: str = "triton", more: tuple[str, ...] = ()
) -> tuple[str, dict[str, dict[str, Any]]]:
    """``(version of the compiler, entry by "sm_<arch> <variant>")`` of a baseline file; arguments as it was written.

    Raises:
        TableError: the file is missing, damaged or of another format.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        found = document["format"], document[compiler], document["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path}: the baseline cannot be read: {type(error).__name__}: {error}.") from error
    if found[0] != BASELINE_FORMAT:
        raise TableError(f"{path}: format must be {BASELINE_FORMAT}, got {found[0]!r}. Write it anew with --baseline.")
    for name, entry in found[2].items():
        if not isinstance(entry, dict) or set(entry) != {*_RECORDED, *more}:
            raise TableError(f"{path}: {name} must have {', '.join((*_RECORDED, *more))}, got {entry!r}.")
    return found[1], found[2]


def regressions(report: Any, recorded: Mapping[str, Any]) -> list[str]:
    """What got worse against the recorded entry in a way that no change may: new spills, instructions that are gone."""
    found = []
    if report.spill_bytes > recorded["spill_bytes"]:
        found.append(f"spills {report.spill_bytes} bytes a thread, recorded {recorded['spill_bytes']}")
    for field, words in (("tensor_core", "tensor-core"), ("bulk_copy", "bulk-copy"), ("wide", "16-byte")):
        if field not in recorded:
            continue
        lost = sorted(set(recorded[field]) - set(getattr(report, field)))
        if lost:
            left = ", ".join(getattr(report, field)) or "none"
            found.append(f"lost its {words} instructions {', '.join(lost)} (left: {left})")
    return found


def growth(report: Any, recorded: Mapping[str, Any]) -> str | None:
    """More registers than recorded, in words; None where there are not. Worth a look, no failure."""
    if report.registers <= recorded["registers"]:
        return None
    return f"sm_{report.arch} {report.variant}: {recorded['registers']} -> {report.registers} registers a thread"
