"""The method as it reads with PEFT and transformers alone: ``set_adapter``, write, ``set_adapter``, queries.

What the package is compared with. Always thinks; needs no gate for it. Knows one execution graph: one cache, which
the prompt's adapter and ``reasoning`` fill with prompt and thought and which the queries read under ``embedding``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from twn_kernels.ops import pool_queries
from twn_kernels.pipeline import TWNEmbedder
from twn_kernels.pipeline.backbone import Backbone, Prompt, roll_back
from twn_kernels.pipeline.loading import end_of_sequence
from twn_kernels.settings import EMBEDDING, REASONING

__all__ = ["NaivePipeline", "NaiveResult"]

_TAIL = 16  # tokens in which a text that closes a thought must lie


class NaiveResult(NamedTuple):
    """Unit vectors fp32 ``[inputs, hidden]``; tokens that each input's thought took."""

    vectors: Tensor
    tokens: list[int]


class _Written(NamedTuple):
    """Token ids of each row up to its end, whether it closed its thought, and the steps that all rows took."""

    ids: list[list[int]]
    closed: list[bool]
    steps: int


class NaivePipeline:
    """Embeds with a thought, one adapter at a time.

    Args:
        model: a ``PeftModel`` with both adapters.
        embedder: whose processor, queries and configuration are used; its model is not.
    """

    def __init__(self, model: nn.Module, embedder: TWNEmbedder) -> None:
        self.model, self.processor, self.config = model, embedder.processor, embedder.config
        self.backbone = Backbone(model)
        self.queries = embedder.checkpoint.queries.to(self.backbone.device, self.backbone.dtype)
        self.opening = self.processor.token_ids(self.config.think_prompt)
        self.last = end_of_sequence(embedder.model, self.processor)

    @torch.no_grad()
    def always(self, inputs: list) -> NaiveResult:
        """Embed inputs, each with a thought; the plain vector where the thought is not closed."""
        batch = self.processor.batch([self.processor.parse(value, place) for place, value in enumerate(inputs)])
        prompt, cache = self.backbone.prompt(batch.tensors), self.backbone.new_cache()
        self._activate(self.config.prefill_adapter)
        hidden = self.backbone.read(prompt, None, cache)
        self._activate(REASONING)
        written = self._write(prompt, hidden, cache)
        lengths = torch.tensor([len(ids) for ids in written.ids], device=hidden.device)
        steps = torch.arange(written.steps, device=hidden.device) < lengths[:, None]
        opened = prompt.mask.new_ones(len(inputs), len(self.opening))
        mask = torch.cat([prompt.mask, opened, steps.to(prompt.mask)], dim=1)
        self._activate(EMBEDDING)
        thoughtful = self._read_queries(mask, prompt.next_position + len(self.opening) + lengths, cache)
        roll_back(cache, len(self.opening) + written.steps + len(self.queries))
        plain = self._read_queries(prompt.mask, prompt.next_position, cache)
        closed = torch.tensor(written.closed, device=hidden.device)
        states = torch.where(closed[:, None, None], thoughtful, plain)
        return NaiveResult(pool_queries(states, pooling=self.config.pooling), lengths.tolist())

    def _activate(self, adapter: str | None) -> None:
        tuner = self.model.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self.model.set_adapter(adapter)

    def _write(self, prompt: Prompt, hidden: Tensor, cache) -> _Written:
        """Greedily, all rows together until the last has ended; the cache then holds every step of every row."""
        rows, backbone = len(prompt.ids), self.backbone
        mask, position = prompt.mask, prompt.next_position

        def read(ids: Tensor) -> Tensor:
            nonlocal mask, position
            mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
            found = backbone.continue_(backbone.embeddings(ids), mask, position, cache)
            position = position + ids.shape[1]
            return found

        if self.opening:
            hidden = read(prompt.ids.new_tensor([self.opening] * rows))
        written = _Written([[] for _ in range(rows)], [False] * rows, 0)
        going = set(range(rows))
        while going and written.steps < self.config.max_think_tokens:
            chosen = backbone.logits(hidden[:, -1]).argmax(dim=-1)
            tokens = chosen.tolist()
            for row in sorted(going):
                written.ids[row].append(tokens[row])
                written.closed[row] = self._closes(written.ids[row])
                if written.closed[row] or tokens[row] in self.last:
                    going.discard(row)
            hidden = read(chosen[:, None])
            written = written._replace(steps=written.steps + 1)
        return written

    def _closes(self, ids: list[int]) -> bool:
        tail = self.processor.raw_text_of(ids[-_TAIL:])
        return any(ids[-1] == end if isinstance(end, int) else end in tail for end in self.config.think_end)

    def _read_queries(self, mask: Tensor, first: Tensor, cache) -> Tensor:
        queries = self.queries.expand(len(mask), -1, -1)
        mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], dim=1)
        return self.backbone.continue_(queries, mask, first, cache)
