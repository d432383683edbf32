"""Contenders of the linear and group suites: this package's ops, and what one would write by hand in torch."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.benchmarking.cases import Site
from twn_kernels.benchmarking.contender import Built, Contender, Unavailable
from twn_kernels.benchmarking.peft_contenders import PEFT_CONTENDERS
from twn_kernels.benchmarking.problem import NORM_EPS, Inputs, Problem
from twn_kernels.benchmarking.truth import leaves_of, rms_norm, site_in_torch
from twn_kernels.modules.dual_lora_linear import DualLoRALinear, LayerAdapter
from twn_kernels.modules.packing import PackedGroup
from twn_kernels.modules.routing import RouteState, UniformSpec
from twn_kernels.ops import LoRA, RoutePlan, choice, dual_lora_group, dual_lora_linear
from twn_kernels.ops.projection import Norm, Projection
from twn_kernels.settings import ADAPTERS, IMPLS

__all__ = ["GROUP_CONTENDERS", "differentiated"]

_SLICES = 4  # segments up to which separate products on slices beat one masked product over all rows, by launches


def differentiated(problem: Problem, inputs: Inputs, run, used: list[int]):
    """``run`` as a call that returns results by name; with the backward pass where the case has one."""
    if problem.case.pass_ != "forward_backward":

        def forward():
            with torch.no_grad():
                return {"y": run()}

        return forward
    leaves = leaves_of(inputs, used)

    def both():
        y = run()
        grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    return both


def _ours(impl: str, *, base_only: bool = False):
    def build(problem: Problem) -> Built:
        reason = None if impl == "auto" else choice.unavailable_reason(impl, problem.device, problem.dtype)
        if reason is None and choice.is_for_inference(impl) and problem.case.pass_ == "forward_backward":
            reason = f"{impl} is for inference: it has no backward pass."
        if reason is not None:
            raise Unavailable(" ".join(reason.split()))
        used = [] if base_only else problem.used
        runs = [_OpCalls(problem, inputs, impl, base_only) for inputs in problem.sets]
        calls = [differentiated(problem, i, run, used) for i, run in zip(problem.sets, runs, strict=True)]
        taken = "+".join(dict.fromkeys(group.taken for group in runs[0].groups))
        return Built(calls, taken, sum(group.added_bytes for group in runs[0].groups))

    return build


class _OpCalls:
    """The public op on one set of inputs, as a patched model calls it.

    Of an MLP, the implementation of ``gate_up`` decides where SwiGLU is computed: ``blas`` leaves it to ``down``.
    """

    def __init__(self, problem: Problem, inputs: Inputs, impl: str, base_only: bool) -> None:
        self.problem, self.inputs, self.impl, self.base_only = problem, inputs, impl, base_only
        parts = [inputs] if inputs.then is None else [inputs, inputs.then]
        self.groups = [
            _Group(problem, site, part, impl, base_only) for site, part in zip(problem.case.sites, parts, strict=True)
        ]

    def __call__(self) -> Tensor:
        inputs, plan = self.inputs, self.problem.plan
        if self.problem.case.suite == "linear":
            plan = RoutePlan(plan.routes, 0, True) if self.base_only else plan
            return dual_lora_linear(inputs.x, *self.groups[0].projections[0], plan, impl=self.impl)
        plan = None if self.base_only else plan
        norm = None if inputs.norm is None else Norm(inputs.norm, NORM_EPS)
        if len(self.groups) == 1:
            swiglu = self.problem.site.swiglu
            return self.groups[0](inputs.x, plan, norm=norm, swiglu=swiglu, residual=inputs.residual)
        gate_up, down = self.groups
        gated = gate_up.taken == "blas"
        between = gate_up(inputs.x, plan, norm=norm, swiglu=not gated)
        return down(between, plan, gated=gated, residual=inputs.x)


class _Group:
    """One site group: ``blas`` multiplies packed weights, as in a patched model."""

    def __init__(self, problem: Problem, site: Site, inputs: Inputs, impl: str, base_only: bool) -> None:
        self.site, self.impl = site, impl
        where = site.name if problem.case.suite == "group" else None
        tokens = problem.case.tokens
        training = problem.case.pass_ == "forward_backward"
        self.taken = choice.resolve(
            impl, problem.device, problem.dtype, site=where, tokens=tokens, differentiable=training
        )
        loras = [(None, None) if base_only else pair for pair in inputs.loras]
        weights = list(inputs.weights)
        self.added_bytes = 0 if base_only else _adapter_bytes(inputs.loras)
        self.packed = None
        if self.taken == "blas" and where is not None and not training:
            members = [_member(weight, pair) for weight, pair in _layers(inputs)]
            self.packed = PackedGroup(members)
            self.added_bytes += self.packed.added_bytes
            weights = [member.weight for member in members]
        self.projections = [Projection(w, None, *pair) for w, pair in zip(weights, loras, strict=True)]

    def __call__(self, x: Tensor, plan: RoutePlan | None, **more) -> Tensor:
        packed, name = () if self.packed is None else self.packed.panels(), self.site.name
        (y,) = dual_lora_group(x, self.projections, plan, impl=self.impl, site=name, packed=packed, split=False, **more)
        return y


def _member(weight: Tensor, pair: tuple[LoRA, LoRA]) -> nn.Module:
    """A layer of a patched model over these tensors; packing moves its weight, not the one given."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    adapters = {name: LayerAdapter(*lora) for name, lora in zip(ADAPTERS, pair, strict=True)}
    return DualLoRALinear.adopt(linear, adapters, RouteState(UniformSpec(0)))


