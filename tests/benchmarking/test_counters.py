"""Ideal bytes and operations, each worked out by hand from the shapes."""

import pytest

from twn_kernels.benchmarking.cases import Case, Site
from twn_kernels.benchmarking.counters import (
    Work,
    adapter_elements,
    base_elements,
    case_work,
    roof_us,
    site_work,
)

LINEAR = Site("q", 10, (7,))
QKV = Site("qkv", 10, (6, 2, 2), norm=True)
GATE_UP = Site("gate_up", 10, (8, 8), norm=True, swiglu=True)
DOWN = Site("down", 8, (10,), residual=True)


def test_a_linear_without_adapters_reads_x_and_w_and_writes_y():
    # x 3*10, W 7*10, y 3*7 elements of 2 bytes; 2*3*7*10 operations.
    assert site_work(LINEAR, 3, (0, 0), (4, 2), "bf16") == Work(2 * (30 + 70 + 21), 420)


def test_an_adapter_that_no_token_uses_costs_nothing():
    # Reasoning alone, rank 4: A 4*10, B 7*4; 2*3*4*(10+7) more operations. One route for all: no routes are read.
    assert site_work(LINEAR, 3, (3, 0), (4, 200), "bf16") == Work(2 * (121 + 40 + 28), 420 + 408)


def test_mixed_routes_are_read_and_each_token_pays_for_its_own_adapter():
    # Two tokens under rank 4, one under rank 2: 2*(2*4*17) + 2*(1*2*17) operations, and a byte of route a token.
    work = site_work(LINEAR, 3, (2, 1), (4, 2), "fp32")
    assert work == Work(4 * (121 + 4 * 17 + 2 * 17) + 3, 420 + 272 + 68)


def test_both_adapters_on_every_token_need_no_routes():
    assert site_work(LINEAR, 3, (3, 3), (4, 2), "fp16") == Work(2 * (121 + 68 + 34), 420 + 408 + 204)


def test_a_group_reads_its_input_once_and_has_an_a_for_each_projection():
    # W (6+2+2)*10, norm 10, A 3*(4*10), B 10*4, x 5*10, y 5*10.
    work = site_work(QKV, 5, (5, 0), (4, 2), "bf16")
    assert work == Work(2 * (100 + 10 + 120 + 40 + 50 + 50), 2 * 5 * 100 + 2 * 5 * 4 * (30 + 10))


def test_swiglu_writes_half_as_much():
    assert site_work(GATE_UP, 5, (0, 0), (4, 2), "bf16") == Work(2 * (160 + 10 + 50 + 5 * 8), 2 * 5 * 160)


def test_a_residual_is_read():
    assert site_work(DOWN, 5, (0, 0), (4, 2), "bf16") == Work(2 * (80 + 40 + 50 + 50), 2 * 5 * 80)


def test_the_backward_pass_of_a_linear():
    # Forward as above. Backward reads dy 3*7, x 3*10, W 70, A and B 68 and writes dx 3*10, dA and dB 68;
    # dx 2*3*70, and dS, dB, dA, dS A: 4 * rows * rank * (10 + 7).
    forward = site_work(LINEAR, 3, (3, 0), (4, 2), "fp32")
    both = site_work(LINEAR, 3, (3, 0), (4, 2), "fp32", "forward_backward")
    assert both == Work(forward.bytes + 4 * (21 + 30 + 70 + 68 + 30 + 68), forward.flops + 420 + 4 * 3 * 4 * 17)


def test_elements_of_weights_and_adapters():
    assert base_elements((QKV, DOWN)) == 100 + 80
    assert adapter_elements((QKV, DOWN), 4) == 4 * (30 + 10) + 4 * (8 + 10)


def test_the_weights_of_an_8b_layer_are_what_its_configuration_says():
    case = Case("layer", "decode", "8B", 1, "base", layers=1, context=1)
    assert base_elements(case.sites) == 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288
    assert adapter_elements(case.sites, 64) == 64 * ((3 * 4096 + 6144) + 8192 + (2 * 4096 + 24576) + (12288 + 4096))


