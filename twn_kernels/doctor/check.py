"""What the doctor's checks share: a line of the report, the dtypes, the comparison, the fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from twn_kernels.errors import MissingDependency
from twn_kernels.testing.oracle import assert_as_good_as_torch

__all__ = ["DTYPES", "FAIL", "NOT_AVAILABLE", "OK", "Check", "check_name", "compare", "first_line", "fix"]

OK, FAIL, NOT_AVAILABLE = "ok", "FAIL", "not available"

# Of the layer and of its adapters. fp64 is missing because it is the truth.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 with fp32 adapters": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        status: ``"ok"``, ``"FAIL"`` or ``"not available"``.
        detail: what was seen, or why it is not available.
        fix: what to do about a failure; empty otherwise.
    """

    name: str
    status: str
    detail: str = ""
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<13}  {self.name}"
        line += f": {self.detail}" if self.detail else ""
        return f"{line}\n{'':<13}  fix: {self.fix}" if self.fix else line

    def to_dict(self) -> dict[str, str]:
        """The fields, ready for JSON."""
        return asdict(self)


def compare(title: str, impl: str, names: list[str], got: dict, truth: dict, own: dict) -> Check:
    """The line of one comparison: ``got`` against fp64 ``truth``, as good as torch's ``own``, for each of ``names``."""
    try:
        for name in names:
            assert_as_good_as_torch(got[name], truth[name], own[name], name)
    except AssertionError as error:
        return Check(title, FAIL, first_line(error), fix(impl))
    return Check(title, OK)


def check_name(op: str, part: str, impl: str, dtype: str, device: torch.device) -> str:
    """What a line is called."""
    return f"{op} {part}, {impl}, {dtype}, {device.type}"


def first_line(error: BaseException) -> str:
    """An error on one line, with its class unless it is a comparison's."""
    words = str(error).strip().splitlines() or [""]
    return words[0] if isinstance(error, AssertionError) else f"{type(error).__name__}: {words[0]}"


def fix(impl: str, error: BaseException | None = None) -> str:
    """What to do where ``impl`` gave a wrong result or ``error``."""
    if isinstance(error, MissingDependency):
        return "install what the message names"
    if impl == "reference":
        return "torch itself gives wrong results here; reinstall torch, then run this again"
    report = "report it with the output of: twn-kernels env"
    other = "blas" if impl != "blas" else "reference"
    return f"set TWN_IMPL={other} until it is repaired, and {report}"
