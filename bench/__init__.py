"""The benchmarks: suites on pytest-benchmark, and one command for a GPU machine. Run from the root of a checkout."""
