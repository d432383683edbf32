"""``impl="cuda"`` on a GPU: every row count of a launch, odd ranks, chains of launches, graphs that meet.

What all implementations share is in ``test_group_on_gpu``. The bodies run here on tiny shapes and a stand-in too.
"""

from __future__ import annotations

import cuda_stand_in
import group_bodies as bodies
import pytest
import torch
from group_cases import ROUTES, GroupCase, converted

from twn_kernels.ops import dual_lora_linear
from twn_kernels.testing.oracle import assert_as_good_as_torch

FP16, BF16 = torch.float16, torch.bfloat16
gpu = pytest.mark.gpu

# in_features, out_features of each projection, front, back.
SITES = {
    "8b-qkv": (4096, (4096, 1024, 1024), "norm", "plain"),
    "8b-o": (4096, (4096,), "plain", "residual"),
    "8b-gate_up": (4096, (12288, 12288), "norm", "swiglu"),
    "8b-down": (12288, (4096,), "gated", "residual"),
    "4b-gate_up": (2560, (9728, 9728), "norm", "swiglu"),
    "4b-down": (9728, (2560,), "plain", "residual"),
    "2b-qkv": (2048, (2048, 1024, 1024), "norm", "plain"),
}
ODD_RANKS = {
    "1": ((1, 1),) * 3,
    "5": ((5, 5),) * 3,
    "48": ((48, 48),) * 3,
    "96": ((96, 96),) * 3,
    "200+64": ((200, 64),) * 3,
    "256+256": ((256, 256),) * 3,
    "some absent": ((200, 0), (0, 1), (0, 0)),
}
# On both sides of every tile of rows, and of the largest launch.
DECODE_ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 63, 64)
MORE_ROWS = (65, 127, 128, 129, 513)


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    cuda_stand_in.install_without_gpu(monkeypatch)


def real(site: str, tokens: int, ranks=((64, 64),) * 3, routes="mixed", dtype=BF16, **fields) -> GroupCase:
    features, outputs, front, back = SITES[site]
    return GroupCase(tokens, features, outputs, ranks[: len(outputs)], dtype, routes, front, back, **fields)


@gpu
@pytest.mark.parametrize("tokens", DECODE_ROWS + MORE_ROWS)
@pytest.mark.parametrize("site", SITES)
def test_every_row_count(site, tokens, device):
    bodies.forward("cuda", real(site, tokens), device)


@gpu
@pytest.mark.parametrize("tokens", [1, 3, 33, 130])
@pytest.mark.parametrize("ranks", ODD_RANKS)
@pytest.mark.parametrize("site", ["8b-qkv", "4b-gate_up", "8b-down"])
def test_odd_ranks(site, ranks, tokens, device):
    for routes in ROUTES:
        bodies.forward("cuda", real(site, tokens, ODD_RANKS[ranks], routes), device)


@gpu
@pytest.mark.parametrize("tokens", [1, 64, 200])
@pytest.mark.parametrize("site", SITES)
def test_fp16_and_biases(site, tokens, device):
    bodies.forward("cuda", real(site, tokens, dtype=FP16), device)
    bodies.forward("cuda", real(site, tokens, bias=True), device)


@gpu
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
@pytest.mark.parametrize("outputs", [(81,), (24, 1, 40), (8, 8, 8), (4097,)], ids=str)
def test_outputs_that_fill_no_tile(outputs, tokens, device):
    for features in (8, 72, 136):
        case = GroupCase(tokens, features, outputs, ((17, 5),) * len(outputs), BF16)
        bodies.forward("cuda", case, device)
        bodies.nan_stays("cuda", case, device)


@gpu
@pytest.mark.parametrize("tokens", [1, 9, 64, 150])
@pytest.mark.parametrize("site", SITES)
def test_nan_and_bits(site, tokens, device):
    bodies.nan_stays("cuda", real(site, tokens, ((64, 5),) * 3), device)
    bodies.same_bits_again("cuda", real(site, tokens), device, rounds=50)


def cut_inputs(case: GroupCase, device, cut) -> None:
    """Inputs whose rows start anywhere, in a sea of NaN; weights must lie as they are read."""
    group = bodies.Group("cuda", case, device)
    for name in ("x", "residual"):
        if group.args[name] is not None:
            group.args[name] = cut(group.args[name])
    bodies.hold(group(), group.eager(torch.float64), group.eager(), f"cut {case}")


@gpu
@pytest.mark.parametrize("tokens", [1, 33, 150])
@pytest.mark.parametrize("site", SITES)
def test_inputs_that_lie_anywhere(site, tokens, device, cut_from_nan):
    cut_inputs(real(site, tokens), device, cut_from_nan)


