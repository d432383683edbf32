"""``AdapterConfig``: the fields of PEFT's ``adapter_config.json`` that decide what an adapter computes.

Owns their ranges and PEFT's defaults, and the list of everything PEFT can express that is not ``scaling * B @ A``
beside a frozen base weight: such an adapter cannot be fused exactly, and a reader that ignored the field would give
other numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twn_kernels.checkpoint.config import is_number, read_json_object, shown
from twn_kernels.checkpoint.patterns import (
    broken_pattern,
    broken_regex,
    is_target,
    pattern_value,
    pattern_value_before_014,
)
from twn_kernels.errors import quoted
from twn_kernels.settings import MAX_RANK

# Fields whose truth changes what the adapter computes, and what each would do.
_NOT_FUSABLE = {
    "use_dora": "DoRA rescales each column of the summed weight",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "whole modules replaced by trained copies",
    "alora_invocation_tokens": "aLoRA switches the adapter on after these tokens only",
    "trainable_token_indices": "trained rows of the input embedding",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "layers repeated to build another model",
    "use_qalora": "QA-LoRA pools the input before lora_A",
    "use_bdlora": "BD-LoRA's block-diagonal factors",
    "arrow_config": "Arrow routes among adapters",
    "kasa_config": "KaSA puts a diagonal between A and B and truncates the base weight",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "megatron_config": "Megatron's parallel linears",
}
# Initialisations that also change the base weight: the file alone, over the published base, is another function.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Everything else that PEFT 0.21 and older write, without effect on y = W x + scaling * B A x over a frozen base.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "alpha_pattern", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "velora_config", "bias", "enable_lora", "merge_weights",
}  # fmt: skip

_ASSUMABLE = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter computes, as PEFT states it.

    Args:
        r: rank where no ``rank_pattern`` matches.
        lora_alpha: alpha where no ``alpha_pattern`` matches.
        lora_dropout: probability in [0, 1), on the input of ``lora_A`` while training.
        use_rslora: ``scaling = alpha / sqrt(rank)`` in place of ``alpha / rank``.
        rank_pattern, alpha_pattern: regex of module path to value, first match wins.
        target_modules: names or one regex; None where the file states none.
        exclude_modules, layers_to_transform, layers_pattern: narrow ``target_modules``.
        fan_in_fan_out: the base layer stores ``[in_features, out_features]``; A and B do not change.
        base_model_name: what the adapter was trained on, where stated.
        peft_version: of the writer; PEFT states it since 0.18.
        assumed: fields that the file leaves out, so that PEFT's default was taken.
        raw: the file's bytes, kept so that saving gives the same file.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    base_model_name: str | None = None
    peft_version: str | None = None
    assumed: tuple[str, ...] = ()
    raw: bytes | None = field(default=None, repr=False, compare=False)

    def rank(self, module: str) -> int:
        """Rank of ``module`` (a path without PEFT's prefix), by ``rank_pattern`` and ``r``."""
        return int(pattern_value(self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        """Alpha of ``module``, by ``alpha_pattern`` and ``lora_alpha``."""
        return pattern_value(self.alpha_pattern, module, self.lora_alpha)

    def scaling(self, module: str, rank: int | None = None) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA, of ``module``."""
        rank = self.rank(module) if rank is None else rank
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether PEFT would put this adapter on ``module``; True where ``target_modules`` cannot tell."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        return is_target(
            module,
            self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
        )

    def before_014(self, module: str) -> tuple[int, float]:
        """The rank and alpha that PEFT before 0.14 took for ``module``; since then a pattern means something else."""
        return pattern_value_before_014(self.rank_pattern, self.alpha_pattern, module, self.r, self.lora_alpha)

    def to_json(self) -> bytes:
        """The bytes of ``adapter_config.json``: as read while unchanged, else PEFT's own layout with these values."""
        base: dict[str, Any] = dict(_TEMPLATE)
        if self.raw is not None:
            original, problems, _ = parse_adapter_config(self.raw, "adapter_config.json")
            if original == self and not problems:
                return self.raw
            base.update(read_json_object(self.raw, "adapter_config.json")[0] or {})
        base.update(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern), alpha_pattern=dict(self.alpha_pattern),
            target_modules=_plain(self.target_modules), exclude_modules=_plain(self.exclude_modules),
            layers_to_transform=_plain(self.layers_to_transform), layers_pattern=_plain(self.layers_pattern) or None,
            fan_in_fan_out=self.fan_in_fan_out, base_model_name_or_path=self.base_model_name,
        )  # fmt: skip
        if self.peft_version is not None:
            base["peft_version"] = self.peft_version
        return json.dumps(base, indent=2, sort_keys=True).encode()


_TEMPLATE = {
    "auto_mapping": None,
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_bias": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "task_type": None,
    "use_dora": False,
}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parse_adapter_config(raw: bytes, label: str) -> tuple[AdapterConfig | None, list[str], list[str]]:
    """Read PEFT's ``adapter_config.json``.

    Args:
        raw: the file's bytes.
        label: how messages name the file.

    Returns:
        the config (None where the file is no JSON object), problems that make the adapter unusable, and notes.
    """
    stated, problem = read_json_object(raw, label)
    if stated is None:
        return None, [problem], []
    reader = _Reader(stated, label)
    reader.check_kind()
    config = AdapterConfig(
        r=reader.take("r", 8, _is_rank, f"a whole number in [1, {MAX_RANK}]"),
        lora_alpha=reader.take("lora_alpha", 8, is_number, "a finite number"),
        lora_dropout=reader.take("lora_dropout", 0.0, lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
        use_rslora=reader.take("use_rslora", False, _is_bool, "true or false"),
        rank_pattern=reader.take_patterns("rank_pattern", _is_rank, f"a whole number in [1, {MAX_RANK}]"),
        alpha_pattern=reader.take_patterns("alpha_pattern", is_number, "a finite number"),
        target_modules=reader.take_names("target_modules"),
        exclude_modules=reader.take_names("exclude_modules"),
        layers_to_transform=reader.take_layers(),
        layers_pattern=reader.take_layers_pattern(),
        fan_in_fan_out=reader.take("fan_in_fan_out", False, _is_bool, "true or false"),
        base_model_name=reader.take("base_model_name_or_path", None, lambda v: isinstance(v, str), "a string"),
        peft_version=reader.take("peft_version", None, lambda v: isinstance(v, str), "a string"),
        assumed=tuple(name for name in _ASSUMABLE if stated.get(name) is None),
        raw=raw,
    )
    return config, reader.problems, reader.notes


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


class _Reader:
    """Takes fields one by one and keeps what was wrong; a wrong field gives its default, so that all get checked."""

    def __init__(self, stated: Mapping[str, Any], label: str) -> None:
        self.stated, self.label = stated, label
        self.problems: list[str] = []
        self.notes: list[str] = []

    def wrong(self, name: str, expected: str) -> None:
        self.problems.append(f"{self.label}: {name} must be {expected}, got {shown(self.stated.get(name))}.")

    def take(self, name: str, default: Any, accepts: Any, expected: str) -> Any:
        value = self.stated.get(name)
        if value is None:
            return default
        if accepts(value):
            return value
        self.wrong(name, expected)
        return default

    def take_names(self, name: str) -> str | tuple[str, ...] | None:
        value = self.stated.get(name)
        if value is None or (isinstance(value, str) and broken_regex(value) is None):
            return value
        if _is_names(value):
            return tuple(value)
        why = f" ({broken_regex(value)})" if isinstance(value, str) else ""
        self.wrong(name, f"a list of module names or one regular expression{why}")
        return None

    def take_patterns(self, name: str, accepts: Any, expected: str) -> dict[str, Any]:
        value = self.stated.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(name, f"an object of module pattern to {expected}")
            return {}
        taken = {}
        for pattern, item in value.items():
            if why := broken_pattern(pattern):
                self.problems.append(f'{self.label}: {name} has "{pattern}", which is no regular expression: {why}.')
            elif not accepts(item):
                self.problems.append(f'{self.label}: {name}["{pattern}"] must be {expected}, got {shown(item)}.')
            else:
                taken[pattern] = item
        return taken

    def take_layers(self) -> tuple[int, ...] | None:
        value = self.stated.get("layers_to_transform")
        items = value if isinstance(value, list) else [] if value is None else [value]
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return tuple(items) or None
        self.wrong("layers_to_transform", "a layer number or a list of them")
        return None

    def take_layers_pattern(self) -> tuple[str, ...]:
        value = self.stated.get("layers_pattern")
        items = [value] if isinstance(value, str) else value or []
        if isinstance(items, list) and all(isinstance(item, str) and broken_regex(item) is None for item in items):
            return tuple(item for item in items if item)
        self.wrong("layers_pattern", "a module name or a list of them")
        return ()

    def check_kind(self) -> None:
        stated, label = self.stated, self.label
        kind = stated.get("peft_type")
        if kind != "LORA":
            self.problems.append(f'{label}: peft_type must be "LORA", got {shown(kind)}; only LoRA can be fused.')
        found = [f"{name} = {shown(stated[name])} ({why})" for name, why in _NOT_FUSABLE.items() if stated.get(name)]
        bias = stated.get("bias", "none")
        if bias not in (None, "none"):
            found.append(f"bias = {shown(bias)} (trained biases of the base)")
        init = stated.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            found.append(
                f"init_lora_weights = {shown(init)} (it changed the base weight; save with PEFT's "
                "path_initial_model_for_weight_conversion, which writes a plain LoRA)"
            )
        if found:
            self.problems.append(f"{label}: cannot be fused exactly: {'; '.join(found)}.")
        unknown = sorted(name for name in stated if name not in _HARMLESS and name not in _NOT_FUSABLE and stated[name])
        if unknown:
            self.notes.append(f"{label}: fields this reader does not know were ignored: {quoted(unknown)}.")
        if stated.get("velora_config"):
            self.notes.append(f"{label}: velora_config is ignored; training uses the exact gradient.")
