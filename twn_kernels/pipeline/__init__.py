"""The embedder: inputs, gate, cache, decode loop, scheduler. Imports transformers only when it loads something."""

from twn_kernels.pipeline.decode_choice import DecodeChoice
from twn_kernels.pipeline.decode_graph import DecodeGraph
from twn_kernels.pipeline.decode_step import DecodeStep
from twn_kernels.pipeline.embedder import TWNEmbedder
from twn_kernels.pipeline.options import EncodeDetails

__all__ = ["DecodeChoice", "DecodeGraph", "DecodeStep", "EncodeDetails", "TWNEmbedder"]
