"""The shipped model: whole, small, loaded without a network, packed into wheel and source archive, reachable by name.

Its weights are in ``twn_kernels/shipped/numbers``; what the tests of the build need is put there in a copy of the tree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import failure, report

from twn_kernels import shipped
from twn_kernels.cli import main
from twn_kernels.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 8 * 2**20


def test_it_is_whole_and_small():
    model = shipped.number_model()
    files = [path for part in (model.base, model.twn) for path in part.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_its_files_name_no_machine():
    model = shipped.number_model()
    for path in (*model.base.rglob("*.json"), *model.twn.rglob("*.json"), model.card):
        found = re.search(r"(?<![\w.:/])/(?:work|root|home|tmp|mnt|Users)/\S*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} names {found[0]}"


def test_its_card_tells_results_and_limits():
    card = shipped.number_model().card.read_text(encoding="utf-8")
    for words in ("## Data", "## Training", "## Parameters", "## Results", "## What it cannot do"):
        assert words in card
    assert "twn-kernels train numbers" in card and "`ood_" in card


def test_it_embeds_without_a_network():
    code = (
        "import socket\n"
        "def refused(*_, **__): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
        "import json, twn_kernels\n"
        "from twn_kernels.shipped import number_model\n"
        "embedder = twn_kernels.TWNEmbedder.from_pretrained(*number_model()[:2], device='cpu')\n"
        "vectors, (detail,) = embedder.encode(['six times seven'], think='always', return_details=True)\n"
        "print(json.dumps([list(vectors.shape), detail.text, detail.thought, detail.gate_score]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shape, thought, closed, score = json.loads(done.stdout)
    assert shape == [1, 128] and closed and 0 <= score <= 1
    assert re.search(r"\d", thought), thought


def test_a_copy_without_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_NUMBERS", tmp_path)
    expected = f'10 of 10 files are missing, the first is "{tmp_path / "base" / "config.json"}". Install a wheel'
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        shipped.number_model()


def test_inspect_takes_its_name(capsys):
    by_name = report(capsys, "inspect", "--shipped", "numbers")
    assert by_name == report(capsys, "inspect", str(shipped.number_model().twn)) and by_name["ok"]


def test_embed_takes_its_name(tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("forty-two\n")
    out = ["--out", str(tmp_path / "a.npy"), "--think", "never", "--quiet", "--device", "cpu"]
    report(capsys, "embed", str(tmp_path / "lines.txt"), "--shipped", "numbers", *out)
    model = shipped.number_model()
    paths = ["--model", str(model.base), "--checkpoint", str(model.twn), "--overwrite"]
    vectors = np.load(tmp_path / "a.npy")
    report(capsys, "embed", str(tmp_path / "lines.txt"), *paths, *out)
    assert np.array_equal(vectors, np.load(tmp_path / "a.npy"))


def test_a_result_calls_it_by_its_name(tmp_path, capsys):
    assert main(["eval", "--make-numbers", str(tmp_path / "data"), "--queries", "2"]) == 0
    capsys.readouterr()
    options = ["--split", "test", "--quiet", "--resamples", "50", "--device", "cpu"]
    found = report(capsys, "eval", str(tmp_path / "data"), "--shipped", "numbers", *options)
    told = found["result"]["model"]
    assert told["base"] == told["checkpoint"] == "numbers (shipped)" and told["parameters"]["gate"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "twn"], "--shipped numbers names the model, and CHECKPOINT another. Leave out one of them."),
        (["inspect", "--revision", "main"], "--shipped numbers names the model, and --revision another."),
        (["embed", "a.txt", "--out", "o.npy", "--model", "m"], "and --model another."),
        (["embed", "a.txt", "--out", "o.npy", "--checkpoint", "c"], "and --checkpoint another."),
        (["eval", "DATA", "--model-revision", "main"], "and --model-revision another."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_stands_beside_no_other_model(argv, message, tmp_path, capsys):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("")
    line = failure(capsys, *(str(tmp_path) if word == "DATA" else word for word in argv), "--shipped", "numbers")
    assert "OptionError: " in line and message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect"], "inspect needs CHECKPOINT, a directory or a Hub id; or --shipped numbers"),
        (["embed", "a.txt", "--out", "o.npy"], "embed needs --model and --checkpoint; or --shipped numbers"),
        (["embed", "a.txt", "--out", "o.npy", "--model", "m"], "embed needs --model and --checkpoint; or --shipped"),
        (["inspect", "--shipped", "number"], 'must be one of "numbers", got "number". Did you mean "numbers"?'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_model_and_no_such_model_are_wrong_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_wheel_and_source_archive_hold_it(tmp_path):
    """Whatever lies in the folder is packed; files stand in for the weights, so that the copy is quick to pack."""
    project, folder = tmp_path / "project", Path("twn_kernels") / "shipped" / "numbers"
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "numbers")
    shutil.copytree(ROOT / "twn_kernels", project / "twn_kernels", ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, project)
    (project / "csrc").mkdir()
    (project / "csrc" / "bindings.cpp").write_text("")
    names = ["README.md", *(f"base/{name}" for name in shipped._BASE_FILES), "base/chat_template.jinja"]
    expected = {(folder / name).as_posix() for name in (*names, *(f"twn/{name}" for name in shipped._TWN_FILES))}
    for name in expected:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    command = [sys.executable, "setup.py", "-q", "sdist", "bdist_wheel"]
    done = subprocess.run(
        command, cwd=project, env=os.environ | {"TWN_BUILD_CUDA": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,), (archive,) = (project / "dist").glob("*.whl"), (project / "dist").glob("*.tar.gz")
    assert expected <= set(zipfile.ZipFile(wheel).namelist())
    assert expected <= {name.split("/", 1)[-1] for name in tarfile.open(archive).getnames()}
