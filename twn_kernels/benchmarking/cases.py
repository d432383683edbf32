"""What is measured: model shapes, sites, routes, and one case of them with its readable id. Pure data, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from twn_kernels.benchmarking.results import DTYPES, PASSES, ROUTES, SUITES
from twn_kernels.errors import OptionError, did_you_mean, quoted
from twn_kernels.settings import EMBEDDING, MAX_RANK, REASONING, ROUTE_BITS

__all__ = ["GROUPS", "LINEARS", "MLP", "MODELS", "Case", "ModelShape", "Site", "check_case"]

GROUPS = ("qkv", "o", "gate_up", "down")
MLP = "mlp"  # gate_up and down in one case, so that an implementation may compute SwiGLU in either, as blocks do
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

_SEQUENCE = 1024  # tokens a row in the prefill of layers and models
_QUERIES = 16  # tokens of each row that the suffix routes put under embedding


@dataclass(frozen=True)
class Site:
    """One linear, or one site group with what stands before and after it in a decoder layer.

    Attributes:
        name: one of :data:`GROUPS` or :data:`LINEARS`.
        in_features: K, the width of what every projection reads.
        out_features: N of each projection.
        norm: an RMSNorm stands in front.
        swiglu: the output is ``silu(gate) * up`` of two projections.
        residual: the residual stream is added to the output.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]
    norm: bool = False
    swiglu: bool = False
    residual: bool = False

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.out_features[0] if self.swiglu else sum(self.out_features)


@dataclass(frozen=True)
class ModelShape:
    """The text layers of one model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int = 151_936

    def group(self, name: str) -> Site:
        """A site group by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": Site("qkv", self.hidden, (queries, keys, keys), norm=True),
            "o": Site("o", queries, (self.hidden,), residual=True),
            "gate_up": Site("gate_up", self.hidden, (self.intermediate, self.intermediate), norm=True, swiglu=True),
            "down": Site("down", self.intermediate, (self.hidden,), residual=True),
        }[name]

    def linear(self, name: str) -> Site:
        """A single linear by name."""
        group = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "gate": ("gate_up", 0), "up": ("gate_up", 1)}
        of, index = group.get(name, (name, 0))
        site = self.group(of)
        return Site(name, site.in_features, (site.out_features[index],))