def _adapter_bytes(loras: list[tuple[LoRA, LoRA]]) -> int:
    return sum(lora.A.nbytes + lora.B.nbytes for pair in loras for lora in pair)


def _plain(problem: Problem) -> Built:
    calls = [
        differentiated(problem, inputs, lambda inputs=inputs: site_in_torch(inputs, None, problem.site.swiglu), [])
        for inputs in problem.sets
    ]
    return Built(calls, None, 0)


def _merged(problem: Problem) -> Built:
    """Adapters added into copies of the weights, one copy for each route that occurs, and each row by its copy."""
    if problem.case.pass_ == "forward_backward":
        raise Unavailable("Adapters merged into the weights cannot be trained.")
    routes = problem.plan.routes
    kinds = sorted({int(bits) for bits in routes.unique().tolist()})
    rows = {bits: (routes == bits).nonzero()[:, 0] for bits in kinds}
    if all(_is_range(index) for index in rows.values()):
        rows = {bits: slice(int(index[0]), int(index[-1]) + 1) for bits, index in rows.items()}
    calls, added = [], 0
    for inputs in problem.sets:
        stages = [inputs] if inputs.then is None else [inputs, inputs.then]
        copies = {
            bits: [torch.cat([_merged_weight(*layer, bits) for layer in _layers(stage)]) for stage in stages]
            for bits in kinds
        }
        added = sum(weight.nbytes for bits, weights in copies.items() if bits for weight in weights)
        parts = [(rows[bits], copies[bits]) for bits in kinds]
        calls.append(differentiated(problem, inputs, functools.partial(_run_merged, problem, inputs, parts), []))
    return Built(calls, None, added)


def _run_merged(problem: Problem, inputs: Inputs, parts: list) -> Tensor:
    """One product for each part, into its rows of the output where these lie together."""
    y = inputs.x.new_empty(inputs.x.shape[0], problem.width)
    for index, weights in parts:
        out = y[index] if isinstance(index, slice) else None
        x = inputs.x[index]
        x = x if inputs.norm is None else rms_norm(x, inputs.norm)
        residual = inputs.residual if inputs.then is None else inputs.x
        if problem.site.swiglu:
            gate, up = F.linear(x, weights[0]).chunk(2, dim=1)
            x = torch.mul(F.silu(gate), up, out=out if inputs.then is None else None)
        if residual is not None:
            x = torch.addmm(residual[index], x, weights[-1].t(), out=out)
        elif not problem.site.swiglu:
            x = torch.mm(x, weights[0].t(), out=out)
        if out is None:
            y[index] = x
    return y


