"""``DecodeStep``: one decode step of a whole model as a callable, to be timed or inspected.

The step is the one that thinking runs: real prefill, fixed buffers, a CUDA graph on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twn_kernels.errors import OptionError
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_graph import DecodeGraph
from twn_kernels.settings import REASONING

__all__ = ["DecodeStep"]


class DecodeStep:
    """A decode step of ``rows`` rows on a context of random tokens. Calling it runs one step.

    Every call decodes one token after those before it; after ``room`` calls the rows return to their context, so any
    number of calls measures steps on ``context`` to ``context + room`` tokens.

    Args:
        model: a patched HuggingFace model, or a plain one, which has no routes.
        rows: of the batch, 1 or more.
        context: tokens that each row holds before the first call, 1 or more.
        room: calls until the rows return, 1 or more.
        routes: of the step, as in :meth:`DecodeGraph.set_routes`; the context is read under the base alone.
        capture: None captures on a GPU; False launches eagerly; True raises where nothing can be captured.
        seed: of the context's tokens and of the decoded one.

    Attributes:
        graph: the :class:`DecodeGraph`; ``graph.capture`` says whether the step is captured, ``graph.failure`` why not.

    Raises:
        OptionError: a number out of range.
        ImplUnavailable: the model cannot decode on fixed buffers; the message says why.

    Example:
        >>> import twn_kernels
        >>> from twn_kernels.pipeline.decode_step import DecodeStep
        >>> from twn_kernels.testing.tiny_models import tiny_model
        >>> step = DecodeStep(twn_kernels.patch(tiny_model("llama"), rank=4), rows=2, context=8)
        >>> step().shape, step.graph.length
        (torch.Size([2, 160]), 9)
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        *,
        context: int = 512,
        room: int = 128,
        routes: str | Sequence[str | None] | None = REASONING,
        capture: bool | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("rows", rows), ("context", context), ("room", room)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}.")
        backbone = Backbone(model)
        self.graph = DecodeGraph(backbone, capture=capture)
        self._context, self._room = context, room
        generator = torch.Generator().manual_seed(seed)
        # Media placeholders are the last ids of a vocabulary, and would announce media that is not there.
        ids = torch.randint(0, max(backbone.config.vocab_size // 2, 1), (rows, context + 1), generator=generator)
        self._ids = ids[:, -1].to(backbone.device)
        cache = backbone.new_cache()
        with torch.no_grad():
            prompt = backbone.prompt({"input_ids": ids[:, :-1], "attention_mask": torch.ones(rows, context)})
            backbone.read(prompt, None, cache)
        self.graph.load(cache, prompt.mask, prompt.next_position, room=room, routes=routes)

    def __call__(self) -> Tensor:
        """Run one step.

        Returns:
            fp32 ``[rows, vocabulary]``, overwritten by the next call.
        """
        if self.graph.length == self._context + self._room:
            self.graph.rewind(self._context)
        return self.graph.step(self._ids)
