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
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from twn_kernels.errors import OptionError, TrainingError
from twn_kernels.training.states import (
    drawn,
    load_learned,
    newest_state,
    publish,
    save_learned,
    staging_folder,
    undraw,
)

__all__ = ["LOG_FILE", "StageTrainer", "stage_arguments"]

LOG_FILE = "log.jsonl"
_SUMS_FILE = "sums.json"


def stage_arguments(out: Path, settings: Any, seed: int, device: torch.device) -> TrainingArguments:
    """Arguments of a stage's trainer.

    Args:
        out: folder of the stage; states go to ``checkpoint-<step>`` in it.
        settings: with ``steps``, ``batch_size``, ``learning_rate``, ``warmup_steps``, ``weight_decay``,
            ``max_grad_norm``, ``save_steps`` and ``log_steps``.
        seed: of the trainer's own draws.
        device: where the model is and stays.
    """
    return TrainingArguments(
        output_dir=str(out),
        use_cpu=device.type == "cpu",
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
        dataloader_pin_memory=torch.cuda.is_available(),
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
        self._run_folder = self.out
        device = next(model.parameters()).device
        super().__init__(
            model,
            stage_arguments(self.out, settings, seed, device),
            data_collator=collate,
            train_dataset=examples,
            callbacks=[_LogFile(self.out / LOG_FILE, say)],
        )
        self.remove_callback(PrinterCallback)  # stdout is the command's
        count = max(self.args.world_size, self.args.n_gpu)
        if count > 1 or (device.index or 0) != (self.args.device.index or 0):
            got = f"{count} of them" if count > 1 else f'"{device}" where the Trainer takes "{self.args.device}"'
            raise TrainingError(
                f"training runs on one device, the first, got {got}. "
                "Start one process, with CUDA_VISIBLE_DEVICES naming one GPU."
            )

    def run(self, *, resume: bool = False) -> nn.Module:
        """Train to the last step, from the newest state in ``out`` where asked; returns the model.

        Raises:
            TrainingError: a loss or a gradient is not finite; the state before that step is kept.
            CheckpointError: the newest state is damaged or belongs to another model.
            OptionError: ``out`` holds states, and ``resume`` is False.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        state = newest_state(self.out)
        if state is not None and not resume:
            raise OptionError(
                f'"{self.out}" holds states of a run, the newest is {state.name}. '
                "Resume that run, or train into an empty folder."
            )
        step = 0 if state is None else int(state.name.rpartition("-")[2])
        _keep_rows(self.out / LOG_FILE, step)
        if state is not None and step == 0:  # kept before the first step: nothing is there but what it began with
            load_learned(self.model, state)
        self.train(resume_from_checkpoint=str(state) if step else None)
        return self.model

    def step(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """One step: run the batch, leave its gradients in the parameters, return scalars to log, ``"loss"`` first."""
        raise NotImplementedError

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer calls it."""
        self._drawn = drawn()
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
        self.model.zero_grad(set_to_none=True)
        what = f"{bad[0]} is {float(torch.as_tensor(scalars[bad[0]]).detach())}" if bad else "a gradient is not finite"
        raise TrainingError(
            f"step {self.state.global_step + 1}: {what}. Stopped; {self._kept()}. "
            "Look at that batch and resume, or train anew with a lower learning_rate."
        )

    def _kept(self) -> str:
        """Keep the state before this step, and say where."""
        step = self.state.global_step
        folder, finite = self.out / f"checkpoint-{step}", self._learned_is_finite()
        if finite and (folder.exists() or self._can_go_on_after(step)):
            if not folder.exists():
                undraw(self._drawn)
                self._write_state()  # beside the states that are there: this one may be no better than the loss
            return f'the state after step {step} is kept in "{folder}"'
        state = newest_state(self.out)
        kept = "no state was saved before" if state is None else f'the newest saved state is "{state}"'
        return kept if finite else f"what was learned is not finite either after step {step}, so {kept}"

    def _learned_is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad)

    def _can_go_on_after(self, step: int) -> bool:
        """Whether a run can go on from after this step with the same bits."""
        return True

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        """Add the means of a step's scalars since the last log."""
        if self._count:
            means = {name: total / self._count for name, total in self._sums.items()}
            logs = logs | means if "loss" in logs else means | logs
            self._sums, self._count = {}, 0
        super().log(logs, *args, **options)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._write_state()
        rotate_checkpoints(str(self.out), self.args.save_total_limit)

    def _write_state(self) -> None:
        self._run_folder = staging_folder(self.out)
        try:
            super()._save_checkpoint(self.model, None)
            publish(self._run_folder / f"checkpoint-{self.state.global_step}", self.out)
        finally:
            self._run_folder = self.out

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_learned(self.model, folder)
        # The scalars since the last log, so that the next line of a resumed run is the mean over the same steps.
        sums = {"count": self._count, "sums": self._sums}
        (folder / _SUMS_FILE).write_text(json.dumps(sums) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_learned(self.model, folder)
        kept = json.loads((folder / _SUMS_FILE).read_text(encoding="utf-8"))
        self._count, self._sums = kept["count"], kept["sums"]


class _LogFile(TrainerCallback):
    """One line of JSON a log, with the step and the seconds of training so far."""

    def __init__(self, path: Path, say: Callable[[str], None] | None) -> None:
        self.path, self.say, self.start, self.last = path, say, time.perf_counter(), 0

    def on_train_begin(self, args, state, control, **_):
        last = (_rows(self.path) or [{"seconds": 0.0, "step": 0}])[-1]
        self.start, self.last = time.perf_counter() - last["seconds"], last["step"]

    def on_log(self, args, state, control, logs=None, **_):
        # A run that is resumed after its last step has nothing to add.
        if not logs or "loss" not in logs or state.global_step == self.last:
            return
        self.last = state.global_step
        summary = ("epoch", "total_flos", "train_")
        kept = {name: float(value) for name, value in logs.items() if not name.startswith(summary)}
        row = {"step": state.global_step, **kept, "seconds": round(time.perf_counter() - self.start, 1)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.say:
            self.say("  ".join(f"{name} {value:.5g}" for name, value in row.items()))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log up to the first line that was not written whole."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _keep_rows(path: Path, step: int) -> None:
    """Drop the rows after ``step``: a run that goes on from there writes them again."""
    kept = [row for row in _rows(path) if row["step"] <= step]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
