"""How a checkpoint's layers meet a model's linears: by path, by shape, and with nothing left over on either side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twn_kernels.checkpoint import Adapter, Checkpoint, match_modules
from twn_kernels.checkpoint.keys import canonical
from twn_kernels.checkpoint.names import collapse
from twn_kernels.errors import CheckpointError
from twn_kernels.modules.dual_lora_linear import LayerAdapter
from twn_kernels.patching.specs import output_embeddings
from twn_kernels.settings import ADAPTERS

__all__ = ["checksum", "fit_checkpoint", "layer_adapters"]

_HALF = (torch.float16, torch.bfloat16)


def fit_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """For each adapter, the path in the checkpoint by path in the model.

    Raises:
        CheckpointError: tensors fit no layer, targeted layers have no tensors, or shapes are those of another base; all
            of them are listed at once.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    problems: list[str] = []
    fitted: dict[str, dict[str, str]] = {}
    if missing := [name for name in ADAPTERS if name not in checkpoint.adapters]:
        problems += [f'adapter "{name}" is missing from the checkpoint' for name in missing]
    for name in ADAPTERS:
        if name in checkpoint.adapters:
            fitted[name] = _fit_adapter(model, checkpoint.adapters[name], linears, problems)
    if problems:
        source = f" ({checkpoint.source})" if checkpoint.source else ""
        base = f"\nThe checkpoint names its base: {checkpoint.base_model_name}." if checkpoint.base_model_name else ""
        raise CheckpointError(
            f"the checkpoint{source} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems) + base
        )
    return fitted


def _fit_adapter(
    model: nn.Module, adapter: Adapter, linears: Mapping[str, nn.Module], problems: list[str]
) -> dict[str, str]:
    places = match_modules(adapter.layers, linears)
    by_place: dict[str, str] = {}
    astray, wrong = [], {}
    for layer, path in places.items():
        if path is None or path in by_place:
            astray.append(layer)
            continue
        by_place[path] = layer
        weights, linear = adapter.layers[layer], linears[path]
        got = (weights.A.shape[1], weights.B.shape[0])
        want = (linear.in_features, linear.out_features)
        if got != want:
            wrong.setdefault((got, want), []).append(path)
    if astray:
        problems.append(f'adapter "{adapter.name}": tensors that fit no layer of the model: {_listed(astray)}')
    if bare := _without_tensors(model, adapter, linears, by_place):
        problems.append(f'adapter "{adapter.name}": layers that its config targets, without tensors: {_listed(bare)}')
    for (got, want), paths in wrong.items():
        problems.append(
            f'adapter "{adapter.name}": tensors for in_features {got[0]} and out_features {got[1]} where the model has '
            f"{want[0]} and {want[1]} (a base of another size?): {_listed(paths)}"
        )
    return by_place


def _without_tensors(
    model: nn.Module, adapter: Adapter, linears: Mapping[str, nn.Module], by_place: Mapping[str, str]
) -> list[str]:
    if adapter.config.target_modules is None:
        return []
    prefix = next((layer.removesuffix(canonical(layer)) for layer in by_place.values()), "")
    heads = output_embeddings(model) if adapter.config.target_modules == "all-linear" else set()
    return [
        path
        for path, module in linears.items()
        if path not in by_place and id(module) not in heads and adapter.config.is_target(prefix + canonical(path))
    ]


def _listed(paths: list[str]) -> str:
    return ", ".join(collapse(paths))


def layer_adapters(
    checkpoint: Checkpoint, fitted: Mapping[str, Mapping[str, str]], path: str, linear: nn.Linear
) -> dict[str, LayerAdapter]:
    """Copies of the adapters of one layer, on its device, in a dtype that loses nothing and that the op takes.

    That is the dtype of the base weight where the file's can be held in it, else fp32 (beside a 16-bit base).
    """
    weights = {
        name: checkpoint.adapters[name].layers[places[path]] for name, places in fitted.items() if path in places
    }
    stored = {tensor.dtype for layer in weights.values() for tensor in (layer.A, layer.B)}
    dtype = linear.weight.dtype
    if dtype in _HALF and stored != {dtype}:
        dtype = torch.float32
    like = {"device": linear.weight.device, "dtype": dtype, "copy": True}
    return {
        name: LayerAdapter(
            layer.A.to(**like), layer.B.to(**like), layer.scaling, checkpoint.adapters[name].config.lora_dropout
        )
        for name, layer in weights.items()
    }


def checksum(checkpoint: Checkpoint) -> tuple:
    """What two checkpoints of equal adapters share: layers, shapes, scalings, and a sum over each tensor's bits."""
    return tuple(
        (name, layer, weights.scaling, adapter.config.lora_dropout, _bits(weights.A), _bits(weights.B))
        for name, adapter in sorted(checkpoint.adapters.items())
        for layer, weights in sorted(adapter.layers.items())
    )


def _bits(tensor: Tensor) -> tuple:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(words).flatten().long()
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        int((flat * torch.arange(1, flat.numel() + 1, device=flat.device)).sum()),
    )
