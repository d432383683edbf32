"""Which directories the writers of this package may write into: empty ones, and those that they wrote before."""

from __future__ import annotations

from pathlib import Path

from twn_kernels.errors import OptionError, quoted

__all__ = ["check_writable", "claim", "mark"]

# In a README, the one file that a model, an adapter and a TWN directory may hold beside their own.
_NOTE = "Untrained; written by twn_kernels.testing, which replaces these files when asked to write them again."
_CARD = "---\ntags:\n- untrained\n---\n\n"  # the hub client complains about a README without
_READMES = ("README.md", "reasoning/README.md")


def check_writable(directory: str | Path) -> Path:
    """The directory as a path, untouched.

    Raises:
        OptionError: it is a file or lies under one, or it holds files and was not written by this package.
    """
    path = Path(directory)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise OptionError(f'directory "{path}" cannot be made: "{place}" is a file. Name another directory.')
    if path.is_dir() and not _is_ours(path):
        held = sorted(entry.name for entry in path.iterdir())
        if held:
            named = quoted(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
            raise OptionError(
                f'directory "{path}" holds files that twn_kernels did not write ({named}), and would be overwritten. '
                "Name an empty or a new directory."
            )
    return path


def claim(directory: str | Path) -> Path:
    """Make the directory; raises as :func:`check_writable` does. :func:`mark` says whose it is."""
    path = check_writable(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f'directory "{path}" cannot be written: {error.strerror or error}.') from error
    return path


def mark(directory: Path) -> None:
    """Write the note by which :func:`check_writable` knows this package's own directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(f"{_CARD}{_NOTE}\n", encoding="utf-8")


def _is_ours(path: Path) -> bool:
    readmes = [path / name for name in _READMES]
    return any(readme.is_file() and _NOTE in readme.read_text("utf-8", errors="replace") for readme in readmes)
