"""One adapter: a PEFT directory read into layers of ``A``, ``B`` and scaling, without PEFT.

:func:`scan_adapter` looks at names, dtypes and shapes only and collects every problem it meets; loading turns the
problems into one error, inspecting prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from twn_kernels.checkpoint.adapter_config import AdapterConfig, parse_adapter_config
from twn_kernels.checkpoint.keys import parse_key
from twn_kernels.checkpoint.names import collapse
from twn_kernels.checkpoint.patterns import matches
from twn_kernels.checkpoint.tensorfile import (
    WEIGHT_DTYPES,
    TensorFile,
    TensorInfo,
    open_index,
    open_tensors,
    read_bytes,
)
from twn_kernels.errors import CheckpointError, OptionError, ShapeError, quoted
from twn_kernels.settings import MAX_RANK

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_WEIGHTS = (
    WEIGHTS_NAME,
    f"{WEIGHTS_NAME}.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
)


class LayerWeights(NamedTuple):
    """The adapter's part of one linear layer.

    ``A`` ``[rank, in_features]``, ``B`` ``[out_features, rank]``, ``scaling`` a float.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    rank: int
    alpha: float


@dataclass(frozen=True)
class LayerScan:
    """A layer by its file's header: tensor names, shapes, and what the config gives it."""

    module: str
    key_a: str
    key_b: str
    rank: int
    in_features: int
    out_features: int
    alpha: float
    scaling: float
    dtypes: tuple[str, ...]


