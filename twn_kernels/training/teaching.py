"""Teach a small backbone its lessons: all of its weights, next-token loss on the replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twn_kernels.pipeline.processor import Processor
from twn_kernels.training.number_lessons import Lesson
from twn_kernels.training.stage_trainer import StageTrainer

__all__ = ["LessonCollator", "LessonTrainer"]


class LessonCollator:
    """Lessons to a batch: prompts as the embedder writes them, each followed by its reply, whose tokens are labels."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self._end = [processor.tokenizer.eos_token_id]

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        inputs = [{"text": x.text, "image": x.image} if x.image and x.text else x.image or x.text for x in lessons]
        parsed = [self.processor.parse(value, index) for index, value in enumerate(inputs)]
        replies = [self.processor.token_ids(lesson.reply) + self._end for lesson in lessons]
        tensors = self.processor.batch(parsed).extended(list(range(len(lessons))), replies).tensors
        labels = torch.full_like(tensors["input_ids"], -100)
        for row, reply in enumerate(replies):
            labels[row, -len(reply) :] = torch.tensor(reply)
        return {**tensors, "labels": labels}


class LessonTrainer(StageTrainer):
    """A stage in which everything learns."""

    def step(self, model, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss and gradients of a batch."""
        loss = model(**batch).loss
        self.accelerator.backward(loss)
        return {"loss": loss}
