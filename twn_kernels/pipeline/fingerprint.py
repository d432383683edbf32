"""What a captured graph has baked in of a model: if any of it changes, the graph must be captured anew.

Values of weights are not part of it: a replay reads them where they lie, so adapters may change in place.
"""

from __future__ import annotations

import torch

from twn_kernels.patching.record import find_record
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.settings import impl_override

__all__ = ["fingerprint"]


def fingerprint(backbone: Backbone) -> tuple:
    """Addresses and dtypes of the weights, scalings and implementations of the patched layers, and global switches."""
    modules = (backbone.decoder, backbone.head, backbone.embeddings)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    weights = tuple((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
    record = find_record(backbone.model)
    layers = () if record is None else tuple(_of_layer(layer) for layer in record.layers.values())
    switches = (
        impl_override(),
        getattr(backbone.config, "_attn_implementation", None),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
    return weights, layers, switches


def _of_layer(layer: torch.nn.Module) -> tuple:
    scaling = getattr(layer, "scaling", None)
    values = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else scaling
    return id(layer), type(layer).__name__, values, getattr(layer, "impl", None)
