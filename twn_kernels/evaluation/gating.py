"""What a gate is worth, from the quality of each query without and with a thought.

Owns the threshold sweep, the oracle and the random gate, calibration (scikit-learn's) and paired bootstrap intervals
(SciPy's). Works on arrays alone: it knows neither vectors nor models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twn_kernels.errors import MissingDependency

if TYPE_CHECKING:
    import numpy as np

__all__ = ["bootstrap", "calibration", "oracle", "random_gate", "require_statistics", "thresholds"]

_CONFIDENCE = 0.95
_BINS = 10


def require_statistics() -> None:
    """Raise MissingDependency where scikit-learn or SciPy is absent; call it before anything long runs."""
    try:
        import scipy.stats  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"judging a gate needs scikit-learn and SciPy, and {error.name} is not installed. "
            'Run: pip install "twn_kernels[eval]"'
        ) from error


def thresholds(scores: np.ndarray, most: int) -> list[float]:
    """Thresholds to sweep: every score where there are at most ``most`` different ones, else as many quantiles of them.

    Together with thinking never, which no threshold up to 1 can promise, these are all the decisions there are.
    """
    import numpy as np

    distinct = np.unique(scores)
    if len(distinct) > most:
        distinct = distinct[np.linspace(0, len(distinct) - 1, most).round().astype(int)]
    return [float(value) for value in distinct]


def oracle(never: np.ndarray, always: np.ndarray) -> np.ndarray:
    """Which queries the best possible gate sends to think: those that gain. bool ``[queries]``."""
    return always > never


def random_gate(never: np.ndarray, always: np.ndarray, auto: np.ndarray, thinking: int, *, seed: int, draws: int):
    """Gates that send as many queries to think as ours, but any.

    Args:
        never, always, auto: quality of each query, ``[queries]``.
        thinking: how many queries ours sends to think.
        seed: of the draws.
        draws: how many random gates stand for all of them.

    Returns:
        ``mean`` (exact: each query thinks with the same probability), ``expected`` (``[queries]``, of each query), and
        ``p_value``, the share of random gates that are at least as good as ours, ours counted among them.
    """
    import numpy as np

    count = len(never)
    rate = thinking / count
    expected = never + rate * (always - never)
    generator = np.random.default_rng(seed)
    least, better = float(auto.sum()) - 1e-9 * count, 1
    gain, base = always - never, float(never.sum())
    for _ in range(draws):
        better += base + float(gain[generator.permutation(count)[:thinking]].sum()) >= least
    return {"mean": float(expected.mean()), "expected": expected, "p_value": better / (draws + 1)}


def bootstrap(difference: np.ndarray, *, seed: int, resamples: int) -> dict[str, float | int]:
    """Mean of paired differences with its percentile interval over queries.

    Args:
        difference: ``[queries]``.
        seed: of the resampling.
        resamples: how many.

    Returns:
        ``mean``, ``low``, ``high``, ``confidence``, ``resamples``; the interval is a point where there is one query.
    """
    import numpy as np
    import scipy.stats

    mean = low = high = float(difference.mean())
    if len(difference) > 1:
        found = scipy.stats.bootstrap(
            (difference,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, 2**22 // len(difference)),
            confidence_level=_CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return {"mean": mean, "low": low, "high": high, "confidence": _CONFIDENCE, "resamples": resamples}


def calibration(scores: np.ndarray, improved: np.ndarray) -> dict[str, Any]:
    """Whether the gate's score predicts that thinking improved the query.

    Args:
        scores: in [0, 1], ``[queries]``.
        improved: bool ``[queries]``.

    Returns:
        ``improved_rate``; ``brier`` and ``brier_of_rate`` (of always saying the rate); ``auroc``, None where all
        queries improved or none did; ``reliability``: per occupied bin ``low``, ``high``, ``queries``, ``mean_score``
        and ``improved_rate``.
    """
    import numpy as np
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, roc_auc_score

    rate = float(improved.mean())
    edges = np.linspace(0, 1, _BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], scores), minlength=_BINS)
    # With both classes named, scikit-learn's curve takes a split on which one of them is absent.
    true, said = calibration_curve(improved.astype(int), scores, n_bins=_BINS, pos_label=1)
    bins = [
        {
            "low": float(edges[place]),
            "high": float(edges[place + 1]),
            "queries": int(counts[place]),
            "mean_score": float(mean),
            "improved_rate": float(share),
        }
        for place, mean, share in zip(np.flatnonzero(counts), said, true, strict=True)
    ]
    return {
        "improved_rate": rate,
        "brier": float(brier_score_loss(improved.astype(int), scores, pos_label=1)),
        "brier_of_rate": rate * (1 - rate),
        "auroc": float(roc_auc_score(improved, scores)) if 0 < rate < 1 else None,
        "reliability": bins,
    }
