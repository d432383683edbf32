"""The route that a model's layers follow: what was asked for, and the plan it becomes for a forward's tokens.

A patched model has one :class:`RouteState`, shared by all of its dual-LoRA layers. A spec builds one plan for each
shape and device and keeps it, so that every layer of a forward, and every decode step, uses the same tensor. Which rows
and tokens a layer sees is read from its input; nothing is read from the device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from twn_kernels.errors import PatchError, ShapeError
from twn_kernels.ops import RoutePlan
from twn_kernels.ops.plan import route_name
from twn_kernels.settings import BOTH

__all__ = ["PlanSpec", "RouteSpec", "RouteState", "RowSpec", "TokenSpec", "UniformSpec", "route_name"]

_KEPT_PLANS = 16  # shapes a spec remembers; prefill lengths vary, decode repeats one


class RouteSpec:
    """What was asked for, and the plans built from it so far."""

    bits: int | None = None  # the one route of every token, where there is one

    def __init__(self) -> None:
        self._plans: dict[tuple, RoutePlan] = {}

    def plan_for(self, x: Tensor, layer: object, state: RouteState) -> RoutePlan | None:
        """The plan for the tokens of ``x`` ``[..., in_features]``; None where no token uses an adapter."""
        if self.bits == 0:
            return None
        lead = x.shape[:-1]
        if torch.compiler.is_compiling():
            return self._build(lead, x.device, layer, state)
        key = (lead, x.device, state.expand, getattr(layer, "follows_rows", True))
        plan = self._plans.get(key)
        if plan is None:
            # A plan made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                plan = self._build(lead, x.device, layer, state)
            self._keep(key, plan, x.device)
        elif len(lead) == 1 and self.bits is None:
            self._check_flat(lead, layer, state)
        return plan

    def _keep(self, key: tuple, plan: RoutePlan, device: torch.device) -> None:
        # A tensor made during capture lives in the graph's memory and is empty until a replay; a fake one always is.
        if type(plan.routes) is not Tensor or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        if len(self._plans) >= _KEPT_PLANS:
            self._plans.clear()
        self._plans[key] = plan

    def _build(self, lead: torch.Size, device: torch.device, layer: object, state: RouteState) -> RoutePlan:
        raise NotImplementedError

    def _check_flat(self, lead: torch.Size, layer: object, state: RouteState) -> None:
        """Raise where a flat input no longer stands for whole rows."""

    def describe(self) -> str:
        """The spec in words, for messages and status."""
        raise NotImplementedError

    def same_as(self, other: RouteSpec | None) -> bool:
        """Whether ``other`` surely gives every token the same route."""
        return self is other or (self.bits is not None and other is not None and self.bits == other.bits)


class UniformSpec(RouteSpec):
    """One route for every token."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def _build(self, lead, device, layer, state) -> RoutePlan:
        routes = torch.full((math.prod(lead),), self.bits, dtype=torch.int8, device=device)
        return RoutePlan(routes, self.bits, True)

    def describe(self) -> str:
        return route_name(self.bits)


