"""Results as tables to read: one run, and two runs side by side. Plain text; every number is the document's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from twn_kernels.evaluation import gating

__all__ = ["compare", "render", "render_comparison", "verdict"]

_GATE_QUESTIONS = {
    "auto_minus_never": "than never thinking",
    "auto_minus_always": "than always thinking",
    "auto_minus_random": "than a random gate that thinks as often",
}


def render(document: Mapping[str, Any]) -> str:
    """One run: modes by split, the gate's verdicts, its calibration, and classes of queries."""
    metric, parts = document["metric"], [_heading(document)]
    rows = []
    for name, split in document["splits"].items():
        rows += [(name, mode, *_mode_row(told, metric)) for mode, told in split["modes"].items()]
        if "oracle" in split:
            roof, floor = split["oracle"], split["random"]
            rate = split["modes"]["auto"]["think_rate"] if "auto" in split["modes"] else 0.0
            rows.append((name, "oracle", *_mode_row(roof, metric)))
            rows.append((name, "random", _score(floor[metric]), "", "", "", _percent(rate), "", "", ""))
    header = ("split", "mode", metric, *_others(document), "think", "fell back", "tokens", "seconds")
    parts.append(_table(header, rows))
    if any(not told.get("seconds_measured", True) for s in document["splits"].values() for told in s["modes"].values()):
        parts.append("~ estimated from the passes without and with thoughts by its share of the tokens")
    for name, split in document["splits"].items():
        parts += [f"{name}: {line}" for line in _gate_lines(split, metric)]
    questions = _verdict_rows(document)
    if questions:
        parts.append("\n" + _table(("is the gate better", *document["splits"]), questions))
    classes = _class_rows(document)
    if classes:
        modes = next(iter(document["splits"].values()))["modes"]
        parts.append("\n" + _table(("split", "class", "queries", "think", *modes), classes))
    return "\n".join(parts)


def _heading(document: Mapping[str, Any]) -> str:
    model, data = document["model"], document["data"]
    counted = ", ".join(
        f"{name} {told['queries']} x {told['documents']}"
        + (
            f" ({told['queries_without_positive']} without a positive left out)"
            * bool(told["queries_without_positive"])
        )
        for name, told in data["splits"].items()
    )
    lines = [f"{data['name']}: queries x documents: {counted}", f"model {model['base']}, {model['checkpoint']}"]
    counts = model["parameters"]
    if counts is not None:
        own = ", ".join(f"{name} {counts[name]:,}" for name in ("reasoning", "embedding", "gate", "queries"))
        lines.append(f"parameters: base {counts['base']:,}; added {counts['added_percent']:.2f} %: {own}")
    return "\n".join(lines) + f"\nthreshold of auto: {document['options'].get('threshold')}\n"


def _others(document: Mapping[str, Any]) -> tuple[str, ...]:
    first = next(iter(next(iter(document["splits"].values()))["modes"].values()))
    return tuple(name for name in first if "_at_" in name and name != document["metric"])


