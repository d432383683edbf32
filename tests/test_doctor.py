"""The doctor finds what is broken: each check can turn red, and says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_stand_in
import pytest
import torch

from twn_kernels import doctor, env
from twn_kernels.errors import TableError
from twn_kernels.impl.cuda import loader
from twn_kernels.ops import choice, choice_table

ROOT = Path(__file__).resolve().parent.parent


def by_name(checks) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_everything_that_runs_here_is_ok():
    checks = list(doctor.examine())
    assert [str(check) for check in checks if check.status == doctor.FAIL] == []
    names = {check.name for check in checks if check.status == doctor.OK}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for impl in ("reference", "blas", "triton"):
        if choice.unavailable_reason(impl, device) is None:
            for op in ("dual_lora_linear", "dual_lora_linear_fanout"):
                for part in ("forward", "backward"):
                    for dtype in doctor.DTYPES:
                        assert f"{op} {part}, {impl}, {dtype}, {device}" in names
            if hasattr(choice.load(impl), "group"):
                for part in ("forward", "backward", "isolation"):
                    for dtype in ("bf16",) if impl == "triton" and device == "cpu" else doctor.DTYPES:
                        assert f"dual_lora_group {part}, {impl}, {dtype}, {device}" in names


def test_each_impl_that_cannot_run_gives_one_line_with_the_reason():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "twn_kernels", "doctor", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("not available")]
    (triton,) = [line for line in lines if "triton on cpu" in line]
    assert "need a GPU" in triton and "TRITON_INTERPRET=1" in triton
    assert 'Instead, impl="auto" takes blas: cpu runs the vendor GEMM' in triton
    assert len([line for line in lines if "cuda on cpu" in line]) == 1


@pytest.mark.parametrize("op", ["gate_scores", "pool_queries"])
def test_the_small_ops_are_checked_too(monkeypatch, op):
    ours, in_torch, shapes = doctor._SMALL[op]
    green = by_name(doctor._small_ops("reference", torch.device("cpu")))
    assert {check.status for check in green.values()} == {doctor.OK} and len(green) == 6
    monkeypatch.setitem(doctor._SMALL, op, (lambda *inputs, impl: ours(*inputs, impl=impl) * 1.001, in_torch, shapes))
    checks = by_name(doctor._small_ops("reference", torch.device("cpu")))
    assert checks[f"{op} forward, reference, bf16, cpu"].status == doctor.FAIL


@pytest.fixture
def only_blas(monkeypatch):
    monkeypatch.setattr(doctor, "IMPLS", ("auto", "blas"))
    return choice.load("blas")


def _wrong_by(factor: float, real, position: int):
    def run(*args, **kwargs):
        out = list(real(*args, **kwargs))
        out[position] = out[position] * factor
        return tuple(out)

    return run


@pytest.mark.parametrize(
    ("function", "position", "red"),
    [
        ("forward", 0, "dual_lora_linear forward"),
        ("fanout", 1, "dual_lora_linear_fanout forward"),
        ("backward", 3, "dual_lora_linear backward"),
    ],
)
def test_a_wrong_number_turns_its_check_red(only_blas, monkeypatch, function, position, red):
    monkeypatch.setattr(only_blas, function, _wrong_by(1.03, getattr(only_blas, function), position))
    checks = by_name(doctor.examine("cpu"))
    for dtype in doctor.DTYPES:
        check = checks[f"{red}, blas, {dtype}, cpu"]
        assert check.status == doctor.FAIL
        assert "is worse than torch: max error" in check.detail
        assert check.fix.startswith("set TWN_IMPL=reference until it is repaired, and report it with")


def _nan_everywhere_where_one_was(real):
    def run(*args, **kwargs):
        y, s = real(*args, **kwargs)
        return y + y.sum(0) * 0, s

    return run


@pytest.mark.parametrize(
    ("function", "wrong", "red"),
    [
        ("group", lambda real: _wrong_by(1.03, real, 0), {"forward", "isolation"}),
        ("group", _nan_everywhere_where_one_was, {"isolation"}),
        ("group_backward", lambda real: _wrong_by(1.03, real, 0), {"backward"}),
    ],
    ids=["wrong number", "leaking NaN", "wrong gradient"],
)
def test_a_wrong_group_turns_its_checks_red(only_blas, monkeypatch, function, wrong, red):
    monkeypatch.setattr(only_blas, function, wrong(getattr(only_blas, function)))
    for dtype in ("fp32", "bf16"):
        checks = list(doctor.group.checks("blas", dtype, torch.device("cpu")))
        parts = {check.name.split()[1].strip(","): check for check in checks}
        assert {part for part, check in parts.items() if check.status == doctor.FAIL} == red, checks
        assert all(check.fix.startswith("set TWN_IMPL=reference") for check in checks if check.status == doctor.FAIL)


def test_an_implementation_without_the_group_op_says_so(only_blas, monkeypatch):
    monkeypatch.delattr(only_blas, "group")
    (check,) = doctor.group.checks("blas", "fp32", torch.device("cpu"))
    assert (check.status, check.detail) == (doctor.NOT_AVAILABLE, "blas has no such op")


def test_a_damaged_table_of_measurements_is_red(monkeypatch):
    title = "measurements that auto follows"
    green = by_name(doctor._installation(torch.device("cpu")))[title]
    assert green.status == doctor.OK and green.detail.endswith(
        'impl="auto" takes blas: ' + choice.explain("cpu", torch.float32).reason
    )

    def damaged():
        raise TableError("choices.json: rows[3] has an empty range.")

    monkeypatch.setattr(choice_table, "packaged", damaged)
    red = by_name(doctor._installation(torch.device("cpu")))[title]
    assert (red.status, red.detail) == (doctor.FAIL, "choices.json: rows[3] has an empty range.")
    assert red.fix == "reinstall twn_kernels"


def test_a_crash_is_a_red_line_and_the_rest_goes_on(only_blas, monkeypatch):
    def crash(*_):
        raise RuntimeError("illegal instruction\nand more")

    monkeypatch.setattr(only_blas, "fanout", crash)
    checks = by_name(doctor.examine("cpu"))
    red = checks["dual_lora_linear_fanout backward, blas, fp16, cpu"]
    assert (red.status, red.detail) == (doctor.FAIL, "RuntimeError: illegal instruction")
    assert checks["dual_lora_linear backward, blas, fp16, cpu"].status == doctor.OK


def test_a_gpu_that_torch_does_not_see_is_red(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    monkeypatch.setattr(env, "collect_gpus", lambda: [{"name": "NVIDIA H100", "capability": "9.0"}])
    check = next(doctor.examine())
    assert (check.name, check.status) == ("GPU", doctor.FAIL)
    assert "the driver lists NVIDIA H100, but torch" in check.detail
    assert check.fix.startswith("install a CUDA build of torch")


def test_an_override_that_cannot_work_is_red(monkeypatch):
    monkeypatch.setenv("TWN_IMPL", "bals")
    check = by_name(doctor._installation(torch.device("cpu")))["TWN_IMPL=bals"]
    assert check.status == doctor.FAIL and "there is no such implementation" in check.detail
    assert check.fix == 'unset TWN_IMPL, or set it to one of these. Did you mean "blas"?'
    monkeypatch.setenv("TWN_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check = by_name(doctor._installation(torch.device("cpu")))["TWN_IMPL=triton"]
    assert check.status == doctor.FAIL and check.detail.startswith("it cannot run on cpu: ")
    monkeypatch.setenv("TWN_IMPL", "blas")
    assert by_name(doctor._installation(torch.device("cpu")))["TWN_IMPL=blas"].status == doctor.OK


@pytest.mark.parametrize(("built", "status"), [(False, doctor.NOT_AVAILABLE), (True, doctor.FAIL)])
def test_the_extension_absent_or_unloadable(monkeypatch, tmp_path, built, status):
    monkeypatch.setattr(loader, "_PACKAGE", tmp_path)
    loader._loaded.cache_clear()
    (tmp_path / "_build_info.json").write_text(json.dumps({"built": built, "reason": "no nvcc when installing"}))
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    check = by_name(doctor._installation(torch.device("cpu")))["CUDA extension"]
    assert check.status == status
    assert loader.REBUILD in check.fix + check.detail


def test_the_last_line_counts():
    checks = [doctor.Check("a", doctor.OK), doctor.Check("b", doctor.FAIL, "x", "y"), doctor.Check("c", doctor.OK)]
    assert doctor.render(checks) == "2 ok, 1 FAIL, 0 not available"
    assert str(checks[1]).splitlines() == ["FAIL           b: x", "               fix: y"]


def _of_cuda(monkeypatch, break_it=lambda stand_in: None) -> dict[str, doctor.Check]:
    break_it(cuda_stand_in.install(monkeypatch))
    monkeypatch.setattr(doctor, "IMPLS", ("auto", "cuda"))
    return {name: check for name, check in by_name(doctor.examine("cpu")).items() if ", cuda, " in name}


def test_an_implementation_for_inference_is_checked_in_what_it_does(monkeypatch):
    checks = _of_cuda(monkeypatch)
    ok = {name for name, check in checks.items() if check.status == doctor.OK}
    parts = ("dual_lora_linear forward", "dual_lora_group forward", "dual_lora_group isolation")
    small = ("gate_scores forward", "pool_queries forward")
    assert ok == {f"{part}, cuda, {dtype}, cpu" for part in (*parts, *small) for dtype in ("fp16", "bf16")} | {
        f"{part}, cuda, fp32, cpu" for part in small
    }
    assert {check.status for name, check in checks.items() if name not in ok} == {doctor.NOT_AVAILABLE}
    assert checks["dual_lora_group backward, cuda, bf16, cpu"].detail == "cuda is for inference"
    by_dtype = by_name(doctor.examine("cpu"))
    assert "its kernels take float16 and bfloat16, not float32" in by_dtype["cuda, fp32, cpu"].detail
    assert "must be in the dtype of x" in by_dtype["cuda, bf16 with fp32 adapters, cpu"].detail


@pytest.mark.parametrize(("kernel", "op"), [("_pool", "pool_queries"), ("_gate", "gate_scores")])
def test_a_wrong_small_kernel_turns_its_check_red(monkeypatch, kernel, op):
    stand_in = cuda_stand_in.install(monkeypatch)
    assert {check.status for check in doctor._small_ops("cuda", torch.device("cpu"))} == {doctor.OK}
    right = getattr(stand_in, kernel)
    wrong = {"_pool": lambda *call: right(*call) * 1.001, "_gate": lambda *call: (right(*call)[0] * 1.001, None)}
    monkeypatch.setattr(stand_in, kernel, wrong[kernel])
    checks = by_name(doctor._small_ops("cuda", torch.device("cpu")))
    red = {name for name, check in checks.items() if check.status == doctor.FAIL}
    assert red == {f"{op} forward, cuda, {dtype}, cpu" for dtype in ("fp32", "fp16", "bf16")}
    assert checks[f"{op} forward, cuda, bf16, cpu"].fix.startswith("set TWN_IMPL=blas until it is repaired, and report")


@pytest.mark.parametrize(
    ("wrong", "red"),
    [(lambda y: y * 1.03, {"forward", "isolation"}), (lambda y: y + y.sum(0) * 0, {"isolation"})],
    ids=["wrong number", "leaking NaN"],
)
def test_a_wrong_kernel_turns_its_checks_red(monkeypatch, wrong, red):
    def break_it(stand_in):
        right = stand_in._decode
        monkeypatch.setattr(stand_in, "_decode", lambda *call: wrong(right(*call)))

    checks = _of_cuda(monkeypatch, break_it)
    for part in ("forward", "isolation"):
        check = checks[f"dual_lora_group {part}, cuda, bf16, cpu"]
        assert check.status == (doctor.FAIL if part in red else doctor.OK), check
