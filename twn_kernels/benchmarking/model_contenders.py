"""Contenders of the layer and model suites: the patched model, the stock one, and the ways to run adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.benchmarking.contender import Built, Contender, Unavailable
from twn_kernels.benchmarking.model_problem import ModelProblem, linears_of, sharing_copy, storage_bytes
from twn_kernels.benchmarking.peft_contenders import check_mixed, in_peft, peft_bytes
from twn_kernels.benchmarking.problem import SCALINGS
from twn_kernels.ops import choice
from twn_kernels.settings import ADAPTERS, IMPLS, ROUTE_BITS

__all__ = ["MODEL_CONTENDERS"]

_ACTIVE = {"reasoning": ["reasoning"], "embedding": ["embedding"], "both": list(ADAPTERS)}
Forward = Callable[[str | None, int, Tensor, int | None, Any], Tensor]


def _calls(problem: ModelProblem, run: Callable[[int], Tensor], leaves: Callable[[int], dict[str, Tensor]]) -> list:
    """One call for each place that the case rotates over, with the backward pass where it has one."""

    def forward(index: int) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"y": run(index)}

    def both(index: int) -> Mapping[str, Tensor]:
        wanted = {"dx": problem.hidden.requires_grad_()} | leaves(index)
        y = run(index)
        grads = torch.autograd.grad(y, list(wanted.values()), problem.dy)
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}

    call = both if problem.case.pass_ == "forward_backward" else forward
    return [lambda index=index: call(index) for index in problem.calls]


def _within(problem: ModelProblem, index: int, path: str) -> bool:
    return problem.case.suite == "model" or path.startswith(f"layers.{index}.")


def _no_leaves(index: int) -> dict[str, Tensor]:
    return {}


# This package.


def _ours(impl: str, *, base_only: bool = False):
    def build(problem: ModelProblem) -> Built:
        import twn_kernels

        reason = None if impl == "auto" else choice.unavailable_reason(impl, problem.device, problem.dtype)
        if reason is None and choice.is_for_inference(impl) and problem.case.pass_ == "forward_backward":
            reason = f"{impl} is for inference: it has no backward pass."
        if reason is not None:
            raise Unavailable(" ".join(reason.split()))
        taken = _resolved(problem, impl)
        asked = _asked(problem, impl, taken, base_only)
        # A packed copy of the weights is large: one patched model serves every name that means the same.
        model = problem.patched.get(asked)
        if model is None:
            model = problem.patched[asked] = _patch(problem, asked)
        route = problem.plan if problem.plan.present and not base_only else None
        cache = problem.cache()

        def run(index: int) -> Tensor:
            with twn_kernels.route(model, route):
                return problem.run(model, index, problem.hidden, cache=cache)

        layers = {path: model.get_submodule(path) for path in problem.loras}

        def leaves(index: int) -> dict[str, Tensor]:
            return {} if base_only else _leaves(problem, index, layers, lambda side: side)

        return Built(_calls(problem, run, leaves), taken, _added(problem, model))

    return build


def _resolved(problem: ModelProblem, impl: str) -> str:
    """The implementation of all sites, or those that differ joined by ``+``."""
    tokens, training = problem.case.tokens, problem.case.pass_ == "forward_backward"
    taken = [
        choice.resolve(impl, problem.device, problem.dtype, site=site.name, tokens=tokens, differentiable=training)
        for site in problem.case.sites
    ]
    return "+".join(dict.fromkeys(taken))


def _asked(problem: ModelProblem, impl: str, taken: str, base_only: bool) -> str:
    """What ``patch`` is asked for: ``auto`` by the name of what it takes, where that is one implementation.

    Base-only forwards of a model patched with ``auto`` may run the stock layers. So the fused base names its
    implementation, and ``auto`` stays ``auto`` where its base-only rows are what is measured.
    """
    if "+" in taken or (impl == "auto" and problem.case.routes == "base" and not base_only):
        return impl
    return taken


def _patch(problem: ModelProblem, impl: str) -> nn.Module:
    import twn_kernels
    from twn_kernels.checkpoint.adapter import Adapter

    adapters = {}
    for adapter, name in enumerate(ADAPTERS):
        factors = {path: (pair[adapter].A, pair[adapter].B) for path, pair in problem.loras.items()}
        alpha = SCALINGS[adapter] * problem.case.ranks[adapter]
        adapters[name] = Adapter.build(name, factors, lora_alpha=alpha)
    model = sharing_copy(problem.model)
    return twn_kernels.patch(model, twn_kernels.Checkpoint(adapters), impl=impl)


def _added(problem: ModelProblem, model: nn.Module) -> int:
    """Bytes beyond the plain model's, for the layers of one call."""
    return (storage_bytes(model) - storage_bytes(problem.model)) // len(problem.calls)


