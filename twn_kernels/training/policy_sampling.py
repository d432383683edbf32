"""Thoughts for policy optimisation, written and embedded by the pipeline's own functions.

Prompts, decode loop, stop rule, execution graph and pooling are those of inference, on the adapters as they are at the
moment; only how a token is chosen is the trainer's. Owns the batch that a step reads and the outcome that it rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twn_kernels.pipeline import loading
from twn_kernels.pipeline.decoding import Decoding
from twn_kernels.pipeline.graphs import Method, Thinking, run_batch
from twn_kernels.pipeline.inputs import EncodedBatch
from twn_kernels.pipeline.processor import Processor
from twn_kernels.pipeline.thinking import StopRule, Thought
from twn_kernels.training.examples import Example
from twn_kernels.training.joint_forward import Trainee
from twn_kernels.training.policy_rewards import Outcome

__all__ = ["PolicyBatch", "PolicyCollator", "Sampler"]

Choose = Callable[[Tensor], Tensor]


@dataclass
class PolicyBatch:
    """Queries, and their documents as the candidates of all of them.

    Attributes:
        queries, documents: Q prompts each; document i is a positive of query i.
        positives: bool ``[Q, Q]``: which documents are relevant to which query.
    """

    queries: EncodedBatch
    documents: EncodedBatch
    positives: Tensor


class PolicyCollator:
    """Examples to a :class:`PolicyBatch`.

    Args:
        processor: the model's.
        query_prompt, document_prompt: instructions, as the embedder would be given.
    """

    def __init__(
        self, processor: Processor, query_prompt: str | None = None, document_prompt: str | None = None
    ) -> None:
        self.processor, self.query_prompt, self.document_prompt = processor, query_prompt, document_prompt

    def __call__(self, examples: Sequence[Example]) -> PolicyBatch:
        queries = self._encoded([example.query.input for example in examples], self.query_prompt)
        documents = self._encoded([example.document.input for example in examples], self.document_prompt)
        ids = [example.document.id for example in examples]
        positives = torch.tensor([[name in example.relevant for name in ids] for example in examples])
        return PolicyBatch(queries, documents, positives)

    def _encoded(self, inputs: list[Any], prompt: str | None) -> EncodedBatch:
        return self.processor.batch([self.processor.parse(value, i) for i, value in enumerate(inputs)], prompt)


class Sampler:
    """Writes thoughts under the trainee's adapters and says what they came to.

    Nothing is kept between calls but decode buffers. Document vectors in particular are made in every call: under
    ``shared_kv`` with ``prefill_adapter="reasoning"`` they depend on the adapter that learns, as do plain embeddings.

    Args:
        trainee: model, queries and method.
        processor: the model's.
        chunk_size: sequences of one forward.
    """

    def __init__(self, trainee: Trainee, processor: Processor, chunk_size: int) -> None:
        self.trainee, self.chunk_size = trainee, chunk_size
        config = trainee.method
        self._method = Method(
            trainee.backbone,
            trainee.bank,
            None,
            config,
            trainee.opening,
            lambda whole, rows, suffixes: whole.extended(rows, suffixes),
            Decoding(trainee.backbone),
            loading.routes_media(trainee.model),
        )
        self._rule = StopRule(
            processor.raw_text_of,
            processor.text_of,
            config.think_end,
            loading.end_of_sequence(trainee.model, processor),
            config.max_think_tokens,
        )

    def outcome(self, batch: PolicyBatch, group_size: int, choose: Choose) -> Outcome:
        """Think ``group_size`` times about every query, and compare what comes out with the documents.

        Args:
            batch: queries and documents.
            group_size: thoughts of one query.
            choose: fp32 logits ``[rows, vocabulary]`` to token ids ``[rows]``.
        """
        count = len(batch.queries)
        queries = [query for query in range(count) for _ in range(group_size)]
        vectors, thoughts = self._vectors(batch.queries, queries, choose)
        documents, _ = self._vectors(batch.documents, range(len(batch.documents)), None)
        closed = torch.tensor([thought.broken is None for thought in thoughts], device=vectors.device)
        # Equal thoughts of a query are worth the same, whatever their rows' rounding.
        first: dict[tuple, int] = {}
        same = [first.setdefault((q, *t.ids), i) for i, (q, t) in enumerate(zip(queries, thoughts, strict=True))]
        similarities = (vectors @ documents.T)[same] * closed[:, None]
        return Outcome(
            [thoughts[start : start + group_size] for start in range(0, len(thoughts), group_size)],
            closed.view(count, group_size),
            similarities.view(count, group_size, -1),
            batch.positives.to(vectors.device),
        )

    def plain_similarities(self, batch: PolicyBatch) -> Tensor:
        """Of every query's plain embedding and each document, ``[Q, 1, D]``."""
        queries, documents = (
            self._vectors(part, range(len(part)), None)[0] for part in (batch.queries, batch.documents)
        )
        return (queries @ documents.T)[:, None]

    def release(self) -> None:
        """Free the memory that decoding keeps between calls."""
        self._method.decoding.release()

    @torch.no_grad()
    def _vectors(self, batch: EncodedBatch, rows: Sequence[int], choose: Choose | None) -> tuple[Tensor, list[Thought]]:
        """Unit vectors ``[rows, hidden]`` of rows of a batch and, with ``choose``, the thought of each."""
        decide = None if choose is None else lambda scores, count: list(range(count))
        vectors, thoughts = [], []
        for start in range(0, len(rows), self.chunk_size):
            part = batch.select(rows[start : start + self.chunk_size])
            result = run_batch(self._method, part, Thinking(decide, self._rule, choose), lambda phase: None)
            vectors.append(self.trainee.pooled(result.states))
            thoughts += [result.thoughts[place] for place in sorted(result.thoughts)]
        return torch.cat(vectors), thoughts
