"""What the loader says about the extension in every state that an installation can be in."""

from __future__ import annotations

import json

import pytest
import torch

from twn_kernels.errors import DeviceError, ImplUnavailable, ShapeError
from twn_kernels.impl import cuda
from twn_kernels.impl.cuda import loader
from twn_kernels.ops import LoRA, RoutePlan, dual_lora_linear

BUILT = {"built": True, "reason": "", "archs": "8.0", "nvcc": "13.0", "torch": "2.12.0"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package folder in place of the installed one; nothing counts as loaded."""
    monkeypatch.setattr(loader, "_PACKAGE", tmp_path)
    loader.load.cache_clear()
    yield tmp_path
    loader.load.cache_clear()


def write(package, **fields):
    (package / "_build_info.json").write_text(json.dumps(fields))


def test_without_a_record(package):
    info = loader.build_info()
    assert not info.built
    assert str(info) == "not built (no record of a build: the package was not installed with pip)"


@pytest.mark.parametrize("text", ["", "{", "[]", '"built"', "{}", "null"])
def test_a_damaged_record(package, text):
    (package / "_build_info.json").write_text(text)
    assert str(loader.build_info()) == "not built (_build_info.json is damaged)"


def test_a_library_that_vanished(package):
    write(package, **BUILT)
    assert str(loader.build_info()) == "not built (_C.abi3.so was built but is no longer beside the package)"


def test_a_built_one_says_for_what(package):
    write(package, **BUILT)
    (package / "_C.abi3.so").touch()
    assert str(loader.build_info()) == "built for 8.0 with nvcc 13.0 against torch 2.12.0"
    assert loader.unavailable_reason().endswith("holds only twn_cuda::probe, no dual-LoRA kernel yet.")


def test_a_library_that_does_not_load(package):
    write(package, **BUILT)
    (package / "_C.abi3.so").write_bytes(b"no library")
    with pytest.raises(ImplUnavailable, match=r"built against torch 2\.12\.0 and does not load into torch") as caught:
        loader.load()
    assert str(caught.value).endswith(f"\n  Rebuild: {loader.REBUILD}")


def test_loading_what_is_not_built(package):
    write(package, built=False, reason="no nvcc when installing")
    with pytest.raises(ImplUnavailable, match=r"not built \(no nvcc when installing\)\.\n  Rebuild: TWN_BUILD_CUDA=1"):
        loader.load()


@pytest.mark.parametrize("name", ["forward", "fanout", "backward"])
def test_every_entry_refuses(package, name):
    write(package, built=False, reason="no nvcc when installing")
    with pytest.raises(ImplUnavailable, match=r'impl="cuda" was asked for, but the extension is not built \(no nvcc'):
        getattr(cuda, name)()


def test_the_public_op_refuses_with_the_reason_and_the_fix(package):
    write(package, built=False, reason="no nvcc when installing")
    x, lora = torch.randn(2, 8), LoRA(torch.randn(4, 8), torch.randn(8, 4), 1.0)
    with pytest.raises(ImplUnavailable) as caught:
        dual_lora_linear(x, torch.randn(8, 8), None, lora, lora, RoutePlan.uniform("both", 2), impl="cuda")
    words = " ".join(str(caught.value).split())
    assert words == (
        'impl="cuda" was asked for, but the extension is not built (no nvcc when installing). '
        "Rebuild: TWN_BUILD_CUDA=1 pip install --no-build-isolation -e . "
        'Or use impl="auto" (now: blas).'
    )


def test_probe_checks_its_argument(monkeypatch):
    monkeypatch.setattr(loader, "load", lambda: None)
    with pytest.raises(DeviceError, match='x must be on a CUDA device, got "cpu"'):
        loader.probe(torch.ones(2))


@pytest.mark.gpu
def test_probe_refuses_a_strided_tensor(monkeypatch):
    monkeypatch.setattr(loader, "load", lambda: None)
    with pytest.raises(ShapeError, match="must be contiguous"):
        loader.probe(torch.ones(4, 4, device="cuda").t()[1:])
