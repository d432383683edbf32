"""A TWN directory on disk, its adapters written by PEFT itself, for tests, demos and benchmarks.

The weights are random but every part matters: ``lora_B`` is not zero, the two adapters differ, and the gate's scores
spread over both sides of 0.5.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twn_kernels.errors import MissingDependency, OptionError, did_you_mean, quoted
from twn_kernels.settings import ADAPTERS, EMBEDDING, REASONING
from twn_kernels.testing.ownership import claim, mark

__all__ = ["write_gate_and_queries", "write_peft_adapter", "write_twn_directory"]

_GATE_INPUTS = ("mean", "last", "concat", "mean_last")
_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)


def write_twn_directory(
    directory: str | Path,
    model: torch.nn.Module,
    *,
    rank: int | Mapping[str, int] = 4,
    alpha: float | Mapping[str, float] | None = None,
    targets: Sequence[str] | str | Mapping[str, Any] | None = None,
    rslora: bool | Mapping[str, bool] = False,
    dropout: float | Mapping[str, float] = 0.0,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    rank_pattern: Mapping[str, Any] | None = None,
    alpha_pattern: Mapping[str, Any] | None = None,
    strength: float = 0.3,
    gate_input: str | None = "mean",
    gate_hidden: int | Sequence[int] = 16,
    gate_norm: bool = False,
    gate_outputs: int = 1,
    num_queries: int = 4,
    seed: int = 0,
    file_format: str = "pt",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a TWN directory for ``model`` with PEFT's own ``save_pretrained``.

    An option that takes one value for both adapters also takes ``{"reasoning": ..., "embedding": ...}``.

    Args:
        directory: where; made when missing. It must be empty or written by this function before; its former adapters,
            gate, queries and config are replaced.
        model: a model without adapters; it is left as it was, weights, module objects and ``requires_grad`` included.
        rank, alpha: of each adapter; ``alpha`` None is twice the rank.
        targets: names or one regex; None takes the attention and MLP projections of the language model by their usual
            names (``q_proj`` ... ``down_proj``), else ``"all-linear"``.
        rslora, dropout: as in PEFT's ``LoraConfig``.
        dtype: of the adapters' weights on disk.
        rank_pattern, alpha_pattern: PEFT's patterns, or one such dict an adapter.
        strength: size of ``scaling * B @ A @ x`` relative to ``x``, per layer, at unit variance.
        gate_input: ``"mean"``, ``"last"``, ``"concat"`` or ``"mean_last"``; None writes no gate.
        gate_hidden: widths of the gate's hidden layers.
        gate_norm: put a layer norm after each hidden linear layer.
        gate_outputs: 1 (sigmoid) or 2 (softmax).
        num_queries: 0 writes no queries.
        seed: of every weight.
        file_format: ``"pt"`` or ``"safetensors"`` for the gate and the queries.
        config: fields of ``twn_config.json``; None writes no such file.

    Returns:
        ``directory`` as a path.

    Raises:
        OptionError: an option is outside its names, or ``directory`` is a file or holds files of somebody else.
        MissingDependency: PEFT is not installed.
    """
    out = claim(directory)
    for name in ADAPTERS:
        shutil.rmtree(out / name, ignore_errors=True)
        mark(out / name)  # PEFT adds its card to a README that is there
        one_rank = _of(rank, name) or 4
        write_peft_adapter(
            out / name,
            model,
            rank=one_rank,
            alpha=2 * one_rank if alpha is None else _of(alpha, name),
            targets=_of(targets, name),
            rslora=bool(_of(rslora, name)),
            dropout=_of(dropout, name) or 0.0,
            dtype=_of(dtype, name) or torch.float32,
            rank_pattern=_of(rank_pattern, name),
            alpha_pattern=_of(alpha_pattern, name),
            strength=strength,
            seed=seed * 2 + ADAPTERS.index(name),
        )
    for stem in ("gate_mlp", "queries"):
        for suffix in (".pt", ".safetensors"):
            (out / (stem + suffix)).unlink(missing_ok=True)
    write_gate_and_queries(
        out,
        _hidden_size(model),
        gate_input=gate_input,
        gate_hidden=gate_hidden,
        gate_norm=gate_norm,
        gate_outputs=gate_outputs,
        num_queries=num_queries,
        seed=seed,
        file_format=file_format,
    )
    (out / "twn_config.json").unlink(missing_ok=True)
    if config is not None:
        (out / "twn_config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    return out


def _of(value: Any, name: str) -> Any:
    """The value for one adapter: ``value[name]`` (None if absent) where it is given per adapter, else ``value``."""
    if isinstance(value, Mapping) and set(value) & {REASONING, EMBEDDING}:
        return value.get(name)
    return value


def _hidden_size(model: torch.nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[1]


def write_peft_adapter(
    directory: str | Path,
    model: torch.nn.Module,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    strength: float = 0.3,
    seed: int = 0,
    **lora_config: Any,
) -> Path:
    """Write one adapter with ``get_peft_model`` and ``save_pretrained``; arguments as in :func:`write_twn_directory`.

    ``lora_config`` goes to PEFT's ``LoraConfig`` as it is.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependency("writing adapters needs peft. Install it: pip install peft") from error
    target_modules = _default_targets(model) if targets is None else targets
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=dropout,
        use_rslora=rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        **lora_config,
    )
    wanted_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, before = model.training, dict(model.named_modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    try:
        _fill(wrapped, dtype, strength, seed)
        wrapped.save_pretrained(str(directory), save_embedding_layers=False)
    finally:
        _restore(model, before)
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted_grad[name])
    return Path(directory)


def _default_targets(model: torch.nn.Module) -> list[str] | str:
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # Towers have linears of the same names; adapters of this method are on the language model.
    language = {name for name in linear if "visual" not in name and "vision" not in name}
    found = [target for target in _TARGETS if any(name.endswith(f".{target}") for name in language)]
    if not found:
        return "all-linear"
    if language == linear:
        return found
    names = sorted(name for name in language if name.rpartition(".")[2] in found)
    prefix = _common_prefix(names)
    return rf"{prefix.replace('.', chr(92) + '.')}.*\.({'|'.join(found)})"


def _common_prefix(names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _fill(wrapped: torch.nn.Module, dtype: torch.dtype, strength: float, seed: int) -> None:
    """Give both factors random values of unit gain, so that the adapter's share of each output is ``strength``."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in sorted(wrapped.named_modules()):
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        scaling = module.scaling["default"]
        gain = strength / (abs(scaling) * a.shape[0] ** 0.5) if scaling else strength
        a.data = (torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5).to(dtype)
        b.data = (torch.randn(b.shape, generator=generator) * gain).to(dtype)


def _restore(model: torch.nn.Module, before: Mapping[str, torch.nn.Module]) -> None:
    """Put the model's own modules back where PEFT had wrapped them; parents come before children."""
    for name, module in before.items():
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        if name and getattr(holder, leaf) is not module:
            setattr(holder, leaf, module)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(model):
            delattr(model, attribute)


def write_gate_and_queries(
    directory: str | Path,
    hidden: int,
    *,
    gate_input: str | None = "mean",
    gate_hidden: int | Sequence[int] = 16,
    gate_norm: bool = False,
    gate_outputs: int = 1,
    num_queries: int = 4,
    seed: int = 0,
    file_format: str = "pt",
) -> None:
    """Write ``gate_mlp`` and ``queries`` for a hidden size; arguments as in :func:`write_twn_directory`.

    The gate starts with a norm of its input, so the size of hidden states does not decide, and its last layer is large:
    over inputs that are not nearly parallel its logits have a standard deviation between 1 and 2 around 0, so that
    scores fall on both sides of 0.5.
    """
    if file_format not in ("pt", "safetensors"):
        raise OptionError(
            f'file_format must be "pt" or "safetensors", got "{file_format}".'
            f"{did_you_mean(file_format, ('pt', 'safetensors'))}"
        )
    if gate_input is not None and gate_input not in _GATE_INPUTS:
        raise OptionError(
            f'gate_input must be one of {quoted(_GATE_INPUTS)} or None, got "{gate_input}".'
            f"{did_you_mean(gate_input, _GATE_INPUTS)}"
        )
    generator = torch.Generator().manual_seed(10_000 + seed)
    out = Path(directory)
    if num_queries:
        queries = torch.randn(num_queries, hidden, generator=generator) / hidden**0.5
        _write(out / f"queries.{file_format}", {"queries": queries}, file_format)
    if gate_input is not None:
        widths = {"concat": max(num_queries, 1) * hidden, "mean_last": 2 * hidden}
        hidden_widths = [gate_hidden] if isinstance(gate_hidden, int) else list(gate_hidden)
        with torch.random.fork_rng(devices=[]):
            gate = _gate(widths.get(gate_input, hidden), hidden_widths, gate_norm, gate_outputs, generator)
        _write(out / f"gate_mlp.{file_format}", gate.state_dict(), file_format)


def _gate(
    in_features: int, hidden: Sequence[int], norm: bool, outputs: int, generator: torch.Generator
) -> torch.nn.Sequential:
    steps: list[torch.nn.Module] = [torch.nn.LayerNorm(in_features)]
    width = in_features
    for size in hidden:
        steps.append(torch.nn.Linear(width, size))
        steps.extend([torch.nn.LayerNorm(size)] if norm else [])
        steps.append(torch.nn.GELU())
        width = size
    steps.append(torch.nn.Linear(width, outputs))
    gate = torch.nn.Sequential(*steps)
    linears = [step for step in gate if isinstance(step, torch.nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            noise = torch.randn(linear.weight.shape, generator=generator)
            # GELU halves the variance of a unit normal and more, hence the gain; the last layer sets the spread.
            gain = 2.0 / outputs**0.5 * 1.6 if linear is linears[-1] else 1.0
            linear.weight.copy_(noise * gain / linear.in_features**0.5)
            linear.bias.zero_()
        # GELU's mean is positive (0.28 at unit normal), so rows of the last layer that sum to zero keep the logits
        # centred, and scores fall on both sides of 0.5.
        if len(linears) > 1:
            last = linears[-1].weight
            last -= last.mean(dim=1, keepdim=True)
    return gate


def _write(path: Path, tensors: Mapping[str, torch.Tensor], file_format: str) -> None:
    if file_format == "safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), path)
