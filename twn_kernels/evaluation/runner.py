"""One evaluation from a data folder to a result document.

Owns the options, which inputs are embedded how often, and what the document says beside the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twn_kernels.errors import OptionError, did_you_mean, quoted
from twn_kernels.evaluation import gating, metrics, provenance
from twn_kernels.evaluation.dataset import Split, read_split, split_names
from twn_kernels.evaluation.embedding import TwoWays, embed_both_ways, timed_auto
from twn_kernels.evaluation.judging import MODES, Judge, main_metric
from twn_kernels.evaluation.results import KIND, SCHEMA, parse

__all__ = ["METRICS", "EvaluationOptions", "evaluate"]

METRICS = ("ndcg", "recall", "mrr", "hit")


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        splits: names; None: all that the folder has.
        think: modes to judge, of ``"never"``, ``"always"``, ``"auto"``. Auto needs both passes, so it costs as
            much as always and never together.
        threshold: of auto; None: the checkpoint's.
        think_documents: documents think as queries do; otherwise they are always embedded plainly.
        k: cutoff of nDCG, recall and MRR.
        metric: the one that decides: ``"ndcg"``, ``"recall"``, ``"mrr"`` or ``"hit"`` (at 1).
        batch_size, max_think_tokens, query_prompt, document_prompt: of ``encode``.
        time_auto: also run the queries with the gate deciding, for its seconds; otherwise they are estimated.
        seed, resamples: of the bootstrap and of the random gate.

    Raises:
        OptionError: one is out of range or not a name.
    """

    splits: tuple[str, ...] | None = None
    think: tuple[str, ...] = MODES
    threshold: float | None = None
    think_documents: bool = False
    k: int = 10
    metric: str = "ndcg"
    batch_size: int = 32
    max_think_tokens: int | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    time_auto: bool = False
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        for name, value, names in (("metric", self.metric, METRICS), *(("think", mode, MODES) for mode in self.think)):
            if value not in names:
                raise OptionError(f"{name} must be of {quoted(names)}, got {value!r}.{did_you_mean(value, names)}")
        if not self.think:
            raise OptionError(f"think must name one or more of {quoted(MODES)}, got none.")
        for name in ("k", "batch_size", "resamples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise OptionError(f"threshold must be a number in [0, 1], got {self.threshold!r}.")


def evaluate(
    embedder: Any,
    folder: str | Path,
    options: EvaluationOptions | None = None,
    *,
    names: Mapping[str, str] | None = None,
    command: str = "twn_kernels.evaluation.evaluate",
    say: Callable[[str], None] = lambda line: None,
    show_progress_bar: bool = False,
) -> dict[str, Any]:
    """Evaluate an embedder on a data folder.

    Args:
        embedder: a :class:`~twn_kernels.TWNEmbedder`.
        folder: in the format of :mod:`twn_kernels.evaluation.dataset`.
        options: None: the defaults.
        names: what to call ``model`` and ``checkpoint`` in the result.
        command: what reproduces the result.
        say: receives a line as each part begins.
        show_progress_bar: of ``encode``.

    Returns:
        The result document of :mod:`twn_kernels.evaluation.results`.

    Raises:
        DataError: the folder is not whole.
        OptionError: auto is asked for and the checkpoint has no gate.
        InputError: an input cannot be embedded.
        MissingDependency: pytrec_eval, scikit-learn or SciPy is absent.
    """
    options = options or EvaluationOptions()
    metrics.require_trec_eval()
    gating.require_statistics()
    start, folder = time.perf_counter(), Path(folder)
    splits = [read_split(folder, name) for name in options.splits or split_names(folder)]
    run = _Run(embedder, options, say, show_progress_bar)
    run.warm_up(splits[0])
    judged = {split.name: run.judge(split) for split in splits}
    document = {
        "schema": SCHEMA,
        "kind": KIND,
        **provenance.stamp(),
        "command": command,
        "data": {"name": folder.resolve().name, "splits": {split.name: _counts(split) for split in splits}},
        "model": {
            "base": (names or {}).get("model", "unnamed"),
            "checkpoint": (names or {}).get("checkpoint", "unnamed"),
            "parameters": provenance.parameters(embedder),
        },
        "options": {**_listed(options), "threshold": run.threshold},
        "metric": run.metric,
        "splits": judged,
        "seconds": time.perf_counter() - start,
    }
    return parse(document, "the result")


def _counts(split: Split) -> dict[str, Any]:
    return {
        "digest": split.digest,
        "queries": len(split.queries),
        "documents": len(split.documents),
        "queries_without_positive": split.without_positive,
    }


def _listed(options: EvaluationOptions) -> dict[str, Any]:
    values = asdict(options)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class _Run:
    """What stays the same from split to split; keeps the vectors of a corpus that several splits share."""

    def __init__(self, embedder: Any, options: EvaluationOptions, say: Callable[[str], None], shown: bool) -> None:
        self.embedder, self.options, self.say = embedder, options, say
        self.metric = main_metric(options.metric, options.k)
        config = getattr(embedder, "config", None)
        given = options.threshold
        self.threshold = float(getattr(config, "think_threshold", 0.5) if given is None else given)
        self.thinks = bool({"always", "auto"} & set(options.think))
        self._encode = {
            "batch_size": options.batch_size,
            "max_think_tokens": options.max_think_tokens,
            "show_progress_bar": shown,
        }
        self._corpora: dict[tuple, TwoWays] = {}

    def warm_up(self, split: Split) -> None:
        """One query both ways: what only a first call pays is no mode's time, and a missing gate shows at once."""
        found = embed_both_ways(self.embedder, split.queries[:1], "query", thoughtful=self.thinks, **self._encode)
        if "auto" in self.options.think and found.gate_scores is None:
            raise OptionError('think="auto" needs a gate, and the checkpoint has none. Use "never" and "always".')

    def judge(self, split: Split) -> dict[str, Any]:
        options = self.options
        documents = self._documents(split)
        self.say(f"{split.name}: {len(split.queries)} queries")
        prompt = {"prompt": options.query_prompt, **self._encode}
        queries = embed_both_ways(self.embedder, split.queries, "query", thoughtful=self.thinks, **prompt)
        judge = Judge(
            split,
            queries,
            documents,
            k=options.k,
            metric=self.metric,
            threshold=self.threshold,
            seed=options.seed,
            resamples=options.resamples,
        )
        found = judge.judged(options.think)
        self._add_seconds(found["modes"], split, queries, documents, prompt)
        return found

    def _documents(self, split: Split) -> TwoWays:
        # The same candidates under another split's name are not embedded again.
        key = tuple((entry.id, entry.title, entry.text, entry.image) for entry in split.documents)
        if key not in self._corpora:
            self.say(f"{split.name}: {len(split.documents)} documents")
            thoughtful = self.thinks and self.options.think_documents
            prompt = {"prompt": self.options.document_prompt, **self._encode}
            self._corpora[key] = embed_both_ways(
                self.embedder, split.documents, "document", thoughtful=thoughtful, **prompt
            )
        return self._corpora[key]

    def _add_seconds(self, modes: dict, split: Split, queries: TwoWays, documents: TwoWays, prompt: dict) -> None:
        """Of queries and documents in each mode. Auto's are measured on request, else shared out by its tokens."""
        for mode, told in modes.items():
            for role, ways in (("query", queries), ("document", documents)):
                if mode == "never" or ways.thoughtful is None:
                    seconds, measured = ways.seconds_plain, True
                elif mode == "always":
                    seconds, measured = ways.seconds_thoughtful, True
                elif self.options.time_auto:
                    entries = split.queries if role == "query" else split.documents
                    options = prompt if role == "query" else {**prompt, "prompt": self.options.document_prompt}
                    seconds = timed_auto(self.embedder, entries, role, self.threshold, **options)
                    measured = True
                else:
                    share = told[f"{role}_tokens"] / max(1, int(ways.tokens.sum()))
                    seconds = ways.seconds_plain + share * max(0.0, ways.seconds_thoughtful - ways.seconds_plain)
                    measured = False
                told[f"{role}_seconds"] = seconds
                told["seconds_measured"] = told.get("seconds_measured", True) and measured
