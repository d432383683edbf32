"""``twn-kernels train``: a configuration in, a TWN directory out.

Owns the options and what is printed; training is :mod:`twn_kernels.training`'s.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from twn_kernels.errors import MissingDependency, OptionError, did_you_mean

__all__ = ["add"]

_STAGES = ("base", "joint", "policy", "gate")
_NEEDED = ("transformers", "accelerate", "sklearn", "PIL")


def add(subparsers) -> argparse.ArgumentParser:
    """Add ``train``."""
    parser = subparsers.add_parser(
        "train",
        allow_abbrev=False,
        help="train two adapters, queries and a gate on a frozen backbone",
        description='CONFIG: a TOML file, or "numbers": the configuration of the shipped model. Stages: base (where '
        "the configuration names no backbone), joint, policy, gate. DIR gets a folder a stage with log.jsonl, log.svg "
        "and states, run.json, and twn/, the result.",
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the run; new, unless --resume is given")
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run in DIR stopped; begin one where there is none"
    )
    parser.add_argument("--until", choices=_STAGES, help="stop after this stage")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value, such as joint.steps=100"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own choice")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--show-config", action="store_true", help="print the whole configuration and stop")
    parser.set_defaults(run=_run)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from twn_kernels.training.config import load_config

    config = load_config(_file(arguments.config), dict(map(_change, arguments.set)))
    if arguments.show_config:
        print(json.dumps(config.as_dict(), indent=2))
        return
    _require_libraries()
    if arguments.threads is not None:
        import torch

        if arguments.threads < 1:
            raise OptionError(f"--threads must be at least 1, got {arguments.threads}.")
        torch.set_num_threads(arguments.threads)
    from transformers.utils.logging import disable_progress_bar

    from twn_kernels.training.run import RUN_FILE, train

    disable_progress_bar()
    command = shlex.join(["twn-kernels", *arguments.words])
    out = train(
        *(config, arguments.out), resume=arguments.resume, until=arguments.until, command=command, say=_say(arguments)
    )
    if arguments.json:
        print((Path(arguments.out) / RUN_FILE).read_text(encoding="utf-8"), end="")
    else:
        print(f"wrote {out}")


def _file(config: str) -> Path:
    """The file that CONFIG names."""
    path = Path(config)
    if config == "numbers" and not path.is_file():
        return Path(__file__).parents[1] / "training" / "numbers.toml"
    if not path.exists():
        raise OptionError(
            f'CONFIG must be a TOML file or "numbers", got "{config}", which is no file here.'
            f"{did_you_mean(config, ['numbers'])}"
        )
    return path


def _say(arguments: argparse.Namespace):
    def say(line: str) -> None:
        if not arguments.quiet:
            print(f"twn-kernels train: {line}", file=sys.stderr, flush=True)

    return say


def _change(word: str) -> tuple[str, Any]:
    """``joint.steps=100``: the value is read as TOML would, and as a string where it is none."""
    name, equals, value = word.partition("=")
    if not equals or not name.strip():
        raise OptionError(f'--set takes KEY=VALUE, such as joint.steps=100, got "{word}".')
    for read in (int, float):
        try:
            return name.strip(), read(value)
        except ValueError:
            continue
    words = {"true": True, "false": False}
    if value.startswith("["):
        try:
            return name.strip(), json.loads(value)
        except ValueError as error:
            raise OptionError(f"--set {name.strip()}: {value} is no list, such as [64, 32].") from error
    return name.strip(), words.get(value.lower(), value.strip("\"'"))


def _require_libraries() -> None:
    absent = [name for name in _NEEDED if not _there(name)]
    if absent:
        raise MissingDependency(
            f'training needs {", ".join(absent)}, not installed here. Run: pip install "twn_kernels[train]"'
        )


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # sys.modules holds None in its place
        return False
