"""The one table of what is known about model families, and how targets are chosen from it.

A family missing here works all the same: its targets are then every ``nn.Linear`` outside vision and audio towers,
except the output embeddings. A row adds which linears form a site group, so that blocks can be built from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from twn_kernels.errors import OptionError, PatchError, did_you_mean, quoted

__all__ = [
    "FAMILY_SPECS",
    "BlockSpec",
    "FamilySpec",
    "bypassed",
    "choose_targets",
    "family_of",
    "follows_rows",
    "in_tower",
    "is_plain_linear",
    "output_embeddings",
]

_SEPARATE = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_FUSED = {
    "qkv": ("self_attn.qkv_proj",),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_up_proj",),
    "down": ("mlp.down_proj",),
}
_NEOX = {
    "qkv": ("attention.query_key_value",),
    "o": ("attention.dense",),
    "gate_up": ("mlp.dense_h_to_4h",),
    "down": ("mlp.dense_4h_to_h",),
}


@dataclass(frozen=True)
class BlockSpec:
    """The classes of a family's decoder layer, for which a fused block can stand.

    Attributes:
        module: of transformers, where the classes are.
        layer, attention, mlp, norm: their names.
    """

    module: str
    layer: str
    attention: str
    mlp: str
    norm: str


@dataclass(frozen=True)
class FamilySpec:
    """One family of models.

    Attributes:
        model_types: ``config.model_type`` of the whole model and of its text part.
        groups: linears of each site group, as paths inside a decoder layer.
        layers: name of the list that holds the decoder layers.
        tower: name of the vision tower, which is left alone; None: the family does not see.
        block: what fused blocks are made from; None: the family runs at linear level.
    """

    model_types: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _SEPARATE)
    layers: str = "layers"
    tower: str | None = None
    block: BlockSpec | None = None

    def is_target(self, path: str) -> bool:
        """Whether a linear at ``path`` belongs to a site group of a decoder layer."""
        names = "|".join(re.escape(name) for group in self.groups.values() for name in group)
        inside = re.search(rf"(?:^|\.){self.layers}\.\d+\.(?:{names})$", path)
        return inside is not None and not in_tower(path)

    def group_of(self, path: str) -> str | None:
        """The site group of a linear, or None where it is in none."""
        if not self.is_target(path):
            return None
        return next(key for key, names in self.groups.items() if any(path.endswith(f".{name}") for name in names))

    def layer_of(self, path: str) -> str | None:
        """The path of the decoder layer whose site group a linear at ``path`` is in, or None."""
        if not self.is_target(path):
            return None
        return next(
            path.removesuffix(f".{name}") for names in self.groups.values() for name in names if path.endswith(name)
        )


def _block(family: str, layer: str, attention: str, mlp: str, norm: str) -> BlockSpec:
    return BlockSpec(f"transformers.models.{family}.modeling_{family}", layer, attention, mlp, norm)


FAMILY_SPECS = (
    FamilySpec(
        ("qwen2_vl", "qwen2_vl_text"),
        tower="visual",
        block=_block("qwen2_vl", "Qwen2VLDecoderLayer", "Qwen2VLAttention", "Qwen2MLP", "Qwen2VLRMSNorm"),
    ),
    FamilySpec(
        ("qwen2_5_vl", "qwen2_5_vl_text"),
        tower="visual",
        block=_block("qwen2_5_vl", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLAttention", "Qwen2MLP", "Qwen2_5_VLRMSNorm"),
    ),
    FamilySpec(
        ("qwen3_vl", "qwen3_vl_text"),
        tower="visual",
        block=_block(
            "qwen3_vl", "Qwen3VLTextDecoderLayer", "Qwen3VLTextAttention", "Qwen3VLTextMLP", "Qwen3VLTextRMSNorm"
        ),
    ),
    FamilySpec(("llama",)),
    FamilySpec(("mistral",)),
    FamilySpec(("qwen2",)),
    FamilySpec(("qwen3",)),
    FamilySpec(("gemma2",)),
    FamilySpec(("gemma3", "gemma3_text"), tower="vision_tower"),
    FamilySpec(("phi3",), _FUSED),
    FamilySpec(("gpt_neox",), _NEOX),
)

# Path components under which tokens are patches, frames or projections of them, across the families of transformers.
_TOWER = re.compile(
    r"(?:^|\.)(?:visual\w*|vision\w*|image_\w+|img_\w+|audio\w*|speech\w*|video\w*|multi_modal_projector|multimodal_projector|"
    r"mm_projector|embed_vision|embed_audio|vqmodel|perceiver\w*|connector)(?:\.|$)"
)
# Subclasses that compute x W^T + b and nothing else, by module and name; any other may compute something of its own.
_PLAIN_LINEARS = {
    ("torch.nn.modules.linear", "Linear"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
}
# Their fused kernels take the weight of out_proj, so that a layer put there is never called.
_MAMBA = re.compile(r"\w*Mamba\w*Mixer")
# A routed expert reads a subset of the tokens, in its own order.
_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


def family_of(model: nn.Module) -> FamilySpec | None:
    """The row of the table for ``model``, by its configuration; None where there is none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((spec for spec in FAMILY_SPECS if model_type in spec.model_types), None)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` that computes what ``nn.Linear`` computes."""
    return (type(module).__module__, type(module).__name__) in _PLAIN_LINEARS


def bypassed(model: nn.Module) -> set[int]:
    """``id`` of linears whose weight their parent reads without calling them, so that no adapter would act."""
    found = set()
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            found |= {id(inner) for inner in module.modules() if isinstance(inner, nn.Linear)}
        elif _MAMBA.fullmatch(type(module).__name__):
            found.add(id(getattr(module, "out_proj", None)))
    return found


def in_tower(path: str) -> bool:
    """Whether a module lies in a vision, audio or projection part, whose tokens are not those of the text."""
    return _TOWER.search(path) is not None


def follows_rows(path: str) -> bool:
    """Whether the tokens that a linear reads are the batch's, row by row."""
    return not in_tower(path) and _EXPERT.search(path) is None


def output_embeddings(model: nn.Module) -> set[int]:
    """``id`` of the modules that turn hidden states into logits or share a weight with an embedding."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module) for module in model.modules() if isinstance(module, nn.Linear) and id(module.weight) in tied}
    for module in model.modules():
        getter = getattr(type(module), "get_output_embeddings", None)
        if getter is not None:
            try:
                heads.add(id(getter(module)))
            except (AttributeError, NotImplementedError):
                continue
    return heads


def choose_targets(
    model: nn.Module, targets: str | Sequence[str] | None, spec: FamilySpec | None
) -> dict[str, nn.Module]:
    """The modules that get adapters, by path.

    Args:
        model: any model.
        targets: None: the family's site groups, or, where the family is unknown, every ``nn.Linear`` outside towers and
            output embeddings that its parent calls. A list: modules whose path is, or ends in, one of its names. A
            string: one regex over the whole path, or ``"all-linear"``: every ``nn.Linear`` except the output
            embeddings. Lists and strings mean what they mean as PEFT's ``target_modules``, so they reach into a tower
            where they match there.
        spec: the family, where known.

    Raises:
        PatchError: nothing, or one of the names, matches.
        OptionError: ``targets`` is of another type, empty, or no regular expression.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    if targets is None or targets == "all-linear":
        left = output_embeddings(model) | (bypassed(model) if targets is None else set())
        keep = (
            spec.is_target
            if targets is None and spec is not None
            else (lambda path: targets is not None or not in_tower(path))
        )
        chosen = {path: module for path, module in linears.items() if id(module) not in left and keep(path)}
        if not chosen:
            raise PatchError(f"{type(model).__name__} has no nn.Linear to patch{_where(spec)}.{_other_kinds(modules)}")
        return chosen
    if isinstance(targets, str):
        return _by_regex(modules, linears, targets)
    return _by_names(modules, linears, targets)


def _other_kinds(modules: dict[str, nn.Module]) -> str:
    kinds = {type(module).__name__ for module in modules.values() if "Conv1D" in type(module).__name__}
    return f" Its layers are {quoted(sorted(kinds))}, which store a transposed weight." if kinds else ""


def _where(spec: FamilySpec | None) -> str:
    return "" if spec is None else f" in the decoder layers of a {spec.model_types[0]} model"


def _by_regex(modules: dict[str, nn.Module], linears: dict[str, nn.Module], regex: str) -> dict[str, nn.Module]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise OptionError(f"targets={regex!r} is not a regular expression: {error}.") from None
    chosen = {path: module for path, module in modules.items() if pattern.fullmatch(path)}
    if not chosen:
        hint = f" For modules of that name give a list: targets=[{regex!r}]." if _ending(modules, regex) else ""
        near = did_you_mean(regex, linears)
        raise PatchError(
            f"targets={regex!r} matches no module. A string is one regular expression over the whole path, such as "
            f'"{next(iter(linears), "")}".{hint or near}'
        )
    return chosen


def _by_names(
    modules: dict[str, nn.Module], linears: dict[str, nn.Module], targets: Sequence[str]
) -> dict[str, nn.Module]:
    if not isinstance(targets, (list, tuple, set, frozenset)) or not targets:
        raise OptionError(f"targets must be None, a list of module names or one regular expression, got {targets!r}.")
    if wrong := [name for name in targets if not isinstance(name, str)]:
        raise OptionError(f"targets must hold module names, got {wrong[0]!r}.")
    ends = sorted({path.rsplit(".", 1)[-1] for path in linears if not path.rsplit(".", 1)[-1].isdigit()})
    missing = [name for name in sorted(targets) if not _ending(modules, name)]
    if missing:
        near = "".join(did_you_mean(name, [*ends, *linears]) for name in missing)
        raise PatchError(f"targets {quoted(missing)} match no module; its linears end in {quoted(ends)}.{near}")
    return {path: modules[path] for name in targets for path in _ending(modules, name)}


def _ending(modules: dict[str, nn.Module], name: str) -> list[str]:
    return [path for path in modules if path == name or path.endswith(f".{name}")]
