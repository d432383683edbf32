"""The card of the number task's model: what it was trained on, how, what it reaches, and what it cannot do.

Owns the words. Every number comes from the run's own record and from the result of an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from twn_kernels.errors import ResultError, TrainingError
from twn_kernels.evaluation import tables
from twn_kernels.evaluation.number_task import SPLITS
from twn_kernels.evaluation.results import parse
from twn_kernels.training.config import GateSettings

__all__ = ["model_card"]

_MODES = ("never", "always", "auto")
_STAGES = {
    "base": "the backbone, all of its weights, on lessons: reading digits and number words, single steps of arithmetic",
    "joint": "both adapters and the queries, on the frozen backbone",
    "policy": "`reasoning`, by group-relative policy optimisation of the thought",
    "gate": "the gate, on queries kept for it",
}
_DIFFERENCES = {
    "auto_minus_never": "auto minus never",
    "auto_minus_always": "auto minus always",
    "auto_minus_random": "auto minus a random gate that thinks as often",
}
_LIMITS = """\
- It knows one task: the numbers 0 to 99, in the words of the number task and in the digits of one data set of 8 x 8
  pixels. Vectors of any other text or image mean nothing. It is there to show the method and to test the package.
- It calculates with five operations (times, plus, minus, double, half) and values from 0 to 99. A thought may be wrong,
  and then it finds another number's images.
- The gate learned from thoughts of this model on this task. What it is worth elsewhere is in the rows above whose split
  begins with `ood`, and nowhere else.
- Results are of one run with one seed. How much they vary from seed to seed was not measured unless it is said above.
- So small a model says nothing about the speed of the kernels."""


def model_card(
    run: Mapping[str, Any], evaluation: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Markdown that describes a trained number model.

    Args:
        run: ``run.json`` of :func:`twn_kernels.training.run.train`.
        evaluation: result document of :func:`twn_kernels.evaluation.evaluate` on the number task, with all three modes.
        baselines: such documents of models trained otherwise, by what they are, to stand beside it.

    Raises:
        TrainingError: a stage of the run is not done.
        ResultError: an evaluation is malformed or lacks a mode, does not count the model's parameters, or a baseline's
            is of other data.
    """
    parse(evaluation, "the evaluation")
    _require_whole(run, evaluation)
    for name, other in (baselines or {}).items():
        parse(other, f'the baseline "{name}"')
        _require_modes(other)
        if other["data"]["splits"] != evaluation["data"]["splits"]:
            raise ResultError(
                f'the baseline "{name}" was evaluated on other data than the model. Evaluate it on the same.'
            )
    parts = [_heading(evaluation), _data(run), _training(run), _parameters(evaluation), _results(evaluation)]
    parts += [_beside(evaluation, baselines)] if baselines else []
    return "\n\n".join([*parts, f"## What it cannot do\n\n{_LIMITS}"]) + "\n"


