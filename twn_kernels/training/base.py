"""Teach a small model its lessons by HuggingFace's Trainer: all weights, next-token loss on the replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twn_kernels.pipeline.processor import Processor
from twn_kernels.training.number_lessons import Lesson

__all__ = ["ReplyCollator", "teach"]

IGNORED = -100  # label of a token whose prediction is not learned


class ReplyCollator:
    """Lessons to a batch: prompts as the embedder writes them, each followed by its reply, whose tokens are labels."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self._end = [processor.tokenizer.eos_token_id]

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        inputs = [{"text": x.text, "image": x.image} if x.image and x.text else x.image or x.text for x in lessons]
        parsed = [self.processor.parse(value, index) for index, value in enumerate(inputs)]
        replies = [self.processor.token_ids(lesson.reply) + self._end for lesson in lessons]
        tensors = self.processor.batch(parsed).extended(list(range(len(lessons))), replies).tensors
        labels = torch.full_like(tensors["input_ids"], IGNORED)
        for row, reply in enumerate(replies):
            labels[row, -len(reply) :] = torch.tensor(reply)
        return {**tensors, "labels": labels}


def teach(
    model, lessons: Sequence[Lesson], processor: Processor, out: str | Path, settings: Any, *, seed: int, resume: bool
):
    """Train all weights of a model on lessons, in their order.

    Args:
        model: a HuggingFace model with a head; trained in place.
        lessons: at least ``settings.steps * settings.batch_size`` of them.
        processor: the model's.
        out: where states for a later resumption go.
        settings: ``steps``, ``batch_size``, ``learning_rate``, ``warmup_steps``, ``weight_decay``, ``save_steps``.
        seed: of the trainer's own draws.
        resume: go on from the last state in ``out``.
    """
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
        disable_tqdm=True,
    )
    trainer = InOrder(model, arguments, data_collator=ReplyCollator(processor), train_dataset=lessons)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer
