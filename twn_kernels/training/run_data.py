"""What a run learns from: the queries of joint training and those of the gate, checked before hours are spent on them.

Owns where both come from, that they are apart, enough and the same when a run goes on, and that the model could write
their thoughts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from twn_kernels.errors import OptionError
from twn_kernels.evaluation.number_task import make_number_task
from twn_kernels.pipeline.processor import Processor
from twn_kernels.training.config import TrainingConfig
from twn_kernels.training.examples import Examples, read_examples, require_writable
from twn_kernels.training.policy import LEAST_EXAMPLES

__all__ = ["RunData", "read_run_data", "require_thoughts"]

Say = Callable[[str], None]


class RunData(NamedTuple):
    """Queries to learn from.

    Attributes:
        joint: of joint training and policy optimisation.
        gate: of the gate, none of which is among them.
        digest: of all that was read.
    """

    joint: Examples
    gate: Examples
    digest: str


def read_run_data(config: TrainingConfig, made: Path, say: Say) -> RunData:
    """Read the queries that a configuration names; the number task is made where it names no folder.

    Args:
        config: of the run.
        made: where the number task is, or is made.
        say: receives a line where it is made.

    Raises:
        DataError: the folder is not whole, or has no such split.
        OptionError: the two parts have queries in common, or one of them is too little.
    """
    folder = _made(config, made, say) if config.data.folder is None else Path(config.data.folder)
    whole, gate = read_examples(folder, config.data.split), config.gate
    if not gate.steps:
        joint, second = whole.divided(0.0, config.seed)
        digest = whole.digest
    elif gate.split:
        joint, second = whole, read_examples(folder, gate.split, taught=False)
        _require_apart(joint, second, config)
        digest = hashlib.sha256(f"{whole.digest} {second.digest}".encode()).hexdigest()
    else:
        joint, second = whole.divided(gate.kept_share, config.seed)
        digest = whole.digest
    _require_enough(config, joint, second)
    return RunData(joint, second, digest)


def _made(config: TrainingConfig, folder: Path, say: Say) -> Path:
    if not (folder / "README.md").exists():  # written last
        data = config.data
        shutil.rmtree(folder, ignore_errors=True)
        say("data: making the number task")
        counts = {"train_queries": data.train_queries, "gate_queries": data.gate_queries, "copies": data.copies}
        make_number_task(folder, queries=1, **counts, seed=config.seed)
    return folder


def _require_apart(joint: Examples, gate: Examples, config: TrainingConfig) -> None:
    known = {query.id for query in joint.queries}
    both = [query.id for query in gate.queries if query.id in known]
    if both:
        names = f'gate.split "{config.gate.split}" and data.split "{config.data.split}"'
        raise OptionError(
            f'{names} have {len(both)} queries in common, the first is "{both[0]}": a gate learns little from what '
            "joint training saw. Name splits that share none."
        )


def _require_enough(config: TrainingConfig, joint: Examples, second: Examples) -> None:
    gate, policy = config.gate, config.policy
    needs_joint = LEAST_EXAMPLES if policy.steps else 2
    needs_gate = 2 if gate.steps else 0
    if len(joint) >= needs_joint and len(second) >= needs_gate:
        if any(query.metadata.get("thought") for query in joint.queries):
            return
        raise OptionError(
            f"gate.share {gate.kept_share} keeps every query that has a thought for the gate, which leaves joint "
            "training none to learn. Lower gate.share, or give more queries a thought."
        )
    jobs = "joint training" + " and policy optimisation" * bool(policy.steps)
    if not gate.steps or gate.split:
        raise OptionError(
            f'data.split "{config.data.split}" has {len(joint)} queries, and {jobs} need {needs_joint}. Add queries, '
            "or name another split."
        )
    raise OptionError(
        f"gate.share {gate.kept_share} of {len(joint) + len(second)} training queries leaves {len(joint)} for {jobs} "
        f"and {len(second)} for the gate; they need {needs_joint} and {needs_gate}. Change gate.share, or train on "
        "more queries."
    )


def require_thoughts(
    examples: Examples, processor: Processor, stops: Sequence[str | int], closing: int, most: int, say: Say
) -> None:
    """Refuse thoughts that no model writes, before hours of training and not where a batch first holds one.

    Args:
        examples: of joint training.
        processor: the model's.
        stops: what ends a thought: strings and token ids.
        closing: tokens that close a thought.
        most: tokens that the model may write; a thought that is longer is said.
        say: receives the warning.

    Raises:
        DataError: as :func:`~twn_kernels.training.examples.require_writable`.
    """
    lengths = [len(require_writable(query, processor, stops)) + closing for query in examples.queries]
    long = sum(length > most for length in lengths)
    if long:
        say(
            f"warning: {long} of {len(lengths)} thoughts are longer than method.max_think_tokens {most}, so that the "
            "model will not get to close them"
        )
