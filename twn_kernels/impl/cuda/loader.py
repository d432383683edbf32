"""Finds and loads the compiled extension, and says what is in it or why it is not there.

Owns the record that the installer wrote (``_build_info.json``), the library file beside it, and the words of every
refusal; :mod:`.first_use` owns the copy in the user's cache, which counts where the installer built none. Nothing is
loaded at import; loading needs no GPU. Only :func:`load` builds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from twn_kernels.errors import DeviceError, ImplUnavailable, ShapeError
from twn_kernels.impl.cuda import first_use
from twn_kernels.impl.cuda.build import LIBRARY, CannotBuild

__all__ = ["OPS", "BuildInfo", "build_info", "load", "probe", "unavailable_reason"]

REBUILD = "TWN_BUILD_CUDA=1 pip install --no-build-isolation -e ."

# What the library registers under torch.ops.twn_cuda, as the bindings write it; a test compares the two.
_GROUP = (
    "(Tensor x, Tensor? norm_weight, float eps, bool gated, Tensor[] weights, Tensor[] biases, "
    "Tensor[] A_r, Tensor[] B_r, Tensor[] A_e, Tensor[] B_e, float[] scaling_r, float[] scaling_e, "
    "Tensor? routes, int present, bool swiglu, Tensor? residual) -> Tensor"
)
OPS = {
    "decode_group": f"decode_group{_GROUP}",
    "front": "front(Tensor x, Tensor? norm_weight, float eps, bool gated) -> Tensor",
    "gate_scores": (
        "gate_scores(Tensor states, Tensor? last, Tensor[] weights, Tensor[] biases, int[] activated, int activation, "
        "float? threshold) -> (Tensor, Tensor)"
    ),
    "pool_queries": "pool_queries(Tensor states, int pooling, bool normalize) -> Tensor",
    "prefill_group": f"prefill_group{_GROUP}",
    "probe": "probe(Tensor x) -> Tensor",
}

_PACKAGE = Path(__file__).resolve().parent.parent.parent
_IN_PACKAGE, _IN_CACHE = "in the package", "in the user's cache"


@dataclass(frozen=True)
class BuildInfo:
    """What is built, and by whom.

    Attributes:
        built: whether there is a library.
        reason: why the installer did not build it; empty where there is one.
        archs: architectures it was built for, as in ``TORCH_CUDA_ARCH_LIST``; empty when not built.
        nvcc: version of the compiler; empty when not built.
        torch: version of torch it was built against; empty when not built.
        kernels: the sources of kernels that are in it, without their suffix.
        sources: digest of everything it was built from.
        seconds: that the build took, in whole seconds.
        where: ``"in the package"`` or ``"in the user's cache"``; empty when not built.
        path: of the library; empty when not built.
        first_use: what asking for ``impl="cuda"`` would do about it; empty when built.
    """

    built: bool
    reason: str
    archs: str = ""
    nvcc: str = ""
    torch: str = ""
    kernels: str = ""
    sources: str = ""
    seconds: str = ""
    where: str = ""
    path: str = ""
    first_use: str = ""

    def __str__(self) -> str:
        if self.built:
            where = f" ({self.path})" if self.where == _IN_CACHE else ""
            return f"built for {self.archs} with nvcc {self.nvcc} against torch {self.torch}, {self.where}{where}"
        return f"not built ({self.reason}); {self.first_use}"


def build_info() -> BuildInfo:
    """What is built now; builds and loads nothing.

    A missing or damaged record counts as not built, with that as the reason.
    """
    if _loaded.cache_info().currsize:
        return _loaded()
    installed, _ = _installed()
    if installed.built:
        return installed
    folder = first_use.find(_PACKAGE)
    cached = None if folder is None else _recorded(folder, _IN_CACHE)[0]
    if cached is not None and cached.built:
        return cached
    made = _order()
    if isinstance(made, str):
        words = f"not on first use either ({made})"
    else:
        words = f"first use builds it for {made.archs} with nvcc {made.tools.nvcc_version} in {made.folder.parent}"
    return dataclasses.replace(installed, first_use=words)


def load() -> None:
    """Register the extension's ops under ``torch.ops.twn_cuda``; later calls do nothing.

    Where it is not built and can be, this builds it first, which takes minutes and prints so.

    Raises:
        ImplUnavailable: it is not built and cannot be, or this torch cannot load it.
    """
    _loaded()


def unavailable_reason(*, may_build: bool = True) -> str | None:
    """Why no op of the extension can run, as a sentence with the fix; None where one can.

    Loads what is built and builds nothing.

    Args:
        may_build: what :func:`load` would build counts as there.
    """
    if _loaded.cache_info().currsize:
        return None
    info = build_info()
    if info.built:
        try:
            load()
        except ImplUnavailable as error:
            return f"{error}  "
        return None
    made = _order()
    if isinstance(made, str):
        return f"the extension is {_nowhere(info, made)}.\n  Rebuild: {REBUILD}  "
    return None if may_build else 'the extension is not built yet; naming impl="cuda" in a call builds it.'


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


@functools.lru_cache(maxsize=1)
def _loaded() -> BuildInfo:
    import torch

    info = build_info()
    if not info.built:
        info = _built_now(info)
    try:
        torch.ops.load_library(info.path)
    except OSError as error:
        cause = error.__cause__ or error
        again = REBUILD if info.where == _IN_PACKAGE else f"rm -r {Path(info.path).parent}, and ask again"
        raise ImplUnavailable(
            f"the CUDA extension was built against torch {info.torch} and does not load into torch "
            f"{torch.__version__}: {cause}.\n  Rebuild: {again}"
        ) from error
    return info


def _built_now(info: BuildInfo) -> BuildInfo:
    made = _order()
    try:
        if isinstance(made, str):
            raise CannotBuild(made)
        found, _ = _recorded(first_use.make(made), _IN_CACHE)
        if not found.built:
            raise CannotBuild(found.reason)
    except CannotBuild as error:
        raise ImplUnavailable(f"the CUDA extension is {_nowhere(info, str(error))}.\n  Rebuild: {REBUILD}") from error
    return found


def _nowhere(info: BuildInfo, refusal: str) -> str:
    return f"not built ({info.reason}), nor can it be on first use ({refusal})"


def _order() -> first_use.Order | str:
    """What :func:`load` would build, or why nothing."""
    try:
        return first_use.order(_PACKAGE, _installed()[1])
    except CannotBuild as error:
        return str(error)


def _installed() -> tuple[BuildInfo, str]:
    """What the installer recorded, and the ``TWN_BUILD_CUDA`` that it was told."""
    return _recorded(_PACKAGE, _IN_PACKAGE)


def _recorded(folder: Path, where: str) -> tuple[BuildInfo, str]:
    record, library = folder / first_use.RECORD, folder / LIBRARY
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        names = ("reason", "archs", "nvcc", "torch", "kernels", "sources", "seconds")
        info = BuildInfo(bool(fields["built"]), **{name: str(fields.get(name, "")) for name in names})
        wanted = str(fields.get("wanted", ""))
    except FileNotFoundError:
        return BuildInfo(False, "no record of a build: the package was not installed with pip"), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return BuildInfo(False, f"{record.name} is damaged"), ""
    if info.built and not library.is_file():
        return BuildInfo(False, f"{library.name} was built but is no longer beside the package"), wanted
    return dataclasses.replace(info, where=where, path=str(library)) if info.built else info, wanted
