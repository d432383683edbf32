"""What a patched model runs, why, and what the patch costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from twn_kernels.checkpoint.names import collapse
from twn_kernels.errors import ImplUnavailable, PatchError
from twn_kernels.modules.site_group import ReadySite, layers_of
from twn_kernels.ops import LoRA, Projection, choice
from twn_kernels.patching.readiness import CONDITIONS, call_refusal, ready
from twn_kernels.patching.record import PatchRecord, find_record
from twn_kernels.patching.specs import FAMILY_SPECS, FamilySpec
from twn_kernels.settings import ADAPTERS

__all__ = ["LayerStatus", "Status", "loras_of", "status"]

_SOURCES = {
    "peft": "PEFT's own, in the model",
    "checkpoint": "a checkpoint",
    "fresh": "fresh (lora_B started at 0)",
}
_FUSED_AS = {
    "qkv": "one call for q, k and v, the norm in front folded in",
    "o": "one call with the residual",
    "gate_up": "one call for gate and up, the norm in front folded in",
    "down": "one call with SwiGLU in front (where gate_up does not make it) and the residual",
}
_DEFAULTS = {"peft": "as PEFT's own state says (active adapters, disable_adapter, adapter_names)"}


@dataclass(frozen=True)
class LayerStatus:
    """One patched layer.

    Attributes:
        layer: its path.
        group: its site group (``qkv``, ``o``, ``gate_up``, ``down``); None where the family's table has none.
        impl: which implementation serves it now; None where none can.
        why: the reason for that.
        ranks: by adapter; an adapter that does not touch the layer is absent.
        dtypes: of the adapters.
        base_dtype, device: of the base weight.
        adapter_bytes: of the adapters' tensors.
        added_bytes: what ``patch`` added (0 where PEFT had put the adapters there).
        by_row: whether each row may have a route of its own here; otherwise one route serves all rows.
        level: ``"block"`` where its site group runs as one call now, else ``"linear"``.
        level_why: what the call does, or why the layer runs by itself.
    """

    layer: str
    group: str | None
    impl: str | None
    why: str
    ranks: dict[str, int]
    dtypes: dict[str, str]
    base_dtype: str
    device: str
    adapter_bytes: int
    added_bytes: int
    by_row: bool
    level: str
    level_why: str


@dataclass(frozen=True)
class Status:
    """A patched (or plain) model at a glance; ``print`` it, or take :meth:`to_dict`.

    Attributes:
        model: its class.
        patched: whether it is.
        family: row of the table of families; None: unknown, or not patched.
        level: ``"block"`` where decoder layers are fused blocks, else ``"linear"``.
        level_note: what ``fuse`` came to, on which conditions, and how the targets were chosen.
        adapters: where the adapters came from.
        default_route: what layers use outside every ``route`` scope.
        current_route: what they use now.
        base_bytes: of all other parameters of the model.
        added_bytes: what ``patch`` added, packing included.
        packed_bytes: of that, what packing base weights beside ``lora_B`` added.
        extension: what of the CUDA extension is built, for what and where, or why it is not.
        layers: one entry a patched layer.
    """

    model: str
    patched: bool
    family: str | None = None
    level: str | None = None
    level_note: str = ""
    adapters: str = ""
    default_route: str = ""
    current_route: str = ""
    base_bytes: int = 0
    added_bytes: int = 0
    packed_bytes: int = 0
    extension: str = ""
    layers: tuple[LayerStatus, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.patched:
            return f"{self.model}: not patched"
        share = f" ({self.added_bytes / self.base_bytes:.2%} of the base)" if self.base_bytes else ""
        lines = [
            f"{self.model}: {len(self.layers)} layer{'s' * (len(self.layers) != 1)} patched, {self.level} level",
            f"  family         {self.family or 'unknown'}",
            f"  note           {self.level_note}",
            f"  adapters       {self.adapters}",
            f"  default route  {self.default_route}",
            f"  current route  {self.current_route}",
            f"  bytes added    {self.added_bytes:,}{share}",
            f"  cuda extension {self.extension}",
        ]
        groups: dict[tuple, list[LayerStatus]] = {}
        for layer in self.layers:
            key = (layer.impl, layer.why, *layer.ranks.items(), *layer.dtypes.items(), layer.base_dtype, layer.device)
            groups.setdefault((*key, layer.by_row, layer.level, layer.level_why), []).append(layer)
        for layers in groups.values():
            lines += _printed(layers)
        return "\n".join(lines)


def status(model: nn.Module) -> Status:
    """What runs in each layer of ``model``, why, and what the patch added; reads no device data.

    Args:
        model: patched or not, or a wrapper of a patched one.
    """
    record = find_record(model)
    if record is None:
        return Status(type(model).__name__, False)
    sites = _sites(record)
    layers = tuple(_layer_status(path, layer, record, sites) for path, layer in record.layers.items())
    adapter_bytes = sum(layer.adapter_bytes for layer in layers)
    everything = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    packed = sum(
        group.packing.added_bytes
        for block in record.blocks.values()
        for group in block.site_groups.values()
        if group.packing is not None
    )
    current = record.state.current
    return Status(
        model=type(model).__name__,
        patched=True,
        family=None if record.family is None else record.family.model_types[0],
        level="block" if record.blocks else "linear",
        level_note=_level_note(record),
        adapters=_SOURCES[record.kind],
        default_route=_DEFAULTS.get(record.kind, "base only"),
        current_route=_DEFAULTS["peft"] if current is None else current.describe(),
        base_bytes=everything - adapter_bytes,
        added_bytes=sum(layer.added_bytes for layer in layers) + packed,
        packed_bytes=packed,
        extension=choice.extension(),
        layers=layers,
    )


def loras_of(layer: nn.Module, record: PatchRecord) -> dict[str, LoRA]:
    """The adapters of one patched layer, by the package's names."""
    own = getattr(record.state, "adapters", ADAPTERS)
    found = {name: layer.lora(inner) for name, inner in zip(ADAPTERS, own, strict=True)}
    return {name: lora for name, lora in found.items() if lora is not None}


