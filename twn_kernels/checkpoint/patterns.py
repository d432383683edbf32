"""PEFT's rules for which module an adapter targets, and which rank and alpha a pattern gives it.

The rules are PEFT's own (``check_target_module_exists`` and ``get_pattern_key``), restated so that reading a checkpoint
needs no PEFT. They changed twice: before 0.14 one key, the first that matched in ``rank_pattern`` and then in
``alpha_pattern``, chose both values; before 0.15 a pattern also needed something in front of it (``.*\\.key$``).
Today's PEFT reads every file by today's rule, so this package does too; :func:`pattern_value_before_014` tells where a
file that an old PEFT wrote would have meant something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def pattern_key(patterns: Sequence[str], module: str) -> str | None:
    """The first pattern that matches the whole of ``module`` or its end after a dot; None where none does."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return None


def pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value that PEFT takes for ``module``: that of the first matching pattern, else ``default``."""
    key = pattern_key(list(patterns), module)
    return patterns.get(module, default) if key is None else patterns[key]


def pattern_value_before_014(
    rank_pattern: Mapping[str, float], alpha_pattern: Mapping[str, float], module: str, rank: float, alpha: float
) -> tuple[float, float]:
    """``(rank, alpha)`` as PEFT before 0.14 chose them."""
    keys = [*rank_pattern, *alpha_pattern]
    key = next((key for key in keys if re.match(rf".*\.{key}$", module)), module)
    return rank_pattern.get(key, rank), alpha_pattern.get(key, alpha)


def broken_regex(regex: str) -> str | None:
    """Why ``regex`` is no regular expression; None where it is one."""
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def broken_pattern(pattern: str) -> str | None:
    """Why ``pattern`` cannot be a key of ``rank_pattern`` or ``alpha_pattern``; None where it can."""
    return broken_regex(rf"(.*\.)?({pattern})$")


def _listed(names: Sequence[str], module: str) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def matches(pattern: str | Sequence[str], module: str) -> bool:
    """Whether a list of names (whole, or the end after a dot) or a regex (whole) takes ``module``."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, module) is not None
    return _listed(pattern, module)


def layer_index(module: str, layers_pattern: Sequence[str]) -> int | None:
    """The layer number that ``layers_to_transform`` is compared with; None where ``module`` has none."""
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
    for rule in rules:
        if found := re.match(rule, module):
            return int(found.group(1))
    return None


def is_target(
    module: str,
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: Sequence[str] = (),
) -> bool:
    """Whether PEFT would put this adapter on ``module``."""
    if exclude_modules and matches(exclude_modules, module):
        return False
    if not matches(target_modules, module):
        return False
    if isinstance(target_modules, str) or module in target_modules or not layers_to_transform:
        return True
    return layer_index(module, layers_pattern) in layers_to_transform
