"""What may be embedded, read into chat messages; and a batch of them as tensors that can be taken apart again.

Owns the forms of an input and their errors, each of which begins with the input's index. Pixels are
:mod:`twn_kernels.pipeline.media`'s; templates, tokens and pixel values :mod:`twn_kernels.pipeline.processor`'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twn_kernels.errors import InputError, ShapeError, TWNWarning, did_you_mean, quoted
from twn_kernels.pipeline.extending import extend_rows
from twn_kernels.pipeline.media import (
    DEFAULT_MAX_IMAGE_PIXELS,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_url,
    load_image,
    load_video,
)

__all__ = ["EncodedBatch", "Message", "Part", "as_list", "parse_input"]

ROLES = ("system", "user", "assistant")
# Order of the parts that a dict of modalities becomes, and the names that each modality goes by. A page is an image.
_MODALITIES = {"video": ("video", "videos"), "image": ("image", "images", "page", "pages"), "text": ("text", "texts")}
_KIND_OF = {name: kind for kind, names in _MODALITIES.items() for name in names}
_PART_FIELDS = {
    "text": ("text",),
    "image": ("image", "path", "url"),
    "video": ("video", "path", "url"),
}


class Part(NamedTuple):
    """A piece of a message: of kind ``"text"`` a str, ``"image"`` an RGB PIL image, ``"video"`` a Video."""

    kind: str
    value: Any


class Message(NamedTuple):
    """One turn: a role of :data:`ROLES` and its parts in order."""

    role: str
    parts: list[Part]


class _Reading(NamedTuple):
    """Where we are, for messages, and the limits of media."""

    where: str
    max_image_pixels: int
    fps: float
    max_frames: int

    def at(self, place: str) -> _Reading:
        return self._replace(where=f"{self.where}{place}")


def as_list(inputs: Any) -> tuple[list, bool]:
    """The inputs as a list, and whether ``inputs`` was a single one.

    A single input is a string, a path, an image, an array or tensor of numbers, a dict, or a list of chat messages. Any
    other sequence or iterable (a tuple, an array of strings, a column of a table, a generator) holds inputs.

    Raises:
        InputError: ``inputs`` is None, a set, or nothing that holds inputs.
    """
    if isinstance(inputs, str | bytes | os.PathLike | Mapping | Tensor) or _is_image(inputs):
        return [inputs], True
    if isinstance(inputs, list | tuple):
        return ([inputs], True) if _is_chat(inputs) else (list(inputs), False)
    dtype = getattr(inputs, "dtype", None)
    if hasattr(inputs, "ndim") and getattr(dtype, "kind", "O") in "biuf":
        return [inputs], True
    if isinstance(inputs, Iterable) and not isinstance(inputs, set | frozenset):
        return list(inputs), False
    hint = " A set has no order." if isinstance(inputs, set | frozenset) else ""
    raise InputError(f"inputs must be one input or a list of them, got {type(inputs).__name__}.{hint}")


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "getbands")


def _is_chat(value: Sequence) -> bool:
    return len(value) > 0 and all(isinstance(entry, Mapping) and "role" in entry for entry in value)


def parse_input(
    value: Any,
    index: int,
    *,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    fps: float = 2.0,
    max_frames: int = 768,
) -> list[Message]:
    """Read one input into chat messages.

    Args:
        value: a string; an image (``pathlib.Path``, PIL image, array ``[height, width, 3]``, tensor
            ``[3, height, width]``); a video (``Path``, array ``[frames, height, width, 3]``, tensor
            ``[frames, 3, height, width]``); a dict of modalities with ``text``, ``image`` (or ``page``), ``video``,
            each one or a list, which become one user turn of videos, images and texts in this order; or chat messages,
            dicts of ``role`` and ``content``, the content a string or a list of ``{"type": "text", "text": ...}``,
            ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``.

            A string is an image or a video where it ends in a known suffix and names an existing file; as a web address
            with such a suffix it is refused; otherwise it is text. ``{"text": ...}`` is always text, and strings under
            ``"image"`` and ``"video"`` are always paths.
        index: its place among the inputs; each message of an error begins with it.
        max_image_pixels: larger images are refused before they are decoded.
        fps, max_frames: as :func:`twn_kernels.pipeline.media.load_video` takes them.

    Raises:
        InputError: the input is empty, of no known form, or its media cannot be read.
        MissingDependency: a library that reads its media is absent.
    """
    reading = _Reading(f"input {index}: ", max_image_pixels, fps, max_frames)
    if isinstance(value, str):
        return [Message("user", [_from_string(value, reading)])]
    if isinstance(value, Mapping):
        return [Message("user", _from_dict(value, reading))]
    if isinstance(value, list | tuple):
        return _from_chat(value, reading)
    if isinstance(value, os.PathLike):
        kind = "video" if Path(value).suffix.lower() in VIDEO_SUFFIXES else "image"
    elif getattr(value, "ndim", None) == 4:
        kind = "video"
    elif _is_image(value) or isinstance(value, Tensor) or type(value).__module__ == "numpy":
        kind = "image"
    else:
        raise InputError(
            f"{reading.where}expected a string, an image, a video, a dict of modalities or chat messages; "
            f"got {type(value).__name__}."
        )
    return [Message("user", [_media(kind, value, reading.at(kind))])]


def _media(kind: str, value: Any, reading: _Reading) -> Part:
    if kind == "image":
        return Part(kind, load_image(value, reading.where, reading.max_image_pixels))
    video = load_video(value, reading.where, reading.max_image_pixels, fps=reading.fps, max_frames=reading.max_frames)
    return Part(kind, video)


def _text(value: Any, reading: _Reading) -> Part:
    if not isinstance(value, str):
        raise InputError(f"{reading.where} must be a string, got {type(value).__name__}.")
    if not value.strip():
        raise InputError(f"{reading.where} is {'empty' if not value else 'only white space'}.")
    return Part("text", value)


def _from_string(value: str, reading: _Reading) -> Part:
    suffix = Path(value.split("?")[0] if is_url(value) else value).suffix.lower() if "\n" not in value else ""
    kind = "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None
    if kind is None:
        return _text(value, reading.at("text"))
    if is_url(value) and not any(letter.isspace() for letter in value):
        return _media(kind, value, reading.at(kind))
    try:
        exists = Path(value).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user: no path
        exists = False
    if exists:
        return _media(kind, value, reading.at(kind))
    if not any(letter.isspace() for letter in value):
        warnings.warn(
            f'{reading.where}"{value}" names no file and is embedded as text. Give {{"{kind}": ...}} for a file, or '
            f'{{"text": ...}} to say that it is text.',
            TWNWarning,
            stacklevel=2,
        )
    return _text(value, reading.at("text"))


def _from_dict(value: Mapping, reading: _Reading) -> list[Part]:
    if not value:
        raise InputError(f"{reading.where}the dict is empty; expected one or more of {quoted(_MODALITIES)}.")
    unknown = [key for key in value if key not in _KIND_OF]
    if unknown:
        hint = did_you_mean(unknown[0], _KIND_OF)
        if {"role", "content"} & set(value):
            hint = " A chat message comes in a list: [{...}]."
        raise InputError(f'{reading.where}unknown key "{unknown[0]}"; expected {quoted(_MODALITIES)}.{hint}')
    parts = []
    for kind, names in _MODALITIES.items():
        for name in [name for name in names if name in value]:
            parts += _entries(kind, name, value[name], reading)
    if not parts:
        raise InputError(f"{reading.where}every value of the dict is empty.")
    return parts


def _entries(kind: str, name: str, value: Any, reading: _Reading) -> list[Part]:
    """One modality of a dict: one entry or a list. None and an empty list stand for nothing."""
    if value is None:
        return []
    entries = [value]
    if isinstance(value, list | tuple) and not (kind == "video" and not _holds_videos(value)):
        entries = list(value)
    parts = []
    for number, entry in enumerate(entries):
        place = reading.at(f"{name} {number}" if len(entries) > 1 else name)
        parts.append(_text(entry, place) if kind == "text" else _media(kind, entry, place))
    return parts


def _holds_videos(value: Sequence) -> bool:
    """Whether a list under "video" holds videos; a list of images or of paths of images is one video's frames."""
    if not value:
        return False
    first = value[0]
    if isinstance(first, str | os.PathLike):
        return Path(first).suffix.lower() not in IMAGE_SUFFIXES
    return isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 4