def _sites(record: PatchRecord) -> dict[tuple[str, str], tuple[str, str, list[Projection]]]:
    """``(level, why, projections)`` of every site group of a fused block, as it would run now."""
    found = {}
    for path, block in record.blocks.items():
        for site in _FUSED_AS:
            like = block.post_attention_layernorm.weight.detach()
            state = _state(block, site, like)
            if isinstance(state, str):
                found[path, site] = ("linear", f"now {state}", [])
            else:
                notes = [_FUSED_AS[site], block.site_groups[site].packing_note]
                found[path, site] = ("block", "; ".join(filter(None, notes)), state.projections)
    for path in record.blocks:
        # SwiGLU joins the two: neither runs as one call without the other.
        levels = [found[path, site] for site in ("gate_up", "down")]
        if refused := next((state for state in levels if state[0] == "linear"), None):
            found[path, "gate_up"] = found[path, "down"] = refused
    return found


def _state(block: nn.Module, site: str, like: torch.Tensor) -> ReadySite | str:
    try:
        return call_refusal(like) or ready(block, site, like)
    except PatchError as error:  # what a call would raise now, such as a third adapter that PEFT made active
        return str(error)


def _layer_status(path: str, layer: nn.Module, record: PatchRecord, sites: dict) -> LayerStatus:
    group = _group(record.family, path)
    parent = None if record.family is None else record.family.layer_of(path)
    level, level_why, projections = sites.get((parent, group), ("linear", record.unfused.get(parent, ""), []))
    loras = loras_of(layer, record)
    weight = layer.weight
    tensors = [tensor for lora in loras.values() for tensor in (lora.A, lora.B)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    projections = projections or [Projection(weight, None, *(loras.get(name) for name in ADAPTERS))]
    impl, why = _choice(layer, weight, loras, group if level == "block" else None, projections)
    return LayerStatus(
        layer=path,
        group=group,
        impl=impl,
        why=why,
        ranks={name: lora.A.shape[0] for name, lora in loras.items()},
        dtypes={name: _short(lora.A.dtype) for name, lora in loras.items()},
        base_dtype=_short(weight.dtype),
        device=str(weight.device),
        adapter_bytes=size,
        added_bytes=0 if record.kind == "peft" else size,
        by_row=layer.follows_rows,
        level=level,
        level_why=level_why,
    )


def _choice(
    layer: nn.Module,
    weight: torch.Tensor,
    loras: dict[str, LoRA],
    site: str | None,
    projections: list[Projection],
) -> tuple[str | None, str]:
    at = (layer.impl, weight.device, weight.dtype)
    try:
        impl, why = choice.chosen(*at, site=site)
        refusals = _refusals(*at, site, projections)
    except ImplUnavailable as error:
        return None, str(error)
    if impl in refusals:  # it was asked for by name: a call raises this
        return None, refusals[impl]
    why += "".join(f"; not {name} here, so {impl} serves: {refusals[name]}" for name in refusals)
    if getattr(layer, "merged", False):
        return "PEFT", f"{', '.join(layer.merged_adapters)} merged into the base weight; run by PEFT"
    dtypes = {lora.A.dtype for lora in loras.values()}
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if dtypes != {weight.dtype} and not (half and dtypes == {torch.float32}):
        stored = ", ".join(sorted(map(_short, dtypes)))
        why += f"; adapters of {stored} are cast in every forward (store them in the base's dtype)"
    return impl, why


def _refusals(
    impl: str, device: torch.device, dtype: torch.dtype, site: str | None, projections: list[Projection]
) -> dict[str, str]:
    """Why these very tensors are not served, by each implementation that would serve such calls otherwise."""
    layers = layers_of(projections)
    candidates = choice.candidates(impl, device, dtype, site=site)
    found = {name: choice.refusal_of(name, projections[0].weight, layers) for name in candidates}
    return {name: reason for name, reason in found.items() if reason is not None}


def _group(family: FamilySpec | None, path: str) -> str | None:
    return None if family is None else family.group_of(path)


def _level_note(record: PatchRecord) -> str:
    if not record.fuse:
        note = "fused blocks were not asked for"
    elif record.family is None or record.family.block is None:
        built = [spec.model_types[0] for spec in FAMILY_SPECS if spec.block is not None]
        note = f"fused blocks stand for the decoder layers of {', '.join(built)} alone"
    else:
        note = _block_note(record)
    if record.family is None:
        chosen = ""
        if record.kind == "fresh" and record.request.get("targets") is None:
            chosen = "; targets are every nn.Linear outside towers and output embeddings that its parent calls"
        note = f"the family is not in the table{chosen}; {note}"
    return note if record.blocks else f"linear level; {note}"


def _block_note(record: PatchRecord) -> str:
    notes = [f"{len(record.blocks)} decoder layers are fused blocks; {CONDITIONS}"] if record.blocks else []
    reasons: dict[str, list[str]] = {}
    for path, reason in record.unfused.items():
        reasons.setdefault(reason, []).append(path)
    notes += [f"not fused: {', '.join(collapse(paths))} ({reason})" for reason, paths in reasons.items()]
    return "; ".join(notes) or "no decoder layer holds a target"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _printed(layers: list[LayerStatus]) -> list[str]:
    one = layers[0]
    ranks = ", ".join(f"{name} {rank} ({one.dtypes[name]})" for name, rank in one.ranks.items()) or "none"
    size = sum(layer.adapter_bytes for layer in layers)
    lines = [f"  {path}" for path in collapse(layer.layer for layer in layers)]
    lines.append(f"    impl {one.impl}: {one.why}")
    lines.append(f"    base {one.base_dtype} on {one.device}; rank: {ranks}; adapters {size:,} bytes")
    if one.level_why:
        lines.append(f"    {one.level}: {one.level_why}")
    if not one.by_row:
        lines.append("    one route for all rows: the tokens here do not belong to one row each")
    return lines
