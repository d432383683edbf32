"""Images and videos as RGB PIL images, from whatever people hold them in.

Owns decoding, orientation, alpha, bit depths, and the refusal of what cannot be an image; what a model's processor does
with the result is :mod:`twn_kernels.pipeline.processor`'s. Nothing is fetched from the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from twn_kernels.errors import InputError, MissingDependency

__all__ = [
    "DEFAULT_MAX_IMAGE_PIXELS",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Video",
    "existing_file",
    "is_url",
    "load_image",
    "load_video",
]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
# A 64 Mpx camera frame; decoded it takes 192 MB.
DEFAULT_MAX_IMAGE_PIXELS = 64_000_000

_WANTED = "a path, a PIL image, a numpy array [height, width, 3] or [height, width], or a tensor [3, height, width]"


class Video(NamedTuple):
    """Frames of one size and when they were taken: frame ``i`` is number ``indices[i]`` at ``fps`` frames a second."""

    frames: list
    fps: float
    indices: list[int]


def is_url(value: Any) -> bool:
    """Whether ``value`` is a string that names something on the web."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def load_image(value: Any, where: str, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS):
    """An RGB PIL image.

    Orientation from EXIF is applied, alpha is laid over white, 16-bit values are scaled to 8 bits, and of an animation
    the first frame is taken.

    Args:
        value: a path (str or ``Path``); a PIL image; a numpy array ``[height, width]`` or
            ``[height, width, 1, 3 or 4]``; a torch tensor ``[height, width]`` or ``[1, 3 or 4, height, width]``.
            Integers are 0 to 255 (uint16: to 65535), floats 0 to 1.
        where: how a message begins, such as ``input 3: image``.
        max_pixels: larger images are refused, files before they are decoded.

    Raises:
        InputError: the value is no image, damaged, empty or too large.
        MissingDependency: Pillow is not installed.
    """
    pil = _pil()
    if isinstance(value, str | os.PathLike):
        return _from_file(value, where, max_pixels)
    if isinstance(value, pil.Image):
        _check_size(value.size, where, max_pixels)
        return _rgb(value, where)
    array = _as_array(value)
    if array is not None:
        return _from_array(array, where, max_pixels, channels_first=_is_tensor(value))
    hint = " Decode bytes first: PIL.Image.open(io.BytesIO(data))." if isinstance(value, bytes | bytearray) else ""
    raise InputError(f"{where} must be {_WANTED}; got {type(value).__name__}.{hint}")


def _pil():
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("images need Pillow, which is not installed. Run: pip install pillow") from error
    return Image


def _from_file(value: str | os.PathLike, where: str, max_pixels: int):
    image_module = _pil()
    path = existing_file(value, where)
    try:
        with image_module.open(path) as image:
            _check_size(image.size, f'{where} "{path}"', max_pixels)
            image.load()
            return _rgb(image, f'{where} "{path}"')
    except InputError:
        raise
    except image_module.DecompressionBombError as error:
        raise InputError(f'{where} "{path}" is larger than Pillow opens at all: {error}') from None
    except image_module.UnidentifiedImageError:
        found = f"{path.stat().st_size} bytes"
        raise InputError(f'{where} "{path}" is not an image of a format that Pillow reads ({found}).') from None
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise InputError(f'{where} "{path}" is damaged or truncated: {error}') from error


def existing_file(value: str | os.PathLike, where: str) -> Path:
    """The path, if a file is there.

    Raises:
        InputError: it is a URL, or no file is there.
    """
    if is_url(value):
        raise InputError(f'{where} "{value}" is not fetched; download it first and give its path.')
    text = os.fspath(value)
    if isinstance(text, str) and text.startswith("data:"):
        raise InputError(f"{where} is a data: URI, which is not decoded; give a path or a PIL image.")
    try:
        path = Path(os.fsdecode(text)).expanduser()
        if path.is_file():
            return path
        found = "is a directory" if path.is_dir() else "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        found = f"is no path: {error}"
    raise InputError(f'{where} "{os.fsdecode(text)[:200]}" {found}; expected a file.')


def _check_size(size: tuple[int, int], where: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{where} is empty: {width} x {height} pixels.")
    if width * height > max_pixels:
        raise InputError(
            f"{where} has {width} x {height} = {width * height:,} pixels; at most {max_pixels:,} are decoded. "
            "Make it smaller, or raise max_image_pixels."
        )


def _rgb(image, where: str):
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(image) or image
    except Exception:
        pass
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_array(_deep_values(image, where), where, image.width * image.height, channels_first=False)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "RGB":
        return image.copy()
    try:
        return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"{where} has mode {image.mode}, which does not convert to RGB: {error}") from error


