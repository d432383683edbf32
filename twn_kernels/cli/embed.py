"""``twn-kernels embed``: from files to inputs, and from vectors and details to files.

Owns the file formats and their errors (with line numbers) and writes nothing until everything is embedded; the two
output files then appear whole or not at all. Embedding itself is the pipeline's.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from twn_kernels.errors import InputError, OptionError, quoted

__all__ = ["IMAGE_SUFFIXES", "Source", "read_inputs", "run", "write_outputs"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FORMATS = (".safetensors", ".npy")
# Keys of an object whose strings are paths, taken relative to the file that names them.
_MEDIA = ("image", "images", "page", "pages", "path", "video", "videos")


class Source(NamedTuple):
    """One input and where it came from, for the details."""

    value: dict | list
    name: str
    line: int | None = None


def run(arguments: argparse.Namespace, device, checkpoint_options: dict, print_json: Callable) -> None:
    """Embed what the arguments name and report what was written.

    Args:
        arguments: of the subcommand.
        device: a torch device, or None for the first GPU, else the CPU.
        checkpoint_options: keywords of ``load_checkpoint``.
        print_json: prints the report where JSON was asked for.

    Raises:
        InputError: an input file is missing, malformed or empty.
        OptionError: an output file exists or cannot be.
    """
    out, details_path = _outputs(arguments)
    sources = read_inputs(arguments.inputs, whole_files=arguments.whole_files)
    vectors, details = _encode(_embedder(arguments, device, checkpoint_options), sources, arguments)
    _require_finite(vectors, sources)
    rows = _rows(sources, details)
    write_outputs(out, details_path, vectors, rows)
    thought = sum(row["thought"] for row in rows)
    report = {
        "vectors": str(out),
        "details": str(details_path),
        "inputs": len(sources),
        "dimensions": int(vectors.shape[1]),
        "thought": thought,
    }
    if arguments.json:
        print_json(report)
    else:
        counted = "1 input" if len(sources) == 1 else f"{len(sources)} inputs"
        print(f"{counted}, {vectors.shape[1]} dimensions, {thought} thought: {out} and {details_path}")


def _outputs(arguments: argparse.Namespace) -> tuple[Path, Path]:
    out = Path(arguments.out).expanduser()
    if out.suffix not in _FORMATS:
        raise OptionError(f'--out must end in {" or ".join(_FORMATS)}, got "{out.name}".')
    if not out.parent.is_dir():
        raise OptionError(f'--out: the directory "{out.parent}" does not exist. Create it first.')
    details = out.with_suffix(".jsonl")
    for path in (out, details):
        if path.is_dir():
            raise OptionError(f'--out: "{path}" is a directory. Name another file.')
        if path.exists() and not arguments.overwrite:
            raise OptionError(f'--out: "{path}" exists. Name another file, or replace it with --overwrite.')
    if details.resolve() in [Path(name).expanduser().resolve() for name in arguments.inputs]:
        raise OptionError(f'--out: the details would replace the input "{details}". Name another file.')
    return out, details


def _embedder(arguments: argparse.Namespace, device, checkpoint_options: dict):
    from twn_kernels.checkpoint import load_checkpoint
    from twn_kernels.pipeline import TWNEmbedder

    if arguments.quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return TWNEmbedder.from_pretrained(
        arguments.model,
        load_checkpoint(arguments.checkpoint, **checkpoint_options),
        dtype=None if arguments.dtype == "auto" else arguments.dtype,
        device=device,
        impl=arguments.impl,
        decode=arguments.decode,
        revision=arguments.model_revision,
        local_files_only=arguments.local_files_only,
    )


def _encode(embedder, sources: list[Source], arguments: argparse.Namespace) -> tuple:
    try:
        return embedder.encode(
            [source.value for source in sources],
            prompt=arguments.prompt,
            batch_size=arguments.batch_size,
            show_progress_bar=not arguments.quiet,
            truncate_dim=arguments.truncate_dim,
            think=arguments.think,
            think_threshold=arguments.threshold,
            max_think_tokens=arguments.max_think_tokens,
            return_details=True,
        )
    except InputError as error:
        # The embedder counts inputs; who wrote the files wants the file and the line.
        found = re.match(r"input (\d+): ", str(error))
        if found is None:
            raise
        raise InputError(f"{_place(sources[int(found[1])])}: {str(error)[found.end() :]}") from error


def _require_finite(vectors, sources: list[Source]) -> None:
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise InputError(
            f"{len(bad)} of {len(vectors)} vectors are not finite (the first: {_place(sources[bad[0]])}); nothing was "
            "written. Look for NaN in the model and the checkpoint, or try --dtype float32."
        )


def _place(source: Source) -> str:
    return f'"{source.name}"' + (f", line {source.line}" if source.line is not None else "")


def read_inputs(paths: list[str], *, whole_files: bool = False) -> list[Source]:
    """Read every input that the paths name, in order.

    Args:
        paths: JSONL files, text files, images, or folders of images.
        whole_files: make each text file one input rather than each of its lines.

    Returns:
        The inputs; blank lines of text files are left out.

    Raises:
        InputError: a path is missing, unreadable, malformed (with its line) or holds nothing.
    """
    sources = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = _from_folder(path)
        elif not path.exists():
            raise InputError(f'input "{name}" does not exist.')
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found = [Source({"image": str(path)}, str(path))]
        elif path.suffix.lower() == ".jsonl":
            found = _from_jsonl(path)
        else:
            found = _from_text(path, whole_files)
        if not found:
            what = "images" if path.is_dir() else "inputs"
            raise InputError(f'"{name}" holds no {what}; expected at least one.')
        sources += found
    return sources


def _from_folder(folder: Path) -> list[Source]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if images and len(images) < len(files):
        others = len(files) - len(images)
        print(f"twn-kernels embed: {folder}: {others} files that are no images are left out", file=sys.stderr)
    return [Source({"image": str(path)}, str(path)) for path in images]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        known = f"Images are known by their suffix: {quoted(IMAGE_SUFFIXES)}."
        raise InputError(f'"{path}" is not UTF-8 text (byte {error.start}). {known}') from None
    except OSError as error:
        raise InputError(f'"{path}" cannot be read: {error.strerror or error}.') from error


def _from_text(path: Path, whole_file: bool) -> list[Source]:
    text = _read(path)
    if whole_file:
        return [Source({"text": text}, str(path))] if text.strip() else []
    # Only real newlines end an input: str.splitlines would also split at separators inside a sentence.
    lines = text.replace("\r\n", "\n").split("\n")
    return [Source({"text": line}, str(path), number) for number, line in enumerate(lines, 1) if line.strip()]


def _from_jsonl(path: Path) -> list[Source]:
    sources = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _resolved(_parsed(line, path, number), path.parent)
        except RecursionError:
            raise InputError(f'"{path}", line {number}: nested too deeply.') from None
        sources.append(Source(value, str(path), number))
    return sources


def _parsed(line: str, path: Path, number: int):
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f'"{path}", line {number}: not JSON: {error.msg} at column {error.colno}.') from None
    if surrogate := re.search(r"[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        code = f"\\u{ord(surrogate[0]):04x}"
        raise InputError(f'"{path}", line {number}: {code} is half of a surrogate pair, which is no character.')
    _check_value(value, path, number)
    return value


def _check_value(value, path: Path, number: int) -> None:
    where = f'"{path}", line {number}'
    if not isinstance(value, (str, dict, list)):
        raise InputError(f"{where}: expected a string, an object of modalities or a list of messages, got {value!r}.")
    if not value or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: the input is empty.")
    if isinstance(value, list) and not all(isinstance(entry, dict) and "role" in entry for entry in value):
        raise InputError(f'{where}: a list must hold chat messages, each an object with "role" and "content".')


def _resolved(value, folder: Path):
    """The same input: a string is text, and relative media paths start at the folder of the file that names them."""
    if isinstance(value, str):
        return {"text": value}  # also where it names a file or an address: which lines do would be chance
    return _located(value, folder)


def _located(value, folder: Path):
    if isinstance(value, list):
        return [_located(entry, folder) for entry in value]
    if not isinstance(value, dict):
        return value
    return {key: _local(entry, folder) if key in _MEDIA else _located(entry, folder) for key, entry in value.items()}


def _local(value, folder: Path):
    if isinstance(value, list):
        return [_local(entry, folder) for entry in value]
    if not isinstance(value, str) or "://" in value or value.startswith(("data:", "~")):
        return value
    return str(folder / value)


def _rows(sources: list[Source], details: list) -> list[dict]:
    rows = []
    for index, (source, detail) in enumerate(zip(sources, details, strict=True)):
        fields = dataclasses.asdict(detail)
        rows.append({"index": index, "source": source.name, "line": source.line, **fields})
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                rows[-1][name] = str(value)  # JSON has no word for it
    return rows


def write_outputs(out: Path, details_path: Path, vectors, rows: list[dict]) -> None:
    """Write both files beside their final names and then move them there.

    Args:
        out: ``.safetensors`` (one tensor, ``embeddings``) or ``.npy``.
        details_path: JSONL, one line an input in the order of the vectors.
        vectors: fp32 ``[inputs, dimensions]``, a numpy array.
        rows: one dict an input, ready for JSON.

    Raises:
        InputError: a file cannot be written.
    """
    staged = [path.with_name(f".{path.name}.{os.getpid()}") for path in (out, details_path)]
    try:
        for target in (out, details_path):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{target} is a directory")
        with open(staged[0], "wb") as file:
            file.write(_encoded(out.suffix, vectors))
        with open(staged[1], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for path, target in zip(staged, (out, details_path), strict=True):
            os.replace(path, target)
    except OSError as error:
        raise InputError(f'"{out}" cannot be written: {error.strerror or error}.') from error
    finally:
        for path in staged:
            path.unlink(missing_ok=True)


def _encoded(suffix: str, vectors) -> bytes:
    if suffix == ".safetensors":
        from safetensors.numpy import save

        return save({"embeddings": vectors})
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    return buffer.getvalue()