def one_linear(case: GroupCase, device) -> None:
    args, plan = bodies.drawn(case, device), case.plan(device)
    exact = converted(args, lambda t: t.double())

    def run(of: dict, impl: str) -> torch.Tensor:
        return dual_lora_linear(of["x"], *of["projections"][0], plan, impl=impl)

    with torch.no_grad():
        assert_as_good_as_torch(run(args, "cuda"), run(exact, "reference"), run(args, "reference"), f"{case}")


@gpu
@pytest.mark.parametrize("tokens", [1, 40, 130])
def test_one_linear(tokens, device):
    one_linear(real("8b-o", tokens), device)


def compiled_into_graphs(case: GroupCase, device) -> None:
    """Recorded where memory that nobody returned is an error, and replayed between calls that are not."""
    args, plan = bodies.drawn(case, device), case.plan(device)
    how = {"mode": "reduce-overhead"} if torch.device(device).type == "cuda" else {"backend": "aot_eager"}

    def run(x: torch.Tensor) -> torch.Tensor:
        return dual_lora_linear(x, *args["projections"][0], plan, impl="cuda") * 2

    step = torch.compile(run, fullgraph=True, **how)
    with torch.no_grad():
        expected = run(args["x"])
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(step(args["x"]), expected)
            assert torch.equal(run(args["x"]), expected)


@gpu
@pytest.mark.parametrize("tokens", [1, 40, 130])
def test_calls_that_are_compiled_into_graphs(tokens, device):
    compiled_into_graphs(real("8b-o", tokens), device)


def step_of(features: int, inner: int, tokens: int, ranks=(16, 8)) -> list[GroupCase]:
    """o, gate_up and down of a layer, each of which reads what the one before wrote."""
    one, two = (ranks,), (ranks,) * 2
    return [
        GroupCase(tokens, features, (features,), one, BF16, back="residual"),
        GroupCase(tokens, features, (inner, inner), two, BF16, "alternating", front="norm", back="swiglu"),
        GroupCase(tokens, inner, (features,), one, BF16, "suffix", back="residual"),
    ]


@gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 100])
def test_launches_that_follow_each_other_wait_for_what_they_read(tokens, device):
    bodies.chains("cuda", step_of(4096, 12288, tokens, (64, 64)), device, rounds=30)
    bodies.chains("cuda", step_of(256, 512, tokens), device, rounds=300)


@gpu
@pytest.mark.parametrize("tokens", [1, 32, 200])
def test_two_graphs_of_one_stream_may_overtake_each_other(tokens, device):
    cases = [real("8b-gate_up", tokens), real("8b-qkv", tokens, routes="alternating")]
    bodies.overtaking_graphs("cuda", cases, device, rounds=30)
    bodies.overtaking_graphs("cuda", [real("8b-o", tokens)] * 2, device, rounds=30)


@gpu
@pytest.mark.parametrize("tokens", [1, 32, 200])
def test_eager_calls_beside_a_replay(tokens, device):
    """A graph has buffers of its own: eager launches on the stream that it was captured on do not meet it."""
    recorded, eager = (bodies.Group("cuda", real("8b-qkv", tokens), device) for _ in range(2))
    alone = [y.clone() for y in recorded()], [y.clone() for y in eager()]
    outputs, replay = bodies.captured(recorded, device)
    side = torch.cuda.Stream()
    for _ in range(30):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            replay()
        seen = eager()
        torch.cuda.synchronize()
        for expected, got in zip(alone, (outputs, seen), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@gpu
def test_many_streams(device):
    cases = [real(site, tokens) for site, tokens in (("8b-qkv", 1), ("8b-o", 17), ("4b-gate_up", 64), ("8b-down", 90))]
    bodies.streams_do_not_meet("cuda", cases, device, rounds=20)


TINY = GroupCase(9, 64, (24, 16, 8), ((8, 4), (0, 8), (5, 0)), BF16, "mixed", "norm", bias=True)


def test_the_bodies_run_on_tiny_shapes(device, no_sync, cut_from_nan):
    bodies.chains("cuda", step_of(64, 96, 5), device, rounds=2)
    bodies.overtaking_graphs("cuda", [TINY, TINY], device, rounds=1)
    bodies.answers_without_waiting("cuda", TINY, device, no_sync)
    bodies.nan_stays("cuda", GroupCase(5, 72, (24, 1, 40), ((17, 5),) * 3, BF16), device)
    cut_inputs(TINY, device, cut_from_nan)
    one_linear(TINY, device)
    compiled_into_graphs(TINY, device)
