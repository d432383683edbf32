"""The configuration of a training run: one TOML file, checked before anything starts.

Owns the sections, their defaults and their ranges. A key that does not exist is an error with the nearest name, so that
a typing mistake never trains for hours on a default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from twn_kernels.checkpoint import TWNConfig
from twn_kernels.errors import MissingDependency, OptionError, did_you_mean, quoted
from twn_kernels.settings import MAX_RANK

__all__ = [
    "BaseSettings",
    "DataSettings",
    "GateSettings",
    "JointSettings",
    "PolicySettings",
    "TrainingConfig",
    "check_policy",
    "load_config",
]

_METHOD_FIELDS = tuple(f.name for f in fields(TWNConfig) if f.name not in ("assumed", "inferred", "raw"))


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What every stage has.

    Attributes:
        steps: of the optimiser; 0 leaves the stage out.
        batch_size: examples of a step.
        learning_rate: at its peak; it falls to 0 along a cosine.
        warmup_steps: over which it rises.
        weight_decay, max_grad_norm: of AdamW, and where gradients are clipped.
        save_steps, log_steps: how often a state is kept and a line logged.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 250
    log_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class BaseSettings(StageSettings):
    """The backbone: one that exists, or the small one of the number task, taught here.

    Attributes:
        path: directory or hub id of a model; None: the small one. With a path, ``steps`` has no meaning.
        dtype: of the backbone's weights in training.
        adapter_dtype: of adapters and queries.
        device: None: the first GPU, else the CPU.
    """

    path: str | None = None
    dtype: str = "float32"
    adapter_dtype: str = "float32"
    device: str | None = None
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    save_steps: int = 500


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned from.

    Attributes:
        folder: a data folder in BEIR's format with thoughts; None: the number task, made here.
        split: of the folder.
        train_queries, gate_queries, copies: of a number task made here.
        query_prompt, document_prompt: instructions, as the embedder will be given.
    """

    folder: str | None = None
    split: str = "train"
    train_queries: int = 12000
    gate_queries: int = 2400
    copies: int = 10
    query_prompt: str | None = None
    document_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class JointSettings(StageSettings):
    """Both adapters and the queries.

    Attributes:
        chunk_size: examples of one forward; a batch of several chunks needs no more memory than one.
        rank: of each adapter.
        num_queries: learned vectors of one embedding.
        temperature: of the contrastive loss.
        thought_weight, plain_weight, thoughtful_weight: of the three losses.
        plain_truncation: how far the plain loss gives up on queries that it cannot find, 0 (InfoNCE) to 1; see
            :func:`~twn_kernels.training.losses.info_nce`. Such queries are for a thought to find.
        adapters: ``"two"``, or ``"one"`` that does both jobs (a baseline).
        detach: cut the gradient at the adapters' interface; False is a baseline.
    """

    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3
    chunk_size: int = 128
    rank: int = 16
    num_queries: int = 4
    temperature: float = 0.02
    thought_weight: float = 1.0
    plain_weight: float = 1.0
    thoughtful_weight: float = 1.0
    plain_truncation: float = 0.0
    adapters: str = "two"
    detach: bool = True


@dataclass(frozen=True, kw_only=True)
class GateSettings(StageSettings):
    """The gate, on queries kept for it.

    Attributes:
        split: of the data folder that it learns from; None or "": a share of the training queries. The better choice
            where a split holds what the backbone did not see: what is known by heart is never thought about wrongly.
        share: of the training queries kept for it; None: a fifth. Not beside ``split``.
        margin: by how much thinking must improve a query's own score, in nats, for the label 1; None: the margin that
            pays best on the training queries when a thought costs ``price``.
        price: nDCG@10 that a thought must bring on average; where ``margin`` is None it decides margin and threshold.
        hidden: widths of the hidden layers.
        temperature: of the scores.
        encode_batch_size: queries that are embedded together.
    """

    steps: int = 400
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    split: str | None = None
    share: float | None = None
    margin: float | None = None
    price: float = 0.01
    hidden: tuple[int, ...] = (64,)
    temperature: float = 0.02
    encode_batch_size: int = 64

    @property
    def kept_share(self) -> float:
        """Of the training queries, where it has no split of its own."""
        return 0.2 if self.share is None else self.share


