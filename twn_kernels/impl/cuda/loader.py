"""Finds and loads the compiled extension, and says what is in it or why it is not there.

Owns the record that the installer wrote (``_build_info.json``), the library file beside it, and the words of every
refusal. Nothing is loaded at import; loading needs no GPU.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from twn_kernels.errors import DeviceError, ImplUnavailable, ShapeError

__all__ = ["OPS", "BuildInfo", "build_info", "load", "probe", "unavailable_reason"]

REBUILD = "TWN_BUILD_CUDA=1 pip install --no-build-isolation -e ."

# What the library registers. The dual-LoRA kernels are not among them yet.
OPS = ("twn_cuda::probe",)

_PACKAGE = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class BuildInfo:
    """What the installer recorded.

    Attributes:
        built: whether the library was built.
        reason: why not; empty when it was.
        archs: architectures it was built for, as in ``TORCH_CUDA_ARCH_LIST``; empty when not built.
        nvcc: version of the compiler; empty when not built.
        torch: version of torch it was built against; empty when not built.
    """

    built: bool
    reason: str
    archs: str = ""
    nvcc: str = ""
    torch: str = ""

    def __str__(self) -> str:
        if self.built:
            return f"built for {self.archs} with nvcc {self.nvcc} against torch {self.torch}"
        return f"not built ({self.reason})"


def _library() -> Path:
    return _PACKAGE / "_C.abi3.so"


def build_info() -> BuildInfo:
    """Read the installer's record; a missing or damaged one counts as not built, with that as the reason."""
    record = _PACKAGE / "_build_info.json"
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        names = ("reason", "archs", "nvcc", "torch")
        info = BuildInfo(bool(fields["built"]), **{name: str(fields.get(name, "")) for name in names})
    except FileNotFoundError:
        return BuildInfo(False, "no record of a build: the package was not installed with pip")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return BuildInfo(False, f"{record.name} is damaged")
    if info.built and not _library().is_file():
        return BuildInfo(False, f"{_library().name} was built but is no longer beside the package")
    return info


@functools.lru_cache(maxsize=1)
def load() -> None:
    """Register the extension's ops under ``torch.ops.twn_cuda``; later calls do nothing.

    Raises:
        ImplUnavailable: it is not built, or this torch cannot load it.
    """
    import torch

    info = build_info()
    if not info.built:
        raise ImplUnavailable(f"the CUDA extension is not built ({info.reason}).\n  Rebuild: {REBUILD}")
    try:
        torch.ops.load_library(str(_library()))
    except OSError as error:
        cause = error.__cause__ or error
        raise ImplUnavailable(
            f"the CUDA extension was built against torch {info.torch} and does not load into torch "
            f"{torch.__version__}: {cause}.\n  Rebuild: {REBUILD}"
        ) from error


def probe(x):
    """Copy ``x`` with the extension's own kernel on the current stream: proof that it is built, loads and launches.

    Args:
        x: contiguous tensor on a CUDA device; any shape and dtype.

    Returns:
        A new tensor equal to ``x``.

    Raises:
        ImplUnavailable: the extension is not built or does not load.
        DeviceError, ShapeError: ``x`` is not on a CUDA device, or not contiguous.
    """
    import torch

    load()
    if not x.is_cuda:
        raise DeviceError(f'probe: x must be on a CUDA device, got "{x.device}". Move it: x.cuda().')
    if not x.is_contiguous():
        raise ShapeError(f"probe: x must be contiguous, got strides {tuple(x.stride())}. Use x.contiguous().")
    return torch.ops.twn_cuda.probe(x)


def unavailable_reason() -> str:
    """Why ``impl="cuda"`` cannot run a dual-LoRA op: whole sentences, with the fix where there is one."""
    info = build_info()
    if not info.built:
        return f"the extension is not built ({info.reason}).\n  Rebuild: {REBUILD}  "
    return f"the extension that is built here holds only {', '.join(OPS)}, no dual-LoRA kernel yet."
