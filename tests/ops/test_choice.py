"""``impl="auto"`` follows the table of measurements and says why; what a table may not hold fails on reading."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
from cases import Case, tensors

from twn_kernels.errors import ImplUnavailable, OptionError, TableError
from twn_kernels.ops import (
    Projection,
    RoutePlan,
    choice,
    choice_table,
    dual_lora_group,
    dual_lora_linear,
    dual_lora_linear_fanout,
)

SOURCE = "bench/results/nvidia-h200/20260101-abc.json"
CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
ROW = {
    "arch": "sm_90",
    "dtype": "bf16",
    "site": "qkv",
    "min_tokens": 16,
    "max_tokens": 63,
    "impl": "triton",
    "source": SOURCE,
    "cases": ["qkv-16", "qkv-32"],
    "measured": {"qkv-16": {"triton": 9.5, "blas": 11.0}, "qkv-32": {"triton": 10, "blas": 10}},
}


def table(*rows, **fields) -> str:
    return json.dumps({"format": 1, "rows": list(rows)} | fields)


def changed(path: str = "", value=None, **fields) -> dict:
    """The row with other fields; ``path`` reaches into ``measured``."""
    row = copy.deepcopy(ROW) | fields
    if path:
        case, impl = path.split("/")
        row["measured"][case][impl] = value
    return row


def test_the_packaged_table_is_valid():
    rows = choice_table.packaged()
    assert all(row.impl in choice_table.IMPLS for row in rows)
    assert choice_table.packaged() is rows


def test_a_row_survives_the_round_trip():
    (row,) = choice_table.parse(table(ROW), "choices.json")
    assert row.to_dict() == ROW
    assert row.key == ("sm_90", "bf16", "qkv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(impl="tritn"), r'rows\[0\].impl must be one of "blas", "cuda", "triton", got "tritn". .*"triton"'),
        (changed(impl="reference"), r"rows\[0\].impl must be one of"),
        (changed(site="kqv"), r'rows\[0\].site must be one of .* got "kqv". Did you mean "qkv"'),
        (changed(site=["qkv"]), r"rows\[0\].site must be one of"),
        (changed(arch="sm_91"), r'rows\[0\].arch must be one of .* got "sm_91"'),
        (changed(arch=90), r"rows\[0\].arch must be one of .* got 90"),
        (changed(dtype="bfloat16"), r'rows\[0\].dtype must be one of "bf16", "fp16", "fp32", got "bfloat16"'),
        (changed(min_tokens=64), r"rows\[0\] has an empty range: min_tokens 64 is above max_tokens 63"),
        (changed(min_tokens=0), r"rows\[0\].min_tokens must be a whole number from 1 to 2147483647, got 0"),
        (changed(min_tokens=True), r"rows\[0\].min_tokens must be a whole number .* got true"),
        (changed(max_tokens=63.0), r"rows\[0\].max_tokens must be a whole number .* got 63.0"),
        (changed(max_tokens=None), r"rows\[0\].max_tokens must be a whole number .* got null"),
        (changed(max_tokens=2**31), r"rows\[0\].max_tokens must be a whole number"),
        (changed(source=None), r'rows\[0\].source must be "bench/results/<device>/<file>.json".* got null'),
        (changed(source="../bench/results/a/b.json"), r"rows\[0\].source must be"),
        (changed(source="bench/results/a/b.txt"), r"rows\[0\].source must be"),
        (changed(note="fast"), r'rows\[0\] has unknown fields "note"; there are "arch"'),
        (changed(mintokens=3), r'rows\[0\] has unknown fields "mintokens".* Did you mean "min_tokens"'),
        ({k: v for k, v in ROW.items() if k != "source"}, r'rows\[0\] lacks "source"'),
        (changed(cases=[]), r"rows\[0\].cases must list the ids of one case or more, got \[\]"),
        (changed(cases="qkv-16"), r"rows\[0\].cases must list the ids"),
        (changed(cases=["qkv-16", "qkv-32", "qkv-16"]), r'rows\[0\].cases lists "qkv-16" twice'),
        (changed(cases=["qkv-16"]), r'rows\[0\].measured must have exactly the cases "qkv-16", got "qkv-16", "qkv-32"'),
        (changed(measured=[1]), r"rows\[0\].measured must have exactly the cases .* got \[1\]"),
        (changed("qkv-16/blas", 9.4), r"impl must be the fastest in each case, but in qkv-16 blas took 9.4 us and tri"),
        (changed("qkv-16/cuda", 1), r"impl must be the fastest in each case, but in qkv-16 cuda took 1 us"),
        (changed("qkv-16/blas", 0), r'measured\["qkv-16"\]\["blas"\] must be a positive time in us, got 0'),
        (changed("qkv-16/blas", "11"), r'measured\["qkv-16"\]\["blas"\] must be a positive time in us, got "11"'),
        (changed("qkv-16/peft", 99.0), r'measured\["qkv-16"\] names "peft"; implementations are "blas", "cuda"'),
        (
            changed(measured={"qkv-16": {"triton": 9.5}, "qkv-32": {"triton": 1, "blas": 2}}),
            r'measured\["qkv-16"\] must hold the medians of "triton", "blas" in us, got {"triton": 9.5}',
        ),
        ("row", r'rows\[0\] must be an object with the fields .* got "row"'),
    ],
)
def test_an_invalid_row_fails_when_it_is_read_and_is_named(row, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(table(row))
    with pytest.raises(TableError, match=message) as caught:
        choice_table.read(path)
    assert str(caught.value).startswith(f"{path}: rows[0]")


@pytest.mark.parametrize(
    ("low", "high", "fails"), [(1, 16, True), (63, 63, True), (20, 30, True), (1, 15, False), (64, 99, False)]
)
def test_ranges_of_one_key_may_touch_but_not_overlap(low, high, fails):
    rows = [changed(min_tokens=low, max_tokens=high), changed(), changed(arch="sm_100"), changed(site="o")]
    if fails:
        with pytest.raises(TableError, match=r"rows\[1\] overlaps rows\[0\]: both serve qkv in bf16 on sm_90 at"):
            choice_table.parse(table(*rows), "t")
    else:
        assert len(choice_table.parse(table(*rows), "t")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: the table must be JSON, but Expecting value"),
        ("[]", r't: the table must be an object with "format" and "rows", got \[\]'),
        (table(format=2), "t: format must be 1, the one that this version reads, got 2"),
        (table(format=True), "t: format must be 1, .* got true"),
        ('{"rows": []}', "t: format must be 1, .* got null"),
        ('{"format": 1}', 't lacks "rows"'),
        (table(rows={}), "t: rows must be a list, got {}"),
        (table(row=[]), 't has unknown fields "row".* Did you mean "rows"'),
        ('{"format": 1, "rows": [], "rows": []}', 't: the table must be JSON, but the key "rows" stands twice'),
        (table(ROW).replace("9.5", "NaN"), "t: the table must be JSON, but NaN is no JSON number"),
        (table(ROW).replace("9.5", "1e999"), "must be a positive time in us"),
        ("[" * 100_000, "t: the table must be JSON"),
    ],
)
def test_a_damaged_table_is_one_clear_error(text, message):
    with pytest.raises(TableError, match=message):
        choice_table.parse(text, "t")


def test_a_table_that_is_absent_or_binary(tmp_path):
    with pytest.raises(TableError, match=r"none.json: the table cannot be read: .*Reinstall"):
        choice_table.read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match=r"binary.json: the table cannot be read"):
        choice_table.read(tmp_path / "binary.json")


@pytest.fixture
def gpu(monkeypatch):
    """Give a function that makes ``choice`` see one GPU and a table; no kernel runs, only the choice."""

    def pretend(*rows, capability=(9, 0), triton=True) -> None:
        parsed = choice_table.parse(table(*rows), "t")
        monkeypatch.setattr(choice, "packaged", lambda: parsed)
        monkeypatch.setattr(choice, "_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
        monkeypatch.setattr(choice, "_has_triton", lambda: triton)
        clear()

    def clear() -> None:
        for cached in (choice._usable, choice.arch, choice._device_name):
            cached.cache_clear()

    clear()
    yield pretend
    clear()


def test_auto_follows_the_row_of_site_dtype_arch_and_tokens(gpu):
    gpu(
        ROW,
        changed(min_tokens=64, max_tokens=128, impl="blas", measured=dict.fromkeys(ROW["cases"], {"blas": 1.0})),
        changed(min_tokens=1, max_tokens=4, site="linear"),
        changed(min_tokens=16, max_tokens=99, dtype="fp16"),
    )

    def taken(tokens, site="qkv", dtype=BF16):
        return choice.resolve("auto", CUDA, dtype, site=site, tokens=tokens)

    assert [taken(t) for t in (1, 15, 16, 40, 63, 64, 128, 129)] == ["blas"] * 2 + ["triton"] * 3 + ["blas"] * 3
    assert [taken(t, site=None) for t in (1, 4, 5)] == ["triton", "triton", "blas"]
    assert [taken(70, dtype=dtype) for dtype in (torch.float16, torch.float32)] == ["triton", "blas"]
    assert taken(40, site="o") == "blas" and taken(40, dtype=torch.float64) == "reference"
    assert choice.resolve("auto", torch.device("cpu"), BF16, site="qkv", tokens=40) == "blas"
    assert choice.resolve("auto", CUDA, BF16, site="qkv") == "blas"


def test_the_reason_tells_what_was_measured(gpu):
    gpu(ROW, changed(min_tokens=100, max_tokens=200))

    def why(tokens, **at):
        return choice.chosen("auto", CUDA, BF16, **{"site": "qkv", "tokens": tokens} | at).reason

    assert why(20) == f"triton was the fastest at 16 to 63 tokens ({SOURCE})"
    assert why(80).startswith("nothing was measured for qkv at 80 tokens (measured: 16 to 63, 100 to 200); the vendor")
    whole = choice.chosen("auto", CUDA, BF16, site="qkv")
    assert whole.impl == "blas" and whole.reason.startswith("by token count: triton was the fastest at 16 to 63")
    assert whole.reason.endswith("; blas elsewhere")
    assert why(20, site="down") == (
        "nothing was measured for down in bf16 on NVIDIA Test (sm_90); the vendor GEMM is the safe choice"
    )


def test_a_row_of_another_architecture_is_never_borrowed(gpu):
    gpu(ROW, capability=(8, 9))
    taken = choice.chosen("auto", CUDA, BF16, site="qkv", tokens=20)
    assert taken.impl == "blas"
    assert taken.reason.startswith(
        "nothing was measured for qkv in bf16 on NVIDIA Test (sm_89) (there are measurements"
    )
    assert "of sm_90, which are not borrowed" in taken.reason


@pytest.mark.parametrize(("pretence", "why"), [({"triton": False}, "Triton is not installed")])
def test_a_row_whose_implementation_cannot_run_here_leaves_the_default_and_says_so(gpu, pretence, why):
    gpu(ROW, **pretence)
    taken = choice.chosen("auto", CUDA, BF16, site="qkv", tokens=20)
    assert taken.impl == "blas"
    assert f"({SOURCE}), but cannot run here, so blas serves: {why}" in taken.reason


def test_an_old_gpu_is_told_what_serves_instead(gpu):
    gpu(ROW, capability=(7, 5))
    with pytest.raises(ImplUnavailable) as caught:
        choice.resolve("triton", CUDA, BF16)
    assert "needs a GPU of compute capability 8.0 or newer; NVIDIA Test (sm_75) has 7.5." in str(caught.value)
    assert str(caught.value).endswith('Or use impl="auto" (now: blas).')
    taken = choice.chosen("auto", CUDA, BF16)
    assert taken.impl == "blas" and taken.reason.startswith(
        "nothing was measured for linear in bf16 on NVIDIA Test (sm_75)"
    )
    assert taken.reason.endswith(
        "; triton cannot serve: it needs a GPU of compute capability 8.0 or newer; NVIDIA Test (sm_75) has 7.5"
    )


def test_names_and_the_environment_override_the_table(gpu, monkeypatch):
    gpu(ROW)
    at = {"site": "qkv", "tokens": 20}
    assert choice.chosen("blas", CUDA, BF16, **at) == ("blas", 'impl="blas" was asked for')
    monkeypatch.setenv("TWN_IMPL", "blas")
    assert choice.chosen("auto", CUDA, BF16, **at) == ("blas", "TWN_IMPL=blas is set")
    monkeypatch.setenv("TWN_IMPL", "auto")
    assert choice.resolve("auto", CUDA, BF16, **at) == "triton"


def test_only_what_was_asked_for_or_measured_is_deliberate(gpu, monkeypatch):
    """The vendor GEMM borrows a Triton kernel only then: unmeasured, the default is torch's own operations alone."""
    gpu(ROW)
    assert choice.is_deliberate("auto", CUDA, BF16, site="qkv", tokens=20)
    assert not choice.is_deliberate("auto", CUDA, BF16, site="qkv", tokens=10**6)
    assert not choice.is_deliberate("auto", CUDA, BF16, site="o", tokens=20)
    assert choice.is_deliberate("blas", CUDA, BF16, site="o", tokens=20)
    monkeypatch.setenv("TWN_IMPL", "blas")
    assert choice.is_deliberate("auto", CUDA, BF16, site="o", tokens=20)