def _from_chat(value: Sequence, reading: _Reading) -> list[Message]:
    if not value:
        raise InputError(f"{reading.where}the list is empty; expected chat messages.")
    messages = []
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping) or "role" not in entry:
            got = f"a dict with {quoted(entry)}" if isinstance(entry, Mapping) else type(entry).__name__
            raise InputError(
                f'{reading.where}a list must hold chat messages, dicts of "role" and "content"; item {number} is '
                f'{got}. Several images are {{"image": [...]}}, frames {{"video": [...]}}.'
            )
        messages.append(_message(entry, reading.at(f"message {number}")))
    return messages


def _message(entry: Mapping, reading: _Reading) -> Message:
    role = entry["role"]
    if role not in ROLES:
        raise InputError(
            f'{reading.where} has role "{role}"; expected one of {quoted(ROLES)}.{did_you_mean(role, ROLES)}'
        )
    unknown = sorted(set(entry) - {"role", "content"}, key=str)
    if unknown:
        hint = did_you_mean(unknown[0], ("role", "content"))
        raise InputError(f'{reading.where} has unknown key "{unknown[0]}"; expected "role", "content".{hint}')
    content = entry.get("content")
    if isinstance(content, str):
        return Message(role, [_text(content, reading.at(", content"))])
    if not isinstance(content, list | tuple):
        got = "none" if content is None else type(content).__name__
        raise InputError(f"{reading.where}, content must be a string or a list of parts, got {got}.")
    if not content:
        raise InputError(f"{reading.where}, content is empty.")
    return Message(role, [_part(part, reading.at(f", part {number}")) for number, part in enumerate(content)])


