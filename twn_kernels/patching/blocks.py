"""Fused blocks: a decoder layer whose site groups run as one call each, norms, SwiGLU and residuals folded in.

A layer and its attention turn over in place, as linears do (:meth:`FusedLayer.adopt`, :meth:`FusedLayer.release`): same
objects, other class. The attention's own forward (rotary embedding, cache, attention function) stays transformers'. It
is given the states before the norm, and its ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` are, for that one call,
what hands out the parts of the fused call and what adds the residual. Each call asks :mod:`.readiness` first: a site
that something watches, or that would not compute exactly the same, runs layer by layer.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.errors import PatchError
from twn_kernels.modules.routing import RouteState
from twn_kernels.modules.site_group import ReadySite, SiteGroup
from twn_kernels.ops import Norm
from twn_kernels.patching import readiness
from twn_kernels.patching.structure import QKV, parameter_defaults

__all__ = ["FusedAttention", "FusedLayer"]


class FusedLayer(nn.Module):
    """A decoder layer with its site groups fused; made in place by :meth:`adopt`."""

    plain_class: type
    argument_names: tuple[str, ...]
    argument_defaults: dict[str, Any]

    @classmethod
    def adopt(cls, layer: nn.Module, path: str, routing: RouteState, impl: str) -> nn.Module:
        """Turn ``layer``, which :func:`~twn_kernels.patching.structure.misfit` has passed, over in place.

        Args:
            layer: a decoder layer of a family with a block.
            path: of the layer in its model, for messages.
            routing: what the model's layers follow.
            impl: of site groups without adapters.
        """
        attention = layer.self_attn
        classes = _fused_class(type(layer), cls), _fused_class(type(attention), FusedAttention)
        groups = {site: SiteGroup(site, impl) for site in readiness.SITES}
        layer.__dict__["_twn_block"] = readiness.Block(
            path, routing, groups, type(layer.input_layernorm), type(layer.mlp), type(layer.mlp.act_fn)
        )
        attention.__dict__.update(_twn_calls={}, _twn_traced=None)
        layer.__class__, attention.__class__ = classes
        return layer

    @property
    def site_groups(self) -> dict[str, SiteGroup]:
        """The layer's site groups, by site."""
        return self._twn_block.groups

    def pack_where_it_pays(self) -> None:
        """Pack the weights of the site groups that gain by it, where they are now; others may pack in a later call."""
        for site, group in self.site_groups.items():
            members = readiness.members_of(self, site)
            if group.packs_on(members[0].weight.device):
                group.pack(members)

    def release(self) -> nn.Module:
        """Turn the layer and its attention back into what they were."""
        for group in self._twn_block.groups.values():
            group.unpack()
        attention = self.self_attn
        if isinstance(attention, FusedAttention):
            attention.__class__ = attention.plain_class
            for name in ("_twn_calls", "_twn_traced"):
                attention.__dict__.pop(name, None)
        self.__class__ = self.plain_class
        self.__dict__.pop("_twn_block", None)
        return self

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output ``[batch, seq, hidden]``; arguments as those of transformers' layer."""
        if readiness.gains_nothing(self._twn_block, hidden_states) or readiness.call_refusal(hidden_states) is not None:
            return super().forward(hidden_states, *args, **kwargs)
        named = {**self.argument_defaults, **dict(zip(self.argument_names, args, strict=False)), **kwargs}
        return self._transform(self._attend(hidden_states, named))

    def _attend(self, hidden_states: Tensor, named: dict[str, Any]) -> Tensor:
        block: readiness.Block = self._twn_block
        norm, attention = self.input_layernorm, self.self_attn
        qkv = readiness.ready(self, "qkv", hidden_states)
        o = readiness.ready(self, "o", hidden_states)
        normed = hidden_states
        if isinstance(qkv, ReadySite):
            parts = block.groups["qkv"].run(qkv, hidden_states, norm=Norm(norm.weight, norm.variance_epsilon))
        else:
            parts, normed = None, norm(hidden_states)
        if parts is None and not isinstance(o, ReadySite):
            return hidden_states + attention(hidden_states=normed, **named)[0]
        call = _Call(normed, parts, block.groups["o"], o, hidden_states)
        before = _open(attention, call)
        try:
            attended, _ = attention(hidden_states=normed, **named)
        finally:
            _close(attention, before)
        call.check_used(block.path)
        return attended if call.added else hidden_states + attended

    def _transform(self, hidden_states: Tensor) -> Tensor:
        block: readiness.Block = self._twn_block
        norm, mlp = self.post_attention_layernorm, self.mlp
        gate_up, down = (readiness.ready(self, site, hidden_states) for site in ("gate_up", "down"))
        if not isinstance(gate_up, ReadySite) or not isinstance(down, ReadySite):
            return hidden_states + mlp(norm(hidden_states))
        before = Norm(norm.weight, norm.variance_epsilon)
        groups, residual = block.groups, hidden_states
        if groups["gate_up"].prefers_epilogue(gate_up, hidden_states):
            (inner,) = groups["gate_up"].run(gate_up, hidden_states, norm=before, swiglu=True)
            return groups["down"].run(down, inner, residual=residual)[0]
        (inner,) = groups["gate_up"].run(gate_up, hidden_states, norm=before, split=False)
        return groups["down"].run(down, inner, gated=True, residual=residual)[0]


