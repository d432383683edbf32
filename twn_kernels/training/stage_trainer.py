"""HuggingFace's Trainer for parts of a model: only what learns is saved, order is fixed, and NaN stops the run.

Each stage of training subclasses :class:`StageTrainer` and says what one step's loss is. Optimiser, schedule, clipping,
checkpoints and resumption are the Trainer's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from twn_kernels.errors import CheckpointError, TrainingError

__all__ = ["LOG_FILE", "StageTrainer", "stage_arguments"]

LOG_FILE = "log.jsonl"
_WEIGHTS_FILE = "learned.safetensors"


def stage_arguments(out: Path, settings: Any, seed: int) -> TrainingArguments:
    """Arguments of a stage's trainer.

    Args:
        out: folder of the stage; states go to ``checkpoint-<step>`` in it.
        settings: with ``steps``, ``batch_size``, ``learning_rate``, ``warmup_steps``, ``weight_decay``,
            ``max_grad_norm``, ``save_steps`` and ``log_steps``.
        seed: of the trainer's own draws.
    """
    return TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
        disable_tqdm=True,
    )


class StageTrainer(Trainer):
    """A trainer of the parameters that require a gradient.

    Args:
        model: the module that holds them.
        out: folder of the stage.
        settings: as :func:`stage_arguments` reads them.
        examples: a dataset by index, read in order.
        collate: examples to the batch that :meth:`step` takes.
        seed: of the trainer's own draws.
        say: receives a line at each log.
    """

    def __init__(
        self,
        model: nn.Module,
        out: Path,
        settings: Any,
        examples: Any,
        collate: Callable,
        *,
        seed: int = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.settings, self.out = settings, Path(out)
        self._sums: dict[str, float] = {}
        self._count = 0
        super().__init__(
            model,
            stage_arguments(self.out, settings, seed),
            data_collator=collate,
            train_dataset=examples,
            callbacks=[_LogFile(self.out / LOG_FILE, say)],
        )
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise TrainingError(
                f"training runs on one device, got {max(self.args.world_size, self.args.n_gpu)}. "
                "Start one process, with CUDA_VISIBLE_DEVICES naming one GPU."
            )

    def run(self, *, resume: bool = False) -> nn.Module:
        """Train to the last step, from the newest state in ``out`` where asked; returns the model.

        Raises:
            TrainingError: a loss or a gradient is not finite; the state before that step is kept.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        last = get_last_checkpoint(str(self.out)) if resume else None
        if last is None:
            (self.out / LOG_FILE).unlink(missing_ok=True)
        self.train(resume_from_checkpoint=last)
        return self.model

    def step(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """One step: run the batch, leave its gradients in the parameters, return scalars to log, ``"loss"`` first."""
        raise NotImplementedError

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer calls it."""
        inputs = self._prepare_inputs(inputs)
        scalars = self.step(model, inputs)
        self._require_finite(scalars)
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(torch.as_tensor(value).detach())
        self._count += 1
        return scalars["loss"].detach()

    def _require_finite(self, scalars: dict[str, Tensor]) -> None:
        bad = [name for name, value in scalars.items() if not torch.isfinite(torch.as_tensor(value)).all()]
        learned = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        if not bad and all(torch.isfinite(p.grad).all() for p in learned):
            return
        step = self.state.global_step
        self.model.zero_grad(set_to_none=True)
        self._save_checkpoint(self.model, None)
        what = f"{bad[0]} is {float(scalars[bad[0]])}" if bad else "a gradient is not finite"
        raise TrainingError(
            f"step {step + 1}: {what}. Stopped; the state after step {step} is kept in "
            f'"{self.out / f"checkpoint-{step}"}". Lower learning_rate or look at the batch, and resume from it.'
        )

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        """Add the means of a step's scalars since the last log."""
        if self._count:
            means = {name: total / self._count for name, total in self._sums.items()}
            logs = logs | means if "loss" in logs else means | logs
            self._sums, self._count = {}, 0
        super().log(logs, *args, **options)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_learned(self.model), folder / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / _WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(f'"{path.parent}" holds no {path.name}; it is no state of this stage. Remove it.')
        load_learned(self.model, load_file(path), path)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_learned(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into the parameters that learn.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(set(own) ^ set(tensors)) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise CheckpointError(
            f'"{path}" belongs to another model: {len(wrong)} of its tensors do not fit, the first is "{wrong[0]}". '
            "Train into an empty folder, or with the configuration that wrote it."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


class _LogFile(TrainerCallback):
    """One line of JSON a log, with the step and the seconds since the start."""

    def __init__(self, path: Path, say: Callable[[str], None] | None) -> None:
        self.path, self.say, self.start = path, say, time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:
            return
        kept = {name: _number(value) for name, value in logs.items() if name != "epoch"}
        row = {"step": state.global_step, **kept, "seconds": round(time.perf_counter() - self.start, 1)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.say:
            self.say("  ".join(f"{name} {value:.5g}" for name, value in row.items()))


def _number(value: Any) -> float:
    return float(value)
