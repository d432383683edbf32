"""Rankings from vectors, and retrieval metrics of rankings as trec_eval computes them (through ``pytrec_eval``).

Owns the order of ties and the names of metrics. A ranking is by similarity, then by id, whatever trec_eval itself would
do with a tie: it is handed places instead of similarities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from twn_kernels.errors import InputError, MissingDependency

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Ranked", "metric_names", "rank", "require_trec_eval", "score"]

_QUERIES_AT_ONCE, _DOCUMENTS_AT_ONCE = 64, 8192  # bounds memory: 64 * 8192 fp64 products are 4 MiB


class Ranked(NamedTuple):
    """What ranking gave.

    Attributes:
        places: query id to the ids of its best documents, best first.
        margins: float64 ``[queries]``: similarity of the best positive less that of the best other document; NaN where
            every document is a positive.
    """

    places: dict[str, list[str]]
    margins: np.ndarray


def metric_names(k: int) -> tuple[str, ...]:
    """The metrics that :func:`score` gives for a cutoff, as MTEB calls them; ``hit_at_1`` is MMEB's ``hit@1``."""
    return (f"ndcg_at_{k}", f"recall_at_{k}", f"mrr_at_{k}", "hit_at_1")


def require_trec_eval():
    """The module ``pytrec_eval``.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import pytrec_eval
    except ImportError as error:
        raise MissingDependency(
            'retrieval metrics need pytrec_eval-terrier, which is not installed. Run: pip install "twn_kernels[eval]"'
        ) from error
    return pytrec_eval


def rank(
    queries: np.ndarray,
    documents: np.ndarray,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    qrels: Mapping[str, Mapping[str, int]],
    depth: int,
) -> Ranked:
    """The best ``depth`` documents of each query by inner product; equal ones in the order of their ids.

    Args:
        queries, documents: float32 ``[n, width]``, of unit length.
        query_ids, document_ids: of their rows.
        qrels: query id to document id to relevance, for the margins.
        depth: how many to keep.

    Raises:
        InputError: a vector is not finite.
    """
    import numpy as np

    for name, vectors, ids in (("query", queries, query_ids), ("document", documents, document_ids)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise InputError(
                f'{len(bad)} of {len(vectors)} {name} vectors are not finite (the first: "{ids[bad[0]]}"). '
                "Look for NaN in the model and the checkpoint, or try float32."
            )
    order = np.array(sorted(range(len(document_ids)), key=document_ids.__getitem__))
    ordered_ids = [document_ids[place] for place in order]
    column = {document: place for place, document in enumerate(ordered_ids)}
    places: dict[str, list[str]] = {}
    margins = np.full(len(query_ids), np.nan)
    for start in range(0, len(query_ids), _QUERIES_AT_ONCE):
        block = _similarities(queries[start : start + _QUERIES_AT_ONCE], documents, order)
        for row, similarities in enumerate(block, start):
            query = query_ids[row]
            places[query] = [ordered_ids[best] for best in _best(similarities, depth)]
            positive = [column[document] for document, relevance in qrels[query].items() if relevance > 0]
            others = np.delete(similarities, positive)
            if len(others):
                margins[row] = float(similarities[positive].max()) - float(others.max())
    return Ranked(places, margins)


def _similarities(queries: np.ndarray, documents: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rounded to float32 from products in float64, so that equal documents tie wherever they stand in the product."""
    import numpy as np

    left, parts = queries.astype(np.float64), []
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        right = documents[order[start : start + _DOCUMENTS_AT_ONCE]].astype(np.float64)
        parts.append((left @ right.T).astype(np.float32))
    return np.concatenate(parts, axis=1)


def _best(similarities: np.ndarray, depth: int) -> np.ndarray:
    import numpy as np

    candidates = np.arange(len(similarities))
    if depth < len(similarities):
        least = np.partition(similarities, -depth)[-depth]
        candidates = np.flatnonzero(similarities >= least)  # all that tie with the last place, in the order of ids
    return candidates[np.argsort(-similarities[candidates], kind="stable")][:depth]


def score(
    places: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, int]],
    query_ids: Sequence[str],
    k: int,
) -> dict[str, np.ndarray]:
    """Metrics of each query.

    Args:
        places: of :func:`rank`, at least ``k`` deep.
        qrels: query id to document id to relevance.
        query_ids: in the order of the result.
        k: cutoff.

    Returns:
        by name of :func:`metric_names`, float64 ``[queries]``.

    Raises:
        MissingDependency: pytrec_eval is not installed.
    """
    import numpy as np

    trec = require_trec_eval()
    measures = {f"ndcg_cut.{k}", f"recall.{k}", "recip_rank", "success.1"}
    # Cut first: trec_eval's reciprocal rank looks at all that it is given.
    run = {
        query: {document: float(k - place) for place, document in enumerate(places[query][:k])} for query in query_ids
    }
    whole = {query: dict(qrels[query]) for query in query_ids}
    found = trec.RelevanceEvaluator(whole, measures).evaluate(run)
    columns = (f"ndcg_cut_{k}", f"recall_{k}", "recip_rank", "success_1")
    return {
        name: np.array([found[query][column] for query in query_ids])
        for name, column in zip(metric_names(k), columns, strict=True)
    }