def test_a_decode_step_of_a_layer_reads_weights_and_cache():
    # tiny: hidden 64, heads 4 and 2 of 16, intermediate 96; two rows, 8 tokens cached, no adapters.
    case = Case("layer", "decode", "tiny", 2, "base", (4, 4), "fp32", layers=1, context=8)
    weights = 64 * (64 + 32 + 32) + 64 * 64 + 64 * 192 + 96 * 64
    elements = weights + 2 * 64 + 2 * 16 + 2 * (2 * 64) + 2 * 2 * (2 * 16) * 9
    assert case_work(case) == Work(4 * elements, 2 * 2 * weights + 4 * 64 * 2 * 9)


def test_a_model_is_its_layers_and_a_norm():
    layer = Case("layer", "forward", "tiny", 16, "half", (16, 8), "fp32", layers=1)
    model = Case("model", "forward", "tiny", 16, "half", (16, 8), "fp32", layers=2)
    activations = 4 * 2 * 16 * 64
    one, two = case_work(layer), case_work(model)
    assert two.bytes - activations == 2 * (one.bytes - activations) + 4 * 64
    assert two.flops == 2 * one.flops


def test_attention_sees_the_tokens_before():
    # Two rows of 8 tokens, each of which sees 1 + ... + 8 = 36 tokens; 4 heads of 16, scores and weighted sum.
    case = Case("layer", "forward", "tiny", 16, "base", (4, 4), "fp32", layers=1)
    weights = base_elements(case.sites)
    assert case_work(case).flops == 2 * 16 * weights + 4 * 64 * 2 * 36


def test_the_plain_base_is_counted_without_adapters():
    case = Case("group", "forward", "8B", 4096, "half", site="qkv")
    base = case_work(case, base_only=True)
    assert base == case_work(Case("group", "forward", "8B", 4096, "base", site="qkv"))
    # One adapter of rank 64 a row: 64 * (3 * 4096 + 6144) beside 4096 * 6144.
    assert case_work(case).flops / base.flops == pytest.approx(1 + 64 * (3 * 4096 + 6144) / (4096 * 6144))


def test_an_mlp_is_its_groups_without_what_lies_between():
    # tiny: hidden 64, intermediate 96; 4 tokens, two under each adapter of rank 2. x and y 4*64, norm 64, weights
    # 3*64*96, adapters 2*(2*64 + 192) + 2*(96 + 64) each; 4 bytes an element, one byte of route a token.
    case = Case("group", "forward", "tiny", 4, "half", (2, 2), "fp32", site="mlp")
    adapter = 2 * (2 * 64 + 192) + 2 * (96 + 64)
    elements = 2 * 4 * 64 + 64 + 3 * 64 * 96 + 2 * adapter
    assert case_work(case) == Work(4 * elements + 4, 2 * 4 * 3 * 64 * 96 + 2 * 4 * adapter)
    base = 2 * 4 * 64 + 64 + 3 * 64 * 96
    assert case_work(case, base_only=True) == Work(4 * base, 2 * 4 * 3 * 64 * 96)
    # Backward: dy and x read, dx written, weights and adapters read, their gradients written.
    both = case_work(Case("group", "forward_backward", "tiny", 4, "half", (2, 2), "fp32", site="mlp"))
    assert both.bytes == 4 * (elements + 3 * 4 * 64 + 64 + 3 * 64 * 96 + 4 * adapter) + 4


def test_the_roof_is_the_slower_of_memory_and_arithmetic():
    roofs = {"copy_gb_per_s": 4000.0, "matmul_tflops": 800.0}
    assert roof_us(Work(4_000_000, 8), roofs) == pytest.approx(1.0)
    assert roof_us(Work(4, 1_600_000_000), roofs) == pytest.approx(2.0)
    assert roof_us(Work(4, 4), {}) is None
