"""Whether a site group of a fused block may run as one in this very call, and if not, why.

Asked again in every call, since hooks, autocast, dropout or merged adapters come and go. The answer is a reason in
words, which ``status`` prints too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from twn_kernels.modules.routing import RouteState
from twn_kernels.modules.site_group import ReadySite, SiteGroup
from twn_kernels.ops import choice
from twn_kernels.ops.autocast import autocast_is_on
from twn_kernels.patching.own_forward import has_own_forward
from twn_kernels.patching.structure import GATE_UP, QKV

__all__ = ["CONDITIONS", "MEMBERS", "SITES", "Block", "call_refusal", "gains_nothing", "members_of", "ready"]

# Linears of each site group as (parent, names), and what else the fused call bypasses or changes the view of.
MEMBERS = {
    "qkv": ("self_attn", QKV),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", GATE_UP),
    "down": ("mlp", ("down_proj",)),
}
SITES = tuple(MEMBERS)
_NORM_OF = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
CONDITIONS = (
    "a call runs layer by layer where a bypassed module has hooks or a forward of its own, under autocast, with LoRA "
    "dropout in training, in float64, under function transforms, with PEFT's adapter_names= or merged adapters, and "
    "base only where no kernel was asked for or measured"
)


@dataclass
class Block:
    """What a fused layer knows beside its modules.

    Attributes:
        path: of the layer in its model.
        routing: what the model's layers follow.
        groups: by site.
        norm_class, mlp_class, activation_class: of the modules that the block stands for.
    """

    path: str
    routing: RouteState
    groups: dict[str, SiteGroup]
    norm_class: type
    mlp_class: type
    activation_class: type


def call_refusal(x: Tensor) -> str | None:
    """Why nothing may be fused in this call."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"the hidden states are a {type(x).__name__}"
    if x.dtype == torch.float64:
        return "float64 runs layer by layer, as transformers' norms compute in float32"
    if autocast_is_on(x.device):
        return "autocast is on"
    if _global_hooks():
        return "hooks on every module (torch.nn.modules.module.register_module_…_hook)"
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return "a function transform or forward-mode differentiation is on"
    return None


def gains_nothing(block: Block, x: Tensor) -> bool:
    """Whether the layer's own forward is the same computation with less around it: no adapter acts, no kernel would.

    That is so where the vendor GEMM serves every site for want of a measurement, since its form of a group without
    adapters is torch's own sequence of ops.
    """
    spec = block.routing.current
    if spec is None or spec.bits != 0:
        return False
    if x.device.type == "cpu":
        return True
    if torch.compiler.is_compiling():  # a traced token count must not be looked at
        return False
    tokens = x.shape[:-1].numel()
    return not any(
        choice.is_deliberate(group.impl, x.device, x.dtype, site=site, tokens=tokens)
        for site, group in block.groups.items()
    )


def members_of(layer: nn.Module, site: str) -> list[nn.Module]:
    """The linears of one site group of a decoder layer, in order."""
    parent, names = MEMBERS[site]
    return [layer._modules[parent]._modules[name] for name in names]


def ready(layer: nn.Module, site: str, like: Tensor) -> ReadySite | str:
    """What a site group of a fused layer would run with now, or why its linears run by themselves.

    Args:
        layer: fused.
        site: of the layer.
        like: the hidden states, or a tensor of their dtype and device.
    """
    block: Block = layer._twn_block
    parent_name, names = MEMBERS[site]
    parent = layer._modules[parent_name]
    if parent_name == "mlp":
        if type(parent) is not block.mlp_class or type(parent.act_fn) is not block.activation_class:
            return "its mlp was replaced since the patch"
        if _is_watched(parent) or _is_watched(parent.act_fn):
            return "hooks or a forward of its own on mlp or its activation"
    elif not hasattr(type(parent), "plain_class"):
        return "its self_attn was replaced since the patch"
    elif _is_watched(parent, but_recorders=True):
        return "hooks or a forward of its own on self_attn"
    members = members_of(layer, site)
    for name, member in zip(names, members, strict=True):
        if _is_watched(member):
            return f"hooks or a forward of its own on {parent_name}.{name}"
    if site in _NORM_OF:
        norm = layer._modules[_NORM_OF[site]]
        if type(norm) is not block.norm_class or _is_watched(norm):
            return f"hooks or a forward of its own on {_NORM_OF[site]}, or another norm"
        if type(norm.weight) not in (nn.Parameter, Tensor) or norm.weight.dtype != like.dtype:
            return f"{_NORM_OF[site]} has a weight of another dtype or kind than the hidden states"
    return block.groups[site].prepare(members, like)


def _is_watched(module: nn.Module, *, but_recorders: bool = False) -> bool:
    """Whether something would notice that ``module`` is not called, or is called with other tensors."""
    hooks = module._forward_hooks
    if hooks and not (but_recorders and all(_records_weights(hook) for hook in hooks.values())):
        return True
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ and has_own_forward(module)


def _records_weights(hook: Any) -> bool:
    """Whether a hook is transformers' own recorder of attention weights, which stays on after one such request.

    It reads what the attention returns second, and that is the same in a fused block.
    """
    if torch.compiler.is_compiling() or getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return "index" in cells and cells["index"].cell_contents == 1


def _global_hooks() -> bool:
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )
