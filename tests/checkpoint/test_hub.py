"""Hub ids, resolved without a network: from a cache laid out as the Hub's client does, or refused in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from httpx import Request, Response
from huggingface_hub import errors

from twn_kernels import inspect_checkpoint, load_checkpoint
from twn_kernels.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(pristine, tmp_path):
    """A cache that holds ``owner/name`` at one commit, called main and v1; files are links to blobs."""
    root = tmp_path / "cache" / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    for ref in ("main", "v1"):
        (root / "refs" / ref).write_text(COMMIT)
    for index, path in enumerate(path for path in pristine.rglob("*") if path.is_file()):
        blob = root / "blobs" / f"{index:040x}"
        shutil.copy(path, blob)
        for folder in ("", "sub"):
            link = root / "snapshots" / COMMIT / folder / path.relative_to(pristine)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return tmp_path / "cache"


@pytest.mark.parametrize("options", [{}, {"revision": "v1"}, {"revision": COMMIT}, {"subfolder": "sub"}], ids=str)
def test_from_the_cache(cache, options):
    checkpoint = load_checkpoint("owner/name", cache_dir=cache, local_files_only=True, **options)
    assert checkpoint.queries.shape == (4, 64) and len(checkpoint.adapters["embedding"].layers) == 14
    assert checkpoint.source == ("owner/name/sub" if "subfolder" in options else "owner/name")
    assert inspect_checkpoint("owner/name", cache_dir=cache, local_files_only=True, **options).ok


def test_offline_variable(cache):
    code = f"""
from twn_kernels import load_checkpoint
print(len(load_checkpoint("owner/name", cache_dir={str(cache)!r}).adapters))
try:
    load_checkpoint("owner/other", cache_dir={str(cache)!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.stdout.splitlines() == [
        "2",
        "owner/other is no directory here and cannot be had from the Hub: HF_HUB_OFFLINE is set and no copy is in the "
        "cache. Download it once online, or pass a directory.",
    ], done.stderr


def test_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="local_files_only=True was passed and no copy is in the cache"):
        load_checkpoint("owner/name", cache_dir=tmp_path, local_files_only=True)


def http_error(kind):
    return kind("no", response=Response(404, request=Request("GET", "https://example.invalid")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http_error(errors.RepositoryNotFoundError), "there is no such repository, or it is private. Check the name"),
        (http_error(errors.GatedRepoError), "access is gated. Ask for access on its page, then pass token="),
        (http_error(errors.RevisionNotFoundError), "the repository has no such revision."),
        (errors.LocalEntryNotFoundError("x"), "the Hub is unreachable and no copy is in the cache."),
        (ConnectionError("refused\nmore"), "ConnectionError: refused"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_refusal_is_one_sentence(monkeypatch, error, said):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("owner/name", revision="v9")
    start = "owner/name (revision v9) is no directory here and cannot be had from the Hub: "
    assert str(caught.value).startswith(start)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_options_reach_the_client_and_only_checkpoint_files_are_asked_for(pristine, monkeypatch):
    from fnmatch import fnmatch

    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(pristine.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_checkpoint("owner/name", revision="r", token="t", cache_dir="c", subfolder=pristine.name)
    patterns = asked.pop("allow_patterns")
    assert asked == {"repo": "owner/name", "revision": "r", "token": "t", "cache_dir": "c", "local_files_only": False}
    wanted = [str(path.relative_to(pristine.parent)) for path in pristine.rglob("*.*") if path.name != "README.md"]
    assert wanted and all(any(fnmatch(name, pattern) for pattern in patterns) for name in wanted)
    unwanted = ("twn/model.safetensors", "modeling.py", "twn/reasoning/optimizer.pt", "queries.pt")
    assert not any(fnmatch(name, pattern) for name in unwanted for pattern in patterns)


@pytest.mark.parametrize("name", ["./owner/name", "/no/such/place", "~/owner/name", "name", "a/b/c", "owner/na me"])
def test_what_is_no_hub_id_never_asks_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="does not exist; a checkpoint is a directory or a Hub id of the form"):
        load_checkpoint(name)


def test_a_local_directory_of_that_name_wins(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert load_checkpoint("owner/name").queries is not None


def test_a_repository_of_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "never-made"))
    with pytest.raises(CheckpointError, match="owner/name is on the Hub, but has no file of a TWN directory in sub/"):
        load_checkpoint("owner/name", subfolder="sub")


def test_an_incomplete_snapshot_is_reported(cache):
    shutil.rmtree(cache / "models--owner--name" / "snapshots" / COMMIT / "reasoning")
    with pytest.raises(CheckpointError, match='owner/name has no adapter "reasoning"'):
        load_checkpoint("owner/name", cache_dir=cache, local_files_only=True)
