"""``SiteGroup``: the linears of one site group, run as one call where that gives exactly what they give one by one.

Owns what can be read off the linears themselves: whether they can run together at this moment, their adapters, their
plan, their packed weights. What stands around them in a model (norms, hooks, residuals) is its caller's. A layer takes
part by offering :class:`SiteMember`; a plain ``nn.Linear`` takes part without adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from twn_kernels.modules.packing import PackedGroup
from twn_kernels.modules.routing import RouteSpec, RouteState
from twn_kernels.ops import LoRA, Norm, Projection, RoutePlan, dual_lora_group
from twn_kernels.ops.choice import resolve, serving
from twn_kernels.ops.choice_table import DEFAULT

__all__ = ["ReadySite", "SiteGroup", "SiteMember", "fitting_dtype", "layers_of"]

_HALF = (torch.float16, torch.bfloat16)


class SiteMember(Protocol):
    """What a linear with adapters offers to its site group."""

    routing: RouteState
    impl: str
    follows_rows: bool

    def site_refusal(self) -> str | None:
        """Why this layer must run by itself now, such as LoRA dropout; None where it need not."""

    def site_spec(self) -> RouteSpec:
        """The routes that the layer would follow now."""

    def site_projection(self) -> Projection:
        """Its weight, bias and adapters."""


class ReadySite(NamedTuple):
    """A site group whose linears can run as one now.

    Attributes:
        members: the linears, in order.
        projections: of each.
        leader: the first linear with adapters, whose route all follow; None: no linear has any.
        spec: that route.
        impl: as asked for.
    """

    members: Sequence[nn.Module]
    projections: list[Projection]
    leader: nn.Module | None
    spec: RouteSpec | None
    impl: str


class SiteGroup:
    """Up to three linears that read one input.

    Args:
        site: ``"qkv"``, ``"o"``, ``"gate_up"`` or ``"down"``.
        impl: for a group without adapters; one with adapters runs what its linears say.
    """

    def __init__(self, site: str, impl: str = "auto") -> None:
        self.site, self.impl = site, impl
        self.packing: PackedGroup | None = None
        self._packed: tuple[nn.Module, ...] = ()
        self._unpackable: str | None = None

    def pack(self, members: Sequence[nn.Module]) -> None:
        """Move the weights of ``members`` beside their adapters, where the vendor GEMM serves them and can use that.

        Weights whose memory is part of something larger (a flat, sharded or mapped buffer) stay where they are.
        """
        weights = [member.weight for member in members]
        impls = [member.impl for member in members if hasattr(type(member), "site_projection")]
        if not impls or weights[0].dtype not in _HALF or self._serving(impls[0], weights[0], None) != "blas":
            return
        if all(_owns_memory(weight) for weight in weights):
            self.packing, self._packed = PackedGroup(members), tuple(members)
        else:
            self._unpackable = "a weight is a view of memory that is not its own"

    @property
    def packing_note(self) -> str:
        """Whether the weights are packed, or why not; empty where nothing was to be packed."""
        reason = self._unpackable if self.packing is None else self.packing.reason
        if reason is None:
            return "" if self.packing is None else "weights packed beside lora_B"
        return f"weights not packed ({reason})"

    def packs_on(self, device: torch.device) -> bool:
        """Whether packing pays there: a GPU's GEMM reads a packed weight as it is, a CPU's copies it all the same."""
        return device.type == "cuda"

    def unpack(self) -> None:
        """Put packed weights back into memory of their own."""
        if self.packing is not None:
            self.packing.remove()
        self.packing, self._packed, self._unpackable = None, (), None

    def prepare(self, members: Sequence[nn.Module], like: Tensor) -> ReadySite | str:
        """What the group would run with now, or why its linears run one by one.

        Args:
            members: the linears, in order.
            like: an input, or a tensor of its dtype and device.
        """
        projections: list[Projection] = []
        leader, spec = None, None
        for member in members:
            if type(member) is nn.Linear:
                projection = Projection(member.weight, member.bias)
            elif not hasattr(type(member), "site_projection"):
                return f"{type(member).__name__} is no nn.Linear"
            else:
                if (reason := member.site_refusal()) is not None:
                    return reason
                if leader is None:
                    leader, spec = member, member.site_spec()
                elif (reason := _unlike(member, leader, spec)) is not None:
                    return reason
                projection = member.site_projection()
            if (reason := _foreign(projection, like)) is not None:
                return reason
            projections.append(projection)
        return ReadySite(members, projections, leader, spec, self.impl if leader is None else leader.impl)

    def run(
        self,
        ready: ReadySite,
        x: Tensor,
        *,
        norm: Norm | None = None,
        gated: bool = False,
        swiglu: bool = False,
        residual: Tensor | None = None,
        split: bool = True,
    ) -> tuple[Tensor, ...]:
        """The group's outputs; arguments as in :func:`twn_kernels.ops.dual_lora_group`."""
        plan = None
        if ready.leader is not None:
            plan = ready.leader.routing.plan_for(x, ready.leader, ready.spec)
        packed = self._panels(ready, x)
        projections = [_used(projection, plan) for projection in ready.projections]
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        return dual_lora_group(
            x,
            _fitting(projections, x.dtype),
            plan,
            norm=norm,
            gated=gated,
            swiglu=swiglu,
            residual=residual,
            impl=ready.impl,
            site=self.site,
            packed=packed,
            split=split,
        )

    def prefers_epilogue(self, ready: ReadySite, x: Tensor) -> bool:
        """Whether gate and up should be combined where they are made, rather than where ``down`` reads them."""
        return self._serving_now(ready, x) != "blas"

    def _panels(self, ready: ReadySite, x: Tensor) -> tuple[Tensor, ...]:
        """The packed weights, where they are those of this call's linears and serve it."""
        if ready.leader is None or x.dtype not in _HALF or self._serving_now(ready, x) != "blas":
            return ()
        if self.packing is None:
            if self._unpackable is not None or not self.packs_on(x.device) or _is_recorded():
                return ()
            # The model was patched on another device, or in a dtype that is not packed.
            self.pack(ready.members)
        if self.packing is None or any(a is not b for a, b in zip(ready.members, self._packed, strict=True)):
            return ()
        return self.packing.panels(ready.projections)

    def _serving_now(self, ready: ReadySite, x: Tensor) -> str:
        """What serves this very call: an implementation may not take its tensors, or not its gradients."""
        taken = self._serving(ready.impl, x, x.shape[:-1])
        if taken == DEFAULT or torch.compiler.is_compiling():
            return taken
        layers = layers_of(ready.projections)
        grads = torch.is_grad_enabled() and (
            x.requires_grad or any(t is not None and t.requires_grad for tensors in layers for t in tensors)
        )
        tokens = x.shape[:-1].numel()
        return serving(ready.impl, x, layers, site=self.site, tokens=tokens, differentiable=grads).impl

    def _serving(self, impl: str, like: Tensor, lead: torch.Size | None) -> str:
        # A traced token count is symbolic; every choice is exact, so the one without it is good enough there.
        tokens = None if lead is None or torch.compiler.is_compiling() else lead.numel()
        return resolve(impl, like.device, like.dtype, site=self.site, tokens=tokens)