@dataclass(frozen=True, kw_only=True)
class PolicySettings(StageSettings):
    """Group-relative policy optimisation of the thought, after joint training and before the gate.

    Attributes:
        group_size: thoughts sampled for a query.
        temperature: of sampling.
        clip: of the probability ratio.
        kl_weight: of the divergence from the adapter that it started with.
        format_reward, rank_reward, gap_reward: weights of: closed, reciprocal rank, similarity gap.
        chunk_size: sequences of one forward.
        inner_steps: updates on one set of samples.
    """

    steps: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    save_steps: int = 20
    log_steps: int = 5
    group_size: int = 8
    temperature: float = 1.0
    clip: float = 0.2
    kl_weight: float = 0.04
    format_reward: float = 0.5
    rank_reward: float = 1.0
    gap_reward: float = 1.0
    chunk_size: int = 64
    inner_steps: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole run.

    Attributes:
        seed: of everything that is drawn.
        base, data, joint, policy, gate: the sections.
        method: how the trained embedder runs; the section ``[method]`` has the fields of ``twn_config.json``.
    """

    seed: int = 0
    base: BaseSettings = field(default_factory=BaseSettings)
    data: DataSettings = field(default_factory=DataSettings)
    joint: JointSettings = field(default_factory=JointSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    gate: GateSettings = field(default_factory=GateSettings)
    method: TWNConfig = field(default_factory=TWNConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as :func:`parse_config` reads them."""
        told = asdict(replace(self, method=TWNConfig()))
        told["method"] = {name: getattr(self.method, name) for name in _METHOD_FIELDS}
        return told


def load_config(path: str | os.PathLike, changes: Mapping[str, Any] | None = None) -> TrainingConfig:
    """Read a configuration.

    Args:
        path: a TOML file.
        changes: values by dotted name (``"joint.steps"``) that replace those of the file.

    Raises:
        OptionError: the file is missing or no TOML, or a value is unknown, of the wrong kind or out of range; the
            message names the section and the key.
        MissingDependency: Python 3.10 without tomli.
    """
    try:
        table = _toml().loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f'configuration "{path}" cannot be read: {error.strerror or error}.') from error
    except ValueError as error:
        raise OptionError(f'configuration "{path}" is no TOML: {error}.') from error
    for name, value in (changes or {}).items():
        section, dot, key = name.partition(".")
        held = table.get(section, {})
        table[section] = (held if isinstance(held, dict) else {}) | {key: value} if dot else value
    return parse_config(table)


def _toml():
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError as error:
        raise MissingDependency(
            'a configuration in TOML needs tomli before Python 3.11. Run: pip install "twn_kernels[train]"'
        ) from error
    return tomli


def parse_config(table: Mapping[str, Any]) -> TrainingConfig:
    """A configuration from nested dicts; errors as in :func:`load_config`."""
    sections = {f.name: f for f in fields(TrainingConfig)}
    _reject_unknown(table, sections, "the configuration")
    parsed: dict[str, Any] = {}
    for name, value in table.items():
        if name == "seed":
            parsed[name] = _value("seed", value, int)
            continue
        if not isinstance(value, Mapping):
            raise OptionError(f"[{name}] must be a section with keys, got {value!r}.")
        parsed[name] = _method(value) if name == "method" else _section(sections[name].default_factory, value, name)
    config = TrainingConfig(**parsed)
    if config.gate.split == "":  # TOML has no null
        config = replace(config, gate=replace(config.gate, split=None))
    _check(config)
    return config


def _method(table: Mapping[str, Any]) -> TWNConfig:
    _reject_unknown(table, _METHOD_FIELDS, "[method]")
    values = dict(table)
    if values.get("prefill_adapter") == "none":  # TOML has no null
        values["prefill_adapter"] = None
    return TWNConfig(**values)


def _section(cls: type, table: Mapping[str, Any], section: str) -> Any:
    kinds = get_type_hints(cls)
    _reject_unknown(table, kinds, f"[{section}]")
    return cls(**{name: _value(f"{section}.{name}", value, kinds[name]) for name, value in table.items()})


def _reject_unknown(table: Mapping[str, Any], known: Any, where: str) -> None:
    for name in table:
        if name not in known:
            raise OptionError(f'{where} has no "{name}"; it has {quoted(known)}.{did_you_mean(name, known)}')


def _value(name: str, value: Any, kind: Any) -> Any:
    """The value as its field holds it."""
    if kind == tuple[int, ...]:
        if isinstance(value, list | tuple) and all(type(item) is int and item > 0 for item in value):
            return tuple(value)
        raise OptionError(f"{name} must be a list of whole numbers of at least 1, got {value!r}.")
    if kind in (float, float | None) and type(value) is int:
        return float(value)
    if value is None and kind in (str | None, float | None):  # of a dict: TOML has no null
        return None
    allowed = {str | None: (str,), float | None: (float,)}.get(kind, (kind,))
    if type(value) not in allowed:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise OptionError(f"{name} must be {words[allowed[0]]}, got {value!r}.")
    return value


