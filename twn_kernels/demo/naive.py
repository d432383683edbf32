"""The method as it reads with PEFT and transformers alone: ``set_adapter``, ``generate``, ``set_adapter``, queries.

What the package is compared with. Always thinks; needs no gate for it. Knows one execution graph: one cache, which
``reasoning`` fills with prompt and thought and which the queries read under ``embedding``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from twn_kernels.ops import pool_queries
from twn_kernels.pipeline import TWNEmbedder
from twn_kernels.pipeline.backbone import Backbone, roll_back
from twn_kernels.settings import EMBEDDING, REASONING

__all__ = ["NaivePipeline", "NaiveResult"]


class NaiveResult(NamedTuple):
    """Unit vectors fp32 ``[inputs, hidden]``; tokens that each input's thought took."""

    vectors: Tensor
    tokens: list[int]


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

    @torch.no_grad()
    def always(self, inputs: list) -> NaiveResult:
        """Embed inputs, each with a thought; the plain vector where the thought is not closed."""
        batch = self.processor.batch([self.processor.parse(value, place) for place, value in enumerate(inputs)])
        prompt = self.backbone.prompt(batch.tensors)
        rows = range(len(inputs))
        self.model.set_adapter(REASONING)
        ids, cache = self._generate(batch.extended(rows, [self.opening for _ in rows]).tensors)
        lengths, closed = self._ends(ids)
        written = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        opened = prompt.mask.new_ones(len(inputs), len(self.opening))
        mask = torch.cat([prompt.mask, opened, written.to(prompt.mask)], dim=1)
        first = prompt.next_position + len(self.opening)
        # generate writes its last token and does not read it.
        self.backbone.continue_(self.backbone.embeddings(ids[:, -1:]), mask, first + ids.shape[1] - 1, cache)
        self.model.set_adapter(EMBEDDING)
        thoughtful = self._read_queries(mask, first + lengths, cache)
        roll_back(cache, len(self.opening) + ids.shape[1] + len(self.queries))
        plain = self._read_queries(prompt.mask, prompt.next_position, cache)
        states = torch.where(closed[:, None, None], thoughtful, plain)
        return NaiveResult(pool_queries(states, pooling=self.config.pooling), lengths.tolist())

    def _generate(self, tensors: dict) -> tuple[Tensor, object]:
        """Token ids ``[inputs, steps]``, and a cache that lacks the last of them."""
        tensors = {name: value.to(self.backbone.device) for name, value in tensors.items()}
        found = self.model.generate(
            **tensors,
            do_sample=False,
            max_new_tokens=self.config.max_think_tokens,
            stop_strings=list(self.config.think_end),
            tokenizer=self.processor.tokenizer,
            return_dict_in_generate=True,
        )
        return found.sequences[:, tensors["input_ids"].shape[1] :], found.past_key_values

    def _ends(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens each row wrote, and whether it closed its thought: int64 and bool ``[inputs]``."""
        lengths = (ids != self.processor.tokenizer.pad_token_id).sum(1)
        texts = [self.processor.raw_text_of(row[:count]) for row, count in zip(ids.tolist(), lengths, strict=True)]
        closed = [any(end in text for end in self.config.think_end) for text in texts]
        return lengths, torch.tensor(closed, device=ids.device)

    def _read_queries(self, mask: Tensor, first: Tensor, cache) -> Tensor:
        queries = self.queries.expand(len(mask), -1, -1)
        mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], dim=1)
        return self.backbone.continue_(queries, mask, first, cache)
