"""Which decoder layers of a model become fused blocks at ``patch``, and why the others do not."""

from __future__ import annotations

from torch import nn

from twn_kernels.checkpoint.names import collapse
from twn_kernels.errors import PatchError
from twn_kernels.patching.blocks import FusedLayer
from twn_kernels.patching.own_forward import drop_bound_forward, has_own_forward
from twn_kernels.patching.record import PatchRecord
from twn_kernels.patching.structure import misfit

__all__ = ["fuse_blocks", "refuse_wrapped_blocks", "release_blocks"]


def fuse_blocks(model: nn.Module, record: PatchRecord) -> None:
    """Turn the decoder layers that hold patched linears into fused blocks, where their structure allows it.

    Notes them in ``record.blocks``, and the reasons against the others in ``record.unfused``.
    """
    if not record.fuse or record.family is None or record.family.block is None:
        return
    found = dict.fromkeys(record.family.layer_of(path) for path in record.layers)
    for path in found:
        if path is None:
            continue
        layer = model.get_submodule(path)
        reason = misfit(layer, record.family.block)
        if reason is not None:
            record.unfused[path] = reason
            continue
        for module in (layer, layer.self_attn):
            drop_bound_forward(module)
        record.blocks[path] = FusedLayer.adopt(layer, path, record.state, record.impl)
        record.blocks[path].pack_where_it_pays()


def release_blocks(record: PatchRecord) -> None:
    """Turn every fused block back into the layer it was."""
    for layer in record.blocks.values():
        for module in (layer, layer.self_attn):
            drop_bound_forward(module)
        layer.release()
    record.blocks.clear()
    record.unfused.clear()


def refuse_wrapped_blocks(record: PatchRecord) -> None:
    """Raise PatchError where something has wrapped a block's forward, and would go on calling it."""
    wrapped = [
        f"{path}{name}"
        for path, layer in record.blocks.items()
        for name, module in (("", layer), (".self_attn", layer.self_attn))
        if has_own_forward(module)
    ]
    if wrapped:
        raise PatchError(
            "these fused blocks got a forward of their own since the patch (an offloading or wrapping hook): "
            f"{', '.join(collapse(wrapped))}. Remove it first; it calls the patched forward."
        )
