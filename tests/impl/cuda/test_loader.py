"""What the loader says about the extension in every state that an installation can be in."""

from __future__ import annotations

import json

import pytest
import torch

from twn_kernels.errors import DeviceError, ImplUnavailable, ShapeError
from twn_kernels.impl.cuda import first_use, loader

BUILT = {"built": True, "reason": "", "archs": "8.0", "nvcc": "13.0", "torch": "2.12.0"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package folder in place of the installed one; nothing counts as loaded, and no GPU is here."""
    monkeypatch.setattr(loader, "_PACKAGE", tmp_path)
    monkeypatch.setattr(first_use, "capabilities", list)
    monkeypatch.delenv("TWN_BUILD_CUDA", raising=False)
    loader._loaded.cache_clear()
    yield tmp_path
    loader._loaded.cache_clear()


def write(package, **fields):
    (package / "_build_info.json").write_text(json.dumps(fields))


NO_GPU = "torch sees no CUDA GPU, and it runs on nothing else"


def test_without_a_record(package):
    info = loader.build_info()
    assert not info.built
    words = f"not on first use either ({NO_GPU})"
    assert str(info) == f"not built (no record of a build: the package was not installed with pip); {words}"


@pytest.mark.parametrize("text", ["", "{", "[]", '"built"', "{}", "null"])
def test_a_damaged_record(package, text):
    (package / "_build_info.json").write_text(text)
    assert loader.build_info().reason == "_build_info.json is damaged" and not loader.build_info().built


def test_a_library_that_vanished(package):
    write(package, **BUILT)
    info = loader.build_info()
    assert (info.built, info.archs) == (False, "")
    assert info.reason == "_C.abi3.so was built but is no longer beside the package"


def test_a_built_one_says_for_what_and_where(package):
    write(package, **BUILT, kernels="copy decode_sm80", seconds="83")
    (package / "_C.abi3.so").touch()
    info = loader.build_info()
    assert str(info) == "built for 8.0 with nvcc 13.0 against torch 2.12.0, in the package"
    assert info.path == str(package / "_C.abi3.so")
    assert (info.kernels, info.seconds, info.first_use) == ("copy decode_sm80", "83", "")


def test_a_library_that_does_not_load(package):
    write(package, **BUILT)
    (package / "_C.abi3.so").write_bytes(b"no library")
    with pytest.raises(ImplUnavailable, match=r"built against torch 2\.12\.0 and does not load into torch") as caught:
        loader.load()
    assert str(caught.value).endswith(f"\n  Rebuild: {loader.REBUILD}")


def test_what_does_not_load_is_no_implementation(package):
    write(package, **BUILT)
    (package / "_C.abi3.so").write_bytes(b"no library")
    reason = loader.unavailable_reason()
    assert reason.startswith("the CUDA extension was built against torch 2.12.0 and does not load into torch ")
    assert reason.endswith(f"\n  Rebuild: {loader.REBUILD}  ")


def test_what_is_not_built_says_why_and_what_to_do(package):
    write(package, built=False, reason="no nvcc was found; set CUDA_HOME", wanted="auto")
    why = f"not built (no nvcc was found; set CUDA_HOME), nor can it be on first use ({NO_GPU})"
    assert loader.unavailable_reason() == f"the extension is {why}.\n  Rebuild: {loader.REBUILD}  "
    with pytest.raises(ImplUnavailable) as caught:
        loader.load()
    assert str(caught.value) == f"the CUDA extension is {why}.\n  Rebuild: {loader.REBUILD}"


def test_probe_checks_its_argument(monkeypatch):
    monkeypatch.setattr(loader, "load", lambda: None)
    with pytest.raises(DeviceError, match='x must be on a CUDA device, got "cpu"'):
        loader.probe(torch.ones(2))


@pytest.mark.gpu
def test_probe_refuses_a_strided_tensor(monkeypatch):
    monkeypatch.setattr(loader, "load", lambda: None)
    with pytest.raises(ShapeError, match="must be contiguous"):
        loader.probe(torch.ones(4, 4, device="cuda").t()[1:])
