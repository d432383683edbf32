"""Conversions: ``torch.save`` files to safetensors, and two PEFT adapters to one TWN directory.

Files are only ever loaded with ``weights_only=True``; there is no unsafe way. Sources are never changed or removed, and
converting twice gives the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from twn_kernels.checkpoint.adapter import WEIGHTS_NAME, load_adapter, scan_adapter
from twn_kernels.checkpoint.config import parse_twn_config
from twn_kernels.checkpoint.directory import CONFIG_FILE, GATE, QUERIES, read_small
from twn_kernels.checkpoint.gate import queries_tensor
from twn_kernels.checkpoint.loading import Checkpoint, load_checkpoint, ordered_gate
from twn_kernels.checkpoint.saving import equal_tensors, save_checkpoint, small_bytes, write_file
from twn_kernels.checkpoint.tensorfile import open_safetensors, read_bytes, safetensors_bytes
from twn_kernels.errors import CheckpointError, OptionError
from twn_kernels.settings import ADAPTERS


def convert_file(source: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Write the tensors of a ``torch.save`` file as safetensors.

    Args:
        source: for example ``gate_mlp.pt``.
        out: the file to write; None writes beside ``source``, with the suffix ``.safetensors``.

    Returns:
        the file written, or found there with the same tensors.

    Raises:
        CheckpointError: ``source`` is missing, damaged or pickles code, or ``out`` holds other tensors.
    """
    path = Path(source).expanduser()
    target = path.with_suffix(".safetensors") if out is None else Path(out).expanduser()
    if target.suffix != ".safetensors":
        raise OptionError(f"out must end in .safetensors, got {target.name}.")
    small = read_small(path, path.name)
    if path.suffix == ".safetensors" and target == path:
        return target
    if not _there(target, small.tensors):
        _replace(target, small_bytes(small.tensors, small.extras))
    return target


def convert_directory(directory: str | os.PathLike, out: str | os.PathLike | None = None) -> list[Path]:
    """Write everything in a TWN directory that ``torch.save`` wrote as safetensors.

    Args:
        directory: a TWN directory.
        out: another directory, which then gets the whole checkpoint; None writes the new files beside the old ones.

    Returns:
        the files written, or found there with the same tensors; empty where nothing needs converting.

    Raises:
        CheckpointError: the directory does not load, or a file to write is there with other tensors.
    """
    source = Path(directory).expanduser()
    if out is None and not source.is_dir():
        raise CheckpointError(f"{directory} is no directory, and only a directory can be converted in place; name out.")
    checkpoint = load_checkpoint(directory)
    if out is not None:
        if Path(out).expanduser().resolve() == source.resolve():
            raise OptionError("out is the directory to convert; leave it out to convert in place.")
        target = save_checkpoint(_as_safetensors(checkpoint), out)
        return sorted(path for path in target.rglob("*.safetensors"))
    written = [convert_file(source / f"{stem}.pt") for stem in (GATE, QUERIES) if (source / f"{stem}.pt").exists()]
    for name in ADAPTERS:
        target = source / name / WEIGHTS_NAME
        if checkpoint.adapters[name].header is None:
            tensors = load_adapter(scan_adapter(source / name, name, name)).tensors()
            _replace(target, safetensors_bytes(tensors))
            written.append(target)
    return written


def _as_safetensors(checkpoint: Checkpoint) -> Checkpoint:
    changes = {}
    for part in ("gate_file", "queries_file"):
        small = getattr(checkpoint, part)
        if small is not None and not small.name.endswith(".safetensors"):
            changes[part] = None
    return replace(checkpoint, **changes)


def convert_pair(
    adapters: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    *,
    gate: str | os.PathLike | None = None,
    queries: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
) -> Path:
    """Make a TWN directory of two PEFT adapter directories.

    Args:
        adapters: ``{"reasoning": dir, "embedding": dir}``.
        out: the directory to write.
        gate, queries: files of tensors, safetensors or ``torch.save``.
        config: a ``twn_config.json``.

    Returns:
        ``out``.

    Raises:
        CheckpointError: a part does not load, the parts do not fit each other, or ``out`` holds other things.
        OptionError: ``adapters`` does not name the two adapters, or names one directory for both.
    """
    checkpoint = load_checkpoint(adapters)
    places = [Path(place).expanduser().resolve() for place in adapters.values()]
    if len(set(places)) == 1:
        raise OptionError(f"both adapters are {next(iter(adapters.values()))}; reasoning and embedding must be two.")
    if gate is not None:
        checkpoint.gate = ordered_gate(read_small(Path(gate).expanduser(), str(gate)), str(gate))
    if queries is not None:
        checkpoint.queries = queries_tensor(read_small(Path(queries).expanduser(), str(queries)).tensors, str(queries))
    if config is not None:
        raw = read_bytes(Path(config).expanduser(), str(config))
        checkpoint.config, problems = parse_twn_config(raw, CONFIG_FILE)
        if problems:
            raise CheckpointError("\n".join(problems))
    return save_checkpoint(checkpoint, out)


def _there(target: Path, tensors: Mapping) -> bool:
    """Whether ``target`` already holds these tensors.

    Raises:
        CheckpointError: it holds others.
    """
    if not target.exists():
        return False
    if equal_tensors(open_safetensors(target, target.name).read_all(), tensors):
        return True
    raise CheckpointError(f"{target} is there and holds other tensors; remove it or name another file.")


def _replace(target: Path, parts: list) -> None:
    staging = target.with_name(f".{target.name}.new-{os.getpid()}")
    try:
        write_file(staging, parts)
        os.replace(staging, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        staging.unlink(missing_ok=True)
