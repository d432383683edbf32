"""``--shipped NAME``: the model that comes with the package, where a command would name one of the user's.

Owns the option, what it replaces, and what it cannot stand beside.
"""

from __future__ import annotations

import argparse

from twn_kernels.cli.values import one_of
from twn_kernels.errors import OptionError

__all__ = ["add_model", "add_shipped", "name_of", "take_shipped"]

_NAMES = ("numbers",)
_REPLACED = ("model", "model_revision", "checkpoint", "revision", "subfolder")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--model-revision``, ``--checkpoint`` and ``--shipped``."""
    parser.add_argument("--model", help="base model: a directory or a Hub id")
    parser.add_argument("--model-revision", help="branch, tag or commit of the base model, where it is a Hub id")
    parser.add_argument("--checkpoint", help="TWN directory or Hub id")
    add_shipped(parser, "--model and --checkpoint")


def add_shipped(parser: argparse.ArgumentParser, instead: str) -> None:
    """Add ``--shipped``, which stands for what ``instead`` says."""
    told = f'the model that comes with the package, instead of {instead}: "numbers" (small; see twn-kernels demo)'
    parser.add_argument("--shipped", metavar="NAME", type=one_of(_NAMES), help=told)


def take_shipped(arguments: argparse.Namespace) -> None:
    """Put the shipped model's directories where ``--model`` and ``--checkpoint`` put theirs.

    Raises:
        OptionError: an option that names another model was given as well.
        CheckpointError: this copy of the package holds no such model.
    """
    if arguments.shipped is None:
        return
    given = [name for name in _REPLACED if getattr(arguments, name, None) is not None]
    if given:
        option = given[0].replace("_", "-")
        both = "CHECKPOINT" if arguments.command == "inspect" and option == "checkpoint" else f"--{option}"
        raise OptionError(f"--shipped {arguments.shipped} names the model, and {both} another. Leave out one of them.")
    from twn_kernels.shipped import number_model

    model = number_model()
    arguments.model, arguments.checkpoint = str(model.base), str(model.twn)


def name_of(arguments: argparse.Namespace, part: str) -> str:
    """What a result calls ``"model"`` or ``"checkpoint"``: as given, or the shipped model's name."""
    return getattr(arguments, part) if arguments.shipped is None else f"{arguments.shipped} (shipped)"
