"""PEFT's own LoRA linear with a fused forward. The class is made on first use, so that importing this imports no PEFT.

The layer stays PEFT's: same object, same state, same keys. Outside every ``route(...)`` scope its route comes from PEFT
(active adapters, ``disable_adapter()``, ``adapter_names=``, merged weights), so that PEFT's API keeps its meaning.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from twn_kernels.errors import PatchError, quoted
from twn_kernels.modules.dual_lora_linear import fused_linear
from twn_kernels.modules.routing import RouteSpec, RouteState, RowSpec, UniformSpec
from twn_kernels.ops import LoRA, Projection
from twn_kernels.patching.own_forward import has_own_forward

__all__ = ["PeftRouteState", "dual_peft_linear"]

_BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names
_OWN_ATTRIBUTES = ("routing", "impl", "path", "follows_rows")
_KEPT_BATCHES = 32


class PeftRouteState(RouteState):
    """Routes of a model with PEFT's layers: the default is whatever PEFT says.

    Args:
        names: PEFT's names of the reasoning and of the embedding adapter.
    """

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__(None)
        self.adapters = names
        self._uniform = [UniformSpec(bits) for bits in range(4)]
        self._rows: dict[tuple, RowSpec] = {}

    @property
    def base_only(self) -> UniformSpec:
        """The spec of disabled adapters."""
        return self._uniform[0]

    def active(self, names: list[str], path: str) -> UniformSpec:
        """The spec of PEFT's active adapters."""
        bits = 0
        for name in names:
            bits |= self._bit(name, path)
        return self._uniform[bits]

    def rows(self, names: list[str], layer: nn.Module) -> RowSpec:
        """The spec of PEFT's ``adapter_names``, kept so that all layers share its plans."""
        key = (tuple(names), layer.get_base_layer().weight.device)
        if key not in self._rows:
            if len(self._rows) >= _KEPT_BATCHES:
                self._rows.clear()
            bits = [0 if name == _BASE else self._bit(name, layer.path) for name in names]
            self._rows[key] = RowSpec(bits, key[1])
        return self._rows[key]

    def _bit(self, name: str, path: str) -> int:
        if name in self.adapters:
            return 1 << self.adapters.index(name)
        raise PatchError(
            f'adapter "{name}" is active on layer "{path}", but the model was patched for {quoted(self.adapters)} '
            "alone. Activate one of these, or unpatch the model first."
        )


@functools.cache
def dual_peft_linear() -> type:
    """The class ``DualPeftLinear``: a ``peft.tuners.lora.Linear`` whose two adapters run fused."""
    from peft.tuners.lora.layer import Linear

    return type("DualPeftLinear", (_Fused, Linear), {"__module__": __name__, "__doc__": _Fused.__doc__})


def __getattr__(name: str) -> type:
    # Unpickling looks the class up here.
    if name == "DualPeftLinear":
        return dual_peft_linear()
    raise AttributeError(name)


class _Fused:
    """A ``peft.tuners.lora.Linear`` whose two adapters run fused; made in place by :meth:`adopt`."""

    @classmethod
    def adopt(cls, layer: nn.Module, routing: PeftRouteState, *, impl: str, path: str, follows_rows: bool) -> nn.Module:
        """Turn PEFT's ``layer`` itself into a fused one; everything PEFT keeps on it stays."""
        layer.__class__ = cls
        layer.routing, layer.impl, layer.path, layer.follows_rows = routing, impl, path, follows_rows
        return layer

    def release(self) -> nn.Module:
        """Turn the layer back into PEFT's."""
        for name in _OWN_ATTRIBUTES:
            self.__dict__.pop(name, None)
        self.__class__ = dual_peft_linear().__bases__[1]
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output ``[..., out_features]``; PEFT's arguments keep their meaning.

        Raises:
            PatchError: an adapter outside the two is active, a scope meets merged weights or ``adapter_names``, or
                hooks were put on the inner base layer.
        """
        names = kwargs.get("adapter_names")
        spec = self.routing.spec
        if spec is not None:
            self._check_scope(names)
        elif self.merged and names is None:
            return super().forward(x, *args, **kwargs)
        if self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if self._base_is_watched():
            raise PatchError(
                f'layer "{self.path}": hooks on its base_layer would not run, because the fused product bypasses it. '
                f'Put them on "{self.path}" itself, or unpatch the model first.'
            )
        if spec is None:
            self._check_forward_args(x, *args, **kwargs)
            active = self.routing.active(self.active_adapters, self.path)
            spec = active if names is None else self.routing.rows(names, self)
        plan = self.routing.plan_for(x, self, spec)
        first, second = self.routing.adapters
        dropout = (self._dropout(first), self._dropout(second))
        return fused_linear(x, base.weight, base.bias, self.lora(first), self.lora(second), plan, dropout, self.impl)

    def lora(self, name: str) -> LoRA | None:
        """One adapter of this layer by PEFT's name, or None where it does not touch the layer."""
        if name not in self.lora_A:
            return None
        return LoRA(self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name]))

    def site_refusal(self) -> str | None:
        """Why this layer must run by itself now; as :class:`~twn_kernels.modules.site_group.SiteMember`."""
        if type(self).forward is not _Fused.forward:
            return f"{type(self).__name__} has a forward of its own"
        if self.merged:
            return "adapters are merged into its base weight"
        if self._base_is_watched():
            return "hooks on its base_layer"
        if any(self._dropout(name) for name in self.routing.adapters):
            return "LoRA dropout in training"
        return None

    def site_spec(self) -> RouteSpec:
        """The routes that this layer would follow now."""
        if self.disable_adapters:
            return self.routing.base_only
        spec = self.routing.spec
        return self.routing.active(self.active_adapters, self.path) if spec is None else spec

    def site_projection(self) -> Projection:
        """The base layer's weight and bias, and both adapters."""
        first, second = self.routing.adapters
        return Projection(self.base_layer.weight, self.base_layer.bias, self.lora(first), self.lora(second))

    def _base_is_watched(self) -> bool:
        base = self.base_layer
        return bool(base._forward_hooks or base._forward_pre_hooks or has_own_forward(base))

    def _dropout(self, name: str) -> float:
        if not self.training or name not in self.lora_dropout:
            return 0.0
        layer = self.lora_dropout[name]
        return float(getattr(layer, "p", 0.0)) if layer.training else 0.0

    def _check_scope(self, names: list[str] | None) -> None:
        if names is not None:
            raise PatchError(
                "adapter_names= was given inside a route(...) scope; both say which adapter a row uses. Give one."
            )
        if self.merged:
            raise PatchError(
                f'layer "{self.path}" has {quoted(self.merged_adapters)} merged into its base weight, so no route can '
                "leave it out. Call unmerge_adapter() first."
            )
