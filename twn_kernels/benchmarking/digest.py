"""From runs to contests: which rows answer for this package, which are its alternatives, which are bounds.

A contest is one case of one run with all its contenders: they ran on the same tensors, interleaved, so only rows of
one contest are set against each other. Where several runs hold a case, the newest run's contest stands for it; a
layer's linears are added up in the newest run that holds all four site groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from twn_kernels.benchmarking.cases import GROUPS, MLP
from twn_kernels.benchmarking.results import Row, Run
from twn_kernels.errors import ResultError

__all__ = [
    "AUTO",
    "CUDA",
    "CUDA_BASE",
    "FUSED_BASE",
    "PLAIN",
    "Contest",
    "Device",
    "LayerSum",
    "Source",
    "arch_of",
    "device_of",
    "devices",
    "is_bound",
    "is_gpu",
    "roofs_of",
]

AUTO = "ours_auto"  # what a user gets who names no implementation: it answers for the package
CUDA = "ours_cuda"
FUSED_BASE = "fused_base"
CUDA_BASE = "fused_base_cuda"  # the same kernels as CUDA without adapters
PLAIN = "plain"  # the stock linears or model, without adapters
# These bound a contest rather than compete: they leave the adapters out, or hold another copy of the weights for each
# combination of adapters.
_BOUND_PREFIXES = (FUSED_BASE, PLAIN, "merged")


class Source(NamedTuple):
    """A run and the file that it was read from."""

    run: Run
    name: str


@dataclass(frozen=True)
class Contest:
    """All contenders of one case of one run.

    Attributes:
        source: run and file.
        rows: in the order in which they were measured; all of one case.
    """

    source: Source
    rows: tuple[Row, ...]

    @property
    def case(self) -> Row:
        """A row that speaks for what all have in common."""
        return self.rows[0]

    def row(self, contender: str) -> Row | None:
        """One contender's row, or None."""
        return next((row for row in self.rows if row.contender == contender), None)

    @property
    def ours(self) -> Row | None:
        """The row that answers for this package; None where the case was run without it."""
        return self.row(AUTO)

    @property
    def alternatives(self) -> tuple[Row, ...]:
        """Timed rows of what a user would run instead, and that does the same work; fastest first."""
        able = [row for row in self.rows if row.is_baseline and row.time_us is not None and not is_bound(row)]
        return tuple(sorted(able, key=lambda row: row.time_us.median))

    @property
    def times_alternative(self) -> float | None:
        """Our median over the fastest alternative's: above 1 we lose. None without both."""
        ours, others = self.ours, self.alternatives
        if ours is None or ours.time_us is None or not others:
            return None
        return ours.time_us.median / others[0].time_us.median


def is_bound(row: Row) -> bool:
    """Whether a row does less than the contest's work, and so bounds it rather than competes."""
    return row.contender.startswith(_BOUND_PREFIXES)


def device_of(run: Run) -> str:
    """The device's name as the run recorded it: a GPU's name, or the CPU's.

    Raises:
        ResultError: the run's environment does not say.
    """
    return _recorded(run.environment, "device")


def is_gpu(run: Run) -> bool:
    """Whether the run's times are a GPU's; raises as :func:`device_of`."""
    return _recorded(run.environment, "device_type") == "cuda"


def arch_of(run: Run) -> str:
    """The GPU's architecture, such as ``sm_90``; raises as :func:`device_of`."""
    gpu = run.environment.get("gpu")
    capability = _recorded(gpu if isinstance(gpu, dict) else {}, "capability", "gpu.capability")
    return "sm_" + capability.replace(".", "")


def roofs_of(run: Run) -> tuple[float, float] | None:
    """Measured GB/s and TFLOP/s, or None where the run did not measure both."""
    roofs = [run.roofs.get(name) for name in ("copy_gb_per_s", "matmul_tflops")]
    measured = all(isinstance(roof, int | float) and not isinstance(roof, bool) and roof > 0 for roof in roofs)
    return (float(roofs[0]), float(roofs[1])) if measured else None


def _recorded(entries: dict[str, Any], name: str, path: str | None = None) -> str:
    value = entries.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ResultError(
            f"environment.{path or name} of the run must be a non-empty string, got {value!r}: without it nobody can "
            "tell what was measured. Measure again."
        )
    return value


def devices(sources: Iterable[Source]) -> list[Device]:
    """The runs by device, GPUs first, then by name; a run without rows brings no device."""
    by_device: dict[tuple[bool, str], list[Source]] = {}
    for source in sorted(sources, key=lambda source: (source.run.created, source.name)):
        if source.run.cases:
            by_device.setdefault((not is_gpu(source.run), device_of(source.run)), []).append(source)
    return [_device(name, not cpu, entries) for (cpu, name), entries in sorted(by_device.items(), key=lambda e: e[0])]


