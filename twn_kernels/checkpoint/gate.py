"""The gate and the queries on disk: whatever their names, what they compute.

A gate file is a state dict of linear layers with optional norms between them. Names and prefixes are free, so the order
comes from the file (or from the numbers in the names) and must chain: each layer reads what the one before it writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch

from twn_kernels.checkpoint.tensorfile import WEIGHT_DTYPES, TensorInfo
from twn_kernels.errors import CheckpointError

_MAX_LINEARS = 6  # permutations are tried when names tell no order; a gate is a small MLP


@dataclass(frozen=True)
class GateLayer:
    """One step of the gate, by the names of its tensors.

    Args:
        kind: ``"linear"`` (weight ``[out, in]``) or ``"norm"`` (weight ``[width]``; without a bias, RMS).
        name: its prefix in the file.
        weight, bias: names of its tensors; ``bias`` None where there is none.
        in_features, out_features: widths.
        activated: whether the activation follows this layer.
    """

    kind: str
    name: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    activated: bool = False


@dataclass(frozen=True)
class GateLayout:
    """The gate's layers in order, and what they imply."""

    layers: tuple[GateLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def in_features(self) -> int:
        """Width of the gate's input."""
        return self.layers[0].in_features

    @property
    def out_features(self) -> int:
        """1 (sigmoid) or 2 (softmax; the second logit means think)."""
        return self.layers[-1].out_features


def _natural(name: str) -> tuple:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def gate_layout(infos: Mapping[str, TensorInfo], label: str, *, ordered: bool) -> GateLayout:
    """Find the gate's layers.

    Args:
        infos: dtype and shape by tensor name.
        label: how messages name the file.
        ordered: whether the file keeps the order of definition (``torch.save`` does, safetensors does not).

    Raises:
        CheckpointError: tensors that belong to no linear layer or norm, dtypes that are no weights, layers that do not
            chain, or an output that is neither 1 nor 2 wide.
    """
    units: dict[str, dict[str, str]] = {}
    for key in infos:
        prefix, _, leaf = key.rpartition(".")
        units.setdefault(prefix, {})[leaf] = key
    if wrong := [f"{key} is {info.dtype_name}" for key, info in infos.items() if info.dtype not in WEIGHT_DTYPES]:
        allowed = ", ".join(map(_dtype_name, WEIGHT_DTYPES))
        raise CheckpointError(f"{label}: weights must be one of {allowed}, got: {', '.join(wrong)}.")
    layers, strange = [], []
    for prefix, leaves in units.items():
        layer = _layer(prefix, leaves, infos)
        if layer is None:
            strange.extend(f"{key} {list(infos[key].shape)}" for key in leaves.values())
        else:
            layers.append(layer)
    if strange:
        raise CheckpointError(
            f"{label}: tensors that belong to no linear layer (weight [out, in], bias [out]) and to no layer norm "
            f"(weight [width], bias [width]): {', '.join(strange)}."
        )
    if not ordered:
        layers.sort(key=lambda layer: _natural(layer.name))
    return _chained(layers, label, ordered)


def _layer(prefix: str, leaves: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> GateLayer | None:
    if not set(leaves) <= {"weight", "bias"} or "weight" not in leaves:
        return None
    weight = infos[leaves["weight"]].shape
    bias = infos[leaves["bias"]].shape if "bias" in leaves else None
    if 0 in weight or len(weight) not in (1, 2) or bias not in (None, weight[:1]):
        return None
    kind = "linear" if len(weight) == 2 else "norm"
    return GateLayer(kind, prefix, leaves["weight"], leaves.get("bias"), weight[-1], weight[0])


def _chains(layers: Sequence[GateLayer]) -> bool:
    return all(a.out_features == b.in_features for a, b in zip(layers, layers[1:], strict=False))


def _chained(layers: list[GateLayer], label: str, ordered: bool) -> GateLayout:
    linears = [layer for layer in layers if layer.kind == "linear"]
    listing = ", ".join(f"{layer.weight} [{layer.out_features}, {layer.in_features}]" for layer in linears)
    if not linears:
        raise CheckpointError(f"{label} holds no linear layer (a weight [out, in]).")
    notes = []
    order = layers
    if not _chains(layers):
        order = _only_order(layers, linears)
        if order is None:
            raise CheckpointError(
                f"{label}: the gate's layers do not chain, each into the next, in exactly one order: {listing}."
            )
        notes.append(f"{label}: layers ordered by their shapes, not by their names")
    elif not ordered and _other_orders(linears) and not all(any(c.isdigit() for c in x.name) for x in linears):
        notes.append(f"{label}: layers ordered by names that hold no numbers; their shapes allow other orders")
    if order[-1].kind == "norm" or order[-1].out_features not in (1, 2):
        raise CheckpointError(
            f"{label}: the gate's last layer must be linear with 1 output (sigmoid) or 2 (softmax), got "
            f"{order[-1].weight} with {order[-1].out_features}. Its layers: {listing}."
        )
    return GateLayout(_activated(order), tuple(notes))


def _other_orders(linears: list[GateLayer]) -> bool:
    if len(linears) > _MAX_LINEARS:
        return True
    chains = [order for order in permutations(linears) if order[-1].out_features in (1, 2) and _chains(order)]
    return len(chains) > 1


def _only_order(layers: list[GateLayer], linears: list[GateLayer]) -> list[GateLayer] | None:
    """The one order in which linears chain to an output of 1 or 2, with norms placed by their width."""
    if len(linears) > _MAX_LINEARS:
        return None
    if _chains(linears) and linears[-1].out_features in (1, 2):
        found = [tuple(linears)]
    else:
        tried = (order for order in permutations(linears) if order[-1].out_features in (1, 2))
        found = [order for order in tried if _chains(order)]
    if len(found) != 1:
        return None
    order = list(found[0])
    for norm in (layer for layer in layers if layer.kind == "norm"):
        places = [
            index + 1
            for index, layer in enumerate(order[:-1])
            if layer.kind == "linear" and layer.out_features == norm.in_features and order[index + 1].kind == "linear"
        ]
        if order[0].kind == "linear" and order[0].in_features == norm.in_features:
            places.append(0)
        if len(places) != 1:
            return None
        order.insert(places[0], norm)
    return order


def _index(layer: GateLayer) -> int | None:
    last = layer.name.rpartition(".")[2]
    return int(last) if last.isdigit() else None


def _activated(order: list[GateLayer]) -> tuple[GateLayer, ...]:
    """Mark the layers that the activation follows: one between any two linears.

    With a norm between them the activation comes after the norm, unless the numbers of an ``nn.Sequential`` leave a gap
    between linear and norm and none between norm and the next linear (linear, activation, norm, linear).
    """
    marked = list(order)
    starts = [index for index, layer in enumerate(order) if layer.kind == "linear"]
    for here, after in zip(starts, starts[1:], strict=False):
        place = after - 1
        if place > here:
            first, norm, following = _index(order[here]), _index(order[here + 1]), _index(order[after])
            if None not in (first, norm, following) and norm - first > 1 and following - norm == 1:
                place = here
        layer = order[place]
        marked[place] = GateLayer(
            layer.kind, layer.name, layer.weight, layer.bias, layer.in_features, layer.out_features, True
        )
    return tuple(marked)


def gate_inputs(in_features: int, num_queries: int, hidden: int) -> tuple[str, ...]:
    """What a gate of this input width can read, likeliest first; empty where nothing fits.

    ``hidden``: the mean of the query outputs, or the last prompt token. ``num_queries * hidden``: all query outputs,
    one after another. ``2 * hidden``: their mean, then the last prompt token.
    """
    fits = []
    if in_features == num_queries * hidden and num_queries > 1:
        fits.append("concat")
    if in_features == 2 * hidden:
        fits.append("mean_last")
    if in_features == hidden:
        fits.extend(["mean", "last"])
        if num_queries == 1:
            fits.append("concat")
    return tuple(fits)


def queries_tensor(tensors: Mapping[str, torch.Tensor], label: str) -> torch.Tensor:
    """The queries ``[num_queries, hidden]`` of a file's tensors; the only one, ``[1, N, H]`` flattened.

    Scalars beside it, such as a trained temperature of the loss, take no part in embedding.

    Raises:
        CheckpointError: there is more than one tensor, or one of another shape or dtype.
    """
    given = {name: tensor for name, tensor in tensors.items() if not is_scalar(tensor)} or tensors
    if len(given) != 1:
        listing = ", ".join(f'"{name}" {list(tensor.shape)}' for name, tensor in given.items())
        raise CheckpointError(f"{label} must hold one tensor [num_queries, hidden], got {len(given)}: {listing}.")
    name, tensor = next(iter(given.items()))
    shape = list(tensor.shape)
    fits = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
    if not fits or 0 in shape:
        raise CheckpointError(
            f'{label}: "{name}" must be [num_queries, hidden] or [1, num_queries, hidden], got {shape}.'
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        allowed, got = (", ".join(map(_dtype_name, dtypes)) for dtypes in (WEIGHT_DTYPES, (tensor.dtype,)))
        raise CheckpointError(f'{label}: "{name}" must be one of {allowed}, got {got}.')
    return tensor.reshape(shape[-2:])


def is_scalar(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one number."""
    return tensor.numel() == 1 and tensor.dim() <= 1


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
