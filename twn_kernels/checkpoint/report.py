"""``inspect_checkpoint``: what a checkpoint is, from its files alone, as a table and as a dict."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from twn_kernels.checkpoint.adapter import AdapterScan
from twn_kernels.checkpoint.directory import GATE, QUERIES, DirectoryScan, SmallFile, warn_non_finite
from twn_kernels.checkpoint.gate import GateLayout, gate_inputs
from twn_kernels.checkpoint.hub import HubOptions
from twn_kernels.checkpoint.loading import scan_source

# What is unknown where an adapter's weights could not be read.
_FROM_WEIGHTS = (
    *("ranks", "alphas", "scalings", "targets", "shapes", "modules", "layers", "under", "touches_visual"),
    *("visual_modules", "zero_lora_B", "dtypes", "parameters", "bytes"),
)
_TOWERS = ("visual", "vision", "image_tower", "video_tower", "multi_modal_projector", "audio")


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`inspect_checkpoint` found; ``print`` it, or take :meth:`to_dict`.

    Args:
        source: what was inspected.
        base_model_names: what the adapters say they were trained on.
        adapters: by name: ranks, alphas, scalings, dropout, targets, modules, dtypes, parameters, bytes.
        queries: file, shape, dtype; None where there are none.
        gate: file, layers, which inputs its width allows, output; None where there is none.
        config: every setting of the method with its value.
        assumed: settings whose value is a default that nothing states or implies.
        inferred: settings whose value follows from shapes.
        problems: what makes the checkpoint unusable; loading raises these.
        warnings: what loads but is probably not meant.
        notes: what is worth knowing.
        unread: parts that are there and could not be read (problems say why); what depends on them is None.
    """

    source: str
    base_model_names: list[str]
    adapters: dict[str, dict[str, Any]]
    queries: dict[str, Any] | None
    gate: dict[str, Any] | None
    config: dict[str, Any]
    assumed: list[str]
    inferred: list[str]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the checkpoint loads."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        out["config"] = {name: list(v) if isinstance(v, tuple) else v for name, v in self.config.items()}
        return {"ok": self.ok, **out}

    def __str__(self) -> str:
        lines = [f"checkpoint  {self.source}", f"base model  {', '.join(self.base_model_names) or 'not stated'}", ""]
        lines += _adapter_table(self.adapters)
        lines += ["", *_pairs(self._method_rows())]
        lines += ["", *_table(["setting", "value", "from"], self._setting_rows())]
        for title, items in (("problems", self.problems), ("warnings", self.warnings), ("notes", self.notes)):
            if items:
                lines += ["", f"{title}:", *(f"  - {item}" for item in items)]
        lines += ["", "loads: yes" if self.ok else f"loads: no, {len(self.problems)} problem(s) above"]
        return "\n".join(lines)

    def _method_rows(self) -> list[tuple[str, str]]:
        queries, gate = self.queries, self.gate
        rows = [("queries", "unread" if QUERIES in self.unread else "absent")]
        if queries is not None:
            shape = f"{queries['num_queries']} x {queries['hidden']}"
            rows = [("queries", f"{shape}, {queries['dtype']}, {queries['file']}")]
        if gate is None:
            return [*rows, ("gate", "unread" if GATE in self.unread else "absent")]
        outputs = "1 logit, sigmoid" if gate["outputs"] == 1 else "2 logits, softmax; the second means think (assumed)"
        size = f"{gate['parameters']:,} parameters, {', '.join(gate['dtypes'])}"
        fits = "unread, no queries" if gate["inputs"] is None else " or ".join(gate["inputs"])
        return [
            *rows,
            ("gate", f"{gate['layers']}, {size}, {gate['file']}"),
            ("gate reads", f"{gate['in_features']} features: {fits or 'fits no input'}"),
            ("gate output", outputs),
        ]

    def _setting_rows(self) -> list[list[str]]:
        def origin(name: str) -> str:
            if name in self.assumed:
                return "assumed"
            return "implied by shapes" if name in self.inferred else "twn_config.json"

        return [[name, _value(value), origin(name)] for name, value in self.config.items()]


