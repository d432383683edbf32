"""The site-group op's arguments as csrc's kernels see them, and the emulated decode kernel as a function of them."""

from __future__ import annotations

import ctypes

import torch
from host_program import library

_MAX_PROJECTIONS = 3
_FLOAT16, _BFLOAT16 = 0, 1
_PLAIN, _NORM, _GATED = 0, 1, 2


class Adapter(ctypes.Structure):
    """``twn::Adapter``."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("a_pitch", ctypes.c_int64),
        ("b_pitch", ctypes.c_int64),
        ("rank", ctypes.c_int),
        ("scaling", ctypes.c_float),
    ]


class Projection(ctypes.Structure):
    """``twn::Projection``."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int),
        ("adapters", Adapter * 2),
    ]


class Group(ctypes.Structure):
    """``twn::Group``."""

    _fields_ = [
        ("projections", Projection * _MAX_PROJECTIONS),
        ("count", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_pitch", ctypes.c_int64),
        ("tokens", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("front", ctypes.c_int),
        ("norm_weight", ctypes.c_void_p),
        ("norm_is_wide", ctypes.c_bool),
        ("eps", ctypes.c_float),
        ("swiglu", ctypes.c_bool),
        ("residual", ctypes.c_void_p),
        ("residual_pitch", ctypes.c_int64),
        ("routes", ctypes.c_void_p),
        ("present", ctypes.c_int),
        ("y", ctypes.c_void_p),
        ("y_pitch", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


def described(args: dict, plan, y: torch.Tensor) -> Group:
    """``args`` of the op (x, projections, norm, gated, swiglu, residual) and a RoutePlan, as the kernels see them."""
    x, projections, norm, residual = args["x"], args["projections"], args["norm"], args["residual"]
    group = Group(
        count=len(projections), x=x.data_ptr(), x_pitch=x.stride(0), tokens=x.shape[0],
        in_features=projections[0].weight.shape[1], front=_GATED if args["gated"] else _NORM if norm else _PLAIN,
        swiglu=args["swiglu"], y=y.data_ptr(), y_pitch=y.stride(0),
        dtype=_FLOAT16 if x.dtype == torch.float16 else _BFLOAT16,
    )  # fmt: skip
    if norm is not None:
        group.norm_weight, group.eps = norm.weight.data_ptr(), norm.eps
        group.norm_is_wide = norm.weight.dtype == torch.float32
    if residual is not None:
        group.residual, group.residual_pitch = residual.data_ptr(), residual.stride(0)
    for place, projection in zip(group.projections, projections, strict=False):
        place.weight, place.pitch = projection.weight.data_ptr(), projection.weight.stride(0)
        place.out_features = projection.weight.shape[0]
        place.bias = None if projection.bias is None else projection.bias.data_ptr()
        for bit, (slot, lora) in enumerate(
            zip(place.adapters, (projection.reasoning, projection.embedding), strict=True)
        ):
            if lora is None:
                continue
            slot.a, slot.a_pitch = lora.A.data_ptr(), lora.A.stride(0)
            slot.b, slot.b_pitch = lora.B.data_ptr(), lora.B.stride(0)
            slot.rank, slot.scaling = lora.A.shape[0], lora.scaling
            group.present |= plan.present & 1 << bit
    group.routes = None if plan.is_uniform else plan.routes.data_ptr()
    return group


def readable(cut):
    """Cut from a buffer of NaN with rows that begin at 16 bytes, as the kernels need weights, A and x to lie."""

    def view(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() != 2 or tensor.shape[1] % 8:
            return cut(tensor)
        buffer = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 16), float("nan"), dtype=tensor.dtype)
        inner = buffer[1:-1, 8:-8]
        inner.copy_(tensor)
        return inner

    return view


class Emulator:
    """One stream of emulated launches: they share the words that :file:`flags.h` never resets."""

    def __init__(self, arch: int, *, processors: int = 5, resident: int = 2, stages: int = 2) -> None:
        self._library = library("decode")
        if self._library.group_bytes() != ctypes.sizeof(Group):
            raise TypeError("twn::Group and its description here differ")
        self.arch, self.processors, self.resident, self.stages = arch, processors, resident, stages
        self.words = torch.zeros(1 << 13, dtype=torch.int32)

    def __call__(self, args: dict, plan) -> torch.Tensor:
        """``y``, in a buffer that was NaN."""
        widths = [projection.weight.shape[0] for projection in args["projections"]]
        x = args["x"]
        y = torch.full((x.shape[0], widths[0] if args["swiglu"] else sum(widths)), float("nan"), dtype=x.dtype)
        group = described(args, plan, y)
        code = self._library.emulate_decode(
            ctypes.byref(group), self.arch, self.processors, self.resident, self.stages,
            ctypes.c_void_p(self.words.data_ptr()), self.words.numel(),
        )  # fmt: skip
        if code != 0:
            raise RuntimeError(f"the emulated launch ended with {code}")
        return y
