"""Tensors on disk, read safely: safetensors by header first, ``torch.save`` files with ``weights_only=True`` alone.

Owns every way in which such a file can be damaged or unsafe, and the exact layout of a safetensors file, so that
writing back what was read gives the same bytes.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twn_kernels.errors import CheckpointError, quoted

_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (None where torch has none for the file's) and shape of a tensor that need not be in memory."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def _info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tensor.dtype, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def infos_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Dtype and shape of each tensor."""
    return {name: _info(tensor) for name, tensor in tensors.items()}


class TensorFile:
    """Named tensors of one or more files.

    Args:
        infos: dtype and shape by name.
        header: the JSON header of a single safetensors file, byte for byte; None for other formats.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        *,
        sources: Mapping[str, Path] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        header: bytes | None = None,
    ) -> None:
        self.infos = dict(infos)
        self.header = header
        self._sources = dict(sources or {})
        self._tensors = dict(tensors or {})

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        if name in self._tensors:
            return self._tensors[name]
        from safetensors import safe_open

        with safe_open(str(self._sources[name]), framework="pt", device="cpu") as opened:
            return opened.get_tensor(name)

    def read_all(self) -> dict[str, torch.Tensor]:
        """Every tensor, on the CPU, opening each file once."""
        from safetensors import safe_open

        out = dict(self._tensors)
        for path in dict.fromkeys(self._sources.values()):
            with safe_open(str(path), framework="pt", device="cpu") as opened:
                for name, source in self._sources.items():
                    if source == path:
                        out[name] = opened.get_tensor(name)
        return {name: out[name] for name in self.infos}


def read_bytes(path: Path, label: str) -> bytes:
    """A small file's bytes.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise CheckpointError(f"{label} is a directory; a file was expected.") from None
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {error.strerror or error}.") from error


def _pointer(start: bytes, label: str) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label} is a Git LFS pointer, not the file itself. Run: git lfs pull")


def open_safetensors(path: Path, label: str) -> TensorFile:
    """Open a safetensors file by its header; no tensor is read.

    Raises:
        CheckpointError: the file is missing, truncated, a Git LFS pointer or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(64)
            _pointer(start, label)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else None
            stream.seek(8)
            header = stream.read(length) if length is not None and length <= min(_HEADER_LIMIT_BYTES, size) else b""
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {error.strerror or error}.") from error
    try:
        with safe_open(str(path), framework="pt", device="cpu"):
            pass
        entries = json.loads(header)
    except (SafetensorError, OSError, ValueError) as error:
        why = _shortfall(header, size) or f"it is no safetensors file: {error}"
        raise CheckpointError(f"{label} cannot be read: {why}. Copy or download it again.") from error
    entries.pop("__metadata__", None)
    infos = {
        name: TensorInfo(_DTYPES.get(item["dtype"]), tuple(item["shape"]), _dtype_name(item["dtype"]))
        for name, item in entries.items()
    }
    return TensorFile(infos, sources=dict.fromkeys(infos, path), header=header)


def _dtype_name(name: str) -> str:
    return str(_DTYPES[name]).removeprefix("torch.") if name in _DTYPES else name


def _shortfall(header: bytes, size: int) -> str | None:
    """How many bytes are missing; None where the header itself is damaged."""
    if size < 8:
        return f"it has {size} bytes, fewer than a safetensors header"
    try:
        ends = [item["data_offsets"][1] for name, item in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + len(header) + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    if size < expected:
        return f"it is truncated: {size} bytes of {expected}"
    return None


def open_index(path: Path, label: str, folder: str) -> TensorFile:
    """Open the shards that a ``*.safetensors.index.json`` or ``*.bin.index.json`` names.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or a shard lies outside the directory.
    """
    from twn_kernels.checkpoint.config import read_json_object

    index, problem = read_json_object(read_bytes(path, label), label)
    places = (index or {}).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(problem or f'{label} has no "weight_map" of tensor name to file.')
    if outside := sorted({shard for shard in places.values() if Path(shard).name != shard}):
        raise CheckpointError(f"{label} names files outside its own directory: {quoted(outside)}.")
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Path] = {}
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(places.values())):
        opened = open_tensors(path.parent / shard, f"{folder}{shard}")
        wanted = [name for name, place in places.items() if place == shard]
        if absent := [name for name in wanted if name not in opened.infos]:
            raise CheckpointError(f"{folder}{shard} lacks tensors that {label} places there: {quoted(absent)}.")
        infos.update({name: opened.infos[name] for name in wanted})
        sources.update({name: opened._sources[name] for name in wanted if name in opened._sources})
        tensors.update({name: opened._tensors[name] for name in wanted if name in opened._tensors})
    return TensorFile(infos, sources=sources, tensors=tensors)


def open_tensors(path: Path, label: str) -> TensorFile:
    """Open one file of named tensors by its suffix: ``.safetensors``, else what ``torch.save`` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or holds something other than named tensors.
    """
    if path.suffix == ".safetensors":
        return open_safetensors(path, label)
    named = named_tensors(load_pickled(read_bytes(path, label), label), label)
    return TensorFile(infos_of(named), tensors=named)


def load_pickled(raw: bytes, label: str) -> Any:
    """What ``torch.save`` wrote, by ``weights_only=True``.

    Raises:
        CheckpointError: the file pickles code, is truncated, or is something else.
    """
    _pointer(raw[:64], label)
    if not raw:
        raise CheckpointError(f"{label} is empty; a torch.save file was expected. Copy or download it again.")
    if raw[8:9] == b"{" and struct.unpack("<Q", raw[:8])[0] <= len(raw):
        raise CheckpointError(f"{label} is a safetensors file; rename it to end in .safetensors.")
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its parsers raise: pickle, zip, EOF, key, type, runtime errors
        if names := _pickled_names(raw):
            raise CheckpointError(
                f"{label} does not load with weights_only=True: it pickles {', '.join(names)}. "
                "twn_kernels never unpickles code.\n"
                "  Convert it where you trust it: load it there, torch.save(module.state_dict(), ...), then "
                "twn-kernels convert."
            ) from error
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # torch's own advice is to load with weights_only=False, which would run what the file says.
        said = isinstance(error, (RuntimeError, EOFError, OSError, pickle.UnpicklingError))
        why = why.rstrip(".") if said and "weights_only" not in why else "its pickle cannot be parsed"
        raise CheckpointError(
            f"{label} is not a complete torch.save file: {why}. Copy or download it again."
        ) from error


def _pickle_streams(raw: bytes) -> list[bytes]:
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        return [raw]
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]


def _pickled_names(raw: bytes) -> list[str]:
    """The functions and classes that unpickling would import and that ``weights_only`` refuses; nothing is run."""
    allowed = {"collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.bytearray"}
    found: dict[str, None] = {}
    try:
        for stream in _pickle_streams(raw):
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    found[argument.replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    found[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # a damaged stream names what came before the damage
        pass
    # Python 2's name for the module, which protocols 0 to 2 still write.
    modern = [name.replace("__builtin__.", "builtins.", 1) for name in found]
    return [
        name
        for name in modern
        if name not in allowed and not name.startswith(("torch._utils._rebuild", "torch.storage."))
        and not (name.startswith("torch.") and (name.endswith("Storage") or name in _TORCH_PLAIN))
    ]  # fmt: skip


_TORCH_PLAIN = {
    "torch.Size", "torch.Tensor", "torch.device", "torch._tensor._rebuild_from_type_v2",
    "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
}  # fmt: skip


def named_tensors(value: Any, label: str, extras: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, however it is wrapped.

    A bare tensor gets the name ``"weight"``; an envelope around the tensors (``{"state_dict": ...}``) is opened; other
    nested dicts are joined with dots. Plain numbers and strings beside the tensors (an epoch, a version) go to
    ``extras``.

    Raises:
        CheckpointError: there is no tensor, or something else than dicts of tensors.
    """
    if isinstance(value, torch.Tensor):
        return {"weight": _plain(value, "weight", label)}
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{label} holds {_kind(value)}; a tensor or a state dict (names to tensors) was expected."
        )
    found: dict[str, torch.Tensor] = {}
    strange: dict[str, str] = {}
    _collect(value, "", found, strange, label)
    plain = {name: item for name, item in strange.items() if isinstance(item, (bool, int, float, str))}
    if extras is not None:
        extras.update(plain)
    if len(plain) < len(strange):
        listed = ", ".join(f'"{name}" ({_kind(item)})' for name, item in strange.items() if name not in plain)
        raise CheckpointError(f"{label} holds values that are neither tensors nor plain numbers: {listed}.")
    if not found:
        raise CheckpointError(f"{label} holds no tensor.")
    return found


