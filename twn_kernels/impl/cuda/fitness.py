"""What a call must offer for the extension's kernels: dtypes, alignment, ranks. Asks the device nothing.

A weight is never copied, so one that the kernels cannot read as it lies is refused by name. Asked in every call, so it
looks at no more than it must.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from twn_kernels.errors import DtypeError, ImplUnavailable, ShapeError, TWNError
from twn_kernels.impl.cuda import loader
from twn_kernels.impl.cuda.dispatch import MIN_CAPABILITY, covers

__all__ = ["capability_of", "device_reason", "misfit", "refusal"]

WORD = 8  # elements of the 16-byte words in which weights and inputs are read
_BYTES = 16
_HALF = (torch.float16, torch.bfloat16)
_INSTEAD = 'use impl="triton", impl="blas" or impl="auto"'


def device_reason(device: torch.device, dtype: torch.dtype | None = None, *, may_build: bool = True) -> str | None:
    """Why nothing of ``dtype`` runs on ``device``, as a sentence with the fix; None where it does.

    Asks the loader last: on a CPU it does not matter what is built.

    Args:
        device, dtype: of ``x``; no dtype: any.
        may_build: an extension that the first call would build counts as there.
    """
    if device.type != "cuda":
        return f"its kernels need a GPU and the tensors are on {device.type}. Move them: x.cuda()."
    if dtype is not None and dtype not in _HALF:
        name = str(dtype).removeprefix("torch.")
        return f"its kernels take float16 and bfloat16, not {name}. Convert the layer: model.to(torch.bfloat16)."
    capability = capability_of(device.index)
    if capability < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or newer; this one has {capability[0]}.{capability[1]}."
    reason = loader.unavailable_reason(may_build=may_build)
    if reason is None:
        reason = _not_covered(loader.build_info(), capability)
    return reason


def refusal(
    x: Tensor,
    weights: Sequence[Tensor],
    A_r: Sequence[Tensor | None],
    B_r: Sequence[Tensor | None],
    A_e: Sequence[Tensor | None],
    B_e: Sequence[Tensor | None],
) -> str | None:
    """Why these tensors are not served, as a sentence with the fix; None where they are.

    Args:
        x: the input, or a tensor of its dtype and device.
        weights, A_r, B_r, A_e, B_e: of each projection; None or rank 0 where it lacks an adapter.
    """
    error = misfit(x, weights, A_r, B_r, A_e, B_e)
    return None if error is None else str(error)


def misfit(x: Tensor, weights, A_r, B_r, A_e, B_e) -> TWNError | None:
    """The error that :func:`refusal` gives the words of."""
    dtype = x.dtype
    if not _on_gpu(x) or dtype not in _HALF:
        return ImplUnavailable(f'impl="cuda" was asked for, but {device_reason(x.device, dtype)} Or {_INSTEAD}.')
    features = weights[0].shape[1]
    if features % WORD or not features:
        return ShapeError(
            f'in_features must be a multiple of {WORD} for impl="cuda" (16-byte words), got {features}. Or {_INSTEAD}.'
        )
    for place, weight in enumerate(weights):
        if not _is_in_words(weight):
            return _unaligned(f"{_owner(weights, place)}weight", weight, "the weight")
    for part, As, Bs in (("reasoning", A_r, B_r), ("embedding", A_e, B_e)):
        for place, A in enumerate(As):
            if A is None or (A.dtype == dtype and _is_in_words(A) and Bs[place].stride()[1] == 1):
                continue
            if (error := _adapter_misfit(_owner(weights, place) + part, dtype, A, Bs[place])) is not None:
                return error
    return None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@functools.cache
def capability_of(index: int | None) -> tuple[int, int]:
    """Compute capability of a GPU; None: the current one's."""
    return torch.cuda.get_device_capability(index)


def _is_in_words(matrix: Tensor) -> bool:
    """Whether every row starts at a 16-byte word, lies in one piece and is not the row before it."""
    pitch, step = matrix.stride()
    return step == 1 and pitch and pitch % WORD == 0 and matrix.data_ptr() % _BYTES == 0


def _owner(weights: Sequence[Tensor], place: int) -> str:
    """What stands before the name of a tensor: a linear by itself is called without ``projections``."""
    return f"projections[{place}]." if len(weights) > 1 else ""


def _adapter_misfit(name: str, dtype: torch.dtype, A: Tensor, B: Tensor) -> TWNError | None:
    """What is wrong with an adapter that did not pass at first sight; None where nothing is."""
    rank = A.shape[0]
    if rank == 0:
        return None
    if A.dtype != dtype:
        return DtypeError(
            f'{name} must be in the dtype of x ({dtype}) for impl="cuda", got {A.dtype}. '
            f"Convert it: A.to({dtype}), B.to({dtype}); a patched model with all it holds: model.to({dtype}). "
            f"Or {_INSTEAD}."
        )
    if not _is_in_words(A):
        return _unaligned(f"{name}.A", A, "A")
    if rank == 1:  # the stride of a single column says nothing
        return None
    return ShapeError(
        f'{name}.B must have a contiguous last dimension for impl="cuda", got strides {B.stride()}. '
        f"Store it so: B.contiguous(). Or {_INSTEAD}."
    )


def _unaligned(name: str, matrix: Tensor, what: str) -> ShapeError:
    return ShapeError(
        f'{name} must have rows that start at 16-byte words for impl="cuda" (strides (a multiple of {WORD}, 1), '
        f"address a multiple of {_BYTES}), got strides {matrix.stride()} at an address of "
        f"{matrix.data_ptr() % _BYTES} modulo {_BYTES}. Give {what} memory of its own: "
        f".clone(memory_format=torch.contiguous_format). Or {_INSTEAD}."
    )


def _not_covered(info: loader.BuildInfo, capability: tuple[int, int]) -> str | None:
    # What the first call builds is for the GPUs that are here.
    if not info.built or covers(info.archs, capability):
        return None
    name = f"{capability[0]}.{capability[1]}"
    return f"the extension is built for {info.archs}, not for this GPU ({name}).\n  Rebuild: {loader.REBUILD}  "
