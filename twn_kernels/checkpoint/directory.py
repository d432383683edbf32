"""A TWN directory as a whole: which files it has, whether they fit each other, and what had to be assumed.

:class:`DirectoryScan` reads the small files and the headers of the large ones and collects every problem. Loading and
inspecting both start here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from twn_kernels.checkpoint.adapter import AdapterScan, is_adapter_dir, listed, non_finite, scan_adapter
from twn_kernels.checkpoint.config import TWNConfig, parse_twn_config
from twn_kernels.checkpoint.gate import GateLayout, gate_inputs, gate_layout, is_scalar, queries_tensor
from twn_kernels.checkpoint.tensorfile import (
    TensorFile,
    infos_of,
    load_pickled,
    named_tensors,
    open_safetensors,
    read_bytes,
)
from twn_kernels.errors import CheckpointError, did_you_mean, quoted
from twn_kernels.settings import ADAPTERS

CONFIG_FILE = "twn_config.json"
GATE = "gate_mlp"
QUERIES = "queries"
_SUFFIXES = (".safetensors", ".pt")


@dataclass
class SmallFile:
    """The gate's or the queries' file: its bytes, kept for saving, and its tensors."""

    name: str
    raw: bytes
    tensors: dict[str, torch.Tensor]
    ordered: bool
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class DirectoryScan:
    """All that a checkpoint's files state and imply, and all that is wrong with them."""

    label: str
    adapters: dict[str, AdapterScan] = field(default_factory=dict)
    gate_file: SmallFile | None = None
    gate: GateLayout | None = None
    queries_file: SmallFile | None = None
    queries: torch.Tensor | None = None
    config: TWNConfig = field(default_factory=TWNConfig)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # of GATE and QUERIES: a file is there, but cannot be used

    def all_problems(self) -> list[str]:
        """The directory's problems, then each adapter's."""
        return [*self.problems, *(problem for scan in self.adapters.values() for problem in scan.problems)]

    def all_warnings(self) -> list[str]:
        """What loads, but is probably not meant."""
        return [*self.warnings, *(warning for scan in self.adapters.values() for warning in scan.warnings)]

    def all_notes(self) -> list[str]:
        """What is worth knowing."""
        return [*self.notes, *(note for scan in self.adapters.values() for note in scan.notes)]

    @property
    def base_model_names(self) -> list[str]:
        """What the adapters say they were trained on, without repeats."""
        names = [scan.config.base_model_name for scan in self.adapters.values() if scan.config is not None]
        return list(dict.fromkeys(name for name in names if name))


def scan_directory(path: Path, label: str) -> DirectoryScan:
    """Look at a TWN directory.

    Raises:
        CheckpointError: the directory is empty, or is one PEFT adapter rather than two.
    """
    try:
        entries = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {error.strerror or error}.") from error
    if not entries:
        raise CheckpointError(f"{label} is empty; a TWN directory holds reasoning/ and embedding/ (PEFT adapters).")
    folders = [name for name in entries if (path / name).is_dir()]
    if is_adapter_dir(path) and not set(ADAPTERS) & set(folders):
        raise CheckpointError(
            f"{label} is one PEFT adapter; a TWN directory holds two, in reasoning/ and embedding/. "
            'For two separate directories pass {"reasoning": dir, "embedding": dir}.'
        )
    scan = DirectoryScan(label)
    others = [name for name in folders if name not in ADAPTERS and is_adapter_dir(path / name)]
    extra = [*others, *(["the directory itself"] if is_adapter_dir(path) else [])]
    absent = [name for name in ADAPTERS if name not in folders]
    if absent:
        # A misspelt directory explains an absent one; it is no third adapter then.
        near = "".join(did_you_mean(name, others) for name in absent)
        scan.problems.append(
            f"{label} has no adapter {quoted(absent)}; both reasoning/ and embedding/ are needed. "
            f"Its directories: {quoted(folders)}.{near}"
        )
    elif extra:
        scan.problems.append(f"{label} holds adapters beside reasoning and embedding: {quoted(extra)}; remove them.")
    for name in ADAPTERS:
        if name in folders:
            scan.adapters[name] = scan_adapter(path / name, name, name)
    _read_parts(scan, path, entries)
    return _finish(scan)


def scan_pair(paths: Mapping[str, tuple[Path, str]]) -> DirectoryScan:
    """Look at two separate PEFT directories: no gate, no queries, every setting assumed."""
    scan = DirectoryScan(" + ".join(label for _, label in paths.values()))
    scan.config = parse_twn_config(None, CONFIG_FILE)[0]
    for name, (path, label) in paths.items():
        scan.adapters[name] = scan_adapter(path, name, label)
    return _finish(scan)


def _read_parts(scan: DirectoryScan, path: Path, entries: list[str]) -> None:
    try:
        raw = read_bytes(path / CONFIG_FILE, CONFIG_FILE) if CONFIG_FILE in entries else None
        scan.config, problems = parse_twn_config(raw, CONFIG_FILE)
        scan.problems.extend(problems)
    except CheckpointError as error:
        scan.problems.append(str(error))
    try:
        scan.gate_file = _open_small(scan, path, entries, GATE)
        if scan.gate_file is not None:
            part = scan.gate_file
            scan.gate = gate_layout(infos_of(part.tensors), part.name, ordered=part.ordered)
            scan.notes.extend(scan.gate.notes)
    except CheckpointError as error:
        scan.problems.append(str(error))
        scan.unread.append(GATE)
    try:
        scan.queries_file = _open_small(scan, path, entries, QUERIES)
        if scan.queries_file is not None:
            part = scan.queries_file
            scan.queries = queries_tensor(part.tensors, part.name)
            part.extras.update({name: value.item() for name, value in part.tensors.items() if is_scalar(value)})
    except CheckpointError as error:
        scan.problems.append(str(error))
        scan.unread.append(QUERIES)
    strays = [name for name in entries if name.split(".")[0] in (GATE, QUERIES) and not name.endswith(_SUFFIXES)]
    if strays:
        scan.warnings.append(f"{scan.label}: {listed(strays)} not read; the names end in .safetensors or .pt.")
    if (GATE in _stems(entries)) != (QUERIES in _stems(entries)):
        missing = QUERIES if GATE in _stems(entries) else GATE
        near = did_you_mean(f"{missing}.pt", [name for name in entries if name.endswith(_SUFFIXES)])
        scan.warnings.append(f"{scan.label} has no {missing}.safetensors and no {missing}.pt.{near}")


