"""Timing: turns that rotate, quantiles, cold inputs, and contenders that fail."""

import time

import pytest
import torch

from twn_kernels.benchmarking import timers
from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.problem import Problem, rotation
from twn_kernels.benchmarking.timers import SampleFailed, Timer, interleave, summary

MIB = 2**20


@pytest.mark.parametrize(
    "set_bytes, cache_bytes, sets",
    [(4 * MIB, 50 * MIB, 51), (201 * MIB, 50 * MIB, 2), (100 * MIB, 50 * MIB, 3), (1, 50 * MIB, 256), (0, 0, 2)],
)
def test_sets_to_rotate_exceed_four_times_the_cache(set_bytes, cache_bytes, sets):
    assert rotation(set_bytes, cache_bytes) == sets
    if 2 < sets < 256:
        assert (sets - 1) * set_bytes <= 4 * cache_bytes < sets * set_bytes


def test_a_problem_holds_as_many_unlike_sets_as_its_bytes_ask_for():
    case = Case("group", "decode", "tiny", 2, "half", (8, 8), "fp32", site="o")
    one = Problem.build(case, torch.device("cpu"), cache_bytes=0).sets[0]
    size = sum(tensor.nbytes for tensor in one.tensors())
    problem = Problem.build(case, torch.device("cpu"), cache_bytes=size)
    assert len(problem.sets) == 5
    addresses = [tensor.data_ptr() for inputs in problem.sets for tensor in inputs.tensors()]
    assert len(set(addresses)) == len(addresses)
    for first, second in zip(problem.sets, problem.sets[1:], strict=False):
        for a, b in zip(first.tensors(), second.tensors(), strict=True):
            assert not torch.equal(a, b)
    for inputs in problem.sets:
        assert all((tensor != 0).float().mean() > 0.99 for tensor in inputs.tensors())


def test_the_same_case_draws_the_same_numbers_and_another_case_others():
    def draw(tokens):
        case = Case("group", "forward", "tiny", tokens, "half", (8, 8), "fp32", site="o")
        return Problem.build(case, torch.device("cpu"), cache_bytes=0).sets[0].weights[0]

    assert torch.equal(draw(4), draw(4)) and not torch.equal(draw(4), draw(6))


def test_each_call_of_a_sample_is_made_and_the_time_is_of_one(monkeypatch):
    made = []
    timer = Timer("cpu")
    timed = timer.prepare([lambda: made.append("a"), lambda: made.append("b")], "always")
    assert made == ["a", "b"] and timed.calls == 2 and not timed.in_graph
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(clock))
    assert timer.sample_us(timed) == 250_000
    assert made == ["a", "b"] * 2


def test_contenders_take_turns_in_an_order_that_rotates():
    order = []
    timer = Timer("cpu")
    contenders = {name: timer.prepare([lambda name=name: order.append(name)], "never") for name in "abc"}
    order.clear()
    times = interleave(timer, contenders, seconds=10, rounds=4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert list(times) == ["a", "b", "c"] and all(t.rounds == 4 for t in times.values())


def test_the_time_ends_the_rounds_but_never_before_three():
    timer = Timer("cpu")
    slow = timer.prepare([lambda: time.sleep(0.01)], "never")
    assert interleave(timer, {"slow": slow}, seconds=0.0, rounds=50)["slow"].rounds == 3
    assert interleave(timer, {"slow": slow}, seconds=0.0, rounds=2)["slow"].rounds == 2


def test_quantiles_of_samples():
    time_us = summary([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (time_us.median, time_us.p20, time_us.p80, time_us.rounds) == (3.5, 2.0, 5.0, 6)
    assert summary([7.0]) == (type(time_us))(7.0, 7.0, 7.0, 1)


def test_a_contender_that_fails_is_named():
    timer = Timer("cpu")
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")

    contenders = {"good": timer.prepare([lambda: None], "never"), "bad": timer.prepare([fails_later], "never")}
    with pytest.raises(SampleFailed) as raised:
        interleave(timer, contenders, seconds=1, rounds=5)
    assert raised.value.name == "bad" and "out of memory" in str(raised.value)


@pytest.mark.gpu
def test_graphs_replay_what_the_calls_do_and_refuse_what_cannot_be_captured():
    from twn_kernels.benchmarking.timers import CannotCapture

    timer = Timer("cuda")
    total = torch.zeros((), device="cuda")
    timed = timer.prepare([lambda: total.add_(1)], "always")
    assert timed.in_graph and timed.calls >= 1
    before = total.item()
    assert timer.sample_us(timed) > 0
    assert total.item() == before + timed.calls
    with pytest.raises(CannotCapture, match="No CUDA graph can hold it"):
        timer.prepare([lambda: total.item()], "always")
    assert not timer.prepare([lambda: total.item()], "where_possible").in_graph