def _layers(inputs: Inputs):
    return zip(inputs.weights, inputs.loras, strict=True)


def _merged_weight(weight: Tensor, pair: tuple[LoRA, LoRA], bits: int) -> Tensor:
    if not bits:
        return weight
    wide = weight.float()
    for adapter, lora in enumerate(pair):
        if bits & (1 << adapter):
            wide = torch.addmm(wide, lora.B.float(), lora.A.float(), alpha=lora.scaling)
    return wide.to(weight.dtype)


def _is_range(index: Tensor) -> bool:
    return int(index[-1] - index[0]) + 1 == index.numel()


def _separate(side_stream: bool):
    def build(problem: Problem) -> Built:
        if side_stream and problem.device.type != "cuda":
            raise Unavailable(f"{problem.device.type} has no streams to run the shrink beside the base product.")
        if problem.case.pass_ == "forward_backward":
            if side_stream:
                raise Unavailable("The side stream is a form for inference; autograd orders a backward by itself.")
            return _separate_training(problem)
        stream = torch.cuda.Stream(problem.device) if side_stream else None
        calls = [differentiated(problem, i, _SeparateChain(problem, i, stream), []) for i in problem.sets]
        return Built(calls, None, _adapter_bytes(problem.sets[0].all_loras))

    return build


class _SeparateChain:
    """The separate products of a site group, or of both groups of an MLP."""

    def __init__(self, problem: Problem, inputs: Inputs, stream) -> None:
        self.inputs, sites = inputs, problem.case.sites
        self.first = _SeparateProducts(problem, sites[0], inputs, stream)
        self.second = None if inputs.then is None else _SeparateProducts(problem, sites[1], inputs.then, stream)

    def __call__(self) -> Tensor:
        y = self.first(self.inputs.x, self.inputs.residual)
        return y if self.second is None else self.second(y, self.inputs.x)


