"""A tiny model and a TWN directory for it, side by side: all that an example of the whole path needs."""

from __future__ import annotations

from pathlib import Path

from twn_kernels.testing.ownership import check_writable
from twn_kernels.testing.tiny_directory import write_tiny_model
from twn_kernels.testing.tiny_models import VISION_FAMILIES
from twn_kernels.testing.twn_directory import write_twn_directory

__all__ = ["write_demo_directories"]

_RANKS = {"reasoning": 8, "embedding": 4}
_NUM_QUERIES = 4


def write_demo_directories(directory: str | Path, *, family: str = "qwen3_vl", seed: int = 0) -> tuple[Path, Path]:
    """Write ``base/`` (model, tokenizer, processor) and ``twn/`` (two adapters, gate, queries) into ``directory``.

    Args:
        directory: where; made when missing.
        family: one of :data:`twn_kernels.testing.tiny_models.FAMILIES`.
        seed: of all weights.

    Returns:
        The paths of the base model and of the TWN directory.

    Raises:
        OptionError: there is no such family, or one of the two is there and holds files of somebody else.
        MissingDependency: PEFT, which writes the adapters, is not installed.
    """
    import transformers

    base, twn = (check_writable(Path(directory) / name) for name in ("base", "twn"))
    write_tiny_model(base, family, seed=seed)
    auto = transformers.AutoModelForImageTextToText if family in VISION_FAMILIES else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(base)
    write_twn_directory(twn, model, rank=_RANKS, num_queries=_NUM_QUERIES, seed=seed)
    return base, twn