class _PerRowSpec(RouteSpec):
    rows: int

    def _grid(self, lead: torch.Size, layer: object, state: RouteState) -> tuple[int, int, int]:
        """``(rows, tokens a row, copies of each of the spec's rows)`` of an input, or a ShapeError."""
        if not getattr(layer, "follows_rows", True):
            raise ShapeError(
                f"{_name(layer)} reads tokens that do not belong to one row each (a vision or audio tower, or routed "
                f"experts), so {self.describe()} cannot say which adapter they use. Use one route for all rows, "
                "or keep the adapters off this layer."
            )
        rows, tokens = self._rows_of_flat(lead, layer, state) if len(lead) == 1 else (lead[0], math.prod(lead[1:]))
        if rows == self.rows:
            return rows, tokens, 1
        if state.expand > 1 and rows == self.rows * state.expand:
            return rows, tokens, state.expand
        raise ShapeError(
            f"{self.describe()} was given, but {_name(layer)} got {rows} rows ({list(lead)} tokens). "
            "Give one route for each row of the batch."
        )

    def _rows_of_flat(self, lead: torch.Size, layer: object, state: RouteState) -> tuple[int, int]:
        total = lead[0]
        if torch.compiler.is_compiling():
            rows = self.rows * state.expand
            if total % rows == 0:
                return rows, total // rows
        elif state.batch_shape is not None:
            rows, tokens = state.batch_shape
            if total == rows * tokens:
                return rows, tokens
            if total == rows:
                return rows, 1
        seen = "no forward of the patched model" if state.batch_shape is None else f"a batch of {state.batch_shape}"
        raise ShapeError(
            f"{_name(layer)} got a flat input of {total} tokens, which cannot be split into the rows of "
            f"{self.describe()} ({seen} is running). Call the patched model itself, or route with a RoutePlan over "
            "these tokens."
        )

    def _check_flat(self, lead, layer, state) -> None:
        self._rows_of_flat(lead, layer, state)


