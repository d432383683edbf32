"""One split judged: never, always and auto on the same vectors, the roof and the floor beside them, and their spread.

Owns what is derived for a split and its form in a result. Every mode, and auto at every threshold, is a choice between
the two vectors that each input already has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twn_kernels.evaluation import gating
from twn_kernels.evaluation.dataset import Split
from twn_kernels.evaluation.embedding import TwoWays
from twn_kernels.evaluation.metrics import metric_names, rank, score

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Judge", "MODES"]

MODES = ("never", "always", "auto")
_SWEEP_QUERIES, _SWEEP_DOCUMENTS = 101, 21  # points of a sweep; with thinking documents each one is ranked anew
_DRAWS = 2000

Quality = Mapping[str, "np.ndarray"]


class Judge:
    """Judges one split.

    Args:
        split: what is ranked.
        queries, documents: its vectors both ways; documents that were embedded plainly alone never think.
        k: cutoff of the metrics.
        metric: the one that decides, of :func:`~twn_kernels.evaluation.metrics.metric_names`.
        threshold: of ``auto``.
        seed, resamples: of the intervals.
    """

    def __init__(
        self,
        split: Split,
        queries: TwoWays,
        documents: TwoWays,
        *,
        k: int,
        metric: str,
        threshold: float,
        seed: int,
        resamples: int,
    ) -> None:
        self.split, self.queries, self.documents = split, queries, documents
        self.k, self.metric, self.threshold = k, metric, threshold
        self.seed, self.resamples = seed, resamples
        self._query_ids = [entry.id for entry in split.queries]
        self._document_ids = [entry.id for entry in split.documents]
        self.documents_think = documents.thoughtful is not None
        self.never, self.margin_never = self._ranked(*self._all(False))
        self.always, self.margin_always = self.never, self.margin_never
        if queries.thoughtful is not None:
            self.always, self.margin_always = self._ranked(*self._all(True))

    def judged(self, modes: tuple[str, ...] = MODES) -> dict[str, Any]:
        """Everything that is told of the split, ready for JSON; ``modes`` says which of never, always, auto."""
        thinks = self._all(False) if "auto" not in modes else self._deciding(self.threshold)
        auto = self.quality(*thinks)
        made = {
            "never": lambda: self._mode(self.never, *self._all(False)),
            "always": lambda: self._mode(self.always, *self._all(True)),
            "auto": lambda: self._mode(auto, *thinks),
        }
        found: dict[str, Any] = {"modes": {mode: made[mode]() for mode in MODES if mode in modes}}
        if "auto" in modes:
            found |= self._gate(auto, *thinks)
        elif {"never", "always"} <= set(modes):
            found["differences"] = {"always_minus_never": self._interval(self.always, self.never)}
        return found | {"classes": self._classes(auto, thinks[0], modes), "per_query": self._per_query()}

    def quality(self, query_thinks: np.ndarray, document_thinks: np.ndarray) -> Quality:
        """Metrics of each query where those inputs think; ranks again where documents may think and some inputs do."""
        import numpy as np

        if self.documents_think:
            inputs = np.concatenate([query_thinks, document_thinks])
            if inputs.any() and not inputs.all():
                return self._ranked(query_thinks, document_thinks)[0]
        return {name: np.where(query_thinks, self.always[name], self.never[name]) for name in self.never}

    def _ranked(self, query_thinks: np.ndarray, document_thinks: np.ndarray) -> tuple[Quality, np.ndarray]:
        vectors = self.queries.vectors(query_thinks), self.documents.vectors(document_thinks)
        ranked = rank(*vectors, self._query_ids, self._document_ids, self.split.qrels, self.k)
        return score(ranked.places, self.split.qrels, self._query_ids, self.k), ranked.margins

    def _all(self, thinks: bool) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        return np.full(len(self._query_ids), thinks), np.full(len(self._document_ids), thinks and self.documents_think)

    def _deciding(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Who thinks at a threshold, as the embedder decides it: where the score reaches it."""
        return self.queries.gate_scores >= threshold, (
            self.documents.gate_scores >= threshold if self.documents_think else self._all(False)[1]
        )

    def _mode(self, quality: Quality, query_thinks: np.ndarray, document_thinks: np.ndarray) -> dict[str, float]:
        return {
            **{name: float(values.mean()) for name, values in quality.items()},
            "think_rate": float(query_thinks.mean()),
            "document_think_rate": float(document_thinks.mean()),
            "fallback_rate": float((self.queries.fell_back & query_thinks).mean()),
            "query_tokens": int(self.queries.tokens[query_thinks].sum()),
            "document_tokens": int(self.documents.tokens[document_thinks].sum()),
        }

    def _gate(self, auto: Quality, query_thinks: np.ndarray, document_thinks: np.ndarray) -> dict[str, Any]:
        import numpy as np

        never, always = self.never[self.metric], self.always[self.metric]
        best = gating.oracle(never, always)
        roof = {name: np.where(best, self.always[name], self.never[name]) for name in self.never}
        # The same documents for both: only which queries think is left to chance.
        ends = [self.quality(self._all(thinks)[0], document_thinks)[self.metric] for thinks in (False, True)]
        thinking = int(query_thinks.sum())
        floor = gating.random_gate(*ends, auto[self.metric], thinking, seed=self.seed, draws=_DRAWS)
        sweep = self._sweep()
        differences = {
            "auto_minus_never": self._interval(auto, self.never),
            "auto_minus_always": self._interval(auto, self.always),
            "auto_minus_random": self._interval(auto, {self.metric: floor["expected"]}),
            "always_minus_never": self._interval(self.always, self.never),
        }
        calibrated = {"by_metric": gating.calibration(self.queries.gate_scores, always > never)}
        known = ~np.isnan(self.margin_never)
        if known.any():
            gained = self.margin_always[known] > self.margin_never[known]
            calibrated["by_margin"] = gating.calibration(self.queries.gate_scores[known], gained)
        return {
            "differences": differences,
            "oracle": {
                **{name: float(values.mean()) for name, values in roof.items()},
                "think_rate": float(best.mean()),
                "query_tokens": int(self.queries.tokens[best].sum()),
            },
            "random": {self.metric: floor["mean"], "p_value": floor["p_value"]},
            "sweep": sweep,
            "best_in_hindsight": max(sweep, key=lambda point: (point[self.metric], -point["query_tokens"])),
            "calibration": calibrated,
        }

    def _sweep(self) -> list[dict[str, float | None]]:
        """Never, then a falling threshold: tokens only grow along it."""
        most = _SWEEP_DOCUMENTS if self.documents_think else _SWEEP_QUERIES
        scores = self.queries.gate_scores
        if self.documents_think:
            import numpy as np

            scores = np.concatenate([scores, self.documents.gate_scores])
        points = [{"threshold": None, **self._point(*self._all(False))}]
        for threshold in reversed(gating.thresholds(scores, most)):
            points.append({"threshold": threshold, **self._point(*self._deciding(threshold))})
        return points

    def _point(self, query_thinks: np.ndarray, document_thinks: np.ndarray) -> dict[str, float]:
        mode = self._mode(self.quality(query_thinks, document_thinks), query_thinks, document_thinks)
        return {name: mode[name] for name in (self.metric, "think_rate", "query_tokens", "document_tokens")}

    def _interval(self, left: Quality, right: Quality) -> dict[str, float | int]:
        return gating.bootstrap(left[self.metric] - right[self.metric], seed=self.seed, resamples=self.resamples)

    def _classes(self, auto: Quality, thinks: np.ndarray, modes: tuple[str, ...]) -> dict[str, dict[str, float]]:
        import numpy as np

        names = np.array([str(entry.metadata.get("class", "")) for entry in self.split.queries])
        quality = {"never": self.never, "always": self.always, "auto": auto}
        found = {}
        for name in sorted(set(names) - {""}):
            rows = names == name
            means = {mode: float(quality[mode][self.metric][rows].mean()) for mode in MODES if mode in modes}
            rate = {"think_rate": float(thinks[rows].mean())} if "auto" in modes else {}
            found[str(name)] = {"queries": int(rows.sum()), **rate, **means}
        return found

    def _per_query(self) -> dict[str, list]:
        """Columns over the queries: enough to compose any other gate, or to label one."""
        thought = self.queries.thoughtful is not None
        columns = {
            "id": self._query_ids,
            "class": [entry.metadata.get("class") for entry in self.split.queries],
            "gate_score": None if self.queries.gate_scores is None else self.queries.gate_scores.tolist(),
            "never": self.never[self.metric].tolist(),
            "margin_never": _numbers(self.margin_never),
            "always": self.always[self.metric].tolist() if thought else None,
            "margin_always": _numbers(self.margin_always) if thought else None,
            "tokens": self.queries.tokens.tolist() if thought else None,
            "fell_back": self.queries.fell_back.tolist() if thought else None,
        }
        return {name: values for name, values in columns.items() if values is not None}


def _numbers(values: np.ndarray) -> list[float | None]:
    """JSON has no word for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def main_metric(name: str, k: int) -> str:
    """``"ndcg"`` at cutoff 10 as ``"ndcg_at_10"``; ``"hit"`` is always at 1."""
    return next(full for full in metric_names(k) if full.startswith(f"{name}_at_"))