_AT_LEAST_ZERO = ("steps", "warmup_steps", "weight_decay", "margin", "price", "kl_weight", "clip")
_AT_LEAST_ZERO += ("thought_weight", "plain_weight", "thoughtful_weight", "format_reward", "rank_reward", "gap_reward")
_ABOVE_ZERO = ("batch_size", "learning_rate", "max_grad_norm", "save_steps", "log_steps", "chunk_size", "rank")
_ABOVE_ZERO += ("num_queries", "temperature", "encode_batch_size", "group_size", "inner_steps", "train_queries")
_ABOVE_ZERO += ("gate_queries", "copies")
_SEEDS = 2**32  # numpy's generators take no larger ones


def _check(config: TrainingConfig) -> None:
    if not 0 <= config.seed < _SEEDS:
        raise OptionError(f"seed must be a whole number from 0 to {_SEEDS - 1}, got {config.seed}.")
    if config.base.path == "":
        raise OptionError('base.path must be a directory or a hub id, got "". Leave it out for the small backbone.')
    for section in ("base", "data", "joint", "policy", "gate"):
        for name, value in vars(getattr(config, section)).items():
            if value is None:
                continue
            if name in _AT_LEAST_ZERO and not 0 <= value < float("inf"):
                raise OptionError(f"{section}.{name} must be at least 0, got {value!r}.")
            if name in _ABOVE_ZERO and not 0 < value < float("inf"):
                raise OptionError(f"{section}.{name} must be above 0, got {value!r}.")
    _check_names("joint.adapters", config.joint.adapters, ("two", "one"))
    for name in ("dtype", "adapter_dtype"):
        _check_names(f"base.{name}", getattr(config.base, name), ("float32", "bfloat16", "float16"))
    _check_gate(config)
    if not 0 <= config.joint.plain_truncation <= 1:
        raise OptionError(f"joint.plain_truncation must be between 0 and 1, got {config.joint.plain_truncation!r}.")
    if config.joint.batch_size < 2:
        raise OptionError(f"joint.batch_size must be at least 2 to contrast documents, got {config.joint.batch_size}.")
    if config.joint.rank > MAX_RANK:
        raise OptionError(f"joint.rank must be at most {MAX_RANK}, got {config.joint.rank}.")
    if config.joint.steps == 0:
        raise OptionError("joint.steps must be at least 1: without it there is nothing to embed with.")
    if config.policy.steps:
        check_policy(config.policy)
        if config.joint.adapters == "one":
            raise OptionError('policy.steps must be 0 with joint.adapters = "one": its reward would learn too.')


def _check_gate(config: TrainingConfig) -> None:
    gate = config.gate
    if not 0 < gate.kept_share < 1:
        raise OptionError(f"gate.share must be between 0 and 1, got {gate.share!r}.")
    if gate.split and gate.share is not None:
        raise OptionError(
            f'gate.share {gate.share} has no meaning beside gate.split "{gate.split}", which is what the gate learns '
            'from. Leave gate.share out, or set gate.split to "".'
        )


def check_policy(policy: Any) -> None:
    """Refuse settings of policy optimisation that leave nothing to compare, or a state between two updates on the same
    thoughts.

    Args:
        policy: :class:`PolicySettings`, or anything with its fields; ``inner_steps`` may be missing.

    Raises:
        OptionError: a setting is out of range.
    """
    why = {"group_size": "to compare thoughts", "batch_size": "so that documents can be ranked"}
    for name, reason in why.items():
        if getattr(policy, name) < 2:
            raise OptionError(f"policy.{name} must be at least 2 {reason}, got {getattr(policy, name)}.")
    if not policy.temperature > 0:
        raise OptionError(f"policy.temperature must be above 0 to sample thoughts, got {policy.temperature}.")
    inner = getattr(policy, "inner_steps", 1)
    for name in ("steps", "save_steps"):
        if getattr(policy, name) % inner:
            raise OptionError(
                f"policy.{name} must be a multiple of policy.inner_steps, {inner}, so that no state lies between "
                f"updates on the same thoughts; got {getattr(policy, name)}."
            )


def _check_names(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise OptionError(f"{name} must be one of {quoted(names)}, got {value!r}.{did_you_mean(value, names)}")
