"""What ``patch`` leaves on a model: one record, found again from the model, a wrapper of it, or a part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from twn_kernels.errors import PatchError
from twn_kernels.modules.routing import RouteState
from twn_kernels.patching.specs import FamilySpec
from twn_kernels.patching.surroundings import Surroundings

__all__ = ["PatchRecord", "find_record", "require_record"]

_RECORD = "_twn_patch"


@dataclass
class PatchRecord:
    """One patch of one model.

    Attributes:
        kind: ``"peft"``, ``"checkpoint"`` or ``"fresh"``: where the adapters came from.
        request: the arguments, in a form that equal patches share.
        names: bit of each adapter by the names that routes may use.
        layers: the patched layers by path.
        state: the routes in force.
        surroundings: what was put around the layers.
        family: row of the table, where there is one.
        fuse, impl: as asked.
        checkpoint_layers: for each adapter, the path in the checkpoint by path in the model.
        origins: the checkpoint's adapters without their weights, by name.
        blocks: decoder layers that are fused blocks, by path.
        unfused: why others are not, by path.
    """

    kind: str
    request: dict[str, Any]
    names: dict[str, int]
    layers: dict[str, nn.Module]
    state: RouteState
    surroundings: Surroundings
    family: FamilySpec | None
    fuse: bool
    impl: str
    checkpoint_layers: dict[str, dict[str, str]] = field(default_factory=dict)
    origins: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)

    def attach(self, model: nn.Module) -> None:
        """Leave the record on ``model`` and on its layers."""
        model.__dict__[_RECORD] = self
        for layer in self.layers.values():
            layer.__dict__[_RECORD] = self

    def detach(self, model: nn.Module) -> None:
        """Remove the record."""
        model.__dict__.pop(_RECORD, None)
        for module in [*model.modules(), *self.layers.values()]:
            if module.__dict__.get(_RECORD) is self:
                module.__dict__.pop(_RECORD)


def find_record(model: nn.Module) -> PatchRecord | None:
    """The record of ``model``, of the model that it wraps, or of the model it is a part of; None where unpatched."""
    if _RECORD in model.__dict__:
        return model.__dict__[_RECORD]
    found = {id(m.__dict__[_RECORD]): m.__dict__[_RECORD] for m in model.modules() if _RECORD in m.__dict__}
    if len(found) > 1:
        raise PatchError(
            f"{type(model).__name__} holds {len(found)} models that were patched one by one. Name one of them."
        )
    return next(iter(found.values()), None)


def require_record(model: nn.Module, action: str) -> PatchRecord:
    """The record of ``model``, or a PatchError that says what ``action`` needs."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"{action} needs a patched model, got {type(model).__name__}.")
    record = find_record(model)
    if record is None:
        raise PatchError(
            f"{action} needs a patched model, but {type(model).__name__} is not patched. "
            "Call twn_kernels.patch(model, ...) first."
        )
    return record
