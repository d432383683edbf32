"""The gate: what is wrong gets no time and says so, and nothing that a contender does spoils the others' rows."""

import dataclasses

import pytest
import torch

from twn_kernels.benchmarking.cases import Case
from twn_kernels.benchmarking.contender import Built, Contender, Unavailable
from twn_kernels.benchmarking.group_contenders import GROUP_CONTENDERS
from twn_kernels.benchmarking.measure import Options, contenders_of, measure_case
from twn_kernels.benchmarking.model_contenders import MODEL_CONTENDERS
from twn_kernels.benchmarking.model_problem import ModelProblem
from twn_kernels.errors import OptionError
from twn_kernels.ops import RoutePlan

OPTIONS = Options(torch.device("cpu"), seconds=0.1, rounds=2)
GROUP = Case("group", "forward", "tiny", 16, "half", (16, 8), "fp32", site="qkv")
TRAINING = Case("group", "forward_backward", "tiny", 16, "alternating", (8, 8), "fp32", site="down")
MODEL = Case("model", "decode", "tiny", 2, "half", (8, 8), "fp32", layers=1, context=4)
LAYER = Case("layer", "forward_backward", "tiny", 8, "half", (8, 8), "fp32", layers=1)


def planted(change, name="ours_blas", known=GROUP_CONTENDERS):
    """A real contender whose results pass through ``change``."""
    real = known[name]

    def build(problem):
        built = real.build(problem)
        return Built([lambda call=call: change(dict(call())) for call in built.calls], built.impl, 0)

    return dataclasses.replace(real, name="planted", build=build)


def only_row(case, contender):
    base = (MODEL_CONTENDERS if case.suite in ("layer", "model") else GROUP_CONTENDERS)["fused_base"]
    rows = measure_case(case, OPTIONS, contenders=[base, contender])
    assert rows[0].correct and rows[0].time_us is not None
    return rows[1]


def one_element(y):
    y = y.clone()
    y.view(-1)[3] += 0.01
    return y


GROUP_ERRORS = {
    "one element a hundredth off": lambda r: {"y": one_element(r["y"])},
    "all a ten-thousandth too large": lambda r: {"y": r["y"] * 1.0001},
    "a NaN": lambda r: {"y": r["y"].index_fill(0, torch.tensor(5), float("nan"))},
    "rows swapped": lambda r: {"y": r["y"].flip(0)},
    "another shape": lambda r: {"y": r["y"][:-1]},
    "no result": lambda r: {},
}


@pytest.mark.parametrize("name", GROUP_ERRORS)
def test_a_planted_error_gets_no_time_and_says_so(name):
    row = only_row(GROUP, planted(GROUP_ERRORS[name]))
    assert row.correct is False and row.time_us is None and row.in_graph is None
    assert row.reason.startswith("Wrong result, so it is not timed: ")
    assert row.error_ratio is None or row.error_ratio > 1


def test_the_same_contender_without_the_error_is_timed():
    row = only_row(GROUP, planted(lambda results: results))
    assert row.correct and row.error_ratio <= 1 and row.time_us.rounds == 2 and row.reason is None


def test_adapters_taken_for_one_another_are_wrong():
    real = GROUP_CONTENDERS["ours_reference"]

    def build(problem):
        routes = problem.plan.routes
        swapped = torch.where(routes == 1, 2, torch.where(routes == 2, 1, routes)).to(torch.int8)
        return real.build(dataclasses.replace(problem, plan=RoutePlan.from_routes(swapped)))

    assert only_row(GROUP, dataclasses.replace(real, name="planted", build=build)).correct is False


def test_base_rows_in_place_of_adapters_are_wrong():
    cheat = dataclasses.replace(GROUP_CONTENDERS["fused_base"], name="planted", base_only=False)
    assert only_row(GROUP, cheat).correct is False


@pytest.mark.parametrize("gradient", ["dx", "dA0.0", "dB1.0"])
@pytest.mark.parametrize("kind", ["scaled", "missing"])
def test_a_wrong_or_missing_gradient_is_wrong(gradient, kind):
    def change(results):
        if kind == "scaled":
            return results | {gradient: results[gradient] * 1.001}
        return {name: value for name, value in results.items() if name != gradient}

    row = only_row(TRAINING, planted(change))
    assert row.correct is False and gradient in row.reason


