"""A whole training run: backbone, joint training, policy, gate, each in a folder of its own, each resumable.

Owns the order of the stages and what lies where in the run's folder. What a stage does is its own module's.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twn_kernels.patching as patching
from twn_kernels.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from twn_kernels.errors import OptionError, TWNWarning, did_you_mean, quoted
from twn_kernels.evaluation import provenance
from twn_kernels.patching import adapters_of
from twn_kernels.pipeline import TWNEmbedder, loading
from twn_kernels.pipeline.processor import Processor, load_processor
from twn_kernels.settings import EMBEDDING, REASONING
from twn_kernels.training.config import TrainingConfig
from twn_kernels.training.examples import Stream
from twn_kernels.training.gate import BOOKKEEPING, train_gate
from twn_kernels.training.gate_collecting import GATE_FIELDS
from twn_kernels.training.joint import JointCollator, JointTrainer
from twn_kernels.training.joint_forward import Roles, Trainee
from twn_kernels.training.number_base import new_number_base
from twn_kernels.training.number_lessons import Lessons
from twn_kernels.training.plots import draw_log
from twn_kernels.training.policy import train_policy
from twn_kernels.training.run_data import RunData, read_run_data, require_thoughts
from twn_kernels.training.stage_trainer import LOG_FILE
from twn_kernels.training.teaching import LessonCollator, LessonTrainer

__all__ = ["RUN_FILE", "STAGES", "train"]

STAGES = ("base", "joint", "policy", "gate")
RUN_FILE = "run.json"
Say = Callable[[str], None]


def train(
    config: TrainingConfig,
    out: str | Path,
    *,
    resume: bool = False,
    until: str | None = None,
    command: str = "twn_kernels.training.train",
    say: Say = print,
) -> Path:
    """Train a TWN model.

    Args:
        config: what to train, and how.
        out: folder of the run: ``base/`` (HuggingFace directory, where the small backbone is taught), ``data/`` (where
            the number task is made), a folder a stage with its log, plot, states and TWN directory, ``twn/`` (the
            result) and ``run.json`` (configuration, seconds, figures; of each command that went on with the run its
            commit, versions and machine).
        resume: go on where a run in ``out`` stopped; stages that are done are kept. Without one it begins, and says so.
            Settings of the gate may differ: it is then trained anew, from the thoughts that were collected.
        until: stop after this stage.
        command: written into ``run.json``.
        say: receives lines of progress.

    Returns:
        The TWN directory.

    Raises:
        OptionError: ``out`` holds a run and ``resume`` is False, that run had another configuration or other data,
            or what was divided from the data is too little for a stage.
        DataError: the data folder is not whole, or a thought is none that the model could write.
        TrainingError: a loss became NaN; the message says where the last good state is.
    """
    if until is not None and until not in STAGES:
        raise OptionError(f"until must be one of {quoted(STAGES)}, got {until!r}.{did_you_mean(until, STAGES)}")
    run = _Run(config, Path(out), command, say)
    run.begin(resume)
    for stage in STAGES:
        run.stage(stage)
        if stage == until:
            break
    return run.finish()


class _Run:
    """A run's folder and what is in it."""

    def __init__(self, config: TrainingConfig, out: Path, command: str, say: Say) -> None:
        self.config, self.out, self.command, self.say = config, out, command, say
        self.told: dict[str, Any] = {}
        self._trainee: Trainee | None = None
        self._processor: Processor | None = None
        self._data: RunData | None = None

    # -- the folder -------------------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        """Open or make the folder, once what is asked for can be begun."""
        machine = {"processor": platform.machine(), "device": _device_name(self.config)}
        machine["threads"] = torch.get_num_threads()
        asked = json.loads(json.dumps(self.config.as_dict()))
        if (self.out / RUN_FILE).exists():
            self._open(resume, asked)
        elif self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
            raise OptionError(f'"{self.out}" exists and holds no run. Name an empty or a new folder.')
        else:
            if resume:
                self.say(f'"{self.out}" holds no run to go on with; beginning one')
            self.told = {"commands": [], "config": asked, "stages": {}}
            if (taught := _taught(self.config.base.path)) is not None:
                self.told["base"] = taught
        makes_data = self.config.data.folder is None and not self.told["commands"]
        if not makes_data:  # hours may pass before it is needed, and the record is still as it was
            self._require_same_data(self._read())
        self.out.mkdir(parents=True, exist_ok=True)
        self.told["commands"].append({"command": self.command, **provenance.stamp(), "machine": machine})
        self._write()
        if makes_data:
            self._read()

    def _open(self, resume: bool, asked: dict[str, Any]) -> None:
        """Read what the run in the folder tells; nothing of it may differ once something was learned."""
        path = self.out / RUN_FILE
        if not resume:
            raise OptionError(f'"{self.out}" holds a run. Go on with it by --resume, or name another folder.')
        try:
            self.told = json.loads(path.read_text(encoding="utf-8"))
            before, stages, _ = (self.told[name] for name in ("config", "stages", "commands"))
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f'"{path}" is not as a run wrote it ({error!r}). Name another folder.') from error
        changed = _differences(before, asked)
        learned = any(stage["done"] for stage in stages.values()) or any(self.out.glob("*/checkpoint-*"))
        fixed = [name for name in changed if not _of_the_gate_alone(name, before, asked)]
        if fixed and learned:
            raise OptionError(
                f'"{self.out}" was begun with another configuration; different: {quoted(fixed)}. '
                "Resume with the same one, or name another folder."
            )
        anew = [name for name in changed if name.split(".")[-1] not in BOOKKEEPING]
        if anew and stages.get("gate", {}).get("done"):
            self.say(f"gate: to be trained anew, as these differ: {quoted(anew)}")
            stages["gate"] = {"done": False, "seconds": stages["gate"]["seconds"]}
        if not learned:
            self.told.pop("data", None)
        if fixed and before["data"]["folder"] is None:  # made for the configuration of before
            shutil.rmtree(self.out / "data", ignore_errors=True)
        self.told["config"] = asked

    def _write(self) -> None:
        staged = self.out / f".{RUN_FILE}.new"
        staged.write_text(json.dumps(self.told, indent=2) + "\n", encoding="utf-8", newline="\n")
        staged.replace(self.out / RUN_FILE)

    def stage(self, name: str) -> None:
        """Run a stage unless it is done."""
        done = self.told["stages"]
        settings = getattr(self.config, name)
        skipped = settings.steps == 0 or (name == "base" and settings.path is not None)
        if skipped or done.get(name, {}).get("done"):
            return
        self.say(f"{name}: {settings.steps} steps")
        if settings.warmup_steps >= settings.steps:
            self.say(f"warning: {name}.warmup_steps {settings.warmup_steps} leaves no step at the full learning rate")
        start, before = time.perf_counter(), done.get(name, {}).get("seconds", 0.0)
        done[name] = {"done": False, "seconds": before}
        self._write()
        try:
            figures = getattr(self, f"_{name}")()
        finally:
            done[name]["seconds"] = round(before + time.perf_counter() - start, 1)
            self._write()
        done[name] |= {"done": True, "figures": figures}
        self._write()
        draw_log(self.folder(name), f"{name}: {settings.steps} steps")

    def finish(self) -> Path:
        """Copy the last stage's TWN directory to ``twn/``."""
        newest = [name for name in STAGES[1:] if self.told["stages"].get(name, {}).get("done")]
        if not newest:
            return self.out
        target, staged = self.out / "twn", self.out / ".twn.new"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(self.out / newest[-1] / "twn", staged)
        shutil.rmtree(target, ignore_errors=True)
        staged.replace(target)
        return target

    # -- what stages share ------------------------------------------------------------------------------------------

    @property
    def base(self) -> str:
        """Where the backbone is."""
        return self.config.base.path or str(self.out / "base")

    @property
    def processor(self) -> Processor:
        """The backbone's."""
        if self._processor is None:
            self._processor = load_processor(self.base)
        return self._processor

    @property
    def closing(self) -> str:
        """Text that closes a thought."""
        end = self.config.method.think_end[0]
        return end if isinstance(end, str) else self.processor.raw_text_of([end])

    @property
    def data(self) -> RunData:
        """The queries of joint training and those of the gate, once the run knows that they are its own."""
        if self._data is None:
            read = self._read()
            self._require_same_data(read)
            self._require_thoughts(read)
            self.told["data"] = read.digest
            self._write()
            self._data = read
        return self._data

    def _read(self) -> RunData:
        return read_run_data(self.config, self.out / "data", self.say)

    def _require_same_data(self, read: RunData) -> None:
        """Other queries would be divided otherwise, and the gate judged by those that were learned from."""
        if self.told.get("data", read.digest) != read.digest:
            raise OptionError(
                f'the training data is not the one that the run in "{self.out}" began with: its queries, thoughts, '
                "documents or judgments changed. Put it back, or name another folder."
            )

    def _require_thoughts(self, read: RunData) -> None:
        method = self.config.method
        stops = (*method.think_end, *sorted(loading.end_of_sequence(self.trainee().model, self.processor)))
        closing = len(self.processor.token_ids(self.closing))
        require_thoughts(read.joint, self.processor, stops, closing, method.max_think_tokens, self.say)

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its log, plot and states; the backbone's own folder holds the model alone."""
        return self.out / ("teaching" if stage == "base" else stage)

    def trainee(self) -> Trainee:
        """The patched backbone with the newest adapters and queries."""
        if self._trainee is None:
            base, joint = self.config.base, self.config.joint
            model = loading.base_model(self.base, base.dtype, base.device, {})
            queries = self._patch(model)
            dtype = getattr(torch, base.adapter_dtype)
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(dtype)
            roles = Roles(REASONING, REASONING if joint.adapters == "one" else EMBEDDING, joint.detach)
            opening = self.processor.token_ids(self.config.method.think_prompt)
            self._trainee = Trainee(model, queries.to(dtype), self.config.method, opening, roles).to(model.device)
        return self._trainee

    def _patch(self, model) -> Tensor:
        """Give the model the newest adapters, or fresh ones; returns the queries."""
        for stage in ("policy", "joint"):
            if self.told["stages"].get(stage, {}).get("done"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", TWNWarning)  # the gate is the last to come
                    checkpoint = load_checkpoint(self.out / stage / "twn")
                patching.patch(model, checkpoint)
                return checkpoint.queries
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            patching.patch(model, rank=self.config.joint.rank)
        weight = model.get_input_embeddings().weight.detach().float()
        noise = torch.Generator().manual_seed(self.config.seed)
        # As long as the vectors of words, so that no query is out of the layers' range at the start.
        return torch.randn(self.config.joint.num_queries, weight.shape[1], generator=noise) * weight.std().item()

    def checkpoint(self) -> Checkpoint:
        """Adapters and queries as they are now."""
        adapters = adapters_of(self.trainee().model)
        if self.config.joint.adapters == "one":
            adapters[EMBEDDING] = replace(adapters[REASONING], name=EMBEDDING)
        return Checkpoint(adapters, queries=self.trainee().bank.queries.detach(), config=self.config.method)

    # -- the stages -------------------------------------------------------------------------------------------------

    def _base(self) -> dict[str, Any]:
        directory, settings, seed = self.out / "base", self.config.base, self.config.seed
        directory.mkdir(exist_ok=True)
        model = new_number_base(directory, seed=seed)
        model.save_pretrained(directory)
        lessons = Lessons(settings.steps * settings.batch_size, seed=seed)
        trainer = LessonTrainer(
            *(model, self.folder("base"), settings, lessons, LessonCollator(self.processor)), seed=seed, say=self.say
        )
        trainer.run(resume=True)
        model.save_pretrained(directory)
        return _last_log(self.folder("base"))

    def _joint(self) -> dict[str, Any]:
        config, settings, data = self.config, self.config.joint, self.config.data
        prompts = (data.query_prompt, data.document_prompt)
        collate = JointCollator(self.processor, self.closing, settings.chunk_size, *prompts)
        stream = Stream(self.data.joint, settings.steps * settings.batch_size, config.seed)
        folder = self.folder("joint")
        JointTrainer(self.trainee(), folder, settings, stream, collate, seed=config.seed, say=self.say).run(resume=True)
        checkpoint = self.checkpoint()
        save_checkpoint(checkpoint, folder / "twn")
        if settings.adapters == "one":  # from here on both names hold the one that was trained
            self._trainee = None
        return _last_log(folder)

    def _policy(self) -> dict[str, Any]:
        data, folder = self.config.data, self.folder("policy")
        result = train_policy(
            *(self.trainee(), self.processor, self.data.joint, folder, self.config.policy),
            seed=self.config.seed,
            resume=True,
            say=self.say,
            prompts=(data.query_prompt, data.document_prompt),
        )
        save_checkpoint(self.checkpoint(), folder / "twn")
        return asdict(result)

    def _gate(self) -> dict[str, Any]:
        data, settings, folder = self.config.data, self.config.gate, self.folder("gate")
        prompts = {"query": data.query_prompt, "document": data.document_prompt}
        embedder = TWNEmbedder(self.trainee().model, self.checkpoint(), self.processor, prompts=prompts)
        result = train_gate(
            embedder, self.data.gate, folder, settings, seed=self.config.seed, resume=True, say=self.say
        )
        save_checkpoint(result.checkpoint, folder / "twn")
        return asdict(result.report)


def _taught(path: str | None) -> dict[str, Any] | None:
    """What the run that taught a backbone tells of it; None where ``path`` is of no run."""
    record = None if path is None else Path(path).parent / RUN_FILE
    if record is None or not record.is_file():
        return None
    told = json.loads(record.read_text(encoding="utf-8"))
    if not told.get("stages", {}).get("base", {}).get("done"):
        return None
    config = {name: told["config"][name] for name in ("seed", "base")}
    return {"commands": told["commands"], "config": config, "stages": {"base": told["stages"]["base"]}}


def _last_log(folder: Path) -> dict[str, Any]:
    rows = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines() if (folder / LOG_FILE).exists() else []
    return json.loads(rows[-1]) if rows else {}


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Dotted names of values that are not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        below = ((before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [found for pair in below for found in _differences(*pair)]
    return [] if before == now else [name]


def _of_the_gate_alone(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a value can change while adapters, queries and the division of the data stay as they are."""
    section, _, key = name.partition(".")
    if section == "method":
        return key in GATE_FIELDS
    toggled = key == "steps" and not (before["gate"]["steps"] and now["gate"]["steps"])
    return section == "gate" and key not in ("split", "share", "encode_batch_size") and not toggled


def _device_name(config: TrainingConfig) -> str:
    device = loading.checked_device(config.base.device) or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "CPU"
