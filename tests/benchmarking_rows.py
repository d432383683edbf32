"""A row and a run of benchmark results with every field set, to change one at a time."""

from twn_kernels.benchmarking.results import Row, Run, Time


def row(**changes) -> Row:
    values = {
        "id": "case-ours_blas", "case": "case", "suite": "group", "pass_": "decode", "model": "8B", "site": "qkv",
        "layers": None, "layers_full": None, "tokens": 32, "context": None, "routes": "half", "ranks": (64, 32),
        "dtype": "bf16", "contender": "ours_blas", "impl": "blas", "is_baseline": False, "correct": True,
        "error_ratio": 0.4, "time_us": Time(10.0, 9.5, 11.0, 20), "reason": None, "in_graph": True, "ideal_bytes": 10,
        "ideal_flops": 20, "percent_of_roof": 80.5, "overhead_percent": -1.5, "memory_added_bytes": 0,
        "command": "python -m bench.gpu",
    }  # fmt: skip
    return Row(**(values | changes))


def run(*rows: Row) -> Run:
    return Run(
        "2026-01-02T03:04:05+00:00", "abc", None, "command", {"gpu": None}, {}, {"vllm": "absent"}, rows or (row(),)
    )
