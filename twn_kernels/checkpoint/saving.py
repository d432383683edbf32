"""``save_checkpoint``: a TWN directory in one step, or none of it.

What was loaded and not changed is written back byte for byte; what was built in memory always gives the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from twn_kernels.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from twn_kernels.checkpoint.directory import (
    CONFIG_FILE,
    GATE,
    ORDER_KEY,
    QUERIES,
    SmallFile,
    parse_small,
    scan_directory,
)
from twn_kernels.checkpoint.gate import queries_tensor
from twn_kernels.checkpoint.loading import Checkpoint, raise_problems
from twn_kernels.checkpoint.tensorfile import safetensors_bytes
from twn_kernels.errors import CheckpointError, did_you_mean, quoted
from twn_kernels.settings import ADAPTERS

_OWN = (CONFIG_FILE, *(stem + suffix for stem in (GATE, QUERIES) for suffix in (".safetensors", ".pt")))
# Kept when a directory is replaced: they describe a checkpoint and belong to whoever wrote them.
_BESIDE = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes", ".gitignore")


def save_checkpoint(checkpoint: Checkpoint, directory: str | os.PathLike) -> Path:
    """Write a TWN directory that PEFT can read too.

    The files are written to a directory beside ``directory``, read back, and moved into place in one step, so
    ``directory`` never holds half a checkpoint.

    Args:
        checkpoint: what to write.
        directory: where. A former TWN directory there is replaced (its README, LICENSE and .gitattributes stay); one
            that holds anything else is refused.

    Returns:
        the directory.

    Raises:
        CheckpointError: ``directory`` cannot be written or holds other things, or the checkpoint does not fit together.
    """
    names = set(checkpoint.adapters)
    if names != set(ADAPTERS):
        near = "".join(did_you_mean(name, ADAPTERS) for name in names - set(ADAPTERS))
        raise CheckpointError(f"a checkpoint needs the adapters {quoted(ADAPTERS)}, got {quoted(sorted(names))}.{near}")
    target = Path(directory).expanduser()
    target = target.resolve() if target.is_symlink() else target
    _refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _sibling(target, "new")
        try:
            _write_all(checkpoint, staging)
            _check(checkpoint, staging)
            _keep_beside(target, staging)
            _swap(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}.") from error
    return Path(directory)


def _sibling(target: Path, purpose: str) -> Path:
    path = target.parent / f".{target.name}.{purpose}-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a directory was expected.")
    entries = [entry.name for entry in target.iterdir()]
    if not entries:
        return
    foreign = [name for name in entries if name not in (*_OWN, *_BESIDE, *ADAPTERS)]
    for adapter in ADAPTERS:
        if (target / adapter).is_dir():
            foreign.extend(f"{adapter}/{entry.name}" for entry in (target / adapter).iterdir() if not _peft(entry.name))
    if foreign or not set(entries) & set(ADAPTERS):
        raise CheckpointError(
            f"{target} holds files that are no part of a TWN directory: {quoted(sorted(foreign or entries))}. "
            "Nothing was written; choose another directory or an empty one."
        )


def _peft(name: str) -> bool:
    return name == CONFIG_NAME or name.startswith("adapter_model") or name in _BESIDE


def _write_all(checkpoint: Checkpoint, out: Path) -> None:
    for name in ADAPTERS:
        write_adapter(checkpoint.adapters[name], out / name)
    if checkpoint.gate is not None:
        _write_small(out, GATE, checkpoint.gate, checkpoint.gate_file)
    if checkpoint.queries is not None:
        same = _unchanged_queries(checkpoint)
        tensors = dict(checkpoint.queries_file.tensors) if same else {QUERIES: checkpoint.queries}
        _write_small(out, QUERIES, tensors, checkpoint.queries_file if same else None)
    if (text := checkpoint.config.to_json()) is not None:
        write_file(out / CONFIG_FILE, [text])


def _unchanged_queries(checkpoint: Checkpoint) -> bool:
    if checkpoint.queries_file is None:
        return False
    read = queries_tensor(parse_small(checkpoint.queries_file), checkpoint.queries_file.name)
    return equal_tensors({"": read}, {"": checkpoint.queries})


def write_adapter(adapter: Adapter, out: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a new directory ``out``."""
    out.mkdir()
    write_file(out / CONFIG_NAME, [adapter.config.to_json()])
    write_file(out / WEIGHTS_NAME, safetensors_bytes(adapter.tensors(), adapter.header))


def _write_small(out: Path, stem: str, tensors: Mapping[str, torch.Tensor], source: SmallFile | None) -> None:
    # The tensors of `source` may have been changed in place, so its bytes are parsed again to compare.
    if source is not None and equal_tensors(parse_small(source), tensors):
        write_file(out / source.name, [source.raw])
    else:
        write_file(out / f"{stem}.safetensors", small_bytes(tensors))


def small_bytes(tensors: Mapping[str, torch.Tensor], extras: Mapping[str, Any] | None = None) -> list[Any]:
    """A safetensors file that also states the order of definition, which the format itself does not keep.

    Args:
        tensors: by name, in order.
        extras: plain values that stood beside the tensors, kept as metadata.
    """
    metadata = {name: json.dumps(value) for name, value in sorted((extras or {}).items())}
    return safetensors_bytes(tensors, metadata={**metadata, ORDER_KEY: json.dumps(list(tensors))})


def equal_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and every bit agree (NaN equals itself)."""
    if set(first) != set(second):
        return False
    return all(_same_bits(first[name], second[name]) for name in first)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*bits)


def write_file(path: Path, parts: Iterable[Any]) -> None:
    """Write ``parts`` one after another and see them on the disk."""
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


def _check(checkpoint: Checkpoint, staging: Path) -> None:
    """Read back what was written: a checkpoint that would not load, or would load as something else, is not kept."""
    scan = scan_directory(staging, "the checkpoint to save")
    raise_problems(scan)
    for name, adapter in checkpoint.adapters.items():
        read = scan.adapters[name].layers
        other = [module for module, layer in adapter.layers.items() if read[module].scaling != layer.scaling]
        if other:
            raise CheckpointError(
                f'the checkpoint to save: adapter "{name}" has layers whose scaling is not what its config gives: '
                f"{quoted(other)}. Change the config (lora_alpha, alpha_pattern), not the layer."
            )


def _keep_beside(target: Path, staging: Path) -> None:
    for folder in ("", *ADAPTERS):
        for name in _BESIDE:
            source = target / folder / name
            if source.is_file():
                shutil.copy2(source, staging / folder / name)


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
        return
    former = _sibling(target, "old")
    os.rename(target, former / target.name)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(former / target.name, target)
        former.rmdir()
        raise
    shutil.rmtree(former, ignore_errors=True)
