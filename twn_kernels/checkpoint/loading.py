"""``Checkpoint`` and ``load_checkpoint``: everything a TWN directory says, in memory, on the CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from twn_kernels.checkpoint.adapter import Adapter, load_adapter
from twn_kernels.checkpoint.config import TWNConfig
from twn_kernels.checkpoint.directory import DirectoryScan, SmallFile, scan_directory, scan_pair, warn_non_finite
from twn_kernels.checkpoint.gate import GateLayout, gate_layout
from twn_kernels.checkpoint.hub import HubOptions, resolve
from twn_kernels.checkpoint.tensorfile import infos_of
from twn_kernels.errors import CheckpointError, OptionError, TWNWarning, did_you_mean, quoted
from twn_kernels.settings import ADAPTERS


@dataclass
class Checkpoint:
    """Two adapters, and where there are any the gate, the queries and how to run them.

    Args:
        adapters: by name, ``reasoning`` and ``embedding``.
        gate: the gate's tensors by their names in the file, in the order of its layers; None where there is no gate.
        queries: ``[num_queries, hidden]``; None where there are none.
        config: how the method runs.
        base_model_name: what the adapters were trained on, where they say so.
        source: what was loaded, for messages.
        gate_file, queries_file: the files read, so that saving unchanged tensors gives the same bytes.
    """

    adapters: dict[str, Adapter]
    gate: dict[str, torch.Tensor] | None = None
    queries: torch.Tensor | None = None
    config: TWNConfig = field(default_factory=TWNConfig)
    base_model_name: str | None = None
    source: str | None = None
    gate_file: SmallFile | None = field(default=None, repr=False)
    queries_file: SmallFile | None = field(default=None, repr=False)

    def gate_layout(self) -> GateLayout:
        """The gate's layers in order, by the names of their tensors.

        Raises:
            CheckpointError: there is no gate, or its tensors make none.
        """
        self.require("gate")
        return gate_layout(infos_of(self.gate), self.gate_file.name if self.gate_file else "gate", ordered=True)

    def require(self, *parts: str) -> None:
        """Say clearly that a part is needed and absent.

        Args:
            parts: ``"gate"`` or ``"queries"``.

        Raises:
            CheckpointError: a part is absent.
        """
        absent = [part for part in parts if getattr(self, part) is None]
        if absent:
            files = {"gate": "gate_mlp.safetensors or gate_mlp.pt", "queries": "queries.safetensors or queries.pt"}
            raise CheckpointError(
                f"{self.source or 'the checkpoint'} has no {' and no '.join(absent)}; "
                f"expected {', '.join(files[part] for part in absent)} beside the adapters."
            )


def load_checkpoint(
    source: str | os.PathLike | Mapping[str, str | os.PathLike],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Checkpoint:
    """Read a TWN directory, or a pair of PEFT adapter directories, without PEFT.

    Args:
        source: a directory, a Hub id ``owner/name``, or ``{"reasoning": dir, "embedding": dir}``.
        revision, token, cache_dir, local_files_only: for a Hub id, as in ``huggingface_hub.snapshot_download``.
        subfolder: directory inside ``source``.

    Returns:
        the checkpoint, on the CPU, in the file's dtypes.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe, parts do not fit each other, or an adapter cannot be
            fused exactly; every problem found is listed.
        OptionError: ``source`` is none of the above.

    Warns:
        TWNWarning: something loads that is probably not meant, such as NaN in a weight.
    """
    scan = scan_source(source, HubOptions(revision, token, cache_dir, local_files_only), subfolder)
    raise_problems(scan)
    warn_non_finite(scan)
    for message in scan.all_warnings():
        warnings.warn(message, TWNWarning, stacklevel=2)
    return _assemble(scan)


def scan_source(
    source: str | os.PathLike | Mapping[str, str | os.PathLike], options: HubOptions, subfolder: str | None
) -> DirectoryScan:
    """Find ``source`` and look at its files."""
    if not isinstance(source, Mapping):
        return scan_directory(*resolve(source, subfolder, options))
    if set(source) != set(ADAPTERS):
        near = "".join(did_you_mean(name, ADAPTERS) for name in source if name not in ADAPTERS)
        given = quoted(map(str, source))
        raise OptionError(f"a pair of adapters needs the keys {quoted(ADAPTERS)}, got {given}.{near}")
    return scan_pair({name: resolve(source[name], subfolder, options) for name in ADAPTERS})


def raise_problems(scan: DirectoryScan) -> None:
    """Turn what a scan found into one error.

    Raises:
        CheckpointError: there was any problem.
    """
    problems = scan.all_problems()
    if len(problems) == 1:
        raise CheckpointError(f"{scan.label}: {problems[0]}" if scan.label not in problems[0] else problems[0])
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"{scan.label} has {len(problems)} problems:\n{listing}")


def _in_order(layout: GateLayout, small: SmallFile) -> dict[str, torch.Tensor]:
    names = [name for layer in layout.layers for name in (layer.weight, layer.bias) if name is not None]
    return {name: small.tensors[name] for name in names}


def ordered_gate(small: SmallFile, label: str) -> dict[str, torch.Tensor]:
    """A gate file's tensors in the order of its layers.

    Raises:
        CheckpointError: they make no gate.
    """
    return _in_order(gate_layout(infos_of(small.tensors), label, ordered=small.ordered), small)


def _assemble(scan: DirectoryScan) -> Checkpoint:
    return Checkpoint(
        adapters={name: load_adapter(adapter) for name, adapter in scan.adapters.items()},
        gate=None if scan.gate is None else _in_order(scan.gate, scan.gate_file),
        queries=scan.queries,
        config=scan.config,
        base_model_name=next(iter(scan.base_model_names), None),
        source=scan.label,
        gate_file=scan.gate_file,
        queries_file=scan.queries_file,
    )