class _SeparateProducts:
    """Base product of the concatenated weight, stacked shrink, one ``addmm_`` a projection: the best simple form.

    Few long segments run as slices with ``alpha=scaling``; otherwise the shrink is masked and both adapters expand
    together. Weights and adapters are concatenated beforehand, as serving engines do.
    """

    def __init__(self, problem: Problem, site: Site, inputs: Inputs, stream) -> None:
        self.inputs, self.site, self.stream = inputs, site, stream
        self.weight = torch.cat(inputs.weights) if len(inputs.weights) > 1 else inputs.weights[0]
        self.ranks, segments = problem.case.ranks, problem.case.segments()
        self.used = problem.used
        self.A = [torch.cat([pair[adapter].A for pair in inputs.loras]) for adapter in (0, 1)]
        self.scalings = [inputs.loras[0][adapter].scaling for adapter in (0, 1)]
        self.slices = _slices(segments) if len(segments) <= _SLICES else None
        if self.slices is None:
            self.stacked = torch.cat([self.A[adapter] for adapter in self.used])
            masks = problem.masks()
            self.scales = [(masks[a].to(inputs.x.dtype) * self.scalings[a])[:, None] for a in (0, 1)]
            self.B = [torch.cat([pair[a].B for a in self.used], dim=1) for pair in inputs.loras]

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = x if self.inputs.norm is None else rms_norm(x, self.inputs.norm)
        if self.stream is None:
            y = self._base(x, residual)
            low = self._shrink(x, self._low_buffers(x))
        else:
            low = self._low_buffers(x)  # on the main stream: memory of a side stream may be reused under a graph
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._shrink(x, low)
            y = self._base(x, residual)
            torch.cuda.current_stream().wait_stream(self.stream)
        self._expand(y, low)
        if self.site.swiglu:
            gate, up = y.chunk(2, dim=1)
            return F.silu(gate) * up
        return y

    def _base(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The base product; the vendor GEMM adds the residual for nothing."""
        return F.linear(x, self.weight) if residual is None else torch.addmm(residual, x, self.weight.t())

    def _low_buffers(self, x: Tensor) -> list[Tensor]:
        if self.slices is None:
            return [x.new_empty(x.shape[0], self.stacked.shape[0])]
        return [x.new_empty(part.stop - part.start, self.A[a].shape[0]) for a, part in self.slices]

    def _shrink(self, x: Tensor, low: list[Tensor]) -> list[Tensor]:
        if self.slices is not None:
            for (adapter, part), buffer in zip(self.slices, low, strict=True):
                torch.mm(x[part], self.A[adapter].t(), out=buffer)
            return low
        torch.mm(x, self.stacked.t(), out=low[0])
        start = 0
        for adapter in self.used:
            width = self.A[adapter].shape[0]
            low[0][:, start : start + width].mul_(self.scales[adapter])
            start += width
        return low

    def _expand(self, y: Tensor, low: list[Tensor]) -> None:
        outputs = y.split(list(self.site.out_features), dim=1)
        for index, out in enumerate(outputs):
            if self.slices is None:
                out.addmm_(self._columns(low[0], index), self.B[index].t())
                continue
            for (adapter, part), h in zip(self.slices, low, strict=True):
                rank, B = self.ranks[adapter], self.inputs.loras[index][adapter].B
                out[part].addmm_(h[:, index * rank : (index + 1) * rank], B.t(), alpha=self.scalings[adapter])

    def _columns(self, low: Tensor, index: int) -> Tensor:
        """The shrink of one projection under every used adapter, side by side."""
        parts, start = [], 0
        for adapter in self.used:
            rank = self.ranks[adapter]
            parts.append(low[:, start + index * rank : start + (index + 1) * rank])
            start += self.A[adapter].shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _slices(segments) -> list[tuple[int, slice]]:
    """``(adapter, rows)`` of every segment and each adapter that it uses."""
    found, start = [], 0
    for length, name in segments:
        for adapter in {None: (), "reasoning": (0,), "embedding": (1,), "both": (0, 1)}[name]:
            found.append((adapter, slice(start, start + length)))
        start += length
    return found


def _separate_training(problem: Problem) -> Built:
    """The same form out of place, under autograd: masked stacked shrink, one ``addmm`` a projection."""
    masks = problem.masks()

    def run(inputs: Inputs) -> Tensor:
        x = inputs.x if inputs.norm is None else rms_norm(inputs.x, inputs.norm)
        outputs = []
        for weight, pair in _layers(inputs):
            y = F.linear(x, weight)
            for adapter in problem.used:
                low = (x @ pair[adapter].A.t()) * (masks[adapter].to(x.dtype) * pair[adapter].scaling)[:, None]
                y = torch.addmm(y, low, pair[adapter].B.t())
            outputs.append(y)
        y = F.silu(outputs[0]) * outputs[1] if len(outputs) == 2 else torch.cat(outputs, dim=1)
        if inputs.then is not None:
            return run(replace(inputs.then, x=y, residual=inputs.x))
        return y if inputs.residual is None else inputs.residual + y

    calls = [differentiated(problem, i, lambda i=i: run(i), problem.used) for i in problem.sets]
    return Built(calls, None, _adapter_bytes(problem.sets[0].all_loras))


GROUP_CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("fused_base", _ours("auto", base_only=True), is_baseline=False, base_only=True),
        # The base of cuda's own overhead: its kernels without adapters, whatever auto takes.
        Contender(
            "fused_base_cuda",
            _ours("cuda", base_only=True),
            is_baseline=False,
            base_only=True,
            passes=("forward", "decode"),
        ),
        *(Contender(f"ours_{impl}", _ours(impl), is_baseline=False) for impl in IMPLS),
        Contender("plain", _plain, base_only=True),
        Contender("merged", _merged),
        Contender("addmm", _separate(side_stream=False)),
        Contender("addmm_side_stream", _separate(side_stream=True)),
        *PEFT_CONTENDERS,
    )
}
