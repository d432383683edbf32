"""What a site group must hold on a GPU, as functions of a case: real shapes there, tiny ones in the interpreter.

A *form* is how the op is asked for: an implementation, or ``blas-packed``, the vendor GEMM on packed weights. ``cuda``
is for inference, in 16 bits, and reads weights only where their rows start at 16-byte words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from group_cases import GroupCase, arguments, converted, eager_torch, with_gradients

from twn_kernels.modules.dual_lora_linear import DualLoRALinear, LayerAdapter
from twn_kernels.modules.packing import PackedGroup
from twn_kernels.modules.routing import RouteState, UniformSpec
from twn_kernels.ops import RoutePlan, dual_lora_group
from twn_kernels.testing.oracle import assert_as_good_as_torch

FORMS = ("blas", "blas-packed", "triton", "cuda")
NAN = float("nan")


class Group:
    """One case under one form: its tensors, its plan, and the call; changes are made to ``args`` in place."""

    def __init__(self, form: str, case: GroupCase, device, cut=lambda t: t) -> None:
        self.case, self.impl = case, form.removesuffix("-packed")
        self.args, self.plan = drawn(case, device, cut), case.plan(device)
        self.packed = None
        if form.endswith("-packed"):
            self.members = [_layer(projection) for projection in self.args["projections"]]
            self.packed = PackedGroup(self.members)
            assert self.packed.reason is None, self.packed.reason
            self.args["projections"] = [member.site_projection() for member in self.members]

    def __call__(self, **changes) -> tuple[torch.Tensor, ...]:
        packed = () if self.packed is None else self.packed.panels()
        with torch.no_grad():
            return dual_lora_group(**self.args | changes, plan=self.plan, impl=self.impl, packed=packed)

    def eager(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """The same in eager torch, in another dtype where one is named."""
        args = self.args if dtype is None else converted(self.args, lambda t: t.to(dtype))
        with torch.no_grad():
            return eager_torch(args, self.plan)


def drawn(case: GroupCase, device, cut=lambda t: t) -> dict:
    """The case's tensors, drawn on the device: a CPU takes seconds for the weights of a real site."""
    with torch.device(device):
        return arguments(case, device, cut)