def _leaves(problem: ModelProblem, index: int, layers: Mapping[str, Any], side_of) -> dict[str, Tensor]:
    found = {}
    for path, layer in layers.items():
        if not _within(problem, index, path):
            continue
        for adapter in problem.used:
            for letter, sides in (("A", layer.lora_A), ("B", layer.lora_B)):
                found[f"d{letter}{adapter}.{path}"] = side_of(sides[ADAPTERS[adapter]]).requires_grad_()
    return found


# The stock model.


def _plain(problem: ModelProblem) -> Built:
    cache = problem.cache()
    return Built(
        _calls(problem, lambda i: problem.run(problem.model, i, problem.hidden, cache=cache), _no_leaves), None, 0
    )


# One adapter after another: PEFT, merged copies.


class _InTurns:
    """Runs a case's routes as a user of one-adapter-at-a-time code must.

    Rows under one adapter go together as a batch. Where a row changes its adapter inside, its tokens run piece by
    piece on a growing cache.

    Args:
        problem: the case.
        forward: ``(adapter, index of the layer, hidden, position of the first token or None, cache)`` to the output.
    """

    def __init__(self, problem: ModelProblem, forward: Forward) -> None:
        self.problem, self.forward = problem, forward
        names = problem.case.row_names()
        self.pieces = _pieces(problem) if names is None else None
        self.groups: list[tuple[str | None, Tensor, Any]] = []
        for name in dict.fromkeys(names or ()):
            rows = tuple(row for row, own in enumerate(names) if own == name)
            cache = problem.cache(None if len(rows) == len(names) else rows)
            self.groups.append((name, torch.tensor(rows, device=problem.device), cache))

    def __call__(self, index: int) -> Tensor:
        if self.pieces is not None:
            return self._piecewise(index)
        hidden = self.problem.hidden
        if len(self.groups) == 1:
            name, _, cache = self.groups[0]
            return self.forward(name, index, hidden, None, cache)
        y = torch.cat([self.forward(name, index, hidden[rows], None, cache) for name, rows, cache in self.groups])
        return y[torch.cat([rows for _, rows, _ in self.groups]).argsort()]

    def _piecewise(self, index: int) -> Tensor:
        from transformers import DynamicCache

        cache, outputs = DynamicCache(), []
        for name, start, stop in self.pieces:
            outputs.append(self.forward(name, index, self.problem.hidden[:, start:stop], start, cache))
        return torch.cat(outputs, dim=1)


def _pieces(problem: ModelProblem) -> list[tuple[str | None, int, int]]:
    """``(adapter, first, last + 1)`` of the pieces of a row; all rows are alike."""
    pieces, start = [], 0
    for length, name in problem.case.segments():
        if start == problem.case.sequence:
            break
        pieces.append((name, start, start + length))
        start += length
    return pieces


def _peft(*, fp32: bool = False, mixed: bool = False, compile_: bool = False):
    def build(problem: ModelProblem) -> Built:
        if fp32 and problem.case.dtype == "fp32":
            raise Unavailable("The adapters of this case are fp32 already.")
        names = ["__base__" if name is None else name for name in check_mixed(problem.case)] if mixed else None
        if problem.case.row_names() is None and problem.case.pass_ == "forward_backward":
            raise Unavailable("Pieces of a row under one adapter each run on a cache, which training does not keep.")
        model = in_peft(sharing_copy(problem.model), problem.loras, fp32=fp32)
        inner, weights = model.get_base_model(), [p for n, p in model.named_parameters() if "lora_" in n]
        if compile_:
            torch._dynamo.reset()  # forwards that earlier cases compiled count towards dynamo's limit
            _compile_layers(inner, problem.compile_backend)
        if mixed:
            cache = problem.cache()

            def run(index: int) -> Tensor:
                with model.base_model._enable_peft_forward_hooks(adapter_names=names):
                    return problem.run(inner, index, problem.hidden, cache=cache)
        else:
            run = _InTurns(problem, _peft_forward(problem, model, inner, weights))
        layers = {path: inner.get_submodule(path) for path in problem.loras}
        added = peft_bytes(model) // len(problem.calls)
        return Built(_calls(problem, run, lambda i: _leaves(problem, i, layers, lambda side: side.weight)), None, added)

    return build


def _peft_forward(problem: ModelProblem, model: Any, inner: nn.Module, weights: list) -> Forward:
    # Layers are called without PeftModel's own forward, which does no more than hand on its arguments.
    def forward(name, index, hidden, start, cache):
        if name is None:
            with model.disable_adapter():
                return problem.run(inner, index, hidden, start, cache)
        model.base_model.set_adapter(_ACTIVE[name])
        if torch.is_grad_enabled():
            for weight in weights:  # set_adapter freezes the other adapter, which this step trains as well
                weight.requires_grad_()
        return problem.run(inner, index, hidden, start, cache)

    return forward


