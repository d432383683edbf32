"""Drop-in adapters for HuggingFace models: ``patch``, ``unpatch``, ``route``, ``status``. The only place that knows model classes."""

from twn_kernels.patching.apply import patch, unpatch
from twn_kernels.patching.scope import route

__all__ = ["patch", "route", "unpatch"]
