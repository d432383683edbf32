"""A result in the formats of the benchmarks that embedding users compare in: MTEB's and MMEB's.

Owns the two layouts. One folder a mode, because to those benchmarks each mode is a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twn_kernels.evaluation import provenance
from twn_kernels.evaluation.results import write_json

__all__ = ["mmeb_scores", "mteb_result", "write_formats"]


def mteb_result(document: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """One mode as MTEB's result of one task, all splits in it.

    The task's name is that of the data folder; the revision is the digest of what was evaluated.
    """
    scores, seconds = {}, 0.0
    for name, split in document["splits"].items():
        told = split["modes"][mode]
        values = {key: value for key, value in told.items() if "_at_" in key}
        main = told[document["metric"]]
        scores[name] = [{**values, "main_score": main, "hf_subset": "default", "languages": ["eng-Latn"]}]
        seconds += told["query_seconds"] + told["document_seconds"]
    digests = [split["digest"] for split in document["data"]["splits"].values()]
    version = provenance.version("mteb")
    return {
        "dataset_revision": "+".join(digest[:12] for digest in digests),
        "task_name": document["data"]["name"],
        "mteb_version": None if version == "absent" else version,
        "scores": scores,
        "evaluation_time": seconds,
        "kg_co2_emissions": None,
    }


def mmeb_scores(document: Mapping[str, Any], mode: str) -> dict[str, dict[str, float | int]]:
    """One mode as MMEB's scores, by dataset: each split is a dataset, ``hit@1`` its score.

    ``ndcg_linear@k`` is trec_eval's, whose gain is linear too.
    """
    found = {}
    for name, split in document["splits"].items():
        told, count = split["modes"][mode], document["data"]["splits"][name]["queries"]
        renamed = {
            key.replace("ndcg_at_", "ndcg_linear@").replace("_at_", "@"): told[key] for key in told if "_at_" in key
        }
        found[f"{document['data']['name']}-{name}"] = {**renamed, "num_pred": count, "num_data": count}
    return found


def write_formats(document: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write ``mteb/<mode>/<task>.json`` and ``mmeb/<mode>/<dataset>_score.json`` below a folder."""
    folder, written = Path(folder), []
    for mode in next(iter(document["splits"].values()))["modes"]:
        task = document["data"]["name"]
        written.append(write_json(mteb_result(document, mode), folder / "mteb" / mode / f"{task}.json"))
        for dataset, scores in mmeb_scores(document, mode).items():
            written.append(write_json(scores, folder / "mmeb" / mode / f"{dataset}_score.json"))
    return written
