"""The one tolerance of the suite: as good as torch itself, measured against fp64 truth.

A result passes when its largest error is at most twice (torch's largest error in the same dtype + one rounding band),
when its relative RMS error is at most twice torch's + one band, and when it is finite wherever the truth is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["assert_as_good_as_torch", "error_against_truth", "oracle_ratio"]

_RMS_ELEMENTS = 32  # below it, torch may be exact by luck and the RMS says nothing that the largest error does not


def error_against_truth(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest absolute and relative RMS error of ``actual`` against fp64 ``truth``, over the truth's finite part."""
    finite = torch.isfinite(truth)
    difference = (actual.double() - truth)[finite]
    if difference.numel() == 0:
        return 0.0, 0.0
    rms = truth[finite].pow(2).mean().sqrt().item()
    relative = difference.pow(2).mean().sqrt().item() / rms if rms > 0 else difference.abs().max().item()
    return difference.abs().max().item(), relative


def assert_as_good_as_torch(actual: Tensor, truth_fp64: Tensor, torch_same_dtype: Tensor, name: str = "result") -> None:
    """Fail unless ``actual`` is about as near to the truth as torch's own result in the same dtype.

    Args:
        actual: what is tested; its dtype sets the rounding band.
        truth_fp64: the same quantity in fp64, of the same shape. Where it is not finite, ``actual`` must not be either.
        torch_same_dtype: torch's (or PEFT's) result from the same inputs in the dtype of ``actual``.
        name: what to call it in the message.

    Raises:
        AssertionError: with both errors, the budget, the worst coordinate and the three values there.
    """
    _check_alike(actual, truth_fp64, torch_same_dtype, name)
    actual, truth, baseline = (t.detach().cpu() for t in (actual, truth_fp64, torch_same_dtype))
    _same_finite(actual, truth, name)
    errors = _Errors.of(actual, truth, baseline)
    if errors.ratio <= 1:
        return
    max_error, max_budget, torch_max, rms_error, rms_budget, torch_rms = errors[:6]
    gap = torch.where(torch.isfinite(truth), (actual.double() - truth).abs(), 0.0)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)) if gap.dim() else ()
    raise AssertionError(
        f"{name} is worse than torch: max error {max_error:.3e} (budget {max_budget:.3e}, torch {torch_max:.3e}), "
        f"relative RMS {rms_error:.3e} (budget {rms_budget:.3e}, torch {torch_rms:.3e}); worst at {worst}: "
        f"actual {actual[worst].item():.9g}, truth {truth[worst].item():.9g}, torch {baseline[worst].item():.9g}; "
        f"seed {torch.initial_seed()}"
    )


def oracle_ratio(actual: Tensor, truth_fp64: Tensor, torch_same_dtype: Tensor) -> float:
    """How much of the oracle's budget ``actual`` uses: passed where it is at most 1; inf where it is not finite alike.

    Runs on the device of the tensors, which must be alike otherwise (:func:`assert_as_good_as_torch` says how).

    Raises:
        AssertionError: shapes differ, or the truth is not fp64.
    """
    _check_alike(actual, truth_fp64, torch_same_dtype, "result")
    if _unlike(actual, truth_fp64).any():
        return float("inf")
    return _Errors.of(actual.detach(), truth_fp64.detach(), torch_same_dtype.detach()).ratio


class _Errors(NamedTuple):
    """Errors beside their budgets, and the larger of the two quotients that count."""

    max_error: float
    max_budget: float
    torch_max: float
    rms_error: float
    rms_budget: float
    torch_rms: float
    ratio: float

    @classmethod
    def of(cls, actual: Tensor, truth: Tensor, baseline: Tensor) -> _Errors:
        max_error, rms_error = error_against_truth(actual, truth)
        torch_max, torch_rms = error_against_truth(baseline, truth)
        eps, tiny = torch.finfo(actual.dtype).eps, torch.finfo(actual.dtype).tiny
        finite = truth[torch.isfinite(truth)]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        max_budget, rms_budget = 2 * (torch_max + eps * largest) + tiny, 2 * torch_rms + eps
        ratio = _part(max_error, max_budget)
        if finite.numel() >= _RMS_ELEMENTS and max_error > tiny:
            ratio = max(ratio, _part(rms_error, rms_budget))
        return cls(max_error, max_budget, torch_max, rms_error, rms_budget, torch_rms, ratio)


def _part(error: float, budget: float) -> float:
    # Where torch itself overflows the dtype, both are infinite and the budget is just kept.
    return 1.0 if error == budget == float("inf") else error / budget


def _check_alike(actual: Tensor, truth: Tensor, baseline: Tensor, name: str) -> None:
    if actual.shape != truth.shape or baseline.shape != truth.shape:
        raise AssertionError(
            f"{name}: shapes differ: actual {list(actual.shape)}, truth {list(truth.shape)}, "
            f"torch {list(baseline.shape)}"
        )
    if truth.dtype != torch.float64:
        raise AssertionError(f"{name}: the truth must be float64, got {truth.dtype}")


def _unlike(actual: Tensor, truth: Tensor) -> Tensor:
    """Where one is finite and the other is not, overflow of the dtype apart."""
    overflow = torch.isfinite(truth) & (truth.abs() >= torch.finfo(actual.dtype).max)
    return (torch.isfinite(truth) != torch.isfinite(actual)) & ~overflow


def _same_finite(actual: Tensor, truth: Tensor, name: str) -> None:
    wrong = _unlike(actual, truth)
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} elements are finite where the truth is not, or the reverse; first at {where}: "
            f"actual {actual[where].item()}, truth {truth[where].item()}"
        )