# Qwen3-VL's configurations (text part), and one that a CPU runs in milliseconds.
MODELS = {
    "8B": ModelShape(4096, 12288, 32, 8, 128, 36),
    "4B": ModelShape(2560, 9728, 32, 8, 128, 36),
    "2B": ModelShape(2048, 6144, 16, 8, 128, 28),
    "tiny": ModelShape(64, 96, 4, 2, 16, 2, vocabulary=160),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure; every contender of it runs on the same tensors.

    Attributes:
        suite, pass_, model, site, layers, tokens, context, routes, ranks, dtype: as in
            :class:`~twn_kernels.benchmarking.results.Row`.
    """

    suite: str
    pass_: str
    model: str
    tokens: int
    routes: str
    ranks: tuple[int, int] = (64, 64)
    dtype: str = "bf16"
    site: str | None = None
    layers: int | None = None
    context: int | None = None

    @property
    def id(self) -> str:
        where = self.site if self.site else f"{self.layers}layer{'s' if self.layers != 1 else ''}"
        size = f"T{self.tokens}" + ("" if self.context is None else f"-ctx{self.context}")
        ranks = f"r{self.ranks[0]}x{self.ranks[1]}"
        return "-".join((self.suite, self.model, where, self.pass_, size, self.routes, ranks, self.dtype))

    def __str__(self) -> str:
        return self.id

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The linear or the group, the two groups of an MLP, or all four groups of a layer."""
        if self.suite == "linear":
            return (self.shape.linear(self.site),)
        if self.site == MLP:
            return self.shape.group("gate_up"), self.shape.group("down")
        if self.suite == "group":
            return (self.shape.group(self.site),)
        return tuple(self.shape.group(name) for name in GROUPS)

    @property
    def rows(self) -> int:
        """Rows of the batch: one a token in a decode step, else sequences of up to 1024 tokens, at least two."""
        if self.pass_ == "decode":
            return self.tokens
        return max(1, self.tokens // max(1, min(_SEQUENCE, self.tokens // 2)))

    @property
    def sequence(self) -> int:
        """Tokens a row; ``rows * sequence`` is ``tokens``."""
        return self.tokens // self.rows

    def segments(self) -> list[tuple[int, str | None]]:
        """The routes as consecutive ``(tokens, adapter)``, adapter as in ``RoutePlan.from_segments``."""
        tokens = self.tokens
        if self.routes in ("reasoning", "base", "both"):
            return [(tokens, None if self.routes == "base" else self.routes)]
        if self.routes == "half":
            first = self.sequence * ((self.rows + 1) // 2)
            return _merged([(first, REASONING), (tokens - first, EMBEDDING)])
        if self.routes == "suffix":
            if self.pass_ == "decode":
                raise OptionError('routes "suffix" need sequences; a decode step has one token a row. Use a prefill.')
            queries = min(_QUERIES, max(1, self.sequence // 4))
            return [(self.sequence - queries, REASONING), (queries, EMBEDDING)] * self.rows
        names = (REASONING, EMBEDDING)
        if self.suite in ("linear", "group"):
            return _merged([(1, names[index % 2]) for index in range(tokens)])
        return _merged([(self.sequence, names[row % 2]) for row in range(self.rows)])

    def uses(self) -> tuple[int, int]:
        """Tokens that use the reasoning adapter, and the embedding adapter."""
        totals = [0, 0]
        for length, name in self.segments():
            for adapter in (0, 1):
                totals[adapter] += length * (ROUTE_BITS[name] >> adapter & 1)
        return totals[0], totals[1]

    def row_names(self) -> list[str | None] | None:
        """One adapter's name (or None) for each row of the batch; None where a row changes its adapter inside."""
        rows = self.tokens if self.suite in ("linear", "group") and self.routes == "alternating" else self.rows
        names = [name for length, name in self.segments() for _ in range(length)]
        each = self.tokens // rows
        split = [names[row * each : (row + 1) * each] for row in range(rows)]
        return [part[0] for part in split] if all(len(set(part)) == 1 for part in split) else None

    def with_layers(self, layers: int) -> Case:
        """The same with fewer decoder layers, for the model suite."""
        return replace(self, layers=min(layers, self.shape.layers)) if self.suite == "model" else self


def check_case(case: Case) -> Case:
    """The case itself.

    Raises:
        OptionError: a field has a value that no suite knows.
    """
    for name, value, known in (
        ("suite", case.suite, SUITES),
        ("pass", case.pass_, PASSES),
        ("model", case.model, MODELS),
        ("routes", case.routes, ROUTES),
        ("dtype", case.dtype, DTYPES),
    ):
        if value not in known:
            raise OptionError(f"{name} must be one of {quoted(known)}, got {value!r}.{did_you_mean(value, known)}")
    sites = {"linear": LINEARS, "group": (*GROUPS, MLP)}.get(case.suite)
    if sites is None:
        if case.site is not None or not _counts(case.layers) or case.layers > case.shape.layers:
            raise OptionError(
                f'a case of suite "{case.suite}" needs layers in 1 … {case.shape.layers} and no site, '
                f"got layers {case.layers!r}, site {case.site!r}."
            )
        if case.suite == "layer" and case.layers != 1:
            raise OptionError(f'suite "layer" measures one layer, got layers={case.layers}. Use suite "model".')
    elif case.site not in sites or case.layers is not None:
        raise OptionError(
            f'a case of suite "{case.suite}" needs a site of {quoted(sites)} and no layers, got site {case.site!r}, '
            f"layers {case.layers!r}.{did_you_mean(case.site, sites)}"
        )
    if not _counts(case.tokens) or (case.pass_ != "decode" and case.tokens % case.rows):
        raise OptionError(
            f"tokens must be a whole number of 1 or more that splits into equal rows, got {case.tokens!r}."
        )
    if len(case.ranks) != 2 or not all(_counts(rank) and rank <= MAX_RANK for rank in case.ranks):
        raise OptionError(f"ranks must be two whole numbers in [1, {MAX_RANK}], got {case.ranks!r}.")
    needs_context = case.pass_ == "decode" and case.suite in ("layer", "model")
    if needs_context != _counts(case.context):
        expected = "a number of tokens in the cache" if needs_context else "None, as nothing reads a cache"
        raise OptionError(f"context must be {expected}, got {case.context!r}.")
    case.segments()
    return case


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _merged(segments: list[tuple[int, str | None]]) -> list[tuple[int, str | None]]:
    merged: list[tuple[int, str | None]] = []
    for length, name in segments:
        if length and merged and merged[-1][1] == name:
            merged[-1] = (merged[-1][0] + length, name)
        elif length:
            merged.append((length, name))
    return merged
