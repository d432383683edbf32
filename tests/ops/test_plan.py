"""RoutePlan: three ways to build it, refreshing in place, and each refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twn_kernels.errors import DtypeError, OptionError, PatchError, ShapeError
from twn_kernels.ops import RoutePlan

NAMES = [None, "reasoning", "embedding", "both"]
SEGMENTS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(NAMES)), max_size=8)


@given(SEGMENTS)
def test_segments_equal_their_expansion(segments):
    lengths, adapters = [length for length, _ in segments], [name for _, name in segments]
    plan = RoutePlan.from_segments(lengths, adapters)
    expected = [NAMES.index(name) for length, name in segments for _ in range(length)]
    assert plan.routes.tolist() == expected
    assert plan.tokens == len(expected)
    union = 0
    for bit in expected:
        union |= bit
    assert plan.present == union
    assert plan.is_uniform == (len(set(expected)) <= 1)


def test_rows_repeat_their_name():
    plan = RoutePlan.from_rows(["embedding", None, "both"], 2)
    assert plan.routes.tolist() == [2, 2, 0, 0, 3, 3]
    assert (plan.present, plan.is_uniform) == (3, False)


def test_uniform_says_so():
    plan = RoutePlan.uniform("reasoning", 3)
    assert plan.routes.tolist() == [1, 1, 1] and plan.routes.dtype == torch.int8
    assert (plan.present, plan.is_uniform) == (1, True)


def test_from_routes_keeps_its_own_copy_and_refreshes_in_place():
    routes = torch.tensor([0, 1, 2, 3], dtype=torch.int8)
    plan = RoutePlan.from_routes(routes)
    routes.zero_()
    address = plan.routes.data_ptr()
    assert plan.routes.tolist() == [0, 1, 2, 3]
    assert plan.refresh_(torch.tensor([3, 3, 0, 0], dtype=torch.int8)) is plan
    assert plan.routes.tolist() == [3, 3, 0, 0] and plan.routes.data_ptr() == address


def test_a_plan_for_some_adapters_refreshes_among_them():
    plan = RoutePlan.from_routes(torch.tensor([0, 1], dtype=torch.int8), adapters=["reasoning"])
    assert (plan.present, plan.is_uniform) == (1, False)
    assert plan.refresh_(torch.tensor([1, 0], dtype=torch.int8)).routes.tolist() == [1, 0]
    with pytest.raises(OptionError, match="built without: it has reasoning"):
        plan.refresh_(torch.tensor([1, 3], dtype=torch.int8))
    assert plan.routes.tolist() == [1, 0], "a refused refresh changes nothing"
    base = RoutePlan.from_routes(torch.zeros(2, dtype=torch.int8), adapters=[])
    assert (base.present, base.is_uniform) == (0, False)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RoutePlan.from_routes([0, 1]), DtypeError, "routes must be an int8 tensor .* got list"),
        (lambda: RoutePlan.from_routes(torch.zeros(3)), DtypeError, "int8 tensor .* got torch.float32"),
        (
            lambda: RoutePlan.from_routes(torch.zeros(2, 3, dtype=torch.int8)),
            ShapeError,
            r"routes must be \[tokens\], got \[2, 3\]. Flatten",
        ),
        (lambda: RoutePlan.from_routes(torch.tensor([4], dtype=torch.int8)), OptionError, "lie in 0 … 3 .* got 4"),
        (lambda: RoutePlan.from_routes(torch.tensor([-1], dtype=torch.int8)), OptionError, "lie in 0 … 3 .* got -1"),
        (lambda: RoutePlan.from_segments([1, 2], ["both"]), ShapeError, "got 2 lengths and 1 adapters"),
        (
            lambda: RoutePlan.from_segments([-1], [None]),
            ShapeError,
            r"lengths\[0\] must be a whole number of 0 or more tokens, got -1",
        ),
        (lambda: RoutePlan.from_rows([None], -2), ShapeError, "tokens_per_row must be 0 or more, got -2"),
        (
            lambda: RoutePlan.uniform("embeding", 3),
            OptionError,
            'route must be "reasoning", "embedding", "both" or None, got \'embeding\'. Did you mean "embedding"',
        ),
        (
            lambda: RoutePlan.uniform("both", 1).refresh_(torch.zeros(1, dtype=torch.int8)),
            PatchError,
            "refresh_ needs a plan built with RoutePlan.from_routes",
        ),
        (
            lambda: RoutePlan.from_routes(torch.zeros(3, dtype=torch.int8)).refresh_(torch.zeros(2, dtype=torch.int8)),
            ShapeError,
            "routes must keep the plan's 3 tokens, got 2",
        ),
        (
            lambda: RoutePlan.from_routes(torch.tensor([0, 2], dtype=torch.int8), adapters=["reasoning"]),
            OptionError,
            "routes select adapters that the plan was built without: it has reasoning. Build it with",
        ),
        (
            lambda: RoutePlan.from_routes(torch.zeros(1, dtype=torch.int8), adapters=["embeding"]),
            OptionError,
            "route must be .* got 'embeding'. Did you mean \"embedding\"",
        ),
    ],
)
def test_refusals_name_the_argument_and_the_fix(build, error, message):
    with pytest.raises(error, match=message):
        build()