def _stems(entries: list[str]) -> set[str]:
    return {name.removesuffix(suffix) for name in entries for suffix in _SUFFIXES if name.endswith(suffix)}


def _open_small(scan: DirectoryScan, path: Path, entries: list[str], stem: str) -> SmallFile | None:
    present = [stem + suffix for suffix in _SUFFIXES if stem + suffix in entries]
    if not present:
        return None
    if len(present) > 1:
        scan.notes.append(f"{present[0]} was read; {listed(present[1:])} beside it was not")
    return read_small(path / present[0], present[0])


def read_small(path: Path, label: str) -> SmallFile:
    """Read a file of a few tensors, in the order in which they were defined where the file tells it.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or holds no tensors.
    """
    raw = read_bytes(path, label)
    if path.suffix != ".safetensors":
        extras: dict[str, Any] = {}
        return SmallFile(path.name, raw, named_tensors(load_pickled(raw, label), label, extras), True, extras)
    opened = open_safetensors(path, label)
    if not opened.infos:
        raise CheckpointError(f"{label} holds no tensor.")
    order = _stated_order(opened)
    tensors = opened.read_all()
    # The gate is used and saved long after loading, so it must not depend on the mapped file.
    return SmallFile(path.name, raw, {name: tensors[name].clone() for name in order or tensors}, order is not None)


def parse_small(small: SmallFile) -> dict[str, torch.Tensor]:
    """The tensors that the file's bytes hold, whatever happened since to those in memory."""
    if not small.name.endswith(".safetensors"):
        return named_tensors(load_pickled(small.raw, small.name), small.name)
    from safetensors.torch import load

    return load(small.raw)


ORDER_KEY = "definition_order"


def _stated_order(opened: TensorFile) -> list[str] | None:
    metadata = json.loads(opened.header).get("__metadata__") or {}
    try:
        order = json.loads(metadata.get(ORDER_KEY, "null"))
    except ValueError:
        return None
    return order if isinstance(order, list) and sorted(map(str, order)) == sorted(opened.infos) else None


def _finish(scan: DirectoryScan) -> DirectoryScan:
    for name, tensors in ((GATE, scan.gate_file), (QUERIES, scan.queries_file)):
        bad = [key for key, value in (tensors.tensors if tensors else {}).items() if not _finite(value)]
        if bad:
            scan.warnings.append(f"{tensors.name}: NaN or infinity in {name}: {listed(bad)}.")
        if tensors is not None and tensors.extras:
            values = listed(f"{key} = {value!r}" for key, value in tensors.extras.items())
            scan.notes.append(f"{tensors.name}: values beside the tensors were not used: {values}")
    if scan.gate is not None and scan.queries is not None:
        _settle_gate_input(scan)
    names = scan.base_model_names
    if len(names) > 1:
        scan.notes.append(f"the adapters name different base models: {quoted(names)}")
    if scan.queries is not None and scan.adapters:
        hidden = scan.queries.shape[1]
        widths = {
            width
            for adapter in scan.adapters.values()
            for layer in adapter.layers.values()
            for width in (layer.in_features, layer.out_features)
        }
        if widths and hidden not in widths:
            scan.warnings.append(
                f"{scan.queries_file.name}: hidden size {hidden} is no adapted layer's width "
                f"({listed(map(str, sorted(widths)))}); queries and adapters look like parts of different models."
            )
    return scan


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _settle_gate_input(scan: DirectoryScan) -> None:
    queries, hidden = scan.queries.shape
    width = scan.gate.in_features
    fits = gate_inputs(width, queries, hidden)
    stated = "gate_input" not in scan.config.assumed
    if not fits:
        scan.problems.append(
            f"{scan.gate_file.name}: the gate reads {width} features; {queries} queries of {hidden} give {hidden} "
            f"(mean or last), {queries * hidden} (concat) or {2 * hidden} (mean_last)."
        )
    elif stated and scan.config.gate_input not in fits:
        scan.problems.append(
            f'{CONFIG_FILE}: gate_input "{scan.config.gate_input}" does not fit {scan.gate_file.name}, which reads '
            f"{width} features: with {queries} queries of {hidden} that is {quoted(fits)}."
        )
    elif not stated:
        # Where one reading fits, or all that fit are the same numbers, the shapes imply it and nothing is assumed.
        sure = len(fits) == 1
        scan.config = replace(
            scan.config,
            gate_input=fits[0],
            assumed=tuple(name for name in scan.config.assumed if name != "gate_input" or not sure),
            inferred=(("gate_input", fits[0]),),
        )


def warn_non_finite(scan: DirectoryScan) -> None:
    """Add a warning for each adapter that holds NaN or infinity; this reads the weights."""
    for adapter in scan.adapters.values():
        if adapter.layers and (bad := non_finite(adapter)):
            adapter.warnings.append(f"{adapter.label}/{adapter.weights_name}: NaN or infinity in: {listed(bad)}.")
