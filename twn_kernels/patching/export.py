"""The adapters of a patched model as a checkpoint holds them, so that training can be saved."""

from __future__ import annotations

import dataclasses

from torch import nn

from twn_kernels.checkpoint import Adapter, LayerWeights
from twn_kernels.errors import PatchError
from twn_kernels.ops import LoRA
from twn_kernels.patching.record import PatchRecord, require_record
from twn_kernels.patching.status import loras_of
from twn_kernels.settings import ADAPTERS

__all__ = ["adapters_of"]


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a patched model, ready for a :class:`~twn_kernels.checkpoint.Checkpoint` to save.

    Args:
        model: patched, from a checkpoint or with fresh adapters.

    Returns:
        by name, as they are now; the tensors share the model's memory, so every ``lora_B`` that lies in a panel of
        packed weights gets memory of its own first. Adapters that came from a checkpoint keep its
        configuration and its names of layers.

    Raises:
        PatchError: the model is not patched, or its adapters are PEFT's (which saves them itself).

    Example:
        >>> import twn_kernels
        >>> from twn_kernels.patching import adapters_of
        >>> from twn_kernels.testing.tiny_models import tiny_model
        >>> model = twn_kernels.patch(tiny_model("llama"), rank=4)
        >>> checkpoint = twn_kernels.Checkpoint(adapters_of(model))
    """
    record = require_record(model, "adapters_of")
    if record.kind == "peft":
        raise PatchError("the adapters are PEFT's, which saves them itself: model.save_pretrained(...).")
    for block in record.blocks.values():
        for group in block.site_groups.values():
            if group.packing is not None:
                group.packing.unshare()
    return {name: _adapter(name, record) for name in ADAPTERS}


def _adapter(name: str, record: PatchRecord) -> Adapter:
    places = record.checkpoint_layers.get(name, {})
    loras: dict[str, LoRA] = {}
    for path, layer in record.layers.items():
        lora = loras_of(layer, record).get(name)
        if lora is not None:
            loras[places.get(path, path)] = lora
    origin = record.origins.get(name)
    if origin is None:
        rank = record.request["rank"]
        return Adapter.build(
            name, {path: (lora.A.detach(), lora.B.detach()) for path, lora in loras.items()}, lora_alpha=rank
        )
    return dataclasses.replace(
        origin,
        layers={
            path: LayerWeights(
                lora.A.detach(), lora.B.detach(), lora.scaling, lora.A.shape[0], origin.config.alpha(path)
            )
            for path, lora in loras.items()
        },
    )