def _mode_row(told: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    others = [_score(value) for name, value in told.items() if "_at_" in name and name != metric]
    tokens = told["query_tokens"] + told.get("document_tokens", 0)
    seconds = ""
    if "query_seconds" in told:
        mark = "" if told["seconds_measured"] else "~"
        seconds = f"{mark}{told['query_seconds'] + told['document_seconds']:.2f}"
    fell_back = _percent(told["fallback_rate"]) if "fallback_rate" in told else ""
    return _score(told[metric]), *others, _percent(told["think_rate"]), fell_back, f"{tokens:,}", seconds


def verdict(interval: Mapping[str, float]) -> str:
    """``better``, ``worse`` or ``not shown``, by whether the interval holds zero."""
    return "better" if interval["low"] > 0 else "worse" if interval["high"] < 0 else "not shown"


def _gate_lines(split: Mapping[str, Any], metric: str) -> Iterable[str]:
    for name, words in _GATE_QUESTIONS.items():
        if name in split.get("differences", {}):
            found = split["differences"][name]
            spread = f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
            tail = f", p = {split['random']['p_value']:.4f}" if name == "auto_minus_random" else ""
            yield f"is the gate better {words}? {verdict(found)}: {spread}{tail}"
    for by, told in split.get("calibration", {}).items():
        auroc = "undefined" if told["auroc"] is None else f"{told['auroc']:.3f}"
        yield (
            f"gate score against gain {by.replace('_', ' ')}: AUROC {auroc}, Brier {told['brier']:.3f} "
            f"(of the rate alone {told['brier_of_rate']:.3f}), {_percent(told['improved_rate'])} gain"
        )
    if "best_in_hindsight" in split:
        best = split["best_in_hindsight"]
        at = "never thinking" if best["threshold"] is None else f"threshold {best['threshold']:.4f}"
        yield f"best in hindsight: {at}, {metric} {_score(best[metric])}, think {_percent(best['think_rate'])}"


def _verdict_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The questions side by side over the splits: a gain that ends out of distribution shows here."""
    splits = document["splits"].values()
    if not all("auto_minus_never" in split.get("differences", {}) for split in splits):
        return []
    return [
        (words, *(verdict(split["differences"][name]) for split in splits)) for name, words in _GATE_QUESTIONS.items()
    ]


def _class_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            kind,
            str(told["queries"]),
            _percent(told["think_rate"]) if "think_rate" in told else "",
            *(_score(told[mode]) for mode in split["modes"]),
        )
        for name, split in document["splits"].items()
        for kind, told in split["classes"].items()
    ]


def compare(ours: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two runs mode by mode on the splits that both have.

    Returns:
        rows of ``split``, ``mode``, ``metric``, ``ours``, ``other``, ``same_data`` and ``difference``: an interval
        paired by query, for ``never`` and ``always`` where both ran on the same data and decided by the same metric;
        else None.
    """
    import numpy as np

    rows = []
    for name in [name for name in ours["splits"] if name in other["splits"]]:
        left, right = ours["splits"][name], other["splits"][name]
        digests = [run["data"]["splits"][name]["digest"] for run in (ours, other)]
        same_data = digests[0] == digests[1]
        same = same_data and ours["metric"] == other["metric"]
        for mode in [mode for mode in left["modes"] if mode in right["modes"]]:
            values = [_of_queries(run, name, mode) for run in (ours, other)]
            difference = None
            if same and None not in values:
                options = ours["options"]
                difference = gating.bootstrap(
                    np.array(values[0]) - np.array(values[1]), seed=options["seed"], resamples=options["resamples"]
                )
            rows.append(
                {
                    "split": name,
                    "mode": mode,
                    "metric": ours["metric"],
                    "ours": left["modes"][mode][ours["metric"]],
                    "other": right["modes"][mode].get(ours["metric"]),
                    "same_data": same_data,
                    "difference": difference,
                }
            )
    return rows


def _of_queries(run: Mapping[str, Any], split: str, mode: str) -> list[float] | None:
    """Quality of each query in a mode; auto is composed again where documents did not think."""
    columns = run["splits"][split]["per_query"]
    if mode != "auto":
        return columns.get(mode)
    if run["options"]["think_documents"]:
        return None
    threshold = run["options"]["threshold"]
    rows = zip(columns["gate_score"], columns["never"], columns["always"], strict=True)
    return [always if score >= threshold else never for score, never, always in rows]


def render_comparison(rows: Sequence[Mapping[str, Any]], other_name: str) -> str:
    """The rows of :func:`compare` as a table."""
    lines = []
    for row in rows:
        found = row["difference"]
        spread = "" if found is None else f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
        said = "" if found is None else verdict(found)
        said = said if row["same_data"] else "on other data"
        other = "" if row["other"] is None else _score(row["other"])
        lines.append((row["split"], row["mode"], _score(row["ours"]), other, spread, said))
    if not lines:
        return f"{other_name} has no split and mode in common with this run"
    metric = rows[0]["metric"]
    return _table(("split", "mode", metric, other_name, "difference", "ours is"), lines)


def _score(value: float) -> str:
    return f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)
