"""Modules whose ``forward`` was set on the instance, as offloading and wrapping hooks do."""

from __future__ import annotations

from torch import nn

__all__ = ["drop_bound_forward", "has_own_forward"]


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling ``module`` runs something else than its class's ``forward``."""
    return "forward" in module.__dict__ and not _is_bound(module)


def drop_bound_forward(module: nn.Module) -> None:
    """Forget an instance's ``forward`` that is only its class's, bound: what a removed hook leaves behind."""
    if "forward" in module.__dict__ and _is_bound(module):
        del module.__dict__["forward"]


def _is_bound(module: nn.Module) -> bool:
    own = module.__dict__["forward"]
    return getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward
