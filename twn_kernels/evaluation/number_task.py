"""A small retrieval task that a gate can win: find the image of a number that is named, shown, or to be worked out.

Documents are images of the numbers 0 to 99 in handwritten digits. A *simple* query names its number or shows it in
another hand; a *thoughtful* one is arithmetic whose answer is the number, in words or as an image beside words, with a
chain of thought that works it out. Owns the splits and what they hold out from training; words and pictures are its
neighbours'.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from twn_kernels.errors import DataError, OptionError
from twn_kernels.evaluation import number_words as words
from twn_kernels.evaluation.dataset import Entry, write_dataset
from twn_kernels.evaluation.number_images import DigitPools, drawn, load_pools, write_png
from twn_kernels.evaluation.number_words import BINARY, OPERATIONS, Step, applied

__all__ = ["SPLITS", "UNSEEN_COMPOSITIONS", "held_out_pairs", "known_steps", "make_number_task"]

# Two operations in a row that training never shows, though it shows each of them, first and second.
UNSEEN_COMPOSITIONS = frozenset(
    {("half", "times"), ("double", "minus"), ("times", "half"), ("plus", "double"), ("minus", "plus")}
)
_HELD_OUT_SHARE = 0.2  # of operand pairs, by operation
_TWO_STEPS_SHARE = 0.4  # of thoughtful queries in training and test
_TRAIN_TIMES, _GATE_TIMES = 10, 2  # queries of training and of the gate for one of each other split


class SplitPlan(NamedTuple):
    """How the queries of a split are made.

    Attributes:
        images: whose hands: ``"train"``, ``"gate"`` or ``"test"``.
        corpus: which documents: ``"train"``, ``"gate"``, ``"test"`` or ``"ood_images"``.
        unseen_words: phrasings that training never uses.
        steps: numbers of operations of thoughtful queries, one of which is drawn; the first of two is the likelier.
        held: what of its operations training never shows: ``"pairs"``, ``"compositions"`` or nothing.
        says: for the data's README.
    """

    images: str
    corpus: str
    unseen_words: bool
    steps: tuple[int, ...]
    held: str | None
    says: str


SPLITS = {
    "train": SplitPlan("train", "train", False, (1, 2), None, "what a model may learn from"),
    "gate": SplitPlan(
        "gate", "gate", False, (1, 2), None, "what a gate may learn from: as training, in hands that no training shows"
    ),
    "test": SplitPlan("test", "test", True, (1, 2), None, "unseen images and unseen phrasing; operands as in training"),
    "ood_pairs": SplitPlan("test", "test", False, (1,), "pairs", "operand pairs that training never shows"),
    "ood_compositions": SplitPlan(
        "test", "test", False, (2,), "compositions", "two operations in a row that training never shows in a row"
    ),
    "ood_chains": SplitPlan("test", "test", False, (3, 4), None, "three or four operations; training has two at most"),
    "ood_images": SplitPlan(
        "test", "ood_images", True, (1, 2), None, "as test, all images turned, blurred and covered"
    ),
}


def make_number_task(
    folder: str | Path,
    *,
    queries: int = 200,
    train_queries: int | None = None,
    gate_queries: int | None = None,
    copies: int = 2,
    seed: int = 0,
) -> Path:
    """Write the task as a data folder, with a README that describes it.

    Args:
        folder: must be empty or not exist.
        queries: of each split but ``train`` and ``gate``; half of them simple, half thoughtful.
        train_queries: of ``train``; None: ten times as many.
        gate_queries: of ``gate``; None: twice as many.
        copies: images of each number among the documents; all of them are positives.
        seed: of everything that is drawn; the same seed gives the same bytes (with one version of Pillow).

    Returns:
        The folder.

    Raises:
        OptionError: a count is below 1.
        DataError: the folder holds files.
        MissingDependency: scikit-learn or Pillow is not installed.
    """
    counts = dict.fromkeys(SPLITS, queries)
    counts["train"] = _TRAIN_TIMES * queries if train_queries is None else train_queries
    counts["gate"] = _GATE_TIMES * queries if gate_queries is None else gate_queries
    asked_for = {"queries": queries, "train_queries": counts["train"], "gate_queries": counts["gate"], "copies": copies}
    for name, value in asked_for.items():
        if value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}.")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f'"{folder}" exists and is not an empty folder. Name another one.')
    pools = load_pools()
    writer = _Writer(folder, pools, copies, seed)
    documents = {name: writer.documents(name) for name in ("train", "gate", "test", "ood_images")}
    asked, qrels = [], {}
    for name, plan in SPLITS.items():
        own = list(writer.queries(name, plan, counts[name]))
        positives = _positives(documents[plan.corpus])
        qrels[name] = {entry.id: dict.fromkeys(positives[entry.metadata["number"]], 1) for entry in own}
        asked += own
    candidates = {name: of for name, of in documents.items() if name != "test"}
    write_dataset(folder, documents["test"], asked, qrels, candidates=candidates)
    (folder / "README.md").write_text(_readme(counts, copies, seed), encoding="utf-8", newline="\n")
    return folder


def _positives(documents: Iterable[Entry]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for entry in documents:
        found.setdefault(entry.metadata["number"], []).append(entry.id)
    return found


@functools.cache
def held_out_pairs() -> frozenset[tuple[str, int, int]]:
    """:attr:`Step.key` of the operands that training never shows together; the same whatever the seed of the data, so
    that a model can be tested on data of a seed that it was not trained on."""
    choose = random.Random("number task: pairs")
    found = set()
    for operation in OPERATIONS:
        keys = sorted({step.key for step in known_steps(operation)})
        found |= {key for key in keys if choose.random() < _HELD_OUT_SHARE}
    return frozenset(found)


def known_steps(operation: str) -> Iterator[Step]:
    """Every application of an operation whose value is a number of the task; second operands have one digit."""
    for before in range(1, 100):
        for operand in range(2 if operation == "times" else 1, 10) if operation in BINARY else (0,):
            step = Step(operation, before, operand)
            if applied(step) is not None:
                yield step


def _pick(choose: random.Random, options: Sequence):
    # Random.random() alone is promised to give the same numbers in every version of Python.
    return options[int(choose.random() * len(options))]


class _Writer:
    """Draws documents and queries, writing their images as it goes."""

    def __init__(self, folder: Path, pools: DigitPools, copies: int, seed: int) -> None:
        self.folder, self.pools, self.copies, self.seed = folder, pools, copies, seed
        self.held = held_out_pairs()
        self.by_operation = {operation: list(known_steps(operation)) for operation in OPERATIONS}

    def documents(self, name: str) -> list[Entry]:
        choose = random.Random(f"number task {self.seed}: documents of {name}")
        part = SPLITS[name].images
        found = []
        for number in range(100):
            for copy in range(self.copies):
                own = f"{name}-{number:02d}-{copy}"
                image, samples = self._image(f"{name}/documents/{own}", number, (part, "document"), choose, name)
                found.append(Entry(own, image=image, metadata={"number": number, "samples": samples}))
        return found

    def _image(self, name: str, number: int, pool: tuple[str, str], choose: random.Random, split: str):
        ways = {"degraded": split == "ood_images", "varied": split == "train"}
        pixels, samples = drawn(number, self.pools, pool, choose, **ways)
        path = self.folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(pixels, path)
        return str(path), samples

    def queries(self, split: str, plan: SplitPlan, count: int) -> Iterator[Entry]:
        """Half of them simple. In test splits the texts of each half differ while there are enough; to learn from, the
        simple ones in words repeat, or they would be next to none among thousands."""
        choose = random.Random(f"number task {self.seed}: queries of {split}")
        taken: set[str] = set()
        for index in range(count):
            kind = "thoughtful" if index % 2 else "simple"
            for _ in range(20):
                steps = self._chain(plan, choose) if kind == "thoughtful" else []
                start = steps[0].before if steps else int(choose.random() * 100)
                modality = _pick(choose, ("text", "both") if steps else ("text", "image", "both"))
                text = self._text(start, steps, modality, plan, choose)
                if plan.images != "test" or modality != "text" or text not in taken:
                    break
            taken.add(text)
            yield self._query(f"{split}-{index:05d}", split, plan, kind, start, steps, modality, text, choose)

    def _query(self, own: str, split, plan, kind, start, steps, modality, text, choose) -> Entry:
        image, samples = None, []
        if modality != "text":
            pool = (plan.images, "query")
            image, samples = self._image(f"{split}/queries/{own}", start, pool, choose, split)
        return Entry(
            own,
            text,
            image=image,
            metadata={
                "class": kind,
                "modality": modality,
                "number": applied(steps[-1]) if steps else start,
                "operations": [step.operation for step in steps],
                "operands": [[step.before, step.operand] for step in steps],
                "thought": words.thought(start, steps, by_image=modality != "text"),
                "samples": samples,
            },
        )

    def _text(self, start: int, steps: list[Step], modality: str, plan: SplitPlan, choose: random.Random) -> str:
        if modality == "image":
            return ""
        # A number's own name has no held-out operation to it, so that outside of training it is always worded anew.
        unseen = plan.unseen_words or (not steps and plan.images == "test")
        if not steps and modality == "text":
            return _pick(choose, words.spoken(start, unseen=unseen))
        return _pick(choose, words.phrases(steps, by_image=modality == "both", unseen=unseen))

    def _chain(self, plan: SplitPlan, choose: random.Random) -> list[Step]:
        length = plan.steps[0]
        if len(plan.steps) > 1:
            length = plan.steps[int(choose.random() < _TWO_STEPS_SHARE)]
        while True:
            operations = [_pick(choose, OPERATIONS) for _ in range(length)]
            unseen = set(zip(operations, operations[1:], strict=False)) & UNSEEN_COMPOSITIONS
            if bool(unseen) != (plan.held == "compositions"):
                continue
            steps = self._filled(operations, choose)
            if steps and all((step.key in self.held) == (plan.held == "pairs") for step in steps):
                return steps

    def _filled(self, operations: Sequence[str], choose: random.Random) -> list[Step] | None:
        """Operands for a chain of operations, or None where its values leave the task's numbers."""
        steps = [_pick(choose, self.by_operation[operations[0]])]
        for operation in operations[1:]:
            operand = int(choose.random() * 8) + 2 if operation in BINARY else 0
            step = Step(operation, applied(steps[-1]), operand)
            if step.before == 0 or applied(step) is None:
                return None
            steps.append(step)
        return steps


