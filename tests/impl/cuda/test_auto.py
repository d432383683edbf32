"""``impl="auto"`` where the table of measurements names ``cuda``: what it serves, what it leaves, and what is said."""

from __future__ import annotations

from dataclasses import replace

import cuda_stand_in
import pytest
import torch
from sample_results import contest, run
from torch import nn

from twn_kernels import patch, route, status
from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.choosing import choose
from twn_kernels.benchmarking.digest import Source
from twn_kernels.errors import ImplUnavailable
from twn_kernels.impl import cuda
from twn_kernels.modules import DualLoRALinear
from twn_kernels.modules.routing import RouteState, UniformSpec
from twn_kernels.modules.site_group import SiteGroup, layers_of
from twn_kernels.ops import LoRA, Projection, RoutePlan, choice, choice_table, dual_lora_group, dual_lora_linear
from twn_kernels.ops import group_schema as schema
from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model

BF16 = torch.bfloat16
SOURCE = "bench/results/nvidia-h200/20260101-abc.json"
ROW = choice_table.Row("sm_90", "bf16", "qkv", 1, 64, "cuda", SOURCE, ("c",), {"c": {"cuda": 1.0, "blas": 2.0}})
NO_BACKWARD = ", and blas serves where gradients are needed"


@pytest.fixture
def extension(monkeypatch):
    """An extension, and a table whose rows for up to 64 tokens name it; larger counts are blas'."""
    monkeypatch.setattr(choice, "_auto", lambda device, dtype, site, tokens: "cuda" if (tokens or 65) <= 64 else "blas")
    return cuda_stand_in.install(monkeypatch)


def draw(*shape, dtype=BF16):
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


def layer(*, adapters=BF16, pitch=64) -> Projection:
    lora = LoRA(draw(8, 64, dtype=adapters), draw(40, 8, dtype=adapters), 0.5)
    return Projection(draw(40, pitch)[:, :64], None, lora, lora)


def calls(projection, x, plan):
    """The same call of both ops under one impl."""
    return {
        "group": lambda impl: dual_lora_group(x, [projection], plan, site="o", impl=impl)[0],
        "linear": lambda impl: dual_lora_linear(x, *projection, plan, impl=impl),
    }


@pytest.mark.parametrize("op", ["group", "linear"])
@pytest.mark.parametrize("tokens", [5, 65])
def test_it_serves_what_the_table_says(op, tokens, extension):
    x, plan = draw(tokens, 64), RoutePlan.uniform("both", tokens)
    run = calls(layer(), x, plan)[op]
    with torch.no_grad():
        assert torch.equal(run("auto"), run("cuda" if tokens <= 64 else "blas"))
    assert extension.taken == [("decode_group", 5)] * (2 if tokens == 5 else 0)  # of auto and of cuda, or of none


@pytest.mark.parametrize("op", ["group", "linear"])
@pytest.mark.parametrize("changes", [{"adapters": torch.float32}, {"pitch": 68}], ids=["fp32 adapters", "odd pitch"])
def test_a_call_that_does_not_fit_is_left_to_the_default(op, changes, extension):
    x, plan, projection = draw(5, 64), RoutePlan.uniform("both", 5), layer(**changes)
    run = calls(projection, x, plan)[op]
    with torch.no_grad():
        assert torch.equal(run("auto"), run("blas"))
        with pytest.raises((TypeError, ValueError), match='for impl="cuda"'):
            run("cuda")
    assert extension.taken == []
    taken = choice.serving("auto", x, layers_of([projection]), site="o", tokens=5)
    assert taken.impl == "blas" and 'for impl="cuda"' in taken.reason
    assert choice.serving("auto", x, layers_of([layer()]), site="o", tokens=5) == ("cuda", "")