class FusedAttention(nn.Module):
    """An attention whose projections are, during a fused layer's call, what that call says."""

    plain_class: type

    def _member(self, name: str) -> Any:
        member = self._modules[name]
        call = _current(self)
        return member if call is None else call.stand_in(name, member)

    q_proj = property(functools.partial(_member, name="q_proj"))
    k_proj = property(functools.partial(_member, name="k_proj"))
    v_proj = property(functools.partial(_member, name="v_proj"))
    o_proj = property(functools.partial(_member, name="o_proj"))


class _Call:
    """One call of an attention inside a fused layer: the parts to hand out, and the residual to add.

    Args:
        x: what the attention is given.
        parts: outputs of q, k and v; None: they run by themselves.
        group, ready: of ``o_proj``; a reason instead of the latter: it runs by itself.
        residual: what ``o_proj`` adds.
    """

    def __init__(
        self, x: Tensor, parts: tuple[Tensor, ...] | None, group: SiteGroup, ready: ReadySite | str, residual: Tensor
    ) -> None:
        self.x, self.group, self.ready, self.residual = x, group, ready, residual
        self.parts = {} if parts is None else dict(zip(QKV, parts, strict=True))
        self.hands_out = parts is not None
        self.added = False

    def stand_in(self, name: str, member: nn.Module) -> Any:
        """What the attention calls instead of ``member``; the member itself where it runs by itself."""
        acts = isinstance(self.ready, ReadySite) if name == "o_proj" else self.hands_out
        return _StandIn(self, name, member) if acts else member

    def run(self, name: str, member: nn.Module, x: Tensor) -> Tensor:
        """The output of one projection."""
        if name in QKV:
            if x is not self.x or name not in self.parts:
                raise PatchError(f"{_UNEXPECTED} called {name} on another input, or twice. {_FIX}")
            return self.parts.pop(name)
        if x.dtype != self.residual.dtype:
            return member(x)
        if self.added:
            raise PatchError(f"{_UNEXPECTED} called {name} twice. {_FIX}")
        self.added = True
        return self.group.run(self.ready, x, residual=self.residual)[0]

    def check_used(self, path: str) -> None:
        """Raise PatchError unless every part was handed out."""
        if self.parts:
            raise PatchError(f'"{path}": {_UNEXPECTED} never called {", ".join(self.parts)}. {_FIX}')


_UNEXPECTED = "the attention of a fused block"
_FIX = "Patch with fuse=False, which keeps every layer's own call."


class _StandIn:
    """What the attention finds under a projection's name; reads like the projection itself."""

    def __init__(self, call: _Call, name: str, member: nn.Module) -> None:
        self._call, self._name, self._member = call, name, member

    def __call__(self, x: Tensor) -> Tensor:
        return self._call.run(self._name, self._member, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)


# A model may run in several threads, so calls are kept by thread. A traced call is one at a time, and the graph must
# not depend on the thread that traced it.


def _current(attention: FusedAttention) -> _Call | None:
    if torch.compiler.is_compiling():
        return attention._twn_traced
    return attention._twn_calls.get(threading.get_ident())


def _open(attention: nn.Module, call: _Call) -> _Call | None:
    """Put ``call`` in force for ``attention``; returns what was before."""
    if torch.compiler.is_compiling():
        before, attention._twn_traced = attention._twn_traced, call
        return before
    calls, thread = attention._twn_calls, threading.get_ident()
    before = calls.get(thread)
    calls[thread] = call
    return before


def _close(attention: nn.Module, before: _Call | None) -> None:
    if torch.compiler.is_compiling():
        attention._twn_traced = before
    elif before is None:
        attention._twn_calls.pop(threading.get_ident(), None)
    else:
        attention._twn_calls[threading.get_ident()] = before


@functools.cache
def _fused_class(plain: type, fused: type) -> type:
    """``plain`` with ``fused`` in front. It keeps the name, which device maps and reports go by."""
    own: dict[str, Any] = {"plain_class": plain, "__module__": __name__, "__doc__": fused.__doc__}
    own["__qualname__"] = f"{fused.__name__}__{plain.__module__.split('.')[-2]}__{plain.__name__}"
    if fused is FusedLayer:
        own["argument_names"], own["argument_defaults"] = parameter_defaults(plain)
    return type(plain.__name__, (fused, plain), own)


def __getattr__(name: str) -> type:
    # Unpickling looks the classes up here.
    kind, _, rest = name.partition("__")
    family, _, plain = rest.partition("__")
    if kind in ("FusedLayer", "FusedAttention") and plain:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        return _fused_class(getattr(module, plain), globals()[kind])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
