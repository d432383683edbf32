"""How thoughts are decoded, and why: a growing cache, fixed buffers, or fixed buffers replayed from a CUDA graph.

Reads the model's configuration and modules; runs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from twn_kernels.errors import ImplUnavailable, OptionError, did_you_mean, quoted
from twn_kernels.patching.specs import FAMILY_SPECS, family_of
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.settings import DECODE_MODES

__all__ = ["DecodeChoice", "check_mode", "choose", "layer_kinds", "why_not_captured", "why_not_static"]

_MASKED = ("sdpa", "eager")  # attention that takes a prepared mask of any shape
_KINDS = ("full_attention", "sliding_attention")
# Hooks of these packages do nothing but Python's own book-keeping, which a replay may leave out.
_OWN_HOOKS = ("twn_kernels.", "transformers.")


class DecodeChoice(NamedTuple):
    """How thoughts are decoded.

    Attributes:
        mode: ``"cuda_graph"``, ``"static"`` or ``"dynamic"``.
        reason: why.
    """

    mode: str
    reason: str


def check_mode(decode: object) -> None:
    """Raise OptionError unless ``decode`` is one of ``settings.DECODE_MODES``."""
    if decode not in DECODE_MODES:
        near = did_you_mean(decode, DECODE_MODES)
        raise OptionError(f"decode must be one of {quoted(DECODE_MODES)}, got {decode!r}.{near}")


def choose(backbone: Backbone, decode: str) -> DecodeChoice:
    """What ``decode`` means for this model as it is now.

    Args:
        backbone: of the model.
        decode: ``"dynamic"``, ``"static"``, ``"cuda_graph"``, or ``"auto"``: a CUDA graph on a GPU where the model
            allows one, else a growing cache.

    Raises:
        OptionError: no such mode.
        ImplUnavailable: a named mode that this model cannot run; the message says why.
    """
    check_mode(decode)
    if decode == "dynamic":
        return DecodeChoice("dynamic", 'decode="dynamic" was asked for')
    # The device comes first: nobody without a GPU needs to hear what else a graph would need.
    reason = None if decode == "static" else _why_no_device(backbone)
    reason = reason or why_not_static(backbone) or (None if decode == "static" else why_not_captured(backbone))
    if reason is None:
        asked = f'decode="{decode}" was asked for' if decode != "auto" else "a GPU, and a model with fixed shapes"
        return DecodeChoice("static" if decode == "static" else "cuda_graph", asked)
    if decode == "auto":
        return DecodeChoice("dynamic", reason)
    raise ImplUnavailable(f'decode="{decode}" was asked for, but {reason} Or use decode="auto" (now: dynamic).')


def layer_kinds(config) -> list[str]:
    """What each decoder layer attends to, as transformers names it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    kind = "full_attention"
    if getattr(config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * config.num_hidden_layers


def why_not_static(backbone: Backbone) -> str | None:
    """Why this model cannot decode on buffers of fixed shape, as a sentence; None where it can."""
    config = backbone.config
    if family_of(backbone.whole) is None:
        known = quoted(sorted({name for spec in FAMILY_SPECS for name in spec.model_types}))
        got = getattr(backbone.whole_config, "model_type", type(backbone.whole).__name__)
        return f'it is not known how a "{got}" model takes a prepared mask; known families: {known}.'
    if other := sorted(set(layer_kinds(config)) - set(_KINDS)):
        return f"its layers use {quoted(other)}, and masks are prepared for {quoted(_KINDS)} alone."
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return "its attention is not causal."
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in _MASKED:
        return (
            f'attention "{attention}" takes no prepared mask. Load the model with attn_implementation="sdpa" to '
            "decode on fixed buffers."
        )
    devices = {str(tensor.device) for tensor in _weights(backbone)}
    if len(devices) > 1:
        return f"its layers are spread over {', '.join(sorted(devices))}. Put the model on one device."
    return None


def why_not_captured(backbone: Backbone) -> str | None:
    """Why a step of a model that can run on fixed buffers still cannot be captured now; None where it can."""
    if reason := _why_no_device(backbone):
        return reason
    if scaled := sorted(name for name in _rope_types(backbone.config) if name == "longrope" or "dynamic" in name):
        return f"its rotary embedding ({scaled[0]}) reads the positions on the host, which a graph cannot do."
    modules = [*backbone.decoder.modules(), backbone.head, backbone.embeddings]
    if any(module.training for module in modules):
        return "the model is in training mode. Call model.eval()."
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "forward hooks on every module would not run in a replay. Remove them."
    hooked = next((module for module in modules if _foreign_hooks(module)), None)
    if hooked is not None:
        return f"a forward hook on {type(hooked).__name__} would not run in a replay. Remove it."
    if torch.is_autocast_enabled(backbone.device.type):
        return "autocast is on, whose casted weights a graph must not keep. Convert the model instead: model.to(dtype)."
    return None


def _why_no_device(backbone: Backbone) -> str | None:
    if backbone.device.type == "cuda":
        return None
    return f"CUDA graphs need a GPU and the model is on {backbone.device.type}."


def _weights(backbone: Backbone) -> Iterator[torch.Tensor]:
    for module in (backbone.decoder, backbone.head, backbone.embeddings):
        yield from module.parameters()


def _rope_types(config) -> set[str]:
    """Every rotary scaling of a configuration: one for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in nested if entry.get("rope_type")}


def _foreign_hooks(module: nn.Module) -> bool:
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        while isinstance(hook, functools.partial):
            hook = hook.func
        if not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS):
            return True
    return False
