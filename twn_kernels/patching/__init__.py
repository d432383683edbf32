"""Drop-in adapters for HuggingFace models. The only place that knows model classes."""

from twn_kernels.patching.apply import patch, unpatch
from twn_kernels.patching.export import adapters_of
from twn_kernels.patching.scope import route
from twn_kernels.patching.status import LayerStatus, Status, status

__all__ = ["LayerStatus", "Status", "adapters_of", "patch", "route", "status", "unpatch"]
