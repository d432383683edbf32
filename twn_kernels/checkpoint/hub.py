"""From what the caller names (a directory, or a Hub id) to a directory on this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from twn_kernels.errors import CheckpointError, MissingDependency, OptionError, did_you_mean

# Nothing else is downloaded: no base model, no code.
_WANTED = (
    "adapter_config.json",
    "adapter_model*",
    "reasoning/adapter_config.json",
    "reasoning/adapter_model*",
    "embedding/adapter_config.json",
    "embedding/adapter_model*",
    "gate_mlp.*",
    "queries.*",
    "twn_config.json",
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class HubOptions:
    """How a Hub id is resolved; the same names as ``huggingface_hub.snapshot_download``."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False


def resolve(source: str | os.PathLike, subfolder: str | None, options: HubOptions) -> tuple[Path, str]:
    """The directory that ``source`` names, downloading it where it is a Hub id.

    Returns:
        the directory, and how messages name it.

    Raises:
        CheckpointError: no such directory, a file, or a Hub id that cannot be had here.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise OptionError(
            f"a checkpoint must be a directory, a Hub id such as owner/name, or a dict of both adapters' directories, "
            f"got {source!r}."
        )
    path = Path(source).expanduser()
    label = str(source)
    if not path.exists():
        path = _from_hub(label, isinstance(source, str), subfolder, options)
    elif not path.is_dir():
        raise CheckpointError(f"{label} is a file; a checkpoint is a directory.")
    if subfolder is not None:
        path, label = _inside(path, label, subfolder)
    return path, label


def _inside(path: Path, label: str, subfolder: str) -> tuple[Path, str]:
    inner = Path(subfolder)
    if inner.is_absolute() or ".." in inner.parts:
        raise OptionError(f"subfolder must be a relative path inside {label}, got {subfolder!r}.")
    if not (path / inner).is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_dir()]
        raise CheckpointError(f"{label} has no directory {subfolder!r}.{did_you_mean(subfolder, names)}")
    return path / inner, f"{label}/{subfolder}"


def _missing(label: str) -> CheckpointError:
    path = Path(label).expanduser()
    parent = path.parent if str(path.parent) else Path(".")
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return CheckpointError(
        f"{label} does not exist; a checkpoint is a directory or a Hub id of the form owner/name."
        f"{did_you_mean(path.name, names)}"
    )


def _from_hub(label: str, is_text: bool, subfolder: str | None, options: HubOptions) -> Path:
    looks_local = label.startswith((".", "/", "~")) or os.sep in label.replace("/", "", 1)
    if not is_text or looks_local or not _HUB_ID.match(label):
        raise _missing(label)
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependency(
            f"{label} is no directory here, and loading it from the Hub needs huggingface_hub. "
            "Install it: pip install huggingface_hub"
        ) from error
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        found = huggingface_hub.snapshot_download(
            label,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            allow_patterns=[prefix + pattern for pattern in _WANTED],
        )
    except Exception as error:  # the Hub client raises its own, its HTTP library's and the system's errors
        raise CheckpointError(_why_not(label, options, error)) from error
    if not Path(found).is_dir():
        where = f" in {prefix}" if prefix else ""
        raise CheckpointError(f"{label} is on the Hub, but has no file of a TWN directory{where}.")
    return Path(found)


def _why_not(label: str, options: HubOptions, error: Exception) -> str:
    from huggingface_hub import constants, errors

    at = f"{label} (revision {options.revision})" if options.revision else label
    start = f"{at} is no directory here and cannot be had from the Hub: "
    offline = getattr(constants, "HF_HUB_OFFLINE", False)
    if isinstance(error, errors.GatedRepoError):
        return f"{start}access is gated. Ask for access on its page, then pass token= or run: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{start}there is no such repository, or it is private. Check the name, or pass token=."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{start}the repository has no such revision."
    if isinstance(error, errors.LocalEntryNotFoundError) or isinstance(error, errors.OfflineModeIsEnabled):
        if offline or options.local_files_only:
            switch = "HF_HUB_OFFLINE is set" if offline else "local_files_only=True was passed"
            return f"{start}{switch} and no copy is in the cache. Download it once online, or pass a directory."
        return f"{start}the Hub is unreachable and no copy is in the cache. Pass a directory, or try again online."
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{start}{type(error).__name__}: {first}"
