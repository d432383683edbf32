"""``TWNConfig``: how the method runs (graph, gate, pooling, thinking), as ``twn_config.json`` states it.

Owns the fields, their ranges and their defaults. A published checkpoint may state none of them, so a config read from
disk also says which of its values are defaults that had to be assumed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from twn_kernels.errors import OptionError, did_you_mean, quoted

GRAPHS = ("shared_kv", "reencode")
PREFILL_ADAPTERS = ("reasoning", "embedding", None)
GATE_INPUTS = ("mean", "last", "concat", "mean_last")
GATE_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
POOLINGS = ("mean", "last", "first")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold: not a bool, NaN, infinity or an endless integer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """``value`` as JSON, cut to one line's length, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_of(options: tuple) -> Callable[[Any], str | None]:
    names = ", ".join("null" if option is None else f'"{option}"' for option in options)

    def check(value: Any) -> str | None:
        # A list is unhashable but still comparable, so membership never raises here.
        if value in options and not isinstance(value, bool):
            return None
        near = did_you_mean(value, [option for option in options if option]) if isinstance(value, str) else ""
        return f"one of {names}, got {shown(value)}.{near}"

    return check


def _but(expected: str, value: Any) -> str:
    return f"{expected}, got {shown(list(value) if isinstance(value, tuple) else value)}."


def _number(expected: str, accepts: Callable[[float], bool]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if is_number(value) and accepts(value) else _but(expected, value)

    return check


def _token_count(value: Any) -> str | None:
    plain = isinstance(value, int) and not isinstance(value, bool)
    return None if plain and value >= 1 else _but("a whole number of tokens >= 1", value)


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else _but("a string", value)


def _stops(value: Any) -> str | None:
    def stop(item: Any) -> bool:
        if isinstance(item, str):
            return item != ""
        return isinstance(item, int) and not isinstance(item, bool) and item >= 0

    if isinstance(value, tuple) and value and all(stop(item) for item in value):
        return None
    return _but("a non-empty string, a token id >= 0, or a non-empty list of these", value)


# Each gives None, or the rest of a sentence that begins with "... must be".
_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "graph": _one_of(GRAPHS),
    "prefill_adapter": _one_of(PREFILL_ADAPTERS),
    "gate_input": _one_of(GATE_INPUTS),
    "gate_activation": _one_of(GATE_ACTIVATIONS),
    "think_threshold": _number("a number in [0, 1]", lambda value: 0 <= value <= 1),
    "pooling": _one_of(POOLINGS),
    "think_prompt": _text,
    "think_end": _stops,
    "max_think_tokens": _token_count,
    "temperature": _number("a finite number >= 0 (0 is greedy)", lambda value: value >= 0),
    "top_p": _number("a number in (0, 1]", lambda value: 0 < value <= 1),
}


