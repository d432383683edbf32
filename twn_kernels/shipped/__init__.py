"""Trained models that come with the package: small ones, for the demo, for tests, and for a first look at the method.

Owns where they lie and that they are whole. How one was trained and what it can do is said by the card beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from twn_kernels.errors import CheckpointError

__all__ = ["SHIPPED", "ShippedModel", "number_model"]

SHIPPED = ("numbers",)
_NUMBERS = Path(__file__).parent / "numbers"
# One file of each part: a copy that lacks one of them is no model.
_BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")
_TWN_FILES = (
    *("reasoning/adapter_model.safetensors", "embedding/adapter_model.safetensors"),
    *("gate_mlp.safetensors", "queries.safetensors", "twn_config.json"),
)


class ShippedModel(NamedTuple):
    """Where a model lies. ``TWNEmbedder.from_pretrained(*model[:2])`` loads it.

    Attributes:
        base: HuggingFace directory of the backbone.
        twn: TWN directory.
        card: Markdown: data, training, results, limits.
    """

    base: Path
    twn: Path
    card: Path


def number_model() -> ShippedModel:
    """The model of the number task (:mod:`twn_kernels.evaluation.number_task`).

    Raises:
        CheckpointError: this copy of the package was built without it, or lost a part of it.
    """
    model = ShippedModel(_NUMBERS / "base", _NUMBERS / "twn", _NUMBERS / "README.md")
    needed = [*(model.base / name for name in _BASE_FILES), *(model.twn / name for name in _TWN_FILES), model.card]
    absent = [path for path in needed if not path.is_file()]
    if absent:
        raise CheckpointError(
            f'the model "numbers" is not whole in this copy of the package: {len(absent)} of {len(needed)} files are '
            f'missing, the first is "{absent[0]}". Install a wheel or a checkout that holds it, or name a model of '
            "your own."
        )
    return model
