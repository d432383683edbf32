"""The least work that a case can be done with: bytes and floating-point operations, counted from shapes alone.

Bytes: every input that the result depends on is read once, every output is written once, and nothing between them
touches memory. Operations: the matrix products alone (two for each multiply-add); norms, activations and softmax are
left out. A measured time over the time that the roofs allow for this work is a percentage, never more.
"""

from __future__ import annotations

from typing import NamedTuple

from twn_kernels.benchmarking.cases import Case, Site

__all__ = ["ELEMENT_BYTES", "Work", "adapter_elements", "base_elements", "case_work", "roof_us", "site_work"]

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Work(NamedTuple):
    """Bytes moved and floating-point operations done."""

    bytes: int
    flops: int


def base_elements(sites: tuple[Site, ...]) -> int:
    """Elements of the base weights."""
    return sum(site.in_features * sum(site.out_features) for site in sites)


def adapter_elements(sites: tuple[Site, ...], rank: int) -> int:
    """Elements of one adapter of ``rank`` on every projection: A ``[rank, in]`` and B ``[out, rank]`` each."""
    return sum(rank * (len(site.out_features) * site.in_features + sum(site.out_features)) for site in sites)


def case_work(case: Case, *, base_only: bool = False) -> Work:
    """The least work of a case.

    Args:
        case: what is measured.
        base_only: leave the adapters out, as the plain base does.
    """
    uses = (0, 0) if base_only else case.uses()
    if case.suite not in ("linear", "group"):
        return _layers_work(case, uses)
    parts = [site_work(site, case.tokens, uses, case.ranks, case.dtype, case.pass_) for site in case.sites]
    total = Work(sum(part.bytes for part in parts), sum(part.flops for part in parts))
    return total if len(parts) == 1 else _without_between(case, total, uses)


def _without_between(case: Case, total: Work, uses: tuple[int, int]) -> Work:
    """An MLP from its groups: what lies between stays on the chip, routes are read once, the residual is the input."""
    hidden, inner = case.shape.hidden, case.shape.intermediate
    shared = 2 * inner + hidden
    if case.pass_ == "forward_backward":
        shared += 3 * inner  # its gradient is written and read, and the value itself read again
    routes = case.tokens if any(0 < rows < case.tokens for rows in uses) else 0
    return Work(total.bytes - case.tokens * shared * ELEMENT_BYTES[case.dtype] - routes, total.flops)


def site_work(
    site: Site, tokens: int, uses: tuple[int, int], ranks: tuple[int, int], dtype: str, pass_: str = "forward"
) -> Work:
    """The least work of one linear or site group.

    Args:
        site: its shape.
        tokens: rows of the input.
        uses: rows that use the reasoning, and the embedding adapter.
        ranks: of the two adapters.
        dtype: of everything.
        pass_: ``forward``, ``decode`` (the same) or ``forward_backward`` (with respect to input and adapters; the
            base weight is frozen).
    """
    adapters = sum(adapter_elements((site,), rank) for rank, rows in zip(ranks, uses, strict=True) if rows)
    weights = base_elements((site,)) + adapters + (site.in_features if site.norm else 0)
    inputs = tokens * (site.in_features + (site.width if site.residual else 0))
    elements = inputs + weights + tokens * site.width
    flops = _product_flops(site, tokens, uses, ranks)
    if pass_ == "forward_backward":
        # dy and x are read, dx and the adapters' gradients written; the residual's gradient is dy itself.
        elements += tokens * site.width + tokens * site.in_features * 2 + weights + adapters
        flops += _backward_flops(site, tokens, uses, ranks)
    routes = tokens if any(0 < rows < tokens for rows in uses) else 0  # one byte a token, where they differ
    return Work(elements * ELEMENT_BYTES[dtype] + routes, flops)


def _product_flops(site: Site, tokens: int, uses: tuple[int, int], ranks: tuple[int, int]) -> int:
    """Base product, shrink and expand."""
    low = sum(2 * rows * adapter_elements((site,), rank) for rows, rank in zip(uses, ranks, strict=True))
    return 2 * tokens * base_elements((site,)) + low


def _backward_flops(site: Site, tokens: int, uses: tuple[int, int], ranks: tuple[int, int]) -> int:
    """``dx`` of the base; and of each adapter ``dS``, ``dB``, ``dA`` and its part of ``dx``."""
    low = sum(4 * rows * adapter_elements((site,), rank) for rows, rank in zip(uses, ranks, strict=True))
    return 2 * tokens * base_elements((site,)) + low


def _layers_work(case: Case, uses: tuple[int, int]) -> Work:
    shape, layers, element = case.shape, case.layers, ELEMENT_BYTES[case.dtype]
    training = case.pass_ == "forward_backward"
    adapters = sum(adapter_elements(case.sites, rank) for rank, rows in zip(case.ranks, uses, strict=True) if rows)
    # Two norms over the hidden size, and those of queries and keys.
    weights = base_elements(case.sites) + adapters + 2 * shape.hidden + 2 * shape.head_dim
    elements = layers * weights + (shape.hidden if case.suite == "model" else 0)
    elements += 2 * case.tokens * shape.hidden
    if training:
        elements += layers * (weights + adapters) + 2 * case.tokens * shape.hidden
    if case.context is not None:
        elements += layers * case.rows * 2 * shape.kv_heads * shape.head_dim * (case.context + 1)
    flops = sum(_product_flops(site, case.tokens, uses, case.ranks) for site in case.sites)
    if training:
        flops += sum(_backward_flops(site, case.tokens, uses, case.ranks) for site in case.sites)
    return Work(elements * element, layers * (flops + _attention_flops(case) * (3 if training else 1)))


def _attention_flops(case: Case) -> int:
    """Scores and weighted sum over the tokens that each query sees; the backward pass has twice as many products."""
    seen = case.context + 1 if case.context is not None else case.sequence * (case.sequence + 1) // 2
    return 4 * case.shape.heads * case.shape.head_dim * case.rows * seen


def roof_us(work: Work, roofs: dict) -> float | None:
    """The least microseconds that measured roofs allow for ``work``; None where they were not measured."""
    bandwidth, rate = roofs.get("copy_gb_per_s"), roofs.get("matmul_tflops")
    if not bandwidth or not rate:
        return None
    return max(work.bytes / (bandwidth * 1e3), work.flops / (rate * 1e6))