def _require_whole(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    undone = [name for name, stage in run["stages"].items() if not stage.get("done")]
    if undone or not run["stages"]:
        what = f'stage "{undone[0]}" is not done' if undone else "it has no stages"
        raise TrainingError(f"a card is of a finished run, and {what}. Go on with twn-kernels train --resume.")
    _require_modes(evaluation)
    if evaluation["model"]["parameters"] is None:
        raise ResultError("the card tells how many parameters there are, and the evaluation does not count them.")


def _require_modes(evaluation: Mapping[str, Any]) -> None:
    for name, split in evaluation["splits"].items():
        absent = [mode for mode in _MODES if mode not in split["modes"]]
        if absent:
            raise ResultError(f'the card tells of never, always and auto, and split "{name}" lacks "{absent[0]}".')


def _heading(evaluation: Mapping[str, Any]) -> str:
    counts = evaluation["model"]["parameters"]
    return f"""---
license: apache-2.0
library_name: twn_kernels
tags:
- lora
- embeddings
- multimodal
---

# The number model

A *Think When Needed* embedder for the number task of `twn_kernels`: find the image of a number that is named, shown in
another hand, or to be worked out. `base/` is the frozen backbone: {counts["base"]:,} parameters in Qwen3-VL's classes,
and a tokenizer of the task's words. `twn/` holds the two adapters, the queries and the gate.

```python
import twn_kernels
from twn_kernels.shipped import number_model

embedder = twn_kernels.TWNEmbedder.from_pretrained(*number_model()[:2])
vectors, details = embedder.encode(["six times seven"], think="auto", return_details=True)
```"""


def _data(run: Mapping[str, Any]) -> str:
    data, seed = run["config"]["data"], run["config"]["seed"]
    source = f"the folder `{data['folder']}`, split `{data['split']}`"
    if data["folder"] is None:
        counted = f"{data['train_queries']:,} training queries, {data['copies']} images of each number"
        source = f"the number task with {counted}, seed {seed}"
    return f"""## Data

- Adapters and queries: {source}.
- Gate: {_gate_data(run)}.
- Written thoughts: by the task's own rules, a working that ends in the answer.
- Digits: Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI data set 80), as scikit-learn ships
  them: the first half of the samples train backbone and adapters, the next sixth the gate, and the last third tests.
- Held out: digit samples, wordings, a fifth of the operand pairs, five of the 25 pairs of operations, longer chains,
  degraded images. The lessons of the backbone hold every wording, as a pretrained model knows its language, and
  otherwise none of these; adapters, queries and gate never saw a wording that is held out."""


def _gate_data(run: Mapping[str, Any]) -> str:
    data, gate = run["config"]["data"], run["config"]["gate"]
    if not gate["split"]:
        return f"{GateSettings(share=gate['share']).kept_share:.0%} of the training queries, kept out of joint training"
    if data["folder"] is None:
        return f"{data['gate_queries']:,} queries of the task's split `{gate['split']}`, in hands of its own"
    return f"split `{gate['split']}` of the same folder"


def _training(run: Mapping[str, Any]) -> str:
    taught = run.get("base")
    runs = [run] if taught is None else [taught, run]
    rows = [row for part in runs for row in _stage_rows(part)]
    total = sum(stage["seconds"] for part in runs for stage in part["stages"].values())
    parts = [
        f"## Training\n\n{_table(('stage', 'what learns', 'steps x batch', 'minutes'), rows)}",
        f"In all {total / 60:.0f} minutes, seed {run['config']['seed']}; the same commands train it again at the "
        "commits below (bits may\ndiffer from machine to machine).",
    ]
    if taught is not None:
        parts.append(f"The backbone is of a run of its own:\n\n{_commands(taught['commands'])}")
    parts.append(f"{'Adapters, queries and gate' if taught else 'Everything'}:\n\n{_commands(run['commands'])}")
    return "\n\n".join(parts)


def _stage_rows(run: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, stage in run["stages"].items():
        settings = run["config"][name]
        size = f"{settings['steps']:,} x {settings['batch_size']}"
        yield f"`{name}`", _STAGES.get(name, ""), size, f"{stage['seconds'] / 60:.1f}"


def _commands(commands: Sequence[Mapping[str, Any]]) -> str:
    shown = "\n".join(command["command"] for command in commands)
    return f"```bash\n{shown}\n```\n\n" + "\n".join(f"- {_ran_on(command)}" for command in commands)


def _ran_on(command: Mapping[str, Any]) -> str:
    machine, versions = command["machine"], command["versions"]
    device = machine["device"] if machine["device"] != "CPU" else f"a CPU ({machine['processor']})"
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    dirty = " with uncommitted changes" if command.get("dirty") else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    when = f"{command['created'][:16]} UTC on {device} with {threads}"
    return f"{when}; {named}; commit `{command['commit'][:12]}`{dirty}"


def _parameters(evaluation: Mapping[str, Any]) -> str:
    counts = evaluation["model"]["parameters"]
    rows = [(name, f"{counts[name]:,}") for name in ("base", "reasoning", "embedding", "queries", "gate")]
    return f"""## Parameters

{_table(("part", "parameters"), rows)}

Adapters, queries and gate add {counts["added_percent"]:.1f} % to the backbone; the same ranks add far less to a large
one."""


def _results(evaluation: Mapping[str, Any]) -> str:
    metric, splits = evaluation["metric"], evaluation["splits"]
    rows, kinds = [], []
    for name, split in splits.items():
        queries = evaluation["data"]["splits"][name]["queries"]
        for mode in _MODES:
            told = split["modes"][mode]
            tokens = f"{told['query_tokens'] / queries:.1f}"
            quality = f"{told[metric]:.3f}", f"{told['hit_at_1']:.3f}"
            rows.append((f"`{name}`", mode, *quality, f"{told['think_rate']:.0%}", tokens))
        for kind, told in split["classes"].items():
            quality = (f"{told[mode]:.3f}" for mode in _MODES)
            kinds.append((f"`{name}`", kind, f"{told['think_rate']:.0%}", *quality))
    meanings = [f"- `{name}`: {SPLITS[name].says}" for name in splits if name in SPLITS]
    parts = [
        "## Results",
        f"Written {evaluation['created'][:10]} by `{evaluation['command']}`; threshold of auto "
        f"{evaluation['options']['threshold']:g}. *thinks*: share of the queries; *tokens*: thought, a query.",
        _table(("split", "mode", metric, "hit_at_1", "thinks", "tokens"), rows),
        "\n".join(meanings),
        f"{metric} by class; *thinks* is auto's:",
        _table(("split", "class", "thinks", *_MODES), kinds),
        f"Is the gate worth having? Differences of {metric}, 95 % intervals paired by query:",
        _table(("split", *_DIFFERENCES.values()), list(_difference_rows(splits))),
    ]
    return "\n\n".join(part for part in parts if part)


def _beside(evaluation: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> str:
    metric, rows = evaluation["metric"], []
    for name in evaluation["splits"]:
        for who, other in {"this model": evaluation, **baselines}.items():
            modes = other["splits"][name]["modes"]
            share = modes["auto"]["query_tokens"] / max(1, modes["always"]["query_tokens"])
            quality = (f"{modes[mode][metric]:.3f}" for mode in _MODES)
            rows.append((f"`{name}`", who, *quality, f"{modes['auto']['think_rate']:.0%}", f"{share:.0%}"))
    return f"""## Trained otherwise

The same backbone, data, seed and steps, another joint training, and no policy optimisation; {metric}. *thinks* and
*of always' tokens* are auto's.

{_table(("split", "model", *_MODES, "thinks", "of always' tokens"), rows)}"""


def _difference_rows(splits: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, split in splits.items():
        cells = []
        for key in _DIFFERENCES:
            found = split["differences"][key]
            spread = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
            cells.append(f"{spread} {tables.verdict(found)}")
        yield f"`{name}`", *cells


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