_ENVELOPES = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


def _collect(value: Mapping, prefix: str, found: dict, strange: dict, label: str) -> None:
    for key, item in value.items():
        nested = isinstance(item, Mapping)
        name = f"{prefix}{key}"
        if isinstance(item, torch.Tensor):
            found[name] = _plain(item, name, label)
        elif nested:
            _collect(item, prefix if key in _ENVELOPES else f"{name}.", found, strange, label)
        elif item is not None:
            strange[name] = item


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _plain(tensor: torch.Tensor, name: str, label: str) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{str(tensor.layout).removeprefix('torch.')} on {tensor.device}"
        raise CheckpointError(f'{label}: tensor "{name}" is {kind}; plain dense tensors were expected.')
    # A view may repeat its storage; a few bytes on disk would then ask for any amount of memory.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f'{label}: tensor "{name}" of shape {list(tensor.shape)} is larger than what the file stores for it.'
        )
    return tensor


def safetensors_bytes(
    tensors: Mapping[str, torch.Tensor], header: bytes | None = None, *, metadata: Mapping[str, str] | None = None
) -> list[Any]:
    """The parts of a safetensors file, in order.

    Args:
        tensors: by name.
        header: the header of the file that they were read from. While names, dtypes and shapes are unchanged it is
            kept, and the file that is written differs from the one read only where a value does.
        metadata: of a new header, beside ``format``.

    Returns:
        buffers to write one after another; equal tensors always give equal bytes.
    """
    layout = _layout_of(header, tensors) if header is not None else None
    if layout is None:
        header, layout = _new_header(tensors, metadata or {})
    parts: list[Any] = [struct.pack("<Q", len(header)), header]
    parts.extend(memoryview(_flat_bytes(tensors[name])) for name in layout)
    return parts


def _flat_bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _layout_of(header: bytes, tensors: Mapping[str, torch.Tensor]) -> list[str] | None:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    now = {name: (_NAMES.get(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
    if now != {name: (item["dtype"], item["shape"]) for name, item in entries.items()}:
        return None
    return sorted(entries, key=lambda name: tuple(entries[name]["data_offsets"]))


def _new_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    # Widest dtype first keeps every tensor aligned; names break ties, so that equal content gives equal bytes.
    layout = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in layout:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f'tensor "{name}" has dtype {tensor.dtype}, which a checkpoint cannot hold.')
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), layout
