"""The embedder: inputs, gate, cache, decode loop, scheduler. Imports transformers only when it loads something."""

from twn_kernels.pipeline.embedder import TWNEmbedder
from twn_kernels.pipeline.options import EncodeDetails

__all__ = ["EncodeDetails", "TWNEmbedder"]
