"""Cases: what their routes mean, which are refused, and what the lists of suites hold."""

import pytest

from twn_kernels.benchmarking.cases import GROUPS, MLP, MODELS, Case, check_case
from twn_kernels.benchmarking.results import PASSES, ROUTES, SUITES
from twn_kernels.benchmarking.suites import cases
from twn_kernels.errors import OptionError

R, E = "reasoning", "embedding"


def group(routes: str, tokens: int = 8, pass_: str = "forward") -> Case:
    return Case("group", pass_, "tiny", tokens, routes, site="qkv")


def layer(routes: str, tokens: int = 4096, pass_: str = "forward") -> Case:
    return Case("layer", pass_, "8B", tokens, routes, layers=1, context=8 if pass_ == "decode" else None)


@pytest.mark.parametrize(
    "case, segments, uses",
    [
        (group("reasoning"), [(8, R)], (8, 0)),
        (group("base"), [(8, None)], (0, 0)),
        (group("both"), [(8, "both")], (8, 8)),
        (group("half"), [(4, R), (4, E)], (4, 4)),
        (group("alternating"), [(1, R), (1, E)] * 4, (4, 4)),
        (group("suffix"), [(3, R), (1, E)] * 2, (6, 2)),
        (group("half", 3, "decode"), [(2, R), (1, E)], (2, 1)),
        (group("half", 1, "decode"), [(1, R)], (1, 0)),
        (layer("half"), [(2048, R), (2048, E)], (2048, 2048)),
        (layer("alternating"), [(1024, R), (1024, E)] * 2, (2048, 2048)),
        (layer("suffix"), [(1008, R), (16, E)] * 4, (4032, 64)),
        (layer("alternating", 4, "decode"), [(1, R), (1, E)] * 2, (2, 2)),
    ],
    ids=str,
)
def test_routes_as_segments(case, segments, uses):
    assert case.segments() == segments
    assert case.uses() == uses
    assert sum(length for length, _ in segments) == case.tokens == case.rows * case.sequence


def test_rows_that_keep_one_adapter_can_be_named_and_others_cannot():
    assert layer("half").row_names() == [R, R, E, E]
    assert layer("base").row_names() == [None] * 4
    assert group("alternating").row_names() == [R, E] * 4
    assert layer("suffix").row_names() is None


def test_ids_tell_every_field_apart():
    base = Case("group", "forward", "8B", 4096, "half", site="qkv")
    others = [
        Case("group", "decode", "8B", 4096, "half", site="qkv"),
        Case("group", "forward", "4B", 4096, "half", site="qkv"),
        Case("group", "forward", "8B", 2048, "half", site="qkv"),
        Case("group", "forward", "8B", 4096, "both", site="qkv"),
        Case("group", "forward", "8B", 4096, "half", (64, 32), site="qkv"),
        Case("group", "forward", "8B", 4096, "half", (64, 64), "fp16", site="qkv"),
        Case("group", "forward", "8B", 4096, "half", site="o"),
        Case("model", "forward", "8B", 4096, "half", layers=36),
        Case("model", "forward", "8B", 4096, "half", layers=4),
        Case("model", "decode", "8B", 8, "half", layers=36, context=8),
        Case("model", "decode", "8B", 8, "half", layers=36, context=16),
    ]
    assert base.id == "group-8B-qkv-forward-T4096-half-r64x64-bf16"
    assert len({case.id for case in [base, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    "case, words",
    [
        (Case("groups", "forward", "8B", 8, "half", site="qkv"), 'suite must be one of .* Did you mean "group"'),
        (Case("group", "foward", "8B", 8, "half", site="qkv"), 'pass must be one of .* Did you mean "forward"'),
        (Case("group", "forward", "7B", 8, "half", site="qkv"), 'model must be one of "8B", "4B", "2B", "tiny"'),
        (Case("group", "forward", "8B", 8, "halves", site="qkv"), "routes must be one of"),
        (Case("group", "forward", "8B", 8, "half", dtype="int8", site="qkv"), "dtype must be one of"),
        (Case("group", "forward", "8B", 8, "half", site="q"), "needs a site of"),
        (Case("linear", "forward", "8B", 8, "half", site="qkv"), "needs a site of"),
        (Case("group", "forward", "8B", 8, "half", site="o", layers=1), "and no layers"),
        (Case("model", "forward", "8B", 8, "half", layers=37), "needs layers in 1 … 36"),
        (Case("model", "forward", "8B", 8, "half"), "needs layers in 1 … 36"),
        (Case("layer", "forward", "8B", 8, "half", layers=2), 'measures one layer, got layers=2. Use suite "model"'),
        (Case("group", "forward", "8B", 0, "half", site="o"), "tokens must be a whole number of 1 or more"),
        (Case("group", "forward", "8B", 4097, "half", site="o"), "splits into equal rows"),
        (
            Case("group", "forward", "8B", 8, "half", (0, 64), site="o"),
            r"ranks must be two whole numbers in \[1, 256\]",
        ),
        (Case("group", "forward", "8B", 8, "half", (64, 257), site="o"), "ranks must be two whole numbers"),
        (Case("model", "decode", "8B", 8, "half", layers=1), "context must be a number of tokens in the cache"),
        (Case("model", "forward", "8B", 8, "half", layers=1, context=4), "context must be None"),
        (Case("group", "decode", "8B", 8, "suffix", site="o"), "a decode step has one token a row"),
    ],
)
def test_what_no_suite_knows_is_refused(case, words):
    with pytest.raises(OptionError, match=words):
        check_case(case)


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_every_suite_has_every_pass_and_the_scale_every_route(scale):
    found = cases(scale)
    assert len({case.id for case in found}) == len(found)
    assert {(case.suite, case.pass_) for case in found} == {(s, p) for s in SUITES for p in PASSES}
    assert {case.routes for case in found} == set(ROUTES)


def test_the_full_scale_has_the_ranks_and_sizes_that_matter():
    found = cases("full")
    ranks = {case.ranks for case in found}
    assert ranks == {(r, r) for r in (16, 32, 48, 64, 96, 128)} | {(64, 32)}
    assert {case.model for case in found} == set(MODELS) - {"tiny"}
    prefill = {case.tokens for case in found if case.suite == "group" and case.pass_ == "forward"}
    decode = {case.tokens for case in found if case.suite == "group" and case.pass_ == "decode"}
    assert {512, 16384} <= prefill and {1, 256} <= decode


def test_the_full_scale_begins_with_what_the_targets_ask_for():
    first = cases("full")[:48]
    overheads = {(c.model, c.pass_, c.site) for c in first if c.suite == "group" and c.ranks == (64, 64)}
    assert overheads >= {(m, p, s) for m in ("8B", "4B") for p in ("forward", "decode") for s in (*GROUPS, MLP)}
    assert {(c.model, c.pass_) for c in first if c.suite == "model"} == {
        (m, p) for m in ("8B", "4B") for p in ("forward", "decode")
    }


def test_fewer_layers_are_part_of_the_case():
    found = [case for case in cases("full", layers=4) if case.suite == "model"]
    assert {case.layers for case in found} == {4} and all("-4layers-" in case.id for case in found)
    with pytest.raises(OptionError, match="layers must be a whole number"):
        cases("full", layers=0)
    with pytest.raises(OptionError, match='scale must be one of "tiny", "full", got \'huge\''):
        cases("huge")
    with pytest.raises(OptionError, match='suite must be one of .* Did you mean "layer"'):
        cases("full", ["layers"])
