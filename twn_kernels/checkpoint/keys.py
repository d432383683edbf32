"""Names of tensors in an adapter file: which layer a tensor belongs to, and which layer of a model that is.

PEFT writes ``base_model.model.<module path>.lora_A.weight``. The module path is the one that the model had in the
process that trained it, so it also depends on the transformers release (``model.layers.0`` before 4.52 is
``model.language_model.layers.0`` since), on wrappers (``module.``, ``_orig_mod.``) and on whether an adapter's name was
left in (``lora_A.default.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")

# Path components that say where the decoder hangs in its wrapper, which releases disagree on.
_HOLDERS = {"base_model", "model", "language_model", "module", "transformer"}


@dataclass(frozen=True)
class FactorKey:
    """A tensor that is ``lora_A`` or ``lora_B`` of a layer."""

    module: str
    side: str
    adapter: str | None


def parse_key(key: str) -> FactorKey | None:
    """Layer and side of a tensor's name; None where it is neither ``lora_A`` nor ``lora_B`` of a linear layer."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    name = ".".join(parts)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    found = _FACTOR.match(name.removeprefix(_PREFIX))
    if found is None or found["module"].endswith("base_layer"):
        return None
    return FactorKey(found["module"], found["side"], found["adapter"])


def canonical(module: str) -> str:
    """``module`` without the leading components that only say where a release hangs the decoder or the tower."""
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _HOLDERS:
        parts = parts[1:]
    return ".".join(parts)


def match_modules(layers: Iterable[str], modules: Iterable[str]) -> dict[str, str | None]:
    """Find each layer of an adapter among a model's modules.

    An equal name wins. Otherwise names are compared without the leading components that transformers releases disagree
    on (``model.layers``, ``language_model.model.layers`` and ``model.language_model.layers`` are one place), and a
    match counts only where exactly one module has that name.

    Args:
        layers: module paths as the adapter file has them, without PEFT's prefix.
        modules: module paths of the model.

    Returns:
        path in the model by path in the file; None where there is none, or more than one.
    """
    names = list(modules)
    known = set(names)
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(canonical(name), []).append(name)

    def find(layer: str) -> str | None:
        if layer in known:
            return layer
        at = places.get(canonical(layer), [])
        return at[0] if len(at) == 1 else None

    return {layer: find(layer) for layer in layers}
