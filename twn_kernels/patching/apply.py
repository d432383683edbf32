"""``patch`` and ``unpatch``: find the adapters, check everything, then turn the layers over, all or none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.checkpoint import Checkpoint, load_checkpoint
from twn_kernels.checkpoint.names import collapse
from twn_kernels.errors import OptionError, PatchError, UnsupportedModel, did_you_mean, quoted, reject_unknown
from twn_kernels.modules.dual_lora_linear import DualLoRALinear, LayerAdapter, check_rank
from twn_kernels.modules.routing import RouteState, UniformSpec
from twn_kernels.ops import choice
from twn_kernels.patching.fit import checksum, fit_checkpoint, layer_adapters
from twn_kernels.patching.fusing import fuse_blocks, refuse_wrapped_blocks, release_blocks
from twn_kernels.patching.own_forward import drop_bound_forward, has_own_forward
from twn_kernels.patching.peft_layer import PeftRouteState, dual_peft_linear
from twn_kernels.patching.peft_sites import adapter_names, holds_peft_layers, peft_sites
from twn_kernels.patching.record import PatchRecord, find_record, require_record
from twn_kernels.patching.specs import bypassed, choose_targets, family_of, follows_rows, is_plain_linear
from twn_kernels.patching.surroundings import Surroundings
from twn_kernels.settings import ADAPTERS, IMPLS, ROUTE_BITS

__all__ = ["patch", "unpatch"]

_DEFAULT_RANK = 64
_OPTIONS = ("checkpoint", "adapters", "targets", "rank", "fuse", "impl")


def patch(
    model: nn.Module,
    checkpoint: Checkpoint | str | os.PathLike | Mapping[str, str | os.PathLike] | None = None,
    *,
    adapters: Sequence[str] = ADAPTERS,
    targets: str | Sequence[str] | None = None,
    rank: int = _DEFAULT_RANK,
    fuse: bool = True,
    impl: str = "auto",
    **unknown: Any,
) -> nn.Module:
    """Give a model's linears two LoRA adapters that run in one pass; in place, and undone by :func:`unpatch`.

    The adapters are found in this order: PEFT's, where the model holds them; those of ``checkpoint``; fresh ones of
    ``rank`` with ``lora_B = 0``, so that the model gives what the base gives until they are trained. Until a
    :func:`~twn_kernels.patching.route` scope says otherwise, a plain model runs its base alone, and a PEFT model what
    PEFT's own state says.

    Layers stay the same objects: weights, their names, hooks, device, dtype and ``requires_grad`` are not touched, and
    no base weight is copied. ``state_dict()`` gains ``<layer>.lora_A.<adapter>`` and ``<layer>.lora_B.<adapter>``;
    ``save_pretrained`` still writes the base alone (see :func:`~twn_kernels.patching.adapters_of` for the adapters).

    Args:
        model: a model of ``nn.Linear`` layers, or a ``PeftModel`` with the two adapters.
        checkpoint: a :class:`~twn_kernels.checkpoint.Checkpoint`, a TWN directory or Hub id, or
            ``{"reasoning": dir, "embedding": dir}`` of PEFT adapter directories.
        adapters: names of the two adapters. In a PEFT model other names may be given, the reasoning adapter first.
        targets: for fresh adapters: None for the family's own, a list of module names, or a regex, as PEFT's
            ``target_modules``.
        rank: of fresh adapters, 1 … 256.
        fuse: run the decoder layers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL as fused blocks: q, k and v in one call, gate
            and up in one, norms, SwiGLU and residuals folded in. A call whose hooks, autocast or LoRA dropout a block
            would hide runs layer by layer; so do other families. :func:`~twn_kernels.patching.status` says which.
        impl: as in :func:`twn_kernels.ops.dual_lora_linear`.

    Returns:
        ``model`` itself.

    Raises:
        PatchError: nothing to patch, adapters missing or too many, or the model is patched with other arguments.
        UnsupportedModel: layers that cannot be fused exactly, all listed.
        CheckpointError: the checkpoint cannot be read, or does not fit the model.
        OptionError: an argument unknown or out of range, or one that the adapters' source decides.
        ImplUnavailable: ``impl`` was named and cannot run here.

    A model that raises is left as it was.

    Example:
        >>> import twn_kernels
        >>> from twn_kernels.testing.tiny_models import tiny_model
        >>> model = twn_kernels.patch(tiny_model("llama"), rank=4)
        >>> model = twn_kernels.unpatch(model)
    """
    reject_unknown(unknown, _OPTIONS, "patch")
    names = _check_options(model, adapters, rank, fuse, impl)
    if holds_peft_layers(model):
        _no_other_source(checkpoint=checkpoint, targets=targets, rank=rank, source="the model's PEFT adapters")
        return _patch_peft(model, adapter_names(model, names), fuse, impl)
    if set(names) != set(ADAPTERS):
        near = "".join(did_you_mean(name, ADAPTERS) for name in names if name not in ADAPTERS)
        raise OptionError(
            f"adapters must be {quoted(ADAPTERS)} unless the model holds PEFT's, got {quoted(names)}.{near}"
        )
    if checkpoint is not None:
        _no_other_source(targets=targets, rank=rank, source="the checkpoint")
        return _patch_checkpoint(model, checkpoint, fuse, impl)
    return _patch_fresh(model, targets, rank, fuse, impl)


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`: every layer is the object, and the class, that it was.

    The adapters of a PEFT model stay in it; those of a plain model are dropped (keep them with
    :func:`~twn_kernels.patching.adapters_of`).

    Raises:
        PatchError: the model is not patched, or a layer's forward was wrapped since.
    """
    record = require_record(model, "unpatch")
    if wrapped := [path for path, layer in record.layers.items() if has_own_forward(layer)]:
        raise PatchError(
            "these layers got a forward of their own since the patch (an offloading or wrapping hook): "
            f"{', '.join(collapse(wrapped))}. Remove it first; it calls the patched forward."
        )
    refuse_wrapped_blocks(record)
    record.surroundings.remove()
    release_blocks(record)
    for layer in record.layers.values():
        drop_bound_forward(layer)
        layer.release()
    record.detach(model)
    return model


