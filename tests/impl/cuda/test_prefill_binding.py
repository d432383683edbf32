"""What the registered op of the prefill kernel is, and how it refuses: asked of the built library, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from twn_kernels.impl.cuda import loader


@pytest.fixture(scope="module")
def call():
    info = loader.build_info()
    if not info.built:
        pytest.skip(f"needs the CUDA extension, which is {info}")
    loader.load()
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    none = [x[:0]]

    def call(*, norm_weight=None, gated=False):
        torch.ops.twn_cuda.prefill_group(
            x, norm_weight, 1e-6, gated, [x], none, none, none, none, none, [1.0], [1.0], None, 0, False, None
        )

    call.holds_kernel = "prefill_sm90a" in info.kernels.split()
    return call


def test_the_schema_is_the_one_that_the_loader_states(call):
    assert str(torch.ops.twn_cuda.prefill_group.default._schema) == f"twn_cuda::{loader.OPS['prefill_group']}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "x must be on a CUDA device. Move it there with x.cuda(), or use another impl."),
        ({"gated": True}, "x must be ready to be multiplied, got gated=True. Call twn_cuda::front first."),
        (
            {"norm_weight": torch.ones(8, dtype=torch.bfloat16)},
            "x must be ready to be multiplied, got a norm_weight. Call twn_cuda::front first.",
        ),
    ],
)
def test_refusals(call, arguments, words):
    if not call.holds_kernel:
        words = 'this build holds no sm_90a code; rebuild with TORCH_CUDA_ARCH_LIST="9.0a".'
    with pytest.raises(RuntimeError, match=re.escape(f"twn_cuda::prefill_group: {words}")):
        call(**arguments)
