"""Images of numbers from real handwritten digits (scikit-learn's ``load_digits``), whole or degraded.

Owns the pools of digit samples and how they become a picture. Two pools never share a sample: the first half of the
data set is training's, the next sixth the gate's, the last third testing's, and in each every third sample of a digit
is for documents and the rest for queries, so that a query never shows the very strokes that it looks for.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from twn_kernels.errors import MissingDependency

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DigitPools", "SIZE", "drawn", "load_pools", "write_png"]

SIZE = 64  # pixels a side: four of the 32-pixel patches that Qwen3-VL reads, one about a digit wide
_DIGIT = 30
_PARTS = {"train": (0, 3), "gate": (3, 4), "test": (4, 6)}  # in sixths of the data set


class DigitPools(NamedTuple):
    """Samples of handwritten digits.

    Attributes:
        images: uint8 ``[samples, 8, 8]``, dark on light.
        places: ``(part, role)``, of ``"train"``, ``"gate"``, ``"test"`` and ``"document"``, ``"query"``, to the places
            in ``images`` of each digit 0 to 9.
    """

    images: np.ndarray
    places: dict[tuple[str, str], list[list[int]]]


def load_pools() -> DigitPools:
    """The pools; always the same.

    Raises:
        MissingDependency: scikit-learn or Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency(
            f"the number task draws the handwritten digits that scikit-learn ships, and {error.name} is not installed. "
            'Run: pip install "twn_kernels[eval]"'
        ) from error
    data = load_digits()
    images = (255 - data.images * (255 / 16)).round().astype("uint8")
    places = {}
    for part, borders in _PARTS.items():
        low, high = (round(len(images) * border / 6) for border in borders)
        by_digit = [[place for place in range(low, high) if data.target[place] == digit] for digit in range(10)]
        places[part, "document"] = [of[::3] for of in by_digit]
        places[part, "query"] = [[place for index, place in enumerate(of) if index % 3] for of in by_digit]
    return DigitPools(images, places)


def drawn(
    number: int,
    pools: DigitPools,
    pool: tuple[str, str],
    choose: random.Random,
    *,
    degraded: bool = False,
    varied: bool = False,
) -> tuple[np.ndarray, list[int]]:
    """A picture of a number from 0 to 99, and the places of the samples that it shows.

    Args:
        number: what to show; below 10 it has one digit.
        pools, pool: where samples come from.
        choose: picks samples, places and damage.
        degraded: turn, blur, cover and speckle it.
        varied: slant and stretch each digit a little, so that few samples make many pictures; for training alone.

    Returns:
        uint8 ``[SIZE, SIZE]``, and one place a digit.
    """
    import numpy as np
    from PIL import Image

    digits = [int(letter) for letter in str(number)]
    samples = [pools.places[pool][digit][int(choose.random() * len(pools.places[pool][digit]))] for digit in digits]
    canvas = Image.new("L", (SIZE, SIZE), 255)
    left = (SIZE - len(digits) * _DIGIT) // 2 + int(choose.random() * 5) - 2
    top = (SIZE - _DIGIT) // 2 + int(choose.random() * 17) - 8
    for index, sample in enumerate(samples):
        digit = Image.fromarray(pools.images[sample]).resize((_DIGIT, _DIGIT), Image.Resampling.BILINEAR)
        digit = _varied(digit, choose) if varied else digit
        canvas.paste(digit, (left + index * _DIGIT, top))
    return (_degraded(canvas, choose) if degraded else np.asarray(canvas)), samples


def _varied(digit, choose: random.Random):
    """A digit slanted, stretched and moved within its square; never turned, blurred or covered, as tests may be."""
    from PIL import Image

    wide, high = (0.85 + 0.3 * choose.random() for _ in range(2))
    slant = 0.4 * choose.random() - 0.2
    right, down = (4 * choose.random() - 2 for _ in range(2))
    middle = _DIGIT / 2
    # Where each pixel of the result is taken from: x' = a x + b y + c, y' = d x + e y + f.
    matrix = (wide, slant, middle * (1 - wide - slant) + right, 0.0, high, middle * (1 - high) + down)
    return digit.transform((_DIGIT, _DIGIT), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=255)


def _degraded(canvas, choose: random.Random) -> np.ndarray:
    import numpy as np
    from PIL import Image, ImageFilter

    turned = canvas.rotate(choose.random() * 24 - 12, Image.Resampling.BILINEAR, fillcolor=255)
    pixels = np.array(turned.filter(ImageFilter.BoxBlur(1)))
    row = int(choose.random() * (SIZE - 4))
    pixels[row : row + 4] = 128  # a bar across it
    for _ in range(SIZE * SIZE // 12):
        place = int(choose.random() * SIZE * SIZE)
        pixels.flat[place] = int(choose.random() * 256)
    return pixels


def write_png(pixels: np.ndarray, path: str | Path) -> None:
    """Write a picture as RGB; the same pixels give the same bytes."""
    from PIL import Image

    Image.fromarray(pixels).convert("RGB").save(path, format="PNG", compress_level=9)
