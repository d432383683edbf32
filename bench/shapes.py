"""The shapes that are measured, as the suites and ``python -m bench.gpu`` take them.

The list itself lives in :mod:`twn_kernels.benchmarking.suites`, where an installed package finds it too.
"""

from twn_kernels.benchmarking.cases import MODELS, Case
from twn_kernels.benchmarking.suites import SCALES, cases

__all__ = ["MODELS", "SCALES", "Case", "cases"]
