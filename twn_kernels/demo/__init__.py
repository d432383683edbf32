"""The shipped model at work, in a minute or two: what thinking is worth, what it costs, and that the numbers agree.

Owns the order of the sections, where files go and what must be installed. Every figure printed is measured in the same
run.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from twn_kernels.demo import agreement, cost, pictures, retrieval
from twn_kernels.demo.setting import Setting
from twn_kernels.errors import MissingDependency, OptionError, quoted
from twn_kernels.shipped import ShippedModel, number_model

__all__ = ["run_demo"]

_DIRECTORY = "out/demo"
_RESULT, _PLOT, _SHEET = _FILES = ("result.json", "quality.png", "queries.png")
_QUERIES = 400
# Modules that the demo imports beyond torch, and what pip calls them.
_NEEDED = {
    "transformers": "transformers",
    "peft": "peft",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "pytrec_eval": "pytrec_eval-terrier",
}


def run_demo(
    directory: str | Path = _DIRECTORY,
    say: Callable[[str], None] = print,
    *,
    queries: int = _QUERIES,
    model: ShippedModel | None = None,
) -> dict:
    """Retrieve with the shipped model, show what it thought and found, and compare with PEFT.

    Args:
        directory: gets ``result.json`` (an evaluation's result), ``quality.png`` and ``queries.png``; those of an
            earlier demo are replaced.
        say: receives each line of the report.
        queries: how many to retrieve for; half of them are simple, half thoughtful.
        model: of the number task; None: the shipped one.

    Returns:
        The measured figures, ready for JSON.

    Raises:
        MissingDependency: a library that the demo compares with, judges by or draws with is not installed.
        CheckpointError: this copy of the package holds no model.
        OptionError: ``directory`` is a file or holds files of somebody else; ``queries`` is below 2; ``model`` thinks
            in a way that the comparison with PEFT does not know.
    """
    _require_libraries()
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 2:
        raise OptionError(
            f"queries must be a whole number of at least 2, a simple and a thoughtful one, got {queries!r}."
        )
    names = dict.fromkeys(("model", "checkpoint"), "numbers (shipped)") if model is None else None
    out = _checked(Path(directory))
    model = number_model() if model is None else model
    _make(out)
    with tempfile.TemporaryDirectory(prefix="twn-demo-") as temporary, _without_progress_bars():
        start = time.perf_counter()
        setting = Setting.load(model, Path(temporary) / "numbers", queries, names)
        figures = _sections(setting, out, say)
        figures["seconds"] = round(time.perf_counter() - start, 1)
    say(f"\ndone in {figures['seconds']} s on {_device_line()}")
    return figures


def _sections(setting: Setting, out: Path, say: Callable[[str], None]) -> dict:
    from twn_kernels.evaluation import plots, save_result

    document = retrieval.retrieve(setting, say)
    shown = retrieval.examples(setting, document, say)
    figures = {
        "retrieval": retrieval.figures(document),
        "examples": [one.figures() for one in shown],
        "cost": cost.compare_with_peft(setting, say),
        "peft": agreement.against_peft(setting, say),
        "patch": agreement.patch_cost(setting, say),
    }
    written = [
        save_result(document, out / _RESULT),
        plots.draw(document, out / _PLOT),
        pictures.contact_sheet(shown, out / _SHEET),
    ]
    told = ("twn-kernels eval shows it again", "quality against tokens thought", "the queries of section 2")
    say("\n6. written")
    for path, words in zip(written, told, strict=True):
        say(f"   {path}  ({words})")
    return figures | {"files": [str(path) for path in written]}


def _require_libraries() -> None:
    absent = []
    for module, package in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(package)
    if absent:
        raise MissingDependency(
            f"the demo draws digits, judges rankings and compares with PEFT; not installed: {', '.join(absent)}. "
            f"Run: pip install {' '.join(absent)}"
        )


def _checked(directory: Path) -> Path:
    """The directory, untouched: nothing of somebody else may be in it."""
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise OptionError(f'directory "{directory}" cannot be made: "{place}" is a file. Name another directory.')
    others = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in others if name not in _FILES]
    if others:
        named = quoted(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise OptionError(
            f'directory "{directory}" holds files that twn_kernels did not write ({named}). '
            "Name an empty or a new directory."
        )
    return directory


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f'directory "{directory}" cannot be made: {error.strerror or error}. Name another directory.'
        ) from error


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device_line() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"a CPU with {count} thread{'s' * (count > 1)}"
