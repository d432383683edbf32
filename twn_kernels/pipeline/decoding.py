"""Who decodes thoughts: the embedder's ``decode`` option, and the buffers that it keeps from batch to batch."""

from __future__ import annotations

import warnings

import torch

from twn_kernels.errors import TWNWarning
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_choice import DecodeChoice, check_mode, choose
from twn_kernels.pipeline.decode_graph import DecodeGraph
from twn_kernels.pipeline.thinking import Running, StaticRunning

__all__ = ["Decoding"]


class Decoding:
    """Puts batches that begin to think on a growing cache or on fixed buffers.

    Args:
        backbone: of the patched model.
        decode: ``"auto"``, ``"cuda_graph"``, ``"static"`` or ``"dynamic"``, as in
            :meth:`~twn_kernels.pipeline.TWNEmbedder.from_pretrained`.

    Raises:
        OptionError: no such mode.
        ImplUnavailable: a named mode that the model cannot run.
    """

    def __init__(self, backbone: Backbone, decode: str = "auto") -> None:
        check_mode(decode)
        self.backbone, self.decode = backbone, decode
        self.graph: DecodeGraph | None = None
        choose(backbone, decode)

    @property
    def choice(self) -> DecodeChoice:
        """How a batch that began to think now would be decoded, and why."""
        choice = choose(self.backbone, self.decode)
        if choice.mode == "cuda_graph" and self.graph is not None and not self.graph.capture:
            return DecodeChoice("static", self.graph.failure or "capture is off")
        return choice

    def begin(self, running: Running, room: int) -> Running | StaticRunning:
        """The batch as it will decode.

        Args:
            running: the batch, its opening read; consumed where fixed buffers take over.
            room: steps that a row may take.
        """
        mode = self.choice.mode
        if mode == "dynamic":
            return running
        if self.graph is None:
            # Under "auto" a failed capture goes on with the same step run eagerly, and says so.
            capture = {"cuda_graph": True, "static": False}.get(self.decode)
            self.graph = DecodeGraph(self.backbone, capture=capture)
        try:
            return StaticRunning(running, self.graph, room)
        except torch.OutOfMemoryError:
            self.graph.release()
            if self.decode != "auto":
                raise
        rows, tokens = running.mask.shape
        warnings.warn(
            f"no memory for the buffers of {rows} rows and {tokens} + {room} tokens; these rows decode on a cache that "
            "grows. A smaller batch_size or max_think_tokens leaves room for the buffers.",
            TWNWarning,
            stacklevel=2,
        )
        return running

    def release(self) -> None:
        """Free buffers and graphs; the next thought makes new ones."""
        if self.graph is not None:
            self.graph.release()