def _check_options(model: nn.Module, adapters: Sequence[str], rank: int, fuse: bool, impl: str) -> tuple[str, str]:
    if not isinstance(model, nn.Module):
        raise PatchError(f"patch needs a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not all(isinstance(n, str) for n in adapters):
        raise OptionError(f"adapters must be two names, got {adapters!r}.")
    if len(adapters) != 2 or adapters[0] == adapters[1]:
        raise OptionError(f"adapters must be two different names, got {quoted(adapters)}.")
    check_rank(rank)
    if not isinstance(fuse, bool):
        raise OptionError(f"fuse must be True or False, got {fuse!r}.")
    if impl not in IMPLS:
        raise OptionError(f"impl must be one of {quoted(IMPLS)}, got {impl!r}.{did_you_mean(impl, IMPLS)}")
    return tuple(adapters)


def _no_other_source(*, source: str, rank: int, targets: Any, checkpoint: Any = None) -> None:
    given = {"checkpoint": checkpoint is not None, "targets": targets is not None, "rank": rank != _DEFAULT_RANK}
    if named := [name for name, is_given in given.items() if is_given]:
        raise OptionError(
            f"{' and '.join(named)} cannot be given together with {source}, which already says that. "
            "Leave it out, or patch a plain model without."
        )


def _patch_peft(model: nn.Module, names: tuple[str, str], fuse: bool, impl: str) -> nn.Module:
    request = {"adapters": names, "fuse": fuse, "impl": impl, "source": "PEFT"}
    if _already(model, request):
        return model
    layers = peft_sites(model, names)
    _check_weights({path: layer.base_layer for path, layer in layers.items()}, impl)
    state, layer_class = PeftRouteState(names), dual_peft_linear()
    bits = {names[0]: 1, names[1]: 2, **{name: ROUTE_BITS[name] for name in ADAPTERS}}
    record = _record(model, "peft", request, layers, state, fuse, impl, names=bits)
    adopt = {
        path: lambda layer=layer, path=path: layer_class.adopt(
            layer, state, impl=impl, path=path, follows_rows=follows_rows(path)
        )
        for path, layer in layers.items()
    }
    return _swap(model, record, adopt)


def _patch_checkpoint(model: nn.Module, source: Any, fuse: bool, impl: str) -> nn.Module:
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    request = {"checkpoint": checksum(checkpoint), "fuse": fuse, "impl": impl, "source": "checkpoint"}
    if _already(model, request):
        return model
    fitted = fit_checkpoint(model, checkpoint)
    paths = {path for places in fitted.values() for path in places}
    layers = {path: module for path, module in model.named_modules() if path in paths}
    _check_linears(model, layers)
    _check_weights(layers, impl)
    with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
        found = {path: layer_adapters(checkpoint, fitted, path, linear) for path, linear in layers.items()}
    record = _plain_record(model, "checkpoint", request, layers, fuse, impl)
    record.checkpoint_layers = fitted
    record.origins = {name: dataclasses.replace(checkpoint.adapters[name], layers={}) for name in ADAPTERS}
    return _swap(model, record, _adoptions(record, found))


def _patch_fresh(model: nn.Module, targets: Any, rank: int, fuse: bool, impl: str) -> nn.Module:
    shown = targets if targets is None or isinstance(targets, str) else tuple(sorted(map(str, targets)))
    request = {"targets": shown, "rank": rank, "fuse": fuse, "impl": impl, "source": "fresh adapters"}
    if _already(model, request):
        return model
    layers = choose_targets(model, targets, family_of(model))
    _check_linears(model, layers)
    _check_weights(layers, impl)
    with torch.inference_mode(False):
        found = {path: {name: LayerAdapter.fresh(linear, rank) for name in ADAPTERS} for path, linear in layers.items()}
    record = _plain_record(model, "fresh", request, layers, fuse, impl)
    return _swap(model, record, _adoptions(record, found))


def _already(model: nn.Module, request: dict[str, Any]) -> bool:
    record = find_record(model)
    if record is None:
        return False
    if record.request == request:
        return True
    keys = [key for key in sorted({*record.request, *request}) if record.request.get(key) != request.get(key)]
    differ = [
        # Both were read, so a difference lies in the weights, which no message can show.
        "the weights of the checkpoint are not those that were patched in"
        if key == "checkpoint" and record.request.get(key) and request.get(key)
        else f"{key} is {_shown(record.request.get(key))} and now {_shown(request.get(key))}"
        for key in keys
    ]
    raise PatchError(
        f"{type(model).__name__} is patched already, with other arguments: {'; '.join(differ)}. "
        "Call twn_kernels.unpatch(model) first."
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return f"one of {len(value)} layers"
    return "not given" if value is None else repr(value)


def _check_linears(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    problems: dict[str, list[str]] = {}
    unseen = bypassed(model)
    for path, module in layers.items():
        if id(module) in unseen:
            problem = "a linear whose parent reads its weight without calling it, so that no adapter would act"
            problems.setdefault(problem, []).append(path)
        elif not is_plain_linear(module):
            problems.setdefault(f"{type(module).__name__}, not a plain nn.Linear", []).append(path)
        elif has_own_forward(module):
            problem = "nn.Linear with a forward set on the instance (an offloading or wrapping hook)"
            problems.setdefault(problem, []).append(path)
    _raise_unsupported(problems)


def _check_weights(layers: Mapping[str, nn.Module], impl: str) -> None:
    problems: dict[str, list[str]] = {}
    kinds = set()
    for path, linear in layers.items():
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            problems.setdefault("a weight that is no plain parameter (quantised, sharded or computed)", []).append(path)
        elif not weight.dtype.is_floating_point or weight.element_size() < 2:
            problems.setdefault(f"a weight of {weight.dtype}", []).append(path)
        elif weight.device.type == "meta":
            problems.setdefault("a weight on the meta device (load the model's weights first)", []).append(path)
        else:
            kinds.add((weight.device, weight.dtype))
    _raise_unsupported(problems)
    for device, dtype in sorted(kinds, key=str):
        choice.resolve(impl, device, dtype)


def _raise_unsupported(problems: Mapping[str, list[str]]) -> None:
    if problems:
        lines = [f"  {problem}: {', '.join(collapse(paths))}" for problem, paths in problems.items()]
        raise UnsupportedModel(
            "these targets cannot be patched exactly:\n"
            + "\n".join(lines)
            + "\nName other targets=..., or a plain model."
        )


def _plain_record(model, kind, request, layers, fuse, impl) -> PatchRecord:
    names = {name: ROUTE_BITS[name] for name in ADAPTERS}
    return _record(model, kind, request, layers, RouteState(UniformSpec(0)), fuse, impl, names=names)


def _record(model, kind, request, layers, state, fuse, impl, *, names) -> PatchRecord:
    surroundings = Surroundings(model, state)
    return PatchRecord(kind, request, names, dict(layers), state, surroundings, family_of(model), fuse, impl)


def _adoptions(record: PatchRecord, found: Mapping[str, Mapping[str, LayerAdapter]]) -> dict:
    return {
        path: lambda path=path: DualLoRALinear.adopt(
            record.layers[path],
            found[path],
            record.state,
            impl=record.impl,
            path=path,
            follows_rows=follows_rows(path),
        )
        for path in record.layers
    }


def _swap(model: nn.Module, record: PatchRecord, adoptions: Mapping[str, Any]) -> nn.Module:
    done: list[nn.Module] = []
    try:
        for path, adopt in adoptions.items():
            drop_bound_forward(record.layers[path])
            done.append(adopt())
        fuse_blocks(model, record)
        record.surroundings.install(adapter_keys=record.kind != "peft")
        record.attach(model)
    except BaseException:
        record.surroundings.remove()
        release_blocks(record)
        for layer in done:
            layer.release()
        record.detach(model)
        raise
    return model