@pytest.mark.parametrize("op", ["group", "linear"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_that_needs_gradients_is_left_to_the_default(op, compiled, extension):
    x, plan, projection = draw(5, 64), RoutePlan.uniform("both", 5), layer()
    projection.reasoning.A.requires_grad_()
    run = calls(projection, x, plan)[op]
    grads = []
    for impl in ("auto", "blas"):
        torch._dynamo.reset()
        forward = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        grads.append(torch.autograd.grad(forward(impl).float().square().sum(), projection.reasoning.A)[0])
    torch._dynamo.reset()
    assert torch.equal(*grads) and extension.taken == []
    with torch.no_grad():
        run("auto")
    assert extension.taken == [("decode_group", 5)]


def test_a_default_that_was_not_measured_borrows_no_kernel(extension, monkeypatch):
    lent = []
    monkeypatch.setattr(schema, "_lent", lambda *call: lent.append(call) or {})
    x, plan = draw(5, 64), RoutePlan.uniform("both", 5)
    with torch.no_grad():
        dual_lora_group(x, [layer(pitch=68)], plan, site="o")
        assert not lent
        dual_lora_group(x, [layer(pitch=68)], plan, site="o", impl="blas")
        assert lent


def members(*, adapters=BF16) -> list[nn.Module]:
    state, found = RouteState(UniformSpec(3)), []
    for _ in range(2):
        linear = DualLoRALinear(64, 40, rank={"reasoning": 8, "embedding": 8}).requires_grad_(False).to(BF16)
        linear.routing = state
        for parameter in (*linear.lora_A.values(), *linear.lora_B.values()):
            parameter.data = parameter.data.to(adapters)
        found.append(linear)
    return found


def test_a_block_makes_swiglu_where_cuda_makes_gate_and_up(extension):
    x = draw(1, 3, 64)
    for adapters, epilogue in ((BF16, True), (torch.float32, False)):
        group, layers = SiteGroup("gate_up"), members(adapters=adapters)
        ready = group.prepare(layers, x)
        assert group.prefers_epilogue(ready, x) is epilogue
        (y,) = group.run(ready, x, swiglu=True)
        assert y.shape == (1, 3, 40)
        assert extension.taken == [("decode_group", 3)] * epilogue
    layers = members()
    layers[1].lora_A["reasoning"].requires_grad_()
    group = SiteGroup("gate_up")
    ready = group.prepare(layers, x)
    assert not group.prefers_epilogue(ready, x)
    with torch.no_grad():
        assert group.prefers_epilogue(ready, x)


def test_status_says_what_really_serves_and_why(extension, monkeypatch):
    monkeypatch.setattr(choice, "candidates", lambda *at, site: ["blas", "cuda"])
    monkeypatch.setattr(choice, "chosen", lambda *at, site: choice.Choice("blas", "by token count"))
    model = patch(tiny_model("qwen3_vl").to(BF16), rank=8)
    fits = {entry.group: entry for entry in status(model).layers}["o"]
    assert (fits.impl, fits.why) == ("blas", "by token count")
    attention = model.model.language_model.layers[0].self_attn
    attention.q_proj.lora_A["reasoning"].data = attention.q_proj.lora_A["reasoning"].data.float()
    attention.q_proj.lora_B["reasoning"].data = attention.q_proj.lora_B["reasoning"].data.float()
    for name in "qkv":
        (entry,) = [e for e in status(model).layers if e.layer.endswith(f"layers.0.self_attn.{name}_proj")]
        assert entry.impl == "blas"
        assert entry.why.startswith(
            "by token count; not cuda here, so blas serves: projections[0].reasoning must be in the dtype of x"
        )
    assert "not cuda here, so blas serves" in str(status(model))


def test_status_of_a_layer_that_a_named_impl_cannot_serve(extension):
    model = patch(tiny_model("qwen3_vl").to(BF16), rank=8, impl="cuda")
    assert {entry.impl for entry in status(model).layers} == {"cuda"}
    attention = model.model.language_model.layers[0].self_attn
    attention.o_proj.weight.data = draw(*attention.o_proj.weight.shape[:1], 68)[:, : attention.o_proj.weight.shape[1]]
    (entry,) = [e for e in status(model).layers if e.layer.endswith("layers.0.self_attn.o_proj")]
    assert entry.impl is None and entry.why.startswith("weight must have rows that start at 16-byte")


@pytest.fixture
def table(monkeypatch):
    """A GPU whose table of measurements has :data:`ROW`; what the loader says is the test's."""

    def clear() -> None:
        for cached in (choice._usable, choice.arch, choice._device_name):
            cached.cache_clear()

    monkeypatch.setattr(choice, "packaged", lambda: (ROW,))
    monkeypatch.setattr(choice, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
    clear()
    yield
    clear()


AT = {"site": "qkv", "tokens": 20}
GPU = torch.device("cuda", 0)


def test_the_reason_says_where_gradients_go(table, monkeypatch):
    monkeypatch.setattr(cuda, "device_reason", lambda *at, may_build: None)
    taken = choice.chosen("auto", GPU, BF16, **AT)
    assert taken == ("cuda", f"cuda was the fastest at 1 to 64 tokens ({SOURCE}){NO_BACKWARD}")
    assert choice.resolve("auto", GPU, BF16, **AT, differentiable=True) == "blas"
    assert choice.candidates("auto", GPU, BF16, site="qkv") == ["blas", "cuda"]
    assert choice.candidates("auto", GPU, BF16, site="o") == ["blas"]
    assert choice.is_deliberate("auto", GPU, BF16, **AT)
    assert not choice.is_deliberate(choice.DIFFERENTIABLE, GPU, BF16, **AT)


def test_who_left_the_choice_open_waits_for_no_compiler(table, monkeypatch):
    asked = []

    def device_reason(device, dtype, *, may_build):
        asked.append(may_build)
        return None if may_build else "the extension is not built yet."

    monkeypatch.setattr(cuda, "device_reason", device_reason)
    taken = choice.chosen("auto", GPU, BF16, **AT)
    assert taken.impl == "blas" and True not in asked
    assert taken.reason.endswith("but cannot run here, so blas serves: the extension is not built yet")
    assert choice.resolve("cuda", GPU, BF16) == "cuda" and asked[-1] is True


def test_a_named_one_needs_no_table(table, monkeypatch):
    monkeypatch.setattr(cuda, "device_reason", lambda *at, may_build: "it is not there.")
    with pytest.raises(ImplUnavailable, match='^impl="cuda" was asked for, but it is not there. Or use impl="auto"'):
        choice.resolve("cuda", GPU, BF16, **AT)


@torch.no_grad()
def test_a_patched_model_runs_on_it_block_by_block(monkeypatch):
    stand_in, logits, inputs = cuda_stand_in.install(monkeypatch), {}, tiny_inputs("qwen3_vl")
    for impl in ("reference", "cuda"):
        torch.manual_seed(0)
        model = tiny_model("qwen3_vl").to(BF16).eval()
        patch(model, rank=8, impl=impl)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        with route(model, ["reasoning", "embedding"][: inputs["input_ids"].shape[0]]):
            logits[impl] = model(**inputs).logits
    assert torch.equal(*logits.values())
    tokens = inputs["input_ids"].numel()
    sites = [name for name, rows in stand_in.taken if rows == tokens and name != "front"]
    assert len(sites) == 4 * model.config.text_config.num_hidden_layers


def test_rows_of_the_table_are_derived_from_its_results():
    case = Case("group", "decode", "8B", 8, "half", site="qkv")
    larger = replace(case, tokens=32)
    rows = [*contest(case, ours_blas=20.0, ours_triton=15.0, ours_cuda=9.0, fused_base_cuda=8.0)]
    rows += contest(larger, ours_blas=20.0, ours_cuda=10.0)
    found = choose([Source(run(rows), SOURCE)])
    assert [(row.impl, row.min_tokens, row.max_tokens) for row in found.rows] == [("cuda", 8, 32)]
    assert found.rows[0].measured[case.id] == {"blas": 20.0, "triton": 15.0, "cuda": 9.0}