@dataclass
class AdapterScan:
    """An adapter's directory by config and header, with all that is wrong with it."""

    name: str
    label: str
    config: AdapterConfig | None = None
    file: TensorFile | None = None
    weights_name: str | None = None
    layers: dict[str, LayerScan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Adapter:
    """One LoRA by name.

    Args:
        name: ``"reasoning"`` or ``"embedding"``.
        config: what PEFT's ``adapter_config.json`` states.
        layers: weights by module path, without PEFT's prefix (``model.language_model.layers.0.self_attn.q_proj``).
        keys: names of the two tensors in the file, by module path.
        header: header of the safetensors file read; saving unchanged weights then gives the same file.
    """

    name: str
    config: AdapterConfig
    layers: dict[str, LayerWeights]
    keys: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    header: bytes | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        name: str,
        factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        *,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        base_model_name: str | None = None,
    ) -> Adapter:
        """An adapter from factors in memory.

        Args:
            name: of the adapter.
            factors: ``(A [rank, in_features], B [out_features, rank])`` by module path; ranks may differ by layer.
            lora_alpha: of every layer.
            lora_dropout: probability in [0, 1), kept in the config.
            use_rslora: scale by ``alpha / sqrt(rank)``.
            base_model_name: what the adapter was trained on.

        Raises:
            OptionError: ``factors`` is empty.
            ShapeError: the factors of a layer do not fit each other.
        """
        if not factors:
            raise OptionError(f'adapter "{name}" needs factors of at least one layer, got none.')
        for module, (a, b) in factors.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= MAX_RANK:
                raise ShapeError(
                    f'adapter "{name}", layer {module}: A must be [rank, in_features] and B [out_features, rank] with '
                    f"rank in [1, {MAX_RANK}], got {list(a.shape)} and {list(b.shape)}."
                )
        ranks = {module: int(a.shape[0]) for module, (a, _) in factors.items()}
        counts = sorted(set(ranks.values()), key=lambda rank: (-list(ranks.values()).count(rank), rank))
        config = AdapterConfig(
            r=counts[0],
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            rank_pattern={_exact(module): rank for module, rank in sorted(ranks.items()) if rank != counts[0]},
            target_modules=tuple(sorted(factors)),
            base_model_name=base_model_name,
        )
        layers = {
            module: LayerWeights(a, b, config.scaling(module), ranks[module], config.alpha(module))
            for module, (a, b) in factors.items()
        }
        return cls(name, config, layers)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The file's tensors by their names in it (PEFT's names where the adapter was built in memory)."""
        out: dict[str, torch.Tensor] = {}
        for module, layer in self.layers.items():
            prefix = f"base_model.model.{module}"
            key_a, key_b = self.keys.get(module, (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"))
            out[key_a], out[key_b] = layer.A, layer.B
        return out


def _exact(module: str) -> str:
    return "^" + module.replace(".", r"\.")


def listed(items: Iterable[str]) -> str:
    """Every one of ``items``; layers that differ in their index alone are one name with a range."""
    return ", ".join(collapse(items))


def is_adapter_dir(path: Path) -> bool:
    """Whether ``path`` looks like what ``peft.save_pretrained`` writes for one adapter."""
    return (path / CONFIG_NAME).exists() or any((path / name).exists() for name in _WEIGHTS)


def scan_adapter(path: Path, name: str, label: str) -> AdapterScan:
    """Look at an adapter's directory without reading its weights.

    Args:
        path: the directory.
        name: of the adapter.
        label: how messages name the directory (relative, without a trailing slash).
    """
    scan = AdapterScan(name, label)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "is missing"
        scan.problems.append(f'{label} {kind}; the directory of the "{name}" adapter was expected ({CONFIG_NAME}, '
                             f"{WEIGHTS_NAME}).")  # fmt: skip
        return scan
    _guard(scan, lambda: _open_config(scan, path))
    _guard(scan, lambda: _open_weights(scan, path))
    if scan.file is not None and scan.config is not None:
        _read_layers(scan)
    return scan


def _guard(scan: AdapterScan, action: Callable[[], None]) -> None:
    try:
        action()
    except CheckpointError as error:
        scan.problems.append(str(error))


def _open_config(scan: AdapterScan, path: Path) -> None:
    label = f"{scan.label}/{CONFIG_NAME}"
    if not (path / CONFIG_NAME).exists():
        raise CheckpointError(f"{label} is missing; peft.save_pretrained writes it beside the weights.")
    scan.config, problems, notes = parse_adapter_config(read_bytes(path / CONFIG_NAME, label), label)
    scan.problems.extend(problems)
    scan.warnings.extend(notes)


def _open_weights(scan: AdapterScan, path: Path) -> None:
    present = [name for name in _WEIGHTS if (path / name).exists()]
    if not present:
        raise CheckpointError(f"{scan.label}/{WEIGHTS_NAME} is missing; peft.save_pretrained writes it.")
    scan.weights_name = present[0]
    label = f"{scan.label}/{present[0]}"
    opener = (lambda p, at: open_index(p, at, f"{scan.label}/")) if label.endswith(".json") else open_tensors
    scan.file = opener(path / present[0], label)
    if len(present) > 1:
        scan.notes.append(f"{scan.label}: {present[0]} was read; {listed(present[1:])} beside it was not.")


def _read_layers(scan: AdapterScan) -> None:
    sides: dict[str, dict[str, str]] = {}
    strange, names = [], set()
    for key in scan.file.infos:
        parsed = parse_key(key)
        if parsed is None:
            strange.append(key)
            continue
        names.add(parsed.adapter)
        sides.setdefault(parsed.module, {}).setdefault(parsed.side, key)
    label = f"{scan.label}/{scan.weights_name}"
    if strange:
        scan.problems.append(
            f"{label}: cannot be fused exactly: {len(strange)} tensors are neither lora_A nor lora_B of a linear "
            f"layer: {listed(strange)}."
        )
    if len(names - {None}) > 1:
        scan.problems.append(
            f"{label} holds more than one adapter: {quoted(sorted(names - {None}))}; one directory holds one adapter."
        )
    halves = [f"{module} (only lora_{side})" for module, found in sides.items() for side in found if len(found) == 1]
    if halves:
        scan.problems.append(f"{label}: layers with only one of lora_A and lora_B: {listed(halves)}.")
    if not sides and not strange:
        scan.problems.append(f"{label} holds no lora_A or lora_B.")
    whole = {module: found for module, found in sides.items() if len(found) == 2}
    _check_tensors(scan, label, whole)
    _check_targets(scan, label)


def _check_tensors(scan: AdapterScan, label: str, whole: Mapping[str, Mapping[str, str]]) -> None:
    dtypes, shapes, ranks = [], [], []
    for module, found in whole.items():
        a, b = scan.file.infos[found["A"]], scan.file.infos[found["B"]]
        wrong = [f"{found[side]} is {info.dtype_name}" for side, info in (("A", a), ("B", b)) if not _is_weight(info)]
        dtypes.extend(wrong)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            shapes.append(f"{module}: lora_A {list(a.shape)}, lora_B {list(b.shape)}")
            continue
        rank = a.shape[0]
        if rank != scan.config.rank(module):
            ranks.append(f"{module}: {rank}, config {scan.config.rank(module)}")
        if not wrong:
            scan.layers[module] = LayerScan(
                module, found["A"], found["B"], rank, a.shape[1], b.shape[0], scan.config.alpha(module),
                scan.config.scaling(module, rank), tuple(dict.fromkeys((a.dtype_name, b.dtype_name))),
            )  # fmt: skip
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
    if dtypes:
        scan.problems.append(f"{label}: weights must be one of {allowed}, got: {listed(dtypes)}.")
    if shapes:
        scan.problems.append(
            f"{label}: lora_A must be [rank, in_features] and lora_B [out_features, rank], got: {listed(shapes)}."
        )
    if ranks:
        scan.problems.append(
            f"{label}: ranks differ from {CONFIG_NAME} (r, rank_pattern), so its scaling would be wrong too: "
            f"{listed(ranks)}."
        )


def _is_weight(info: TensorInfo) -> bool:
    return info.dtype in WEIGHT_DTYPES


def _check_targets(scan: AdapterScan, label: str) -> None:
    config, modules = scan.config, list(scan.layers)
    if outside := [module for module in modules if not config.is_target(module)]:
        scan.problems.append(
            f"{label}: layers that target_modules of {CONFIG_NAME} does not name, which PEFT would drop: "
            f"{listed(outside)}."
        )
    targets = config.target_modules if isinstance(config.target_modules, tuple) else ()
    if unused := [target for target in targets if not any(matches((target,), module) for module in modules)]:
        scan.warnings.append(f"{scan.label}/{CONFIG_NAME}: target_modules without any tensor: {quoted(unused)}.")
    # Only a file whose ranks agree with the old lookup can have been written under it.
    old = {module: config.before_014(module) for module in modules}
    if config.peft_version is None and all(old[module][0] == scan.layers[module].rank for module in modules):
        if changed := [module for module in modules if old[module][1] != config.alpha(module)]:
            scan.warnings.append(
                f"{scan.label}/{CONFIG_NAME}: written by PEFT before 0.18; rank_pattern and alpha_pattern are read as "
                f"PEFT reads them since 0.15, but PEFT before that took other values for: {listed(changed)}."
            )


def load_adapter(scan: AdapterScan) -> Adapter:
    """Read the weights of an adapter that scanned without a problem (other problems are the caller's to raise)."""
    tensors = scan.file.read_all()
    layers = {
        module: LayerWeights(tensors[layer.key_a], tensors[layer.key_b], layer.scaling, layer.rank, layer.alpha)
        for module, layer in scan.layers.items()
    }
    # Names are kept where the file itself can be; from other formats it is written anew, under PEFT's own names.
    kept = scan.file.header is not None
    keys = {module: (layer.key_a, layer.key_b) for module, layer in scan.layers.items()} if kept else {}
    return Adapter(scan.name, scan.config, layers, keys, scan.file.header)


def non_finite(scan: AdapterScan) -> list[str]:
    """Names of the tensors that hold NaN or infinity; reads the weights one tensor at a time."""
    used = [key for layer in scan.layers.values() for key in (layer.key_a, layer.key_b)]
    return [key for key in used if not bool(torch.isfinite(scan.file.read(key)).all())]