def test_an_unknown_site_is_named():
    with pytest.raises(
        OptionError, match='site must be None or one of "qkv", .* got \'gateup\'. Did you mean "gate_up"'
    ):
        choice.resolve("auto", CUDA, BF16, site="gateup", tokens=1)


CASE = Case(9, 16, 8, 3, 5, torch.float32, "mixed")


@pytest.fixture
def by_count(monkeypatch):
    """Count what auto is asked, as a table would be on a GPU; a count that is a symbol would show as one."""
    asked = Counter()

    def auto(device, dtype, site, tokens):
        asked[tokens if site is None else (site, tokens)] += 1
        return "reference"

    monkeypatch.setattr(choice, "_auto", auto)
    return asked


def _linear(inputs, x, routes):
    return dual_lora_linear(**inputs | {"x": x}, plan=RoutePlan(routes))


def _group(inputs, x, routes):
    projection = Projection(*(inputs[name] for name in ("weight", "bias", "reasoning", "embedding")))
    return dual_lora_group(x, [projection], RoutePlan(routes), site="down")[0]


@pytest.mark.parametrize(
    ("layer", "key"), [(_linear, lambda t: t), (_group, lambda t: ("down", t))], ids=["linear", "group"]
)
def test_a_traced_call_is_chosen_when_it_runs_and_binds_no_graph_to_its_token_count(layer, key, by_count, device):
    inputs = tensors(CASE, device)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, routes: layer(inputs, x, routes), fullgraph=True, dynamic=True, backend=backend)
    for tokens in (6, 9, 13, 7):
        x, routes = torch.randn(tokens, 16, device=device), torch.ones(tokens, dtype=torch.int8, device=device)
        by_count.clear()
        with torch.no_grad():
            compiled(x, routes)
        assert by_count == {key(tokens): 1}, "resolved once, at run time, with this call's own count"
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_the_backward_pass_takes_what_the_forward_pass_took_and_the_fanout_no_row_at_all(by_count):
    inputs, plan = tensors(CASE, "cpu"), CASE.plan("cpu")
    x = inputs["x"].detach().requires_grad_()
    dual_lora_linear(**inputs | {"x": x}, plan=plan).sum().backward()
    assert by_count == {9: 2}
    by_count.clear()
    sum(dual_lora_linear_fanout(**inputs | {"x": x}, plan=plan)).sum().backward()
    assert by_count == {None: 2}
