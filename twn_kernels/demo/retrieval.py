"""The number task retrieved with the shipped model: the table of modes, and a handful of queries in full.

What is measured is :mod:`twn_kernels.evaluation`'s; this file says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twn_kernels.demo.setting import SPLIT, Setting
from twn_kernels.evaluation import Entry, EvaluationOptions, evaluate, tables
from twn_kernels.pipeline.options import EncodeDetails

__all__ = ["Shown", "examples", "figures", "retrieve"]

_MODES = ("never", "always", "auto")
_METRIC, _HIT = "ndcg_at_10", "hit_at_1"
_BATCH = 64
_FOUND = 5
# Queries that are shown: the first of each kind.
_KINDS = (
    *(("simple", "text"), ("simple", "image"), ("simple", "both")),
    *(("thoughtful", "text"), ("thoughtful", "both"), ("thoughtful", "text"), ("thoughtful", "both")),
)


@dataclass(frozen=True)
class Shown:
    """A query with what became of it.

    Attributes:
        query: of the data folder.
        details: of its embedding, the gate deciding.
        found: the nearest documents, best first.
    """

    query: Entry
    details: EncodeDetails
    found: tuple[Entry, ...]

    @property
    def numbers(self) -> list[int]:
        """What the found images show."""
        return [entry.metadata["number"] for entry in self.found]

    @property
    def asked(self) -> str:
        """The query in words."""
        metadata = self.query.metadata
        pictured = metadata["operands"][0][0] if metadata["operands"] else metadata["number"]
        return " ".join(filter(None, (f"[image of {pictured}]" * bool(self.query.image), self.query.text)))

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "query": self.asked,
            "class": self.query.metadata["class"],
            "answer": self.query.metadata["number"],
            "gate_score": self.details.gate_score,
            "thought": self.details.text,
            "tokens": self.details.tokens,
            "found": self.numbers,
        }


def retrieve(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate on the testing split, print the table of modes, and return the result document."""
    options = EvaluationOptions(splits=(SPLIT,), batch_size=_BATCH, time_auto=True)
    document = evaluate(setting.embedder, setting.folder, options, names=setting.names, command="twn-kernels demo")
    _say_heading(document, say)
    _say_table(document, say)
    return document


def _say_heading(document: Mapping[str, Any], say: Callable[[str], None]) -> None:
    counts, data = document["model"]["parameters"], document["data"]["splits"][SPLIT]
    say(f"twn_kernels demo: {document['model']['base']}, {counts['base']:,} parameters in Qwen3-VL's classes;")
    say(f"adapters, queries and gate add {counts['added']:,} ({counts['added_percent']:.1f} %)")
    say(f"\n1. find the image of a number: {data['queries']} queries, {data['documents']} images of 0 to 99")
    say("   in handwriting that training never showed; half of the queries name or show the number (simple), half must")
    say("   be worked out (thoughtful)")


def _say_table(document: Mapping[str, Any], say: Callable[[str], None]) -> None:
    split = document["splits"][SPLIT]
    kinds, modes = split["classes"], split["modes"]
    say("")
    say("           nDCG@10                     hit@1   thinks                  tokens   seconds")
    say("   mode    all     simple  thoughtful          simple  thoughtful")
    for mode in _MODES:
        told = modes[mode]
        quality = {kind: of[mode] for kind, of in kinds.items()}
        rate = {kind: of["think_rate"] if mode == "auto" else float(mode == "always") for kind, of in kinds.items()}
        say(
            f"   {mode:<7} {told[_METRIC]:.4f}  {quality['simple']:.4f}  {quality['thoughtful']:.4f}      "
            f"{told[_HIT]:.4f}  {rate['simple']:>6.0%}  {rate['thoughtful']:>10.0%}  {told['query_tokens']:>6,}  "
            f"{told['query_seconds']:>8.2f}"
        )
    for other in ("never", "always"):
        found = split["differences"][f"auto_minus_{other}"]
        say(
            f"   auto minus {other:<7} {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] nDCG@10: "
            f"{tables.verdict(found)}"
        )
    say(f"   seconds are of the queries; the images took {modes['never']['document_seconds']:.2f}, none of them thinks")


def figures(document: Mapping[str, Any]) -> dict[str, Any]:
    """The table as values."""
    split = document["splits"][SPLIT]
    names = (_METRIC, _HIT, "think_rate", "fallback_rate", "query_tokens", "query_seconds")
    return {
        "queries": document["data"]["splits"][SPLIT]["queries"],
        "documents": document["data"]["splits"][SPLIT]["documents"],
        "modes": {mode: {name: split["modes"][mode][name] for name in names} for mode in _MODES},
        "classes": split["classes"],
        "differences": split["differences"],
    }


def examples(setting: Setting, document: Mapping[str, Any], say: Callable[[str], None]) -> list[Shown]:
    """A handful of queries embedded with the gate deciding: printed, and returned.

    Taken in the order of the data, whether they come out right or wrong.
    """
    queries, left = [], list(setting.split.queries)
    for kind in _KINDS:
        match = next((q for q in left if (q.metadata["class"], q.metadata["modality"]) == kind), None)
        if match is not None:
            left.remove(match)
            queries.append(match)
    embedder, documents = setting.embedder, setting.split.documents
    vectors, details = embedder.encode_query([q.input for q in queries], think="auto", return_details=True)
    corpus = embedder.encode_document([d.input for d in documents], think="never", batch_size=_BATCH)
    best = embedder.similarity(vectors, corpus).topk(min(_FOUND, len(documents)), dim=1).indices.tolist()
    shown = [
        Shown(query, detail, tuple(documents[place] for place in places))
        for query, detail, places in zip(queries, details, best, strict=True)
    ]
    threshold = document["options"]["threshold"]
    say(f"\n2. {len(shown)} of the queries, the gate deciding: it thinks from a score of {threshold:g} on")
    for one in shown:
        _say_one(one, say)
    return shown


def _say_one(one: Shown, say: Callable[[str], None]) -> None:
    answer, detail = one.query.metadata["number"], one.details
    say(f"   {one.asked}")
    thought = f'thought: "{detail.text}"' if detail.text is not None else "embedded at once"
    ended = f" (not closed: {detail.fallback})" if detail.fallback else ""
    say(f"      gate {detail.gate_score:.3f}; {thought}{ended}")
    marked = " ".join(f"[{number}]" if number == answer else str(number) for number in one.numbers)
    say(f"      found {marked}   answer {answer}")
