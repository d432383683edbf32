"""Every error the package raises, and the sentence they share.

One tree under :class:`TWNError`; each class is also the builtin a caller would guess, so ``except ValueError`` works.
A message says what is wrong (with the argument's name), what was expected and why, what came, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "ImplUnavailable",
    "InputError",
    "MissingDependency",
    "OptionError",
    "PatchError",
    "ResultError",
    "ShapeError",
    "TableError",
    "TrainingError",
    "TWNError",
    "TWNWarning",
    "UnsupportedModel",
]


class TWNError(Exception):
    """Root of the package's errors."""


class ShapeError(TWNError, ValueError):
    """A tensor has a shape, or a plan a length, that the contract does not allow."""


class DtypeError(TWNError, TypeError):
    """A tensor has a dtype that the contract does not allow."""


class DeviceError(TWNError, ValueError):
    """Tensors that must share a device do not."""


class OptionError(TWNError, ValueError):
    """An option has a value outside its range or its list of names."""


class ImplUnavailable(TWNError, RuntimeError):
    """A named implementation cannot run here."""


class UnsupportedModel(TWNError, TypeError):
    """The model holds something that cannot be patched exactly."""


class PatchError(TWNError, RuntimeError):
    """A model cannot be patched, unpatched or routed as asked."""


class CheckpointError(TWNError, ValueError):
    """A checkpoint on disk is missing, damaged, unsafe or does not fit."""


class InputError(TWNError, ValueError):
    """Something given to embed cannot be embedded."""


class DataError(TWNError, ValueError):
    """A data set on disk is missing, damaged or contradicts itself."""


class ResultError(TWNError, ValueError):
    """A benchmark's or an evaluation's result on disk is missing, damaged or of another schema."""


class TableError(TWNError, ValueError):
    """A data file of the package or of a benchmark has an entry that it may not have."""


class TrainingError(TWNError, RuntimeError):
    """A training run cannot go on; the last good state is kept, and the message says where."""


class MissingDependency(TWNError, ImportError):
    """An optional library is absent or too old."""


class TWNWarning(UserWarning):
    """Something that works, but that the user can and should change."""


def quoted(names: Iterable[str]) -> str:
    """``'"a", "b"'``, or ``none`` for an empty list."""
    return ", ".join(f'"{name}"' for name in names) or "none"


def reject_unknown(unknown: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raise OptionError for keyword arguments that ``function`` does not have, offering the nearest."""
    names, known = list(unknown), list(known)
    if names:
        raise OptionError(
            f"{function} has no option {quoted(names)}; its options are {quoted(known)}.{did_you_mean(names[0], known)}"
        )


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """`` Did you mean "x"?`` with the nearest of ``options``, or an empty string."""
    near = difflib.get_close_matches(str(name), list(options), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