def _deep_values(image, where: str):
    """uint16 or float values of an image of more than 8 bits; Pillow's own conversion would clip them to 255."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F":
        return values
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(f"{where} has mode {image.mode} and values from {low} to {high}; expected 0 to 65535.")
    return values.astype(np.uint16)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _as_array(value: Any):
    """A numpy array of the same values, or None for what is neither array nor tensor."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    if _is_tensor(value):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return None


def _from_array(array, where: str, max_pixels: int, *, channels_first: bool):
    import numpy as np

    shape, kind = list(array.shape), "a tensor" if channels_first else "an array"
    if array.ndim == 3:
        channels = shape[0] if channels_first else shape[2]
        if channels not in (1, 3, 4):
            wanted = "[3, height, width]" if channels_first else "[height, width, 3]"
            other = shape[2] if channels_first else shape[0]
            turn = "permute(2, 0, 1)" if channels_first else "transpose(1, 2, 0)"
            fix = f" Turn it with .{turn}." if other in (1, 3, 4) else ""
            raise InputError(f"{where} must be {kind} {wanted} or [height, width], got {shape}.{fix}")
        array = array.transpose(1, 2, 0) if channels_first else array
        array = array[:, :, 0] if channels == 1 else array
    elif array.ndim != 2:
        wanted = "[3, height, width]" if channels_first else "[height, width, 3]"
        raise InputError(f"{where} must be {kind} {wanted} or [height, width], got {shape}.")
    _check_size((array.shape[1], array.shape[0]), where, max_pixels)
    image = _pil().fromarray(np.ascontiguousarray(_bytes(array, where)))
    return _rgb(image, where)


def _bytes(array, where: str):
    """The values as uint8."""
    import numpy as np

    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{where} holds NaN or infinity; expected finite values from 0 to 1.")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise InputError(
                f"{where} holds floats from {low:g} to {high:g}; expected 0 to 1. "
                "Scale them, or give uint8 from 0 to 255."
            )
        return np.round(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype == np.uint16:
        return np.round(array / 257).astype(np.uint8)
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise InputError(f"{where} holds integers from {low} to {high}; expected 0 to 255 (uint16: to 65535).")
        return array.astype(np.uint8)
    raise InputError(f"{where} has dtype {array.dtype}; expected uint8, uint16 or floats from 0 to 1.")


def load_video(
    value: Any, where: str, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS, *, fps: float = 2.0, max_frames: int = 768
) -> Video:
    """Frames of a video as RGB PIL images.

    Args:
        value: a list of frames, each as :func:`load_image` takes it; an array ``[frames, height, width, 3]``; a
            tensor ``[frames, 3, height, width]``; or the path of a file, which is sampled at ``fps`` and at most
            ``max_frames`` times.
        where: how a message begins.
        max_pixels: of one frame.
        fps: frames a second that a file is sampled at, and that given frames are taken to be.
        max_frames: more given frames are refused, not dropped.

    Raises:
        InputError: the value is no video, damaged, empty, too large, or its frames differ in size.
        MissingDependency: a file is given and neither ``av`` nor ``decord`` is installed.
    """
    if isinstance(value, str | os.PathLike):
        from twn_kernels.pipeline.videofile import read_video

        return read_video(existing_file(value, where), where, max_pixels, fps=fps, max_frames=max_frames)
    if not isinstance(value, list | tuple):
        array = _as_array(value)
        if array is None or array.ndim != 4:
            got = type(value).__name__ if array is None else f"{type(value).__name__} {list(value.shape)}"
            wanted = "a list of frames, an array [frames, height, width, 3], a tensor [frames, 3, height, width]"
            raise InputError(f"{where} must be {wanted} or a path; got {got}.")
    if len(value) == 0:
        raise InputError(f"{where} has no frames.")
    if len(value) > max_frames:
        raise InputError(f"{where} has {len(value)} frames; the model takes {max_frames} at most. Sample them first.")
    frames = [load_image(frame, f"{where}, frame {number}", max_pixels) for number, frame in enumerate(value)]
    for number, frame in enumerate(frames):
        if frame.size != frames[0].size:
            sizes = f"frame 0 has {frames[0].width} x {frames[0].height}, frame {number} {frame.width} x {frame.height}"
            raise InputError(f"{where}: frames must be of one size; {sizes}.")
    return Video(frames, fps, list(range(len(frames))))
