"""The comparison times each function the stated number of times and orders its quantiles."""

import time

from twn_kernels.benchmarking.timing import compare


def test_each_function_is_called_once_a_round_and_a_slower_one_takes_longer():
    calls = {"fast": 0, "slow": 0}

    def function(name, seconds):
        def run():
            calls[name] += 1
            time.sleep(seconds)

        return run

    result = compare({"fast": function("fast", 0.0), "slow": function("slow", 0.01)}, rounds=5, warmup=1)
    assert calls == {"fast": 6, "slow": 6}
    assert list(result) == ["fast", "slow"]
    assert result["slow"].median_ms >= 10 > result["fast"].median_ms
    for timing in result.values():
        assert timing.p20_ms <= timing.median_ms <= timing.p80_ms and timing.rounds == 5