def layers_of(projections: Sequence[Projection]) -> tuple[list[Tensor | None], ...]:
    """``weights, A_r, B_r, A_e, B_e`` of projections; None where one lacks the adapter."""
    weights = [projection.weight for projection in projections]
    sides = [[p.reasoning for p in projections], [p.embedding for p in projections]]
    return weights, *([None if lora is None else lora[part] for lora in side] for side in sides for part in (0, 1))


def fitting_dtype(dtype: torch.dtype, used: set[torch.dtype]) -> torch.dtype | None:
    """What adapters of these dtypes are cast to beside an input of ``dtype``; None where they can stay.

    They stay in the dtype of the input, or all in fp32 beside a 16-bit one.
    """
    if used <= {dtype} or (used == {torch.float32} and dtype in _HALF):
        return None
    return torch.float32 if dtype in _HALF else dtype


def _unlike(member: SiteMember, leader: SiteMember, spec: RouteSpec) -> str | None:
    if member.routing is not leader.routing or member.site_spec() is not spec:
        return "its linears follow different routes"
    if member.impl != leader.impl or member.follows_rows != leader.follows_rows:
        return "its linears were given different impl= or follow rows differently"
    return None


def _foreign(projection: Projection, like: Tensor) -> str | None:
    """Why a weight cannot be read beside such an input; a tensor subclass (quantised, sharded) computes in its way."""
    for tensor in (projection.weight, projection.bias):
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"a weight is a {type(tensor).__name__}, not a plain tensor"
        if tensor.dtype != like.dtype or tensor.device != like.device:
            return "its weights and its input differ in dtype or device"
    if projection.weight.shape[1] > 1 and projection.weight.stride(1) != 1:
        return "a weight is stored transposed"
    return None


def _is_recorded() -> bool:
    """Whether this call is traced or captured, so that no weight may move in the middle of it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _owns_memory(weight: Tensor) -> bool:
    plain = type(weight) is nn.Parameter
    return plain and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _used(projection: Projection, plan: RoutePlan | None) -> Projection:
    """Without the adapters that no token can use."""
    present = 0 if plan is None else plan.present
    if present == 3:
        return projection
    reasoning = projection.reasoning if present & 1 else None
    return Projection(projection.weight, projection.bias, reasoning, projection.embedding if present & 2 else None)


def _fitting(projections: list[Projection], dtype: torch.dtype) -> list[Projection]:
    used = {lora.A.dtype for p in projections for lora in (p.reasoning, p.embedding) if lora is not None}
    target = fitting_dtype(dtype, used)
    if target is None:
        return projections

    def cast(lora: LoRA | None) -> LoRA | None:
        return None if lora is None else LoRA(lora.A.to(target), lora.B.to(target), lora.scaling)

    return [Projection(p.weight, p.bias, cast(p.reasoning), cast(p.embedding)) for p in projections]
