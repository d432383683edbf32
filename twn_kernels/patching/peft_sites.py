"""Which layers of a model PEFT has already given adapters, and whether each can be fused exactly.

All that stands in the way is collected first and raised as one error; nothing is skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from twn_kernels.checkpoint.names import collapse
from twn_kernels.errors import PatchError, UnsupportedModel, did_you_mean, quoted
from twn_kernels.patching.own_forward import has_own_forward
from twn_kernels.patching.specs import is_plain_linear
from twn_kernels.settings import ADAPTERS, MAX_RANK

__all__ = ["adapter_names", "holds_peft_layers", "peft_sites"]


def holds_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into ``model``; PEFT is not imported to find out."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    # The attribute peft_config says nothing: a model keeps it after its adapters were unloaded.
    return isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def adapter_names(model: nn.Module, adapters: tuple[str, str]) -> tuple[str, str]:
    """PEFT's names of the reasoning and of the embedding adapter.

    Args:
        model: with PEFT's layers.
        adapters: as given to ``patch``: the names ``"reasoning"`` and ``"embedding"`` in any order, or other names with
            the reasoning adapter first.

    Raises:
        PatchError: one is not loaded, or a third one is.
    """
    loaded = _loaded(model)
    wanted = ADAPTERS if set(adapters) == set(ADAPTERS) else adapters
    missing = [name for name in wanted if name not in loaded]
    if missing:
        near = "".join(did_you_mean(name, set(loaded) - set(wanted)) or did_you_mean(name, loaded) for name in missing)
        if len(missing) == len(loaded) == 2:
            near = f" If these two are they, name them: adapters={tuple(loaded)} (the reasoning adapter first)."
        near = near or f" Load both: model.load_adapter(path, adapter_name={missing[0]!r})."
        each = " and ".join(f'adapter "{name}"' for name in missing)
        raise PatchError(f"{each} {_is(missing)} not loaded; loaded: {quoted(sorted(loaded))}.{near}")
    others = sorted(set(loaded) - set(wanted))
    if others:
        raise PatchError(
            f"the model holds {quoted(others)} beside {quoted(wanted)}; exactly two adapters are fused. "
            f"Remove {'it' if len(others) == 1 else 'them'} with delete_adapter(...)."
        )
    return tuple(wanted)


def peft_sites(model: nn.Module, adapters: tuple[str, str]) -> dict[str, nn.Module]:
    """PEFT's LoRA linears by path.

    Raises:
        UnsupportedModel: something PEFT put into the model cannot be fused exactly; every instance is listed.
        PatchError: an adapter touches no layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    problems: dict[str, list[str]] = {}
    layers: dict[str, nn.Module] = {}
    for name in adapters:
        kind = getattr(getattr(model, "peft_config", {}).get(name), "peft_type", "LORA")
        if str(getattr(kind, "value", kind)) != "LORA":
            problems.setdefault(f"{getattr(kind, 'value', kind)} is not LoRA", []).append(f'adapter "{name}"')
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[path] = module
            for problem in _layer_problems(module, adapters):
                problems.setdefault(problem, []).append(path)
        elif problem := _wrapper_problem(module):
            problems.setdefault(problem, []).append(path)
    if problems:
        lines = [f"  {problem}: {', '.join(collapse(paths))}" for problem, paths in problems.items()]
        raise UnsupportedModel("the model holds what cannot be fused exactly:\n" + "\n".join(lines))
    for name in adapters:
        if not any(name in layer.lora_A for layer in layers.values()):
            raise PatchError(f'adapter "{name}" touches no layer of the model.')
    return layers


def _loaded(model: nn.Module) -> list[str]:
    config = getattr(model, "peft_config", None)
    if config:
        return list(config)
    names: dict[str, None] = {}
    for module in model.modules():
        for name in getattr(module, "lora_A", ()):
            names[name] = None
    return list(names)


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _layer_problems(layer: nn.Module, adapters: tuple[str, str]) -> Iterator[str]:
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        yield f"{type(layer).__name__} is no LoRA on an nn.Linear"
        return
    base = layer.base_layer
    if not is_plain_linear(base):
        yield f"the base layer is {type(base).__name__}, not nn.Linear"
    if layer.fan_in_fan_out:
        yield "fan_in_fan_out (the base weight is stored transposed)"
    inner = [base]
    for name in adapters:
        if name not in layer.lora_A:
            continue
        inner += [layer.lora_A[name], layer.lora_B[name]]
        variant = layer.lora_variant.get(name)
        if variant is not None:
            yield f'{type(variant).__name__.removesuffix("LinearVariant")} (a LoRA variant) in "{name}"'
        if layer.lora_bias.get(name) or getattr(layer.lora_B[name], "bias", None) is not None:
            yield f'lora_bias in "{name}"'
        if layer.r.get(name, 1) > MAX_RANK:
            yield f'rank {layer.r[name]} in "{name}" (the largest is {MAX_RANK})'
    yield from _wiring_problems(layer, inner)


def _wiring_problems(layer: nn.Module, inner: list[nn.Module]) -> Iterator[str]:
    if has_own_forward(layer):
        yield "a forward set on the instance (an offloading or wrapping hook)"
    for part in inner:
        if has_own_forward(part) or part._forward_hooks or part._forward_pre_hooks:
            yield "hooks on the inner layers of the adapter, which the fused product bypasses"
            return


def _wrapper_problem(module: nn.Module) -> str | None:
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return "modules_to_save (a whole trained copy, which routes cannot choose by row)"
    if isinstance(module, AuxiliaryTrainingWrapper):
        return f"{type(module).__name__} (trained parts, which routes cannot choose by row)"
    return None