def _layer(projection) -> DualLoRALinear:
    """A module that owns what a projection holds: only modules are packed."""
    out, features = projection.weight.shape
    linear = torch.nn.Linear(features, out, bias=projection.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(projection.weight.detach().clone(memory_format=torch.contiguous_format))
    if projection.bias is not None:
        linear.bias = torch.nn.Parameter(projection.bias)
    loras = {"reasoning": projection.reasoning, "embedding": projection.embedding}
    adapters = {name: LayerAdapter(*lora) for name, lora in loras.items() if lora is not None}
    return DualLoRALinear.adopt(linear, adapters, RouteState(UniformSpec(0)))


def hold(actual, truth, own, name: str) -> None:
    assert len(actual) == len(truth)
    for i, (y, t, o) in enumerate(zip(actual, truth, own, strict=True)):
        assert_as_good_as_torch(y, t, o, f"{name} y{i}")


def forward(form: str, case: GroupCase, device, cut=lambda t: t) -> None:
    """As good as torch."""
    group = Group(form, case, device, cut)
    hold(group(), group.eager(torch.float64), group.eager(), f"{form} {case}")


def gradients(impl: str, case: GroupCase, device) -> None:
    """Every gradient as good as torch's."""
    args, plan = drawn(case, device), case.plan(device)
    truth = with_gradients(eager_torch, converted(args, lambda t: t.double()), plan)
    own = with_gradients(eager_torch, args, plan)
    actual = with_gradients(lambda moved, plan: dual_lora_group(**moved, plan=plan, impl=impl), args, plan)
    for name, value in actual.items():
        assert_as_good_as_torch(value, truth[name], own[name], f"{impl} {case} {name}")


def same_bits_again(form: str, case: GroupCase, device, rounds: int) -> None:
    """No atomics, no order that depends on timing."""
    group = Group(form, case, device)
    first = [y.clone() for y in group()]
    for _ in range(rounds):
        assert all(torch.equal(a, b) for a, b in zip(first, group(), strict=True))


def nan_stays(form: str, case: GroupCase, device) -> None:
    """A NaN row and adapters that are all NaN or Inf change no row that does not use them, not by one bit."""
    group = Group(form, case, device)
    clean = [y.clone() for y in group()]
    row = case.tokens // 2
    with torch.no_grad():
        group.args["x"][row] = NAN
        for projection in group.args["projections"]:
            if projection.embedding is not None:
                projection.embedding.A.fill_(NAN)
                projection.embedding.B.fill_(float("inf"))
    others = (group.plan.routes & 2) == 0
    others[row] = False
    assert others.any() or case.routes in ("both", "embedding")
    for before, after in zip(clean, group(), strict=True):
        assert torch.equal(before[others], after[others])
        assert not after[row].isfinite().any()


def far_offsets(form: str, device, *, tokens: int, pitch: int, wide: int) -> None:
    """Rows beyond 2**31 elements of a pitched x and of a wide y are those of a call on them alone."""
    case = GroupCase(tokens, 64, (96, 32), ((16, 8), (8, 16)), torch.bfloat16, "alternating", front="norm")
    group = Group(form, case, device)
    own = [y.clone() for y in group()]
    buffer = torch.empty(tokens, pitch, dtype=case.dtype, device=device)
    buffer[:, : case.in_features].copy_(group.args["x"])
    pitched = group(x=buffer[:, : case.in_features])
    assert all(torch.equal(a, b) for a, b in zip(own, pitched, strict=True))
    del buffer, pitched, own
    case = GroupCase(tokens, 64, (wide,), ((16, 8),), torch.bfloat16, "alternating", back="residual")
    group = Group(form, case, device)
    (y,) = group()
    last = slice(tokens - 33, tokens)
    part = {**group.args, "x": group.args["x"][last], "residual": group.args["residual"][last]}
    plan = RoutePlan.from_routes(group.plan.routes[last].clone())
    hold((y[last],), eager_torch(converted(part, lambda t: t.double()), plan), eager_torch(part, plan), f"{form} far")


def captured(function: Callable[[], tuple], device) -> tuple[tuple, Callable[[], None]]:
    """``function``'s outputs and what brings them up to date: a CUDA graph's replay; on a CPU, a call that copies."""
    if torch.device(device).type != "cuda":
        outputs = function()

        def again() -> None:
            for old, new in zip(outputs, function(), strict=True):
                old.copy_(new)

        return outputs, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return outputs, graph.replay


def replays(form: str, case: GroupCase, device, routes: tuple[int | None, ...]) -> None:
    """A captured call follows what is changed in place: inputs, the weights of both adapters, and routes.

    ``routes``: what every row takes in one replay after the other; None: all four in turn.
    """
    group = Group(form, case, device)
    group.plan = RoutePlan.from_routes(group.plan.routes.clone())
    outputs, replay = captured(group, device)
    generator = torch.Generator().manual_seed(3)
    for value in routes:
        rows = torch.arange(case.tokens) % 4 if value is None else torch.full((case.tokens,), value)
        group.plan.refresh_(rows.to(device, torch.int8))
        with torch.no_grad():
            changed = [
                group.args["x"],
                *(t for p in group.args["projections"] for lora in p[2:] if lora for t in lora[:2]),
            ]
            for tensor in changed:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        replay()
        hold(outputs, group.eager(torch.float64), group.eager(), f"{form} replayed with routes {value}")
        assert all(torch.equal(a, b) for a, b in zip(outputs, group(), strict=True))


def streams_do_not_meet(form: str, cases: list[GroupCase], device, rounds: int) -> None:
    """Two groups on two streams at once give what each gives alone."""
    groups = [Group(form, case, device) for case in cases]
    alone = [[y.clone() for y in group()] for group in groups]
    on_gpu = torch.device(device).type == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in groups]
    for _ in range(rounds):
        together = []
        for stream, group in zip(streams, groups, strict=True):
            if on_gpu:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
                together.append(group())
        if on_gpu:
            torch.cuda.synchronize()
        for expected, got in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def overtaking_graphs(form: str, cases: list[GroupCase], device, rounds: int) -> None:
    """Graphs captured on one stream and replayed on several at once give what each gives alone."""
    groups = [Group(form, case, device) for case in cases]
    alone = [[y.clone() for y in group()] for group in groups]
    graphs = [captured(group, device) for group in groups]
    on_gpu = torch.device(device).type == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in groups]
    for _ in range(rounds):
        for outputs, _ in graphs:
            for y in outputs:
                y.fill_(NAN)
        for stream, (_, replay) in zip(streams, graphs, strict=True):
            if on_gpu:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
                for _ in range(3):
                    replay()
        if on_gpu:
            torch.cuda.synchronize()
        for expected, (outputs, _) in zip(alone, graphs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


def chains(form: str, cases: list[GroupCase], device, rounds: int) -> None:
    """Groups that each read what the one before wrote, queued without a wait: as one after another with waits.

    Every case's output must be the next one's input; the last one's is the first one's again.
    """
    groups = [Group(form, case, device) for case in cases]
    on_gpu = torch.device(device).type == "cuda"
    start = groups[0].args["x"]

    def run(waits: bool) -> list[torch.Tensor]:
        x, seen = start, []
        for _ in range(rounds):
            for group in groups:
                x = group(x=x)[0]
                seen.append(x)
                if waits and on_gpu:
                    torch.cuda.synchronize()
        return seen

    one_by_one = run(waits=True)
    queued = run(waits=False)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, queued, strict=True))
    for index, group in enumerate(groups):
        x = start if index == 0 else one_by_one[index - 1]
        group.args["x"] = x
        hold(one_by_one[index : index + 1], group.eager(torch.float64), group.eager(), f"{form} link {index}")


def answers_without_waiting(form: str, case: GroupCase, device, no_sync) -> None:
    """A forward pass without gradients reads no device data on the host."""
    group = Group(form, case, device)
    group()  # compiles, or builds, outside the guard
    with no_sync():
        group()


def never_waits(impl: str, case: GroupCase, device, no_sync) -> None:
    """Neither the forward nor the backward pass reads device data on the host."""
    args = converted(drawn(case, device), lambda t: t.detach().requires_grad_())

    def step() -> None:
        outputs = dual_lora_group(**args, plan=plan, impl=impl)
        torch.autograd.backward(list(outputs), [torch.ones_like(y) for y in outputs])

    plan = case.plan(device)
    step()  # compiles outside the guard
    with no_sync():
        step()
