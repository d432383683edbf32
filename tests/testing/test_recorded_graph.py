"""A recording replays what a graph would, and refuses what a graph would refuse."""

from __future__ import annotations

import pytest
import torch

from twn_kernels.testing.recorded_graph import record


def test_a_replay_reads_present_values_and_writes_in_place():
    x, weight, out, count = torch.ones(3), torch.full((3,), 2.0), torch.zeros(3), torch.zeros(1)

    def step():
        y = (x * weight).view(1, 3)
        y[0].add_(1)
        out.copy_(y.squeeze(0))
        count.add_(1)

    graph = record(step)
    assert out.tolist() == [3.0] * 3 and len(graph) > 3
    x.fill_(5)
    weight.fill_(-1)
    graph.replay()
    assert out.tolist() == [-4.0] * 3 and count.item() == 2


def test_host_numbers_are_baked_in():
    held, out = {"factor": 2.0}, torch.zeros(1)
    graph = record(lambda: out.add_(held["factor"]))
    held["factor"] = 100.0
    graph.replay()
    assert out.item() == 4.0


@pytest.mark.parametrize(
    "step",
    [
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x if (x > 0).all() else -x,
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.unique(),
    ],
)
def test_what_waits_for_the_device_is_refused(step):
    with pytest.raises(RuntimeError, match="which a CUDA graph cannot capture|only the device knows"):
        record(lambda: step(torch.ones(3)))
