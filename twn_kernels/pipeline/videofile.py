"""Frames of a video file, by whichever decoder is installed."""

from __future__ import annotations

import importlib
from pathlib import Path

from twn_kernels.errors import InputError, MissingDependency
from twn_kernels.pipeline.media import Video, load_image

__all__ = ["read_video", "sampled"]


def sampled(total: int, source_fps: float, fps: float, max_frames: int) -> list[int]:
    """Evenly spaced frame numbers: ``fps`` of them a second, at least 1 and at most ``max_frames``."""
    count = max(1, min(total, max_frames, round(total / source_fps * fps)))
    if count == 1:
        return [0]
    return [round(step * (total - 1) / (count - 1)) for step in range(count)]


def read_video(path: Path, where: str, max_pixels: int, *, fps: float, max_frames: int) -> Video:
    """Sample a video file.

    Args:
        path: an existing file.
        where: how a message begins.
        max_pixels: of one frame.
        fps, max_frames: as :func:`sampled` takes them.

    Raises:
        InputError: the file is damaged or holds no video.
        MissingDependency: neither ``av`` nor ``decord`` is installed.
    """
    for name, read in (("av", _with_av), ("decord", _with_decord)):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        try:
            frames, source_fps, indices = read(library, path, fps, max_frames)
        except Exception as error:  # the decoders' errors share no class
            raise InputError(f'{where} "{path}" cannot be read as a video: {error}') from error
        images = [load_image(frame, f'{where} "{path}"', max_pixels) for frame in frames]
        return Video(images, source_fps, indices)
    raise MissingDependency(
        f'{where} "{path}" needs a video decoder, and none is installed. Run: pip install av   '
        "Or give a list of frames."
    )


def _with_av(av, path: Path, fps: float, max_frames: int) -> tuple[list, float, list[int]]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video stream")
        stream = container.streams.video[0]
        source_fps = float(stream.average_rate or fps)
        total = stream.frames or sum(1 for _ in container.decode(video=0))
    if not total:
        raise ValueError("it holds no frames")
    wanted = sampled(total, source_fps, fps, max_frames)
    chosen, frames, found = set(wanted), [], []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in chosen:
                frames.append(frame.to_ndarray(format="rgb24"))
                found.append(number)
            if number >= wanted[-1]:
                break
    if not frames:
        raise ValueError("none of its frames decodes")
    return frames, source_fps, found


def _with_decord(decord, path: Path, fps: float, max_frames: int) -> tuple[list, float, list[int]]:
    reader = decord.VideoReader(str(path))
    source_fps = float(reader.get_avg_fps() or fps)
    wanted = sampled(len(reader), source_fps, fps, max_frames)
    return list(reader.get_batch(wanted).asnumpy()), source_fps, wanted