@dataclass(frozen=True)
class TWNConfig:
    """How the method runs.

    Args:
        graph: ``"shared_kv"`` (one cache, the adapters split it by position) or ``"reencode"`` (each adapter its own).
        prefill_adapter: the route of the prompt in ``shared_kv``: ``"reasoning"``, ``"embedding"`` or None (base).
        gate_input: what the gate reads: ``"mean"`` of the query outputs ``[hidden]``, ``"last"`` prompt token
            ``[hidden]``, ``"concat"`` of the query outputs ``[num_queries * hidden]``, or ``"mean_last"``, the mean
            followed by the last prompt token ``[2 * hidden]``.
        gate_activation: between the gate's linear layers.
        think_threshold: think where the gate score is at least this; in [0, 1].
        pooling: over the query states: ``"mean"``, ``"last"`` or ``"first"``.
        think_prompt: text that opens the thought.
        think_end: what closes it: strings and token ids; a single one may be given bare.
        max_think_tokens: tokens of thought before falling back to the plain embedding.
        temperature: 0 decodes greedily.
        top_p: nucleus mass in (0, 1]; only used where ``temperature`` > 0.
        assumed: names of the fields whose value is a default that nothing on disk stated or implied.
        inferred: ``(field, value)`` where the tensors' shapes imply the value.

    Raises:
        OptionError: a field is out of range; the message names it.
    """

    graph: str = "shared_kv"
    prefill_adapter: str | None = "reasoning"
    gate_input: str = "mean"
    gate_activation: str = "gelu"
    think_threshold: float = 0.5
    pooling: str = "mean"
    think_prompt: str = "<think>"
    think_end: tuple[str | int, ...] = ("</think>",)
    max_think_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    assumed: tuple[str, ...] = ()
    inferred: tuple[tuple[str, Any], ...] = ()
    raw: bytes | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "think_end", _as_stops(self.think_end))
        object.__setattr__(self, "assumed", tuple(self.assumed))
        for name, check in _CHECKS.items():
            if refusal := check(getattr(self, name)):
                raise OptionError(f"TWNConfig.{name} must be {refusal}")
        if unknown := [name for name in self.assumed if name not in _CHECKS]:
            raise OptionError(f"TWNConfig.assumed names {quoted(unknown)}; the fields are {quoted(FIELDS)}.")

    def values(self) -> dict[str, Any]:
        """Every field of the method by name (neither ``assumed`` nor the raw text)."""
        return {name: getattr(self, name) for name in FIELDS}

    def to_json(self) -> bytes | None:
        """The bytes of ``twn_config.json``: as read while unchanged, else all that is not assumed; None if empty."""
        if self.raw is not None:
            original, problems = parse_twn_config(self.raw, "twn_config.json")
            if not problems and _stated(original) == _stated(self):
                return self.raw
        stated = _stated(self)
        return (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode() if stated else None


FIELDS = tuple(_CHECKS)
DEFAULTS = {item.name: item.default for item in fields(TWNConfig) if item.name in _CHECKS}


def _stated(config: TWNConfig) -> dict[str, Any]:
    # A value that is neither the default nor what the tensors imply was set by somebody, also after a replace().
    implied = {**{name: DEFAULTS[name] for name in config.assumed}, **dict(config.inferred)}
    out = {name: value for name, value in config.values().items() if name not in implied or value != implied[name]}
    if "think_end" in out:
        out["think_end"] = list(out["think_end"])
    return out


def _as_stops(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def read_json_object(raw: bytes, label: str) -> tuple[dict[str, Any] | None, str | None]:
    """Parse a JSON object.

    Returns:
        ``(object, None)``, or ``(None, problem)`` where ``raw`` is not UTF-8, not JSON, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"repeated field {quoted(repeated)}")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        state = "is empty" if not raw.strip() else f"is not JSON ({error})"
        return None, f"{label} {state}; a JSON object was expected."
    if not isinstance(value, dict):
        return None, f"{label} holds a JSON {type(value).__name__}; a JSON object was expected."
    return value, None


def _flattened(stated: Mapping[str, Any], label: str) -> tuple[dict[str, Any], list[str]]:
    """Fold ``decoding`` (``"greedy"`` or an object of temperature and top_p) into its two fields."""
    flat, problems = dict(stated), []
    if "decoding" not in flat:
        return flat, problems
    decoding = flat.pop("decoding")
    inner = {"temperature": 0.0} if decoding == "greedy" else decoding
    if not isinstance(inner, Mapping):
        problems.append(
            f'{label}: decoding must be "greedy" or an object of temperature and top_p, got {shown(decoding)}.'
        )
        return flat, problems
    for name, value in inner.items():
        if name not in ("temperature", "top_p"):
            problems.append(
                f'{label}: decoding has no field "{name}"; its fields are "temperature", "top_p".'
                f"{did_you_mean(name, ('temperature', 'top_p'))}"
            )
        elif name in flat:
            problems.append(f"{label}: {name} is given twice, beside decoding and inside it.")
        else:
            flat[name] = value
    return flat, problems


def parse_twn_config(raw: bytes | None, label: str) -> tuple[TWNConfig, list[str]]:
    """Read ``twn_config.json``.

    Args:
        raw: the file's bytes; None where there is no file, so that every field is assumed.
        label: how messages name the file.

    Returns:
        the config (defaults where a field is wrong), and one problem a wrong or unknown field.
    """
    if raw is None:
        return TWNConfig(assumed=FIELDS), []
    stated, problem = read_json_object(raw, label)
    if stated is None:
        return TWNConfig(assumed=FIELDS), [problem]
    flat, problems = _flattened(stated, label)
    values: dict[str, Any] = {}
    for name, value in flat.items():
        if name not in _CHECKS:
            near = did_you_mean(name, (*FIELDS, "decoding"))
            problems.append(f'{label} has no field "{name}"; its fields are {quoted(FIELDS)}, "decoding".{near}')
            continue
        value = _as_stops(value) if name == "think_end" else value
        if refusal := _CHECKS[name](value):
            problems.append(f"{label}: {name} must be {refusal}")
        else:
            values[name] = value
    assumed = tuple(name for name in FIELDS if name not in values)
    return TWNConfig(**values, assumed=assumed, raw=raw), problems