def inspect_checkpoint(
    source: str | os.PathLike | Mapping[str, str | os.PathLike],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> CheckpointReport:
    """Say what a checkpoint is, without a base model and without raising on what is wrong inside it.

    Args:
        source: a directory, a Hub id, or a pair of PEFT directories; options as in :func:`load_checkpoint`.

    Raises:
        CheckpointError: there is no such directory, it is empty, or it is one PEFT adapter rather than two.
    """
    scan = scan_source(source, HubOptions(revision, token, cache_dir, local_files_only), subfolder)
    warn_non_finite(scan)
    adapter_assumed = [
        f"{name}: {adapter_field} = {getattr(adapter.config, adapter_field)} (PEFT's default, not stated)"
        for name, adapter in scan.adapters.items()
        if adapter.config is not None
        for adapter_field in adapter.config.assumed
    ]
    return CheckpointReport(
        source=scan.label,
        base_model_names=scan.base_model_names,
        adapters={name: _adapter(adapter) for name, adapter in scan.adapters.items()},
        queries=_queries(scan),
        gate=_gate(scan),
        config=scan.config.values(),
        assumed=list(scan.config.assumed),
        inferred=[name for name, _ in scan.config.inferred],
        problems=scan.all_problems(),
        warnings=scan.all_warnings(),
        notes=[*scan.all_notes(), *adapter_assumed, *_gate_assumed(scan)],
        unread=[*(name for name, adapter in scan.adapters.items() if not adapter.layers), *scan.unread],
    )


def _counted(values: list[Any]) -> dict[str, int]:
    counts = Counter(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return {value: counts[value] for value in sorted(counts)}


def _adapter(scan: AdapterScan) -> dict[str, Any]:
    layers = list(scan.layers.values())
    config = scan.config
    modules = [layer.module for layer in layers]
    towers = [module for module in modules if any(part.startswith(_TOWERS) for part in module.split("."))]
    infos = [scan.file.infos[key] for layer in layers for key in (layer.key_a, layer.key_b)]
    parameters = sum(info.numel for info in infos)
    shapes = {layer.module.rpartition(".")[2]: f"{layer.in_features} -> {layer.out_features}" for layer in layers}
    zero = [layer.module for layer in layers if not bool(torch.count_nonzero(scan.file.read(layer.key_b)))]
    facts = {
        "directory": scan.label,
        "weights": scan.weights_name,
        "base_model": config.base_model_name if config else None,
        "peft_version": config.peft_version if config else None,
        "ranks": _counted([layer.rank for layer in layers]),
        "alphas": _counted([layer.alpha for layer in layers]),
        "scalings": _counted([float(layer.scaling) for layer in layers]),
        "rslora": config.use_rslora if config else None,
        "dropout": config.lora_dropout if config else None,
        "target_modules": _plain(config.target_modules) if config else None,
        "targets": _counted([module.rpartition(".")[2] for module in modules]),
        "shapes": shapes,
        "modules": len(modules),
        "layers": len({place for module in modules if (place := _layer_of(module)) is not None}),
        "under": sorted({_holder(module) for module in modules}),
        "touches_visual": bool(towers),
        "visual_modules": len(towers),
        "zero_lora_B": len(zero),
        "dtypes": _counted([info.dtype_name for info in infos]),
        "parameters": parameters,
        "bytes": sum(info.numel * info.dtype.itemsize for info in infos),
    }
    return facts if layers else {**facts, **dict.fromkeys(_FROM_WEIGHTS)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _layer_of(module: str) -> str | None:
    parts = module.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), None)


def _holder(module: str) -> str:
    place = _layer_of(module)
    return place.rpartition(".")[0] if place else module.rpartition(".")[0]


def _queries(scan: DirectoryScan) -> dict[str, Any] | None:
    if scan.queries is None:
        return None
    count, hidden = scan.queries.shape
    dtype = str(scan.queries.dtype).removeprefix("torch.")
    return {"file": scan.queries_file.name, "num_queries": count, "hidden": hidden, "dtype": dtype}


def _gate(scan: DirectoryScan) -> dict[str, Any] | None:
    if scan.gate is None:
        return None
    tensors = list(scan.gate_file.tensors.values())
    fits = gate_inputs(scan.gate.in_features, *scan.queries.shape) if scan.queries is not None else None
    return {
        "file": scan.gate_file.name,
        "layers": _described(scan.gate, scan.gate_file, scan.config.gate_activation),
        "tensors": {name: list(tensor.shape) for name, tensor in scan.gate_file.tensors.items()},
        "in_features": scan.gate.in_features,
        "outputs": scan.gate.out_features,
        "inputs": None if fits is None else list(fits),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "parameters": sum(tensor.numel() for tensor in tensors),
    }


def _gate_assumed(scan: DirectoryScan) -> list[str]:
    """What no gate file states: the epsilon of its norms, and which of two logits means think."""
    found = []
    if scan.gate is not None and any(layer.kind == "norm" for layer in scan.gate.layers):
        found.append("gate: the epsilon of its norms is not stored; 1e-5 (layer norm) or 1e-6 (RMS norm) is assumed")
    if scan.gate is not None and scan.gate.out_features == 2:
        found.append("gate: which logit means think is not stored; the second is assumed")
    return found


def _described(layout: GateLayout, small: SmallFile, activation: str) -> str:
    steps = []
    for layer in layout.layers:
        if layer.kind == "linear":
            steps.append(f"linear {layer.in_features} -> {layer.out_features}{'' if layer.bias else ' (no bias)'}")
        else:
            steps.append("layer norm" if layer.bias else "RMS norm")
        if layer.activated:
            steps.append(activation)
    return ", ".join(steps)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return ", ".join(_value(item) for item in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and not value.isidentifier() else str(value)


def _shown_counts(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} (x{count})" for value, count in counts.items())


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count:,} ({count / scale:.1f} {unit})"
    return f"{count:,}"


def _adapter_table(adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def visual(info: Mapping[str, Any]) -> str:
        return f"{info['visual_modules']} modules" if info["touches_visual"] else "not touched"

    rows = {
        "rank": lambda info: _shown_counts(info["ranks"]),
        "alpha": lambda info: _shown_counts(info["alphas"]),
        "scaling": lambda info: _shown_counts(info["scalings"]) + (" (rsLoRA)" if info["rslora"] else ""),
        "dropout": lambda info: str(info["dropout"]),
        "targets": lambda info: ", ".join(f"{name} x{count}" for name, count in info["targets"].items()),
        "modules": lambda info: f"{info['modules']} in {info['layers']} layers",
        "under": lambda info: ", ".join(info["under"]),
        "visual": visual,
        "dtype": lambda info: _shown_counts(info["dtypes"]),
        "lora_B": lambda info: f"zero in {info['zero_lora_B']} modules" if info["zero_lora_B"] else "non-zero",
        "parameters": lambda info: f"{info['parameters']:,}",
        "bytes": lambda info: _size(info["bytes"]),
        "file": lambda info: f"{info['directory']}/{info['weights']}",
        "PEFT": lambda info: info["peft_version"] or "version not stated",
    }
    body = []
    for title, cell in rows.items():
        cells = ["unread" if _is_unread(title, info) else cell(info) or "-" for info in adapters.values()]
        body += _wrapped(title, cells)
    return _table(["", *adapters], body)


def _is_unread(title: str, info: Mapping[str, Any]) -> bool:
    """Whether the file that a row is taken from could not be read."""
    if title in ("dropout", "PEFT"):
        return info["dropout"] is None
    return info["weights" if title == "file" else "modules"] is None


def _wrapped(title: str, cells: list[str], width: int = 44) -> list[list[str]]:
    columns = [textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell in cells]
    height = max((len(column) for column in columns), default=0)
    return [
        [title if row == 0 else "", *(column[row] if row < len(column) else "" for column in columns)]
        for row in range(height)
    ]


def _pairs(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    lines = ["  ".join(row).rstrip() for row in cells]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
