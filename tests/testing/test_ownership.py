"""The writers of tiny directories replace their own output and nobody else's files."""

from __future__ import annotations

import pytest

from twn_kernels import testing
from twn_kernels.demo import run_demo
from twn_kernels.errors import OptionError
from twn_kernels.testing.tiny_models import tiny_model

WRITERS = {
    "write_tiny_model": (lambda path: testing.write_tiny_model(path, "llama"), ""),
    "write_twn_directory": (lambda path: testing.write_twn_directory(path, tiny_model("llama")), ""),
    "write_demo_directories": (lambda path: testing.write_demo_directories(path, family="llama"), "twn"),
    "run_demo": (run_demo, ""),
}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def test_files_of_somebody_else_stay(writer, tmp_path):
    write, part = writer
    mine = tmp_path / part / "config.json"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(OptionError, match='holds files that twn_kernels did not write .*"config.json"'):
        write(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine] and mine.read_text() == "mine"


def test_a_file_is_no_directory(writer, tmp_path):
    write, _ = writer
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(OptionError, match='file" is a file. Name another directory.'):
            write(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["write_tiny_model", "write_twn_directory", "write_demo_directories"])
def test_writing_again_replaces_what_was_written(name, tmp_path):
    write, _ = WRITERS[name]
    write(tmp_path)
    (weights,) = list(tmp_path.rglob("reasoning/adapter_model.safetensors")) or list(tmp_path.glob("model.safetensors"))
    expected = weights.read_bytes()
    weights.write_bytes(b"damaged")
    write(tmp_path)
    assert weights.read_bytes() == expected
