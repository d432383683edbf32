"""Joint training of both adapters and the queries, with large contrastive batches in small memory.

A step's batch runs in chunks. Where there are several, vectors are first computed without a graph, the contrastive loss
of the whole batch gives each vector its gradient, and every chunk then runs once more with a graph that this gradient
enters (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twn_kernels.pipeline.processor import Processor
from twn_kernels.training.examples import Example, require_writable
from twn_kernels.training.joint_forward import Trained, Trainee
from twn_kernels.training.losses import info_nce
from twn_kernels.training.sequences import Rows
from twn_kernels.training.stage_trainer import StageTrainer

__all__ = ["JointCollator", "JointTrainer"]


class JointCollator:
    """Examples to chunks of encoded queries and documents.

    Args:
        processor: the model's.
        ending: text that closes a thought.
        chunk_size: examples of one forward.
        query_prompt, document_prompt: instructions, as the embedder would be given.
    """

    def __init__(
        self,
        processor: Processor,
        ending: str,
        chunk_size: int,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ) -> None:
        self.processor, self.ending, self.chunk_size = processor, ending, chunk_size
        self.prompts = (query_prompt, document_prompt)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        size = self.chunk_size
        chunks = [self._chunk(examples[start : start + size]) for start in range(0, len(examples), size)]
        ids = [example.document.id for example in examples]
        positives = torch.tensor([[name in example.relevant for name in ids] for example in examples])
        return {"chunks": chunks, "positives": positives}

    def _chunk(self, examples: Sequence[Example]) -> tuple[Rows, Rows]:
        thoughts = []
        for example in examples:
            written = require_writable(example.query, self.processor, (self.ending,))
            # Encoded with what closes it, as both may share a token.
            thoughts.append(self.processor.token_ids(example.thought + self.ending) if written else [])
        queries = self._encoded([example.query.input for example in examples], self.prompts[0])
        documents = self._encoded([example.document.input for example in examples], self.prompts[1])
        return Rows(queries, thoughts), Rows(documents)

    def _encoded(self, inputs: list, prompt: str | None):
        return self.processor.batch([self.processor.parse(value, i) for i, value in enumerate(inputs)], prompt)


class JointTrainer(StageTrainer):
    """``settings`` has, beside a stage's own, ``temperature``, ``thought_weight``, ``plain_weight``,
    ``thoughtful_weight`` and ``plain_truncation``.

    Gradients are clipped for each job by itself: one norm over both would let the contrastive loss, whose gradients are
    far the larger at the start, scale down what the thought learns.
    """

    def __init__(self, model: Trainee, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.args.max_grad_norm = 0.0  # the Trainer's own clipping is over everything
        learned = [(name.removesuffix(".weight"), p) for name, p in model.named_parameters() if p.requires_grad]
        thought = f".{model.roles.thought}"
        self._jobs = {
            "thought": [p for name, p in learned if name.endswith(thought)],
            "queries": [p for name, p in learned if not name.endswith(thought)],
        }

    def step(self, model: Trainee, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss and clipped gradients of a batch."""
        scalars = self._backward(model, batch)
        for job, parameters in self._jobs.items():
            scalars[f"{job}_grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        return scalars

    def _backward(self, model: Trainee, batch: dict[str, Any]) -> dict[str, Tensor]:
        chunks, positives = batch["chunks"], batch["positives"]
        tokens = max(1, sum(len(thought) for queries, _ in chunks for thought in queries.thoughts))
        if len(chunks) == 1:
            vectors, thought = self._chunk(model, chunks[0])
            losses = self._contrastive(vectors, positives)
            losses["thought_loss"] = thought / tokens
            loss = self._weighted(losses)
            self.accelerator.backward(loss)
            return {"loss": loss} | losses
        with torch.no_grad():
            cached = [self._vectors(model, *(model(rows) for rows in chunk)) for chunk in chunks]
        whole = [torch.cat(parts).requires_grad_() for parts in zip(*cached, strict=True)]
        losses = self._contrastive(whole, positives)
        gradients = torch.autograd.grad(self._weighted(losses), whole)
        thoughts, start = 0.0, 0
        for chunk in chunks:
            vectors, thought = self._chunk(model, chunk)
            end = start + len(vectors[0])
            surrogate = sum((v * g[start:end]).sum() for v, g in zip(vectors, gradients, strict=True))
            self.accelerator.backward(surrogate + self.settings.thought_weight * thought / tokens)
            thoughts, start = thoughts + thought.detach(), end
        losses["thought_loss"] = thoughts / tokens
        return {"loss": self._weighted(losses).detach()} | losses

    def _chunk(self, model: Trainee, chunk: tuple[Rows, Rows]) -> tuple[list[Tensor], Tensor]:
        """Vectors of a chunk, and the sum of its thoughts' losses."""
        queries, documents = model(chunk[0]), model(chunk[1])
        return self._vectors(model, queries, documents), model.thought_loss(queries)

    @staticmethod
    def _vectors(model: Trainee, queries: Trained, documents: Trained) -> list[Tensor]:
        """Of queries, plain and thoughtful, and of documents."""
        thoughtful = queries.plain if queries.thoughtful is None else queries.thoughtful
        return [model.pooled(states) for states in (queries.plain, thoughtful, documents.plain)]

    def _contrastive(self, vectors: Sequence[Tensor], positives: Tensor) -> dict[str, Tensor]:
        plain, thoughtful, documents = vectors
        temperature = self.settings.temperature
        return {
            "plain_loss": info_nce(plain, documents, positives, temperature, self.settings.plain_truncation),
            "thoughtful_loss": info_nce(thoughtful, documents, positives, temperature),
        }

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.settings, name.replace("_loss", "_weight")) * loss for name, loss in losses.items())