def _compile_layers(model: nn.Module, backend: str) -> None:
    """Compile each decoder layer: they share their code, so that a model costs one compilation for each route."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def _merged(problem: ModelProblem) -> Built:
    if problem.case.pass_ == "forward_backward":
        raise Unavailable("Adapters merged into the weights cannot be trained.")
    models = {name: _merged_copy(problem, name) for name in dict.fromkeys(name for _, name in problem.case.segments())}

    def forward(name, index, hidden, start, cache):
        return problem.run(models[name], index, hidden, start, cache)

    plain = {t.untyped_storage().data_ptr() for t in problem.model.parameters()}
    own = [t for m in models.values() for t in m.parameters() if t.untyped_storage().data_ptr() not in plain]
    added = sum(t.nbytes for t in own) // len(problem.calls)
    return Built(_calls(problem, _InTurns(problem, forward), _no_leaves), None, added)


def _merged_copy(problem: ModelProblem, name: str | None) -> nn.Module:
    model, bits = sharing_copy(problem.model), ROUTE_BITS[name]
    for path, linear in linears_of(model) if bits else ():
        wide = linear.weight.float()
        for adapter, lora in enumerate(problem.loras[path]):
            if bits & (1 << adapter):
                wide = torch.addmm(wide, lora.B.float(), lora.A.float(), alpha=lora.scaling)
        linear.weight = nn.Parameter(wide.to(linear.weight.dtype), requires_grad=False)
    return model


# Written by hand: one masked shrink and one addmm_ behind every linear.


def _separate(side_stream: bool):
    def build(problem: ModelProblem) -> Built:
        if side_stream and problem.device.type != "cuda":
            raise Unavailable(f"{problem.device.type} has no streams to run the shrink beside the base product.")
        if problem.case.pass_ == "forward_backward":
            raise Unavailable("The in-place form is for inference; for training it is measured on linears and groups.")
        model = sharing_copy(problem.model)
        stream = torch.cuda.Stream(problem.device) if side_stream else None
        masks = [mask.reshape(-1) for mask in problem.masks()]
        added = 0
        for path, linear in list(linears_of(model)):
            parent, _, leaf = path.rpartition(".")
            own = _Separate(linear.weight, problem.loras[path], problem.used, masks, stream)
            setattr(model.get_submodule(parent), leaf, own)
            added += own.added_bytes
        cache = problem.cache()
        calls = _calls(problem, lambda i: problem.run(model, i, problem.hidden, cache=cache), _no_leaves)
        return Built(calls, None, added // len(problem.calls))

    return build


class _Separate(nn.Module):
    """A linear, a stacked masked shrink and one ``addmm_``; the shrink may run beside the base product."""

    def __init__(self, weight: Tensor, pair, used: list[int], masks: list[Tensor], stream) -> None:
        super().__init__()
        self.own_weight, self.stream = weight, stream
        self.A = torch.cat([pair[a].A for a in used]) if used else None
        self.B = torch.cat([pair[a].B for a in used], dim=1) if used else None
        ranks = [pair[a].A.shape[0] for a in used]
        scales = [
            (masks[a].to(weight.dtype) * pair[a].scaling)[:, None].expand(-1, r)
            for a, r in zip(used, ranks, strict=True)
        ]
        self.scale = torch.cat(scales, dim=1) if used else None
        self.added_bytes = self.A.nbytes + self.B.nbytes if used else 0

    def forward(self, x: Tensor) -> Tensor:
        if self.A is None:
            return F.linear(x, self.own_weight)
        flat = x.reshape(-1, x.shape[-1])
        low = flat.new_empty(flat.shape[0], self.A.shape[0])  # of the main stream, also where a side stream fills it
        if self.stream is None:
            y = F.linear(flat, self.own_weight)
            self._shrink(flat, low)
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._shrink(flat, low)
            y = F.linear(flat, self.own_weight)
            torch.cuda.current_stream().wait_stream(self.stream)
        return y.addmm_(low, self.B.t()).view(*x.shape[:-1], -1)

    def _shrink(self, x: Tensor, low: Tensor) -> None:
        torch.mm(x, self.A.t(), out=low)
        low.mul_(self.scale)


# A decode step without a graph is what transformers and PEFT give; "_graph" is the same captured, the harder rival.
MODEL_CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("fused_base", _ours("auto", base_only=True), is_baseline=False, base_only=True),
        Contender(
            "fused_base_cuda",
            _ours("cuda", base_only=True),
            is_baseline=False,
            base_only=True,
            passes=("forward", "decode"),
        ),
        *(Contender(f"ours_{impl}", _ours(impl), is_baseline=False) for impl in IMPLS),
        Contender("plain", _plain, base_only=True, graph="never"),
        Contender("plain_graph", _plain, base_only=True, passes=("decode",)),
        Contender("merged", _merged),
        Contender("addmm", _separate(side_stream=False)),
        Contender("addmm_side_stream", _separate(side_stream=True)),
        Contender("peft", _peft(), graph="never"),
        Contender("peft_graph", _peft(), passes=("decode",)),
        Contender("peft_fp32", _peft(fp32=True), graph="never"),
        Contender("peft_mixed", _peft(mixed=True), graph="never"),
        Contender("peft_compiled", _peft(compile_=True), graph="never"),
    )
}