def _part(part: Any, reading: _Reading) -> Part:
    if not isinstance(part, Mapping) or part.get("type") not in _PART_FIELDS:
        got = f'type "{part.get("type")}"' if isinstance(part, Mapping) else type(part).__name__
        hint = did_you_mean(part.get("type"), _PART_FIELDS) if isinstance(part, Mapping) else ""
        raise InputError(f'{reading.where} must be a dict of "type" {quoted(_PART_FIELDS)}; got {got}.{hint}')
    kind = part["type"]
    fields = [name for name in part if name != "type"]
    if len(fields) != 1 or fields[0] not in _PART_FIELDS[kind]:
        raise InputError(
            f'{reading.where} of type "{kind}" must have exactly one of {quoted(_PART_FIELDS[kind])}; '
            f"got {quoted(fields)}."
        )
    value = part[fields[0]]
    return _text(value, reading) if kind == "text" else _media(kind, value, reading)


class EncodedBatch:
    """Prompts as tensors, and which of the media belong to which row.

    Attributes:
        tensors: ``input_ids`` and ``attention_mask`` int64 ``[batch, tokens]``, left-padded; where the processor gives
            them ``mm_token_type_ids`` ``[batch, tokens]``, ``pixel_values`` ``[patches of all images, ...]``,
            ``image_grid_thw`` ``[images, 3]`` and the same for videos.
        images_per_row, videos_per_row: counts; media are in the order of the rows.
        pad_id: token id of the padding.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        images_per_row: Sequence[int],
        videos_per_row: Sequence[int],
        *,
        pad_id: int = 0,
    ) -> None:
        self.tensors = dict(tensors)
        self.images_per_row, self.videos_per_row = list(images_per_row), list(videos_per_row)
        self.pad_id = pad_id
        rows = self.tensors["input_ids"].shape[0]
        if not rows == len(self.images_per_row) == len(self.videos_per_row):
            raise ShapeError(
                f"images_per_row and videos_per_row must have one count for each of {rows} rows, got "
                f"{len(self.images_per_row)} and {len(self.videos_per_row)}."
            )

    def __len__(self) -> int:
        return len(self.images_per_row)

    def select(self, rows: Sequence[int]) -> EncodedBatch:
        """These rows, in this order, with their media; padding that no row needs is dropped."""
        rows = [int(row) for row in rows]
        out_of_range = [row for row in rows if not 0 <= row < len(self)]
        if out_of_range:
            raise ShapeError(f"rows must be from 0 to {len(self) - 1}, got {out_of_range}.")
        mask = self.tensors["attention_mask"][rows]
        used = mask.any(0).nonzero()
        first = int(used[0]) if len(used) else 0
        per_row = {"image": self.images_per_row, "video": self.videos_per_row}
        chosen = {kind: _places(counts, rows) for kind, counts in per_row.items()}
        out = {}
        for name, value in self.tensors.items():
            kind = _medium_of(name)
            if kind is None:
                out[name] = value[rows][:, first:] if isinstance(value, Tensor) and value.dim() > 1 else value
            elif chosen[kind]:
                out[name] = self._media(name, value, kind, chosen[kind])
        counts = [[per_row[kind][row] for row in rows] for kind in ("image", "video")]
        return EncodedBatch(out, *counts, pad_id=self.pad_id)

    def _media(self, name: str, value: Any, kind: str, chosen: Sequence[int]) -> Any:
        grid = self.tensors.get(f"{kind}_grid_thw")
        total = sum(self.images_per_row if kind == "image" else self.videos_per_row)
        if not isinstance(value, Tensor):
            return [value[place] for place in chosen]
        if grid is not None and name.startswith("pixel_values"):
            pieces = value.split(grid.prod(1).tolist())
            return torch.cat([pieces[place] for place in chosen])
        if value.shape[0] != total:
            raise ShapeError(
                f"{name} has {value.shape[0]} entries for {total} {kind}s, and nothing says which belong together; "
                "this processor's batches cannot be split. Use batch_size=1."
            )
        return value[list(chosen)]

    def extended(self, rows: Sequence[int], suffixes: Sequence[Sequence[int]]) -> EncodedBatch:
        """These rows with the text tokens ``suffixes[i]`` after the ``i``-th of them."""
        part = self.select(rows)
        part.tensors = extend_rows(part.tensors, [list(suffix) for suffix in suffixes], self.pad_id)
        return part


def _places(counts: Sequence[int], rows: Sequence[int]) -> list[int]:
    starts = [sum(counts[:row]) for row in rows]
    return [place for row, start in zip(rows, starts, strict=True) for place in range(start, start + counts[row])]


def _medium_of(name: str) -> str | None:
    if "video" in name or name == "second_per_grid_ts":
        return "video"
    return "image" if name.startswith(("pixel", "image")) else None
