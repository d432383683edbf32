"""What the sections of the demo share: the model, its embedder, the data, and PEFT's view of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from twn_kernels.errors import OptionError
from twn_kernels.pipeline import TWNEmbedder
from twn_kernels.settings import EMBEDDING, REASONING
from twn_kernels.shipped import ShippedModel

if TYPE_CHECKING:
    from twn_kernels.evaluation import Split

__all__ = ["SPLIT", "Setting", "device"]

SPLIT = "test"


def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Setting:
    """One run of the demo.

    Attributes:
        model: directories.
        embedder: the model in fp32, patched.
        folder: the number task.
        split: its testing queries and documents.
        names: what a result calls model and checkpoint.
    """

    model: ShippedModel
    embedder: TWNEmbedder
    folder: Path
    split: Split
    names: Mapping[str, str]

    @classmethod
    def load(cls, model: ShippedModel, folder: Path, queries: int, names: Mapping[str, str] | None) -> Setting:
        """Make the data in ``folder`` and load the model.

        Raises:
            OptionError: the model thinks in a way that the comparison with PEFT does not know.
        """
        from twn_kernels.evaluation import read_split
        from twn_kernels.evaluation.number_task import make_number_task

        embedder = TWNEmbedder.from_pretrained(model.base, model.twn, dtype="float32", device=device())
        config = embedder.config
        if config.graph != "shared_kv":
            raise OptionError(
                'model must have graph "shared_kv" in its twn_config.json, which the demo compares with PEFT; got '
                f'"{config.graph}".'
            )
        make_number_task(folder, queries=queries, train_queries=1, gate_queries=1)
        told = {"model": str(model.base), "checkpoint": str(model.twn)} if names is None else names
        return cls(model, embedder, folder, read_split(folder, SPLIT), told)

    def base_model(self) -> torch.nn.Module:
        """The backbone anew, in fp32, without adapters."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.model.base, dtype=torch.float32).to(device()).eval()

    def peft_model(self) -> torch.nn.Module:
        """The backbone anew as a ``PeftModel`` with both adapters."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.base_model(), self.model.twn / REASONING, adapter_name=REASONING)
        model.load_adapter(self.model.twn / EMBEDDING, adapter_name=EMBEDDING)
        return model.eval()

    def batch(self, inputs: list) -> dict[str, torch.Tensor]:
        """What a model reads for some inputs: ids and mask ``[inputs, tokens]``, left-padded, and media."""
        processor = self.embedder.processor
        tensors = processor.batch([processor.parse(value, place) for place, value in enumerate(inputs)]).tensors
        return {name: value.to(device()) for name, value in tensors.items()}

    def texts(self, count: int) -> list[str]:
        """The texts of the first queries that have no image."""
        return [entry.text for entry in self.split.queries if entry.image is None][:count]