class RowSpec(_PerRowSpec):
    """One route for each row of the batch, at any sequence length."""

    def __init__(self, bits: Sequence[int], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rows = len(bits)
        self.present = 0
        for bit in bits:
            self.present |= bit
        self.is_uniform = len(set(bits)) == 1
        self.bits = bits[0] if self.is_uniform and bits[0] == 0 else None
        # Copied to the device once: a decode step then needs no transfer.
        with torch.inference_mode(False):
            self.routes = torch.tensor(list(bits), dtype=torch.int8).to(device)

    def plan_for(self, x, layer, state) -> RoutePlan | None:
        # No plan is built for base-only rows, but their number is still held to the batch's.
        if self.bits == 0 and x.dim() > 2 and getattr(layer, "follows_rows", True):
            self._grid(x.shape[:-1], layer, state)
        return super().plan_for(x, layer, state)

    def _build(self, lead, device, layer, state) -> RoutePlan:
        if self.is_uniform and not getattr(layer, "follows_rows", True):
            routes = self.routes[:1].to(device).expand(math.prod(lead)).contiguous()
            return RoutePlan(routes, self.present, True)
        rows, tokens, copies = self._grid(lead, layer, state)
        routes = self.routes.to(device)
        if copies > 1:
            routes = routes.repeat_interleave(copies)
        # One row stays a view of stride 0 under reshape, and kernels read routes one byte after another.
        routes = routes.unsqueeze(1).expand(rows, tokens).reshape(-1).contiguous()
        return RoutePlan(routes, self.present, self.is_uniform)

    def describe(self) -> str:
        return f"one route for each of {self.rows} rows"


class TokenSpec(_PerRowSpec):
    """One route for each token of a ``[batch, seq]`` forward; one-token steps continue each row's last route."""

    def __init__(self, routes: Tensor) -> None:
        super().__init__()
        with torch.inference_mode(False):
            self.routes = routes.detach().clone()
        self.rows = routes.shape[0]
        self.present = BOTH
        if routes.device.type == "cpu":
            self.present = 0
            for bit in routes.unique().tolist():
                self.present |= bit

    def _build(self, lead, device, layer, state) -> RoutePlan:
        rows, tokens, copies = self._grid(lead, layer, state)
        if tokens == self.routes.shape[1]:
            routes = self.routes
        elif tokens == 1 and self.routes.shape[1] > 0:
            routes = self.routes[:, -1:]
        else:
            raise ShapeError(
                f"{self.describe()} was given, but {_name(layer)} got {tokens} tokens a row. A forward must have "
                "exactly that shape, or one token a row after it (each row then keeps its last route)."
            )
        routes = routes.to(device)
        if copies > 1:
            routes = routes.repeat_interleave(copies, dim=0)
        return RoutePlan(routes.reshape(-1).contiguous(), self.present, False)

    def describe(self) -> str:
        return f"a route for each token of [{self.rows}, {self.routes.shape[1]}]"


class PlanSpec(RouteSpec):
    """A plan made by the caller, used as it is; its routes may be refreshed in place."""

    def __init__(self, plan: RoutePlan) -> None:
        super().__init__()
        self.plan = plan

    def plan_for(self, x, layer, state) -> RoutePlan | None:
        tokens = math.prod(x.shape[:-1])
        if tokens != self.plan.tokens:
            raise ShapeError(
                f"the RoutePlan covers {self.plan.tokens} tokens, but {_name(layer)} got {tokens} "
                f"({list(x.shape[:-1])}). Build the plan for this forward's batch x seq tokens."
            )
        return self.plan

    def describe(self) -> str:
        return f"a RoutePlan over {self.plan.tokens} tokens"


class RouteState:
    """The spec in force for one patched model, shared by its layers.

    Attributes:
        spec: in force now; None: the default.
        default: what layers use outside every scope; None: each layer knows (PEFT's own state).
        expand: copies of each row that ``generate`` makes (beams, returned sequences).
        batch_shape: ``(batch, seq)`` of the innermost model that is running, where its inputs told.
    """

    def __init__(self, default: RouteSpec | None = None) -> None:
        self.default = default
        self.spec: RouteSpec | None = None
        self.expand = 1
        self.batch_shape: tuple[int, int] | None = None
        self.replaying = False
        self._last: RouteSpec | None = None
        self._scopes: list[list] = []
        self._thread: int | None = None

    @property
    def current(self) -> RouteSpec | None:
        """The spec that a forward would follow now."""
        return self.default if self.spec is None else self.spec

    def enter(self, spec: RouteSpec) -> list:
        """Put ``spec`` in force; returns what :meth:`leave` needs."""
        here = threading.get_ident()
        if self._scopes and self._thread != here:
            raise PatchError(
                "route(...) was entered in a second thread while another thread's scope is open; a model has one route "
                "at a time. Run them one after the other, or give each thread a model of its own (copy.deepcopy)."
            )
        scope = [self.spec, self.expand]
        self._thread = here
        self._scopes.append(scope)
        self.spec, self.expand = spec, 1
        return scope

    def leave(self, scope: list) -> None:
        """Undo the :meth:`enter` that returned ``scope``, also where scopes end in another order than they began."""
        place = next(place for place, open_scope in enumerate(self._scopes) if open_scope is scope)
        self._scopes.pop(place)
        if place == len(self._scopes):
            self.spec, self.expand = scope
        else:
            # Left out of order: the scope entered next now returns to what this one would have returned to.
            self._scopes[place][:] = scope

    def plan_for(self, x: Tensor, layer: torch.nn.Module, spec: RouteSpec | None = None) -> RoutePlan | None:
        """The plan of ``spec`` (None: the one in force) for the tokens of ``x``; None where all run the base alone."""
        spec = self.current if spec is None else spec
        if layer.training and not torch.compiler.is_compiling():
            self._check_replay(spec, layer)
        return spec.plan_for(x, layer, self)

    def _check_replay(self, spec: RouteSpec, layer: torch.nn.Module) -> None:
        # Recomputation of a checkpointed block runs inside backward, after the scope of its forward may have ended.
        if torch._C._current_graph_task_id() == -1:
            self._last = spec
        elif not self.replaying and not spec.same_as(self._last):
            was = "none" if self._last is None else self._last.describe()
            raise PatchError(
                f"{_name(layer)} is recomputed by activation checkpointing under another route ({spec.describe()}) "
                f"than the last forward's ({was}), so its gradients would be wrong. Call backward inside the same "
                "route(...) scope, or use the model's own gradient_checkpointing_enable(), which remembers routes."
            )


def _name(layer: object) -> str:
    path = getattr(layer, "path", "")
    return f'layer "{path}"' if path else type(layer).__name__
