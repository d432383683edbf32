"""The site group on a GPU: real shapes, graph replay, offsets beyond 2**31, streams, syncs; tiny twins everywhere."""

from __future__ import annotations

import cuda_stand_in
import group_bodies as bodies
import pytest
import torch
from group_cases import ROUTES, GroupCase

from twn_kernels.ops import choice

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
IMPLS = ("blas", "triton")
gpu = pytest.mark.gpu

# in_features, out_features of each projection, front, back: the four site groups of Qwen3-VL.
SITES = {
    "8b-qkv": (4096, (4096, 1024, 1024), "norm", "plain"),
    "8b-o": (4096, (4096,), "plain", "residual"),
    "8b-gate_up": (4096, (12288, 12288), "norm", "swiglu"),
    "8b-down": (12288, (4096,), "gated", "residual"),
    "4b-qkv": (2560, (4096, 1024, 1024), "norm", "plain"),
    "4b-down": (9728, (2560,), "plain", "residual"),
    "2b-gate_up": (2048, (6144, 6144), "norm", "swiglu"),
}
RANKS = {
    "64+64": ((64, 64),) * 3,
    "64+32": ((64, 32),) * 3,
    "48+96": ((48, 96),) * 3,
    "16+16": ((16, 16),) * 3,
    "128+128": ((128, 128),) * 3,
    "uneven": ((64, 17), (0, 64), (5, 0)),
}


def real(site: str, tokens: int, ranks: str, routes: str, dtype=BF16, **fields) -> GroupCase:
    features, outputs, front, back = SITES[site]
    return GroupCase(tokens, features, outputs, RANKS[ranks][: len(outputs)], dtype, routes, front, back, **fields)


@pytest.fixture(autouse=True)
def extension(request, monkeypatch):
    """Where there is no GPU, the forms that need the CUDA extension run on a stand-in for it."""
    callspec = getattr(request.node, "callspec", None)
    if not torch.cuda.is_available():
        cuda_stand_in.install(monkeypatch)
    elif callspec is not None and callspec.params.get("form") == "cuda":
        reason = choice.unavailable_reason("cuda", torch.device("cuda"))
        if reason is not None:
            pytest.skip(f"needs the CUDA extension: {' '.join(reason.split())}")


@gpu
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tokens", [1, 17, 257, 1000])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("form", bodies.FORMS)
def test_real_shapes(form, site, tokens, ranks, device):
    for routes in ROUTES:
        bodies.forward(form, real(site, tokens, ranks, routes), device)


@gpu
@pytest.mark.parametrize("dtype", [(FP16, None), (FP32, None), (BF16, FP32)], ids=["fp16", "fp32", "bf16-fp32adapters"])
@pytest.mark.parametrize("site", ["8b-qkv", "8b-down", "2b-gate_up"])
@pytest.mark.parametrize("impl", IMPLS)
def test_other_dtypes_on_real_shapes(impl, site, dtype, device):
    for tokens in (3, 130):
        bodies.forward(impl, real(site, tokens, "64+32", "mixed", dtype[0], adapter_dtype=dtype[1]), device)


@gpu
@pytest.mark.parametrize("ranks", ["64+64", "uneven"])
@pytest.mark.parametrize("tokens", [5, 515])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_on_real_shapes(impl, site, tokens, ranks, device):
    for routes in ("mixed", "suffix", "reasoning", "base"):
        bodies.gradients(impl, real(site, tokens, ranks, routes), device)


@gpu
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("impl", IMPLS)
def test_strided_operands_on_real_shapes(impl, site, device, cut_from_nan):
    bodies.forward(impl, real(site, 129, "uneven", "mixed", bias=True), device, cut_from_nan)


@gpu
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("form", bodies.FORMS)
def test_nan_and_bits_on_real_shapes(form, site, device):
    for tokens in (9, 300):
        bodies.nan_stays(form, real(site, tokens, "64+32", "mixed"), device)
        bodies.same_bits_again(form, real(site, tokens, "64+32", "mixed"), device, rounds=5)


@gpu
@pytest.mark.parametrize("tokens", [1, 32, 200])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("form", bodies.FORMS)
def test_a_captured_graph_follows_routes_inputs_and_adapters(form, site, tokens, device):
    bodies.replays(form, real(site, tokens, "64+32", "mixed"), device, (0, 1, 2, 3, None))


@gpu
@pytest.mark.parametrize("form", bodies.FORMS)
def test_offsets_beyond_two_to_the_31(form, device):
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs a GPU with 48 GiB free")
    bodies.far_offsets(form, device, tokens=70_001, pitch=32_768, wide=32_768)


@gpu
@pytest.mark.parametrize("form", bodies.FORMS)
def test_two_streams_do_not_meet(form, device):
    cases = [real("2b-gate_up", 129, "64+32", "mixed"), real("4b-qkv", 129, "48+96", "alternating")]
    bodies.streams_do_not_meet(form, cases, device, rounds=20)


@gpu
@pytest.mark.parametrize("site", ["8b-qkv", "8b-o", "8b-gate_up", "8b-down"])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_synchronisation_forward_or_backward(impl, site, device, no_sync):
    bodies.never_waits(impl, real(site, 64, "uneven", "mixed"), device, no_sync)


@gpu
@pytest.mark.parametrize("tokens", [1, 64, 200])
@pytest.mark.parametrize("site", ["8b-qkv", "8b-o", "8b-gate_up", "8b-down"])
@pytest.mark.parametrize("form", bodies.FORMS)
def test_inference_never_waits(form, site, tokens, device, no_sync):
    bodies.answers_without_waiting(form, real(site, tokens, "uneven", "mixed"), device, no_sync)


# The same bodies on what the interpreter can run in a moment: they are known to run before a GPU sees them.
TINY = {
    "qkv": GroupCase(9, 32, (24, 16, 16), ((8, 4), (0, 8), (5, 0)), BF16, "mixed", "norm"),
    "gate_up": GroupCase(6, 32, (24, 24), ((8, 4), (8, 4)), BF16, "mixed", "norm", "swiglu"),
    "down": GroupCase(7, 32, (24,), ((8, 16),), BF16, "mixed", "gated", "residual"),
}
_each_form = pytest.mark.parametrize("form", bodies.FORMS)


@pytest.mark.parametrize("site", TINY)
@pytest.mark.parametrize("form", ["blas", "blas-packed", "cuda"])
def test_the_bodies_run_on_tiny_shapes(form, site, device):
    case = TINY[site]
    bodies.forward(form, case, device)
    bodies.same_bits_again(form, case, device, rounds=1)
    bodies.nan_stays(form, case, device)
    bodies.replays(form, case, device, (0, 1, 2, 3, None))


def test_the_bodies_run_in_the_interpreter(device):
    bodies.nan_stays("triton", TINY["gate_up"], device)
    bodies.replays("triton", TINY["qkv"], device, (2, None))


@_each_form
def test_far_offsets_on_tiny_shapes(form, device):
    bodies.far_offsets(form, device, tokens=40, pitch=72, wide=40)


@_each_form
def test_streams_on_tiny_shapes(form, device):
    bodies.streams_do_not_meet(form, [TINY["down"]] * 2, device, rounds=1)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_gradients_and_syncs_on_tiny_shapes(impl, device, no_sync, cut_from_nan):
    bodies.forward(impl, TINY["down"], device, cut_from_nan)
    bodies.gradients(impl, TINY["down"], device)
    bodies.never_waits(impl, TINY["down"], device, no_sync)
