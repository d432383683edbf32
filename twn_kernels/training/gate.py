"""The gate, trained on its own model's thoughts: will thinking improve this query's own retrieval?

No label is written by people. Each query is embedded plainly and thoughtfully; where the thought improved the score of
the query's positives the gate learns 1, elsewhere 0, from the states of the plain pass that it reads at inference.
Owns the training; a fifth of the queries is held out to tell how good the gate is.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.checkpoint import Checkpoint, TWNConfig
from twn_kernels.errors import DataError, OptionError, TWNWarning
from twn_kernels.modules import GateMLP
from twn_kernels.pipeline import TWNEmbedder
from twn_kernels.training.examples import Examples
from twn_kernels.training.gate_collecting import Collected, collect, write_thoughts
from twn_kernels.training.gate_labels import GateLabels, gate_labels, ndcg, priced_margin, priced_threshold
from twn_kernels.training.gate_report import GateReport, one_class, report_on
from twn_kernels.training.stage_trainer import StageTrainer
from twn_kernels.training.states import newest_state

__all__ = ["BOOKKEEPING", "GateResult", "GateTrainer", "train_gate"]

_HELD_OUT = 5  # one query in so many
_LEAST_SPREAD = 1e-3  # of a feature, as a share of the largest: smaller ones are not blown up to noise
_LEARNS = "learns.json"
BOOKKEEPING = ("log_steps", "save_steps")  # settings that no result depends on


@dataclass(frozen=True)
class GateResult:
    """A trained gate.

    Attributes:
        checkpoint: the embedder's with the new gate; its configuration states the gate's fields.
        report: how good the gate is.
    """

    checkpoint: Checkpoint
    report: GateReport


class GateTrainer(StageTrainer):
    """Binary cross-entropy of a gate that reads rows of features."""

    def step(self, model: GateMLP, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = F.binary_cross_entropy(model(None, batch["features"]), batch["wanted"])
        self.accelerator.backward(loss)
        return {"loss": loss}


def train_gate(
    embedder: TWNEmbedder,
    examples: Examples,
    out: str | Path,
    settings: Any,
    *,
    seed: int = 0,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> GateResult:
    """Train the gate of an embedder.

    Thoughts are written by the model as at inference; every query is scored against the documents of the examples
    (all of them up to ten thousand, see :func:`~twn_kernels.training.gate_collecting.collect`). What the gate reads is
    standardised while it learns; the returned tensors hold that in their first layer and read plain states.

    Args:
        embedder: with trained adapters and queries; a gate that it has is replaced. ``gate_input`` and
            ``gate_activation`` of its configuration are the new gate's, and so is ``think_threshold`` unless the price
            of a thought decides it.
        examples: queries that joint training did not see.
        out: folder for what was collected (``labels.safetensors``), the labels to look at (``labels.jsonl``), states
            and the log.
        settings: of the stage: ``margin``, ``price``, ``hidden``, ``temperature`` and ``encode_batch_size`` beside what
            :func:`~twn_kernels.training.stage_trainer.stage_arguments` reads.
        seed: of the first weights, of the order and of the queries held out.
        resume: go on from the newest state in ``out``. States of other labels or settings are removed and the gate is
            trained anew.
        say: receives lines of progress.

    Raises:
        DataError: there are fewer than two examples.
        OptionError: ``out`` holds states and ``resume`` is False, or a setting is out of range.
        CheckpointError: the newest state is damaged.
        InputError: a query or a document cannot be embedded; the message names it.
        TrainingError: the loss is not finite.

    Warns:
        TWNWarning: all labels that are trained on are the same, so the gate cannot tell queries apart. It is returned
            all the same, as it makes the model run, and the report repeats the warning.
    """
    out, say = Path(out), say or (lambda line: None)
    if len(examples) < 2:
        raise DataError(
            f"the gate needs two queries or more, one to learn from and one to be judged by, got {len(examples)}. "
            "Raise gate.share, or name a larger gate.split."
        )
    state = newest_state(out)
    if state is not None and not resume:  # said before anything is embedded
        raise OptionError(
            f'"{out}" holds states of a run, the newest is {state.name}. '
            "Resume that run, or train into an empty folder."
        )
    collected = collect(embedder, examples, out, settings.encode_batch_size, seed=seed, say=say)
    learned, held = _divided(len(examples), seed)
    labels, margin = _labelled(collected, settings, learned)
    write_thoughts(out, collected, labels, held)
    _drop_other_states(out, _learns(collected, labels.labels, embedder.config, settings, seed), say)
    features, wanted = _features(collected, embedder.config.gate_input)[learned], labels.labels[learned].float()
    mean, spread = features.mean(dim=0), _spread(features)
    # The reference is differentiable; "last" takes rows of features as they are.
    options = {"activation": embedder.config.gate_activation, "gate_input": "last", "impl": "reference"}
    gate = GateMLP(_first_weights(features.shape[1], settings.hidden, seed), **options)
    rows = _Rows((features - mean) / spread, wanted, settings.steps * settings.batch_size, seed)
    GateTrainer(gate, out, settings, rows, _batch, seed=seed, say=say).run(resume=resume)
    tensors = _of_plain_states(gate, mean, spread)
    setting = "gate.price" if settings.margin is None else "gate.margin"
    warning = one_class(labels.labels[learned], margin, setting)
    if warning is not None:
        warnings.warn(warning, TWNWarning, stacklevel=2)
    config = _stating_the_gate(embedder.config)
    if settings.margin is None:
        scores = gate(None, (features - mean) / spread).detach()
        threshold = priced_threshold(scores, *_qualities(collected, learned), settings.price)
        config = replace(config, think_threshold=threshold)
    checkpoint = replace(embedder.checkpoint, gate=tensors, gate_file=None, config=config)
    return GateResult(checkpoint, report_on(checkpoint, collected, labels.labels, learned, held, margin, warning))


def _labelled(collected: Collected, settings: Any, learned: list[int]) -> tuple[GateLabels, float]:
    """Labels of all queries, and their margin: the one that is set, or that pays best on the queries learned from."""
    if settings.margin is not None:
        return gate_labels(*_vectors(collected), settings.temperature, settings.margin), settings.margin
    scored = gate_labels(*_vectors(collected), settings.temperature, 0.0)
    gains = scored.thoughtful_scores - scored.plain_scores
    margin = priced_margin(gains[learned], *_qualities(collected, learned), settings.price)
    return scored._replace(labels=gains > margin), margin


def _vectors(collected: Collected) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return collected.plain, collected.thoughtful, collected.documents, collected.positives


def _qualities(collected: Collected, places: list[int]) -> list[Tensor]:
    """nDCG of the queries at these places, without and with their thoughts."""
    *ways, documents, positives = _vectors(collected)
    return [ndcg(way[places], documents, positives[places]) for way in ways]


def _divided(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Places to learn from and places held out, each sorted."""
    places = list(range(count))
    random.Random(f"gate held out {seed}").shuffle(places)
    border = max(1, count // _HELD_OUT)
    return sorted(places[border:]), sorted(places[:border])


def _features(collected: Collected, gate_input: str) -> Tensor:
    """fp32 ``[queries, features]``: what a gate's first layer multiplies, as GateMLP makes it of the states."""
    queries, last = collected.query_states.float(), collected.prompt_states.float()
    if gate_input == "concat":
        return queries.flatten(1)
    if gate_input == "last":
        return last
    mean = queries.mean(dim=1)
    return mean if gate_input == "mean" else torch.cat([mean, last], dim=1)


def _spread(features: Tensor) -> Tensor:
    """What each feature is divided by, so that all of them are of a size."""
    spread = features.std(dim=0, correction=0)
    largest = spread.max()
    return spread.clamp_min(_LEAST_SPREAD * largest) if largest > 0 else torch.ones_like(spread)


def _of_plain_states(gate: GateMLP, mean: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """Tensors that give for features what ``gate`` gives for standardised ones."""
    tensors = {name: tensor.detach().cpu() for name, tensor in gate.state_dict().items()}
    weight = tensors["0.weight"].double() / spread.double()
    bias = tensors["0.bias"].double() - weight @ mean.double()
    return tensors | {"0.weight": weight.float(), "0.bias": bias.float()}


def _first_weights(width: int, hidden: Sequence[int], seed: int) -> dict[str, Tensor]:
    """State dict of an untrained ``nn.Sequential`` of linear layers and activations, in its order."""
    steps: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for size in hidden:
            steps += [nn.Linear(width, size), nn.GELU()]
            width = size
        steps.append(nn.Linear(width, 1))
    return nn.Sequential(*steps).state_dict()


class _Rows(torch.utils.data.Dataset):
    """Features and labels by index, each pass over them in another order that the seed alone decides."""

    def __init__(self, features: Tensor, wanted: Tensor, count: int, seed: int) -> None:
        self.features, self.wanted, self.count, self.seed = features, wanted, count, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        turn, place = divmod(index, len(self.features))
        if self._order[0] != turn:
            order = list(range(len(self.features)))
            random.Random(f"gate {self.seed}: {turn}").shuffle(order)
            self._order = (turn, order)
        place = self._order[1][place]
        return self.features[place], self.wanted[place]


def _batch(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    features, wanted = zip(*rows, strict=True)
    return {"features": torch.stack(features), "wanted": torch.stack(wanted)}


def _learns(collected: Collected, labels: Tensor, config: TWNConfig, settings: Any, seed: int) -> dict[str, Any]:
    """All that a state in the folder depends on, as JSON gives it back."""
    told = {name: value for name, value in vars(settings).items() if name not in BOOKKEEPING}
    told |= {"gate_input": config.gate_input, "gate_activation": config.gate_activation, "seed": seed}
    told |= {"source": collected.source, "labels": "".join(str(int(label)) for label in labels)}
    return json.loads(json.dumps(told))


def _drop_other_states(out: Path, learns: dict[str, Any], say: Callable[[str], None]) -> None:
    """Remove states of a gate that learned something else, and note what this one learns."""
    path, states = out / _LEARNS, sorted(out.glob("checkpoint-*"))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if states and before != learns:
        say(f"gate: {states[-1].name} is of other labels or settings; training anew")
        for state in states:
            shutil.rmtree(state)
    path.write_text(json.dumps(learns, indent=1) + "\n", encoding="utf-8", newline="\n")


def _stating_the_gate(config: TWNConfig) -> TWNConfig:
    """The configuration with the gate's fields as facts, which are written to disk, and not as defaults."""
    known = ("gate_input", "gate_activation", "think_threshold")
    return replace(
        config,
        assumed=tuple(name for name in config.assumed if name not in known),
        inferred=tuple(pair for pair in config.inferred if pair[0] not in known),
    )