@pytest.mark.parametrize("case", [MODEL, LAYER], ids=str)
def test_the_gate_holds_layers_and_models_too(case):
    right = only_row(case, planted(lambda results: results, "ours_reference", MODEL_CONTENDERS))
    wrong = only_row(case, planted(lambda r: r | {"y": r["y"] * 1.001}, "ours_reference", MODEL_CONTENDERS))
    assert right.correct and right.time_us is not None
    assert wrong.correct is False and wrong.time_us is None


def test_contenders_of_a_decode_step_share_one_cache_and_leave_its_context_alone():
    problem = ModelProblem.build(MODEL, torch.device("cpu"))
    first, second = (MODEL_CONTENDERS[name].build(problem) for name in ("plain", "peft"))
    before = [layer.keys[:, :, : MODEL.context].clone() for layer in problem.cache().layers]
    expected = first.calls[0]()["y"]
    second.calls[0]()
    assert torch.equal(first.calls[0]()["y"], expected)
    assert set(problem.caches) == {None, (0,), (1,)}
    for layer, keys in zip(problem.cache().layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : MODEL.context], keys) and layer.keys.shape[2] == MODEL.context + 1


def test_a_wrong_adapter_in_a_layer_is_wrong():
    real = MODEL_CONTENDERS["ours_reference"]

    def build(problem):
        loras = dict(problem.loras)
        path = "layers.0.mlp.down_proj"
        loras[path] = tuple(lora._replace(A=lora.A * 1.05) for lora in loras[path])
        return real.build(dataclasses.replace(problem, loras=loras, patched={}))

    assert only_row(MODEL, dataclasses.replace(real, name="planted", build=build)).correct is False


@pytest.mark.parametrize(
    "error, reason, correct",
    [
        (Unavailable("There is no such library here."), "There is no such library here.", None),
        (RuntimeError("first line\nsecond"), "RuntimeError: first line", None),
        (MemoryError(), "MemoryError: MemoryError", None),
        (AssertionError("shapes differ"), "AssertionError: shapes differ", False),
    ],
    ids=["unavailable", "runtime", "memory", "assertion"],
)
def test_a_contender_that_raises_has_a_reason_and_the_others_their_times(error, reason, correct):
    def build(problem):
        raise error

    row = only_row(GROUP, Contender("broken", build))
    assert (row.correct, row.time_us, row.reason) == (correct, None, reason)


def test_a_contender_that_fails_while_it_is_timed_leaves_the_others_their_times():
    calls = []

    def change(results):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("no more")
        return results

    row = only_row(GROUP, planted(change))
    assert row.correct and row.time_us is None and row.reason == "It failed while it was timed: no more"


def test_an_excluded_contender_is_not_built():
    contender = Contender("ours_blas", lambda problem: pytest.fail("built"))
    options = dataclasses.replace(OPTIONS, exclude={"ours_blas": "It ended the process."})
    (row,) = measure_case(GROUP, options, contenders=[contender])
    assert row.reason == "It ended the process." and row.correct is None


def test_overheads_and_roofs_are_those_of_the_medians():
    roofs = {"copy_gb_per_s": 1.0, "matmul_tflops": 1e9}
    rows = measure_case(
        GROUP, dataclasses.replace(OPTIONS, roofs=roofs, contenders=("fused_base", "plain", "ours_reference"))
    )
    base = rows[0].time_us.median
    for row in rows:
        assert row.overhead_percent == pytest.approx(100 * (row.time_us.median / base - 1))
        assert row.percent_of_roof == pytest.approx(100 * row.ideal_bytes / 1e3 / row.time_us.median)
    assert rows[0].ideal_bytes == rows[1].ideal_bytes < rows[2].ideal_bytes


def test_an_unknown_contender_is_refused_with_the_nearest():
    with pytest.raises(OptionError, match='suite "group" has no contender \'our_auto\'.*Did you mean "ours_auto"'):
        contenders_of(GROUP, dataclasses.replace(OPTIONS, contenders=("our_auto",)))