def _device(name: str, gpu: bool, sources: list[Source]) -> Device:
    contests: dict[str, Contest] = {}
    sums: dict[tuple, LayerSum] = {}
    for source in sources:  # oldest first, so that newer ones take their places
        found = _contests(source)
        contests |= {contest.case.case: contest for contest in found}
        sums |= _layer_sums(found)
    ordered = tuple(sorted(contests.values(), key=lambda contest: _order(contest.case)))
    return Device(name, gpu, ordered, tuple(sorted(sums.values(), key=lambda entry: _order(entry.case))))


def _contests(source: Source) -> list[Contest]:
    rows: dict[str, list[Row]] = {}
    for row in source.run.cases:
        rows.setdefault(row.case, []).append(row)
    return [Contest(source, tuple(entries)) for entries in rows.values()]


_SUITES = ("model", "layer", "group", "linear")
_PASSES = ("forward", "decode", "forward_backward")


def _order(case: Row) -> tuple:
    sites = GROUPS.index(case.site) if case.site in GROUPS else len(GROUPS)
    return (
        _SUITES.index(case.suite),
        _PASSES.index(case.pass_),
        case.dtype,
        case.model,
        sites,
        case.site or "",
        case.ranks,
        case.routes,
        case.tokens,
        case.context or 0,
        case.case,
    )


@dataclass(frozen=True)
class LayerSum:
    """The four site groups of one decoder layer, added up: what its linears cost.

    Where the run holds ``mlp``, it stands for ``gate_up`` and ``down``: there an implementation computes SwiGLU in
    whichever of the two a patched block would.

    Attributes:
        contests: of ``qkv``, ``o``, ``gate_up`` and ``down``, all of one run.
        medians: microseconds by contender, for those that were timed in all of them.
    """

    contests: tuple[Contest, ...]
    medians: dict[str, float]

    @property
    def case(self) -> Row:
        """The row of one of its sites; all but the site is common to the four."""
        return self.contests[0].case

    def id_of(self, contender: str) -> str:
        """The four rows' ids as one pattern: ``*`` stands for the site."""
        first, site = self.case.case, self.case.site
        return f"{first.replace(f'-{site}-', '-*-', 1)}-{contender}"

    def overhead(self, contender: str, base: str = FUSED_BASE) -> float | None:
        """Percent over our own fused base; None where either was not timed in all four."""
        if contender not in self.medians or base not in self.medians:
            return None
        return 100 * (self.medians[contender] / self.medians[base] - 1)

    @property
    def alternatives(self) -> list[str]:
        """Contenders that a user would run instead, fastest first."""
        rows = [row for row in self.contests[0].rows if row.is_baseline and not is_bound(row)]
        return sorted((row.contender for row in rows if row.contender in self.medians), key=self.medians.get)


@dataclass(frozen=True)
class Device:
    """What is known of one device.

    Attributes:
        name: as its runs recorded it.
        is_gpu: whether the times are a GPU's.
        contests: one for each case, ordered by suite, pass and problem.
        sums: one for each problem of which a run holds all four site groups.
    """

    name: str
    is_gpu: bool
    contests: tuple[Contest, ...] = ()
    sums: tuple[LayerSum, ...] = ()


def _layer_sums(contests: Sequence[Contest]) -> dict[tuple, LayerSum]:
    """Every complete set of the four site groups of one problem, in the contests of one run."""
    sets: dict[tuple, dict[str, Contest]] = {}
    for contest in contests:
        case = contest.case
        if case.suite == "group":
            problem = (case.pass_, case.model, case.tokens, case.context, case.routes, case.ranks, case.dtype)
            sets.setdefault(problem, {})[case.site] = contest
    complete = {problem: sites for problem, sites in sets.items() if set(sites) >= set(GROUPS)}
    return {problem: _sum(sites) for problem, sites in complete.items()}


def _sum(sites: dict[str, Contest]) -> LayerSum:
    times = {
        name: {row.contender: row.time_us.median for row in contest.rows if row.time_us is not None}
        for name, contest in sites.items()
    }
    everywhere = [name for name in times["qkv"] if all(name in each for each in times.values())]
    parts = ("qkv", "o", MLP) if MLP in sites else GROUPS
    medians = {name: sum(times[part][name] for part in parts) for name in everywhere}
    return LayerSum(tuple(sites[name] for name in GROUPS), medians)