def _readme(counts: dict[str, int], copies: int, seed: int) -> str:
    rows = "\n".join(f"| `{name}` | {counts[name]} | {plan.says} |" for name, plan in SPLITS.items())
    return f"""# The number task

Find the image of a number that is named, shown in another hand, or to be worked out. Written by
`twn_kernels.evaluation.number_task.make_number_task(..., copies={copies}, seed={seed})`; the same arguments give the
same bytes.

| split | queries | what it holds |
|---|---|---|
{rows}

Documents: {copies} images of each number from 0 to 99 (`corpus.jsonl`: testing hands; `corpus/train.jsonl`: training
hands; `corpus/gate.jsonl`: the gate's; `corpus/ood_images.jsonl`: testing hands, degraded). A split with no file of its
own in `corpus/` ranks `corpus.jsonl`. Every image of the right number is a positive.

Queries (`queries.jsonl`): half of each split is simple (the number in words, as an image, or both), half thoughtful
(arithmetic in words, or an image of the first operand with the rest in words). Chains are worked out from left to
right. `metadata` holds:

| field | meaning |
|---|---|
| `class` | `simple` or `thoughtful` |
| `thought` | read, work out, say what to find; its last number is the answer |
| `number` | the answer |
| `modality` | `text`, `image` or `both` |
| `operations`, `operands` | names of the steps; value before each and its second operand (0: none) |
| `samples` | which samples of scikit-learn's `load_digits` the image shows, left to right |

Samples of `train` are the first half of that data set, slanted and stretched a little; those of `gate` are the next
sixth, so that a gate learns how a model does in hands that it was not taught on (its words are training's, and may
repeat); those of the other splits are the last third. In each, documents and queries share none. Held out from
training, whatever the seed: a fifth of the operand pairs of each operation (`ood_pairs`), five of the 25 ways to follow
one operation by another (`ood_compositions`), and wordings of each operation and of the number itself (`test`,
`ood_images`, and simple queries of every split but `train` and `gate`).

Digits: Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI), 8 x 8 pixels, enlarged here.
"""
