"""Hand-written results with round numbers, for the tests of what is derived from them. They were never measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from twn_kernels.benchmarking import results
from twn_kernels.benchmarking.cases import GROUPS, Case
from twn_kernels.benchmarking.results import Row, Run, Time

H200 = {"device": "NVIDIA H200", "device_type": "cuda", "gpu": {"capability": "9.0", "driver": "580.1"}}
CPU = {"device": "Some CPU @ 2 GHz", "device_type": "cpu"}
OURS = {"fused_base", "fused_base_cuda", "ours_auto", "ours_blas", "ours_triton", "ours_cuda"}


def row(case: Case, contender: str, median: float | None = 100.0, *, spread: float = 0.02, **fields) -> Row:
    """One row whose p20 and p80 lie ``spread / 2`` on both sides of the median; no median: it was not timed."""
    time = None if median is None else Time(median, median * (1 - spread / 2), median * (1 + spread / 2), 20)
    impl = {"fused_base": "blas", "ours_auto": "blas"}.get(contender, contender.removeprefix("ours_"))
    values = {
        "id": f"{case.id}-{contender}",
        "case": case.id,
        **{name: getattr(case, name) for name in ("suite", "pass_", "model", "site", "layers", "tokens", "context")},
        **{name: getattr(case, name) for name in ("routes", "ranks", "dtype")},
        "layers_full": None if case.layers is None else case.shape.layers,
        "contender": contender,
        "impl": impl if contender in OURS else None,
        "is_baseline": contender not in OURS,
        "correct": None if time is None else True,
        "error_ratio": None if time is None else 0.5,
        "time_us": time,
        "reason": None if time is not None else "it was not installed",
        "in_graph": None if time is None else True,
        "ideal_bytes": 4_000_000,
        "ideal_flops": 8_000_000_000,
        "percent_of_roof": None,
        "overhead_percent": None,
        "memory_added_bytes": None,
        "command": f"python -m bench.gpu --only {case.id}",
    }
    known = {name: value for name, value in values.items() if name in Row.__dataclass_fields__}
    return Row(**(known | fields))


def contest(case: Case, **medians: float | None) -> list[Row]:
    """The rows of one case, contender by contender, with overheads over ``fused_base`` where it has a time."""
    base = medians.get("fused_base")
    overheads = {name: 100 * (time / base - 1) if base and time else None for name, time in medians.items()}
    return [row(case, name, time, overhead_percent=overheads[name]) for name, time in medians.items()]


def layer(case: Case, **medians: float | None) -> list[Row]:
    """The four site groups of a layer; each contender takes a quarter of its time in each."""
    quarters = {name: time and time / 4 for name, time in medians.items()}
    return [entry for site in GROUPS for entry in contest(replace(case, site=site), **quarters)]


def run(rows: list[Row], environment: dict = H200, **fields) -> Run:
    """A run of one commit with measured roofs."""
    values = {
        "created": "2026-11-23T12:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "python -m bench.gpu --minutes 30",
        "environment": environment,
        "roofs": {"copy_gb_per_s": 4000.0, "matmul_tflops": 800.0},
        "peers": {"vllm": "absent"},
        "cases": tuple(rows),
    }
    return Run(**(values | fields))


def saved(run: Run, path: Path) -> Path:
    """The run as a file, written by the package's own writer."""
    return results.save(run, path)
