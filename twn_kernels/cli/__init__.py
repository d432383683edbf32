"""The console script ``twn-kernels``: arguments in, one report out, exit codes.

Every subcommand imports what it needs when it runs. Reports go to stdout (``--json``: one JSON document), everything
else to stderr; a failure is one line there. Exit codes: 0 done, 1 failed or a check is red, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from twn_kernels import __version__
from twn_kernels.cli import bench, evaluate, shipped, train
from twn_kernels.cli.values import DTYPES, count, fraction, one_of
from twn_kernels.errors import OptionError, TWNError, TWNWarning, did_you_mean
from twn_kernels.settings import DECODE_MODES, IMPLS

__all__ = ["main"]

_PROGRAM = "twn-kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments after the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        return _run(_parse(argv))
    except BrokenPipeError:
        return 1  # whoever read the output has gone; nobody is left to tell
    finally:
        _give_up_stdout()


def _run(arguments: argparse.Namespace) -> int:
    warnings_before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *where: (
        f"{_PROGRAM} {arguments.command}: warning: {' '.join(str(message).split())}\n"
        if issubclass(category, TWNWarning)
        else warnings_before(message, category, *where)
    )
    try:
        code = arguments.run(arguments) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe must show here, not while Python exits
        return code
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(_one_line(error, arguments.command), file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = warnings_before


def _give_up_stdout() -> None:
    """Drop what stdout cannot take: Python would try again while it exits, complain, and change the exit code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        near = did_you_mean(argv[0], _COMMANDS)
        parser.error(f"there is no command {argv[0]!r}; commands: {', '.join(_COMMANDS)}.{near}")
    if argv[:1] == ["bench"] and len(argv) > 1 and not argv[1].startswith("-") and argv[1] not in bench.ACTIONS:
        near = did_you_mean(argv[1], bench.ACTIONS)
        parser.error(f"bench has no action {argv[1]!r}; actions: {', '.join(bench.ACTIONS)}.{near}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and hasattr(arguments, "forwarded"):
        arguments.forwarded = unknown
    elif unknown:
        options = [f"--{name.replace('_', '-')}" for name in vars(arguments)]
        near = did_you_mean(unknown[0].split("=")[0], options)
        words = " ".join(filter(None, (arguments.command, getattr(arguments, "action", None))))
        arguments.parser.error(f"{words} does not take {unknown[0]!r}.{near}")
    arguments.words = argv
    return arguments


def _one_line(error: Exception, command: str) -> str:
    words = " ".join(str(error).split()) or "no message"
    if isinstance(error, TWNError):
        return f"{_PROGRAM} {command}: {type(error).__name__}: {words}"
    more = f"Where it happened: {_PROGRAM} {command} --traceback ..."
    return f"{_PROGRAM} {command}: {type(error).__name__}: {words}{'' if words.endswith('.') else '.'} {more}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Two LoRA adapters on one frozen multimodal model: check, inspect, embed, measure, judge, train.",
        epilog="Exit codes: 0 done, 1 failed or a check is red, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for add in _COMMANDS.values():
        subparser = add(subparsers)
        subparser.set_defaults(parser=subparser)
        subparser.allow_abbrev = False  # a later option must not change what a script's short form means
        subparser.add_argument("--json", action="store_true", help="print the report as one JSON document")
        subparser.add_argument("--traceback", action="store_true", help="show where a failure happened")
    return parser


def _print_json(document) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _add_env(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "env", allow_abbrev=False, help="versions, GPUs, the extension, what can run here: attach it to a bug"
    )
    parser.set_defaults(run=_env)
    return parser


def _env(arguments: argparse.Namespace) -> None:
    from twn_kernels import env

    report = env.collect()
    _print_json(report) if arguments.json else print(env.render(report))


def _add_doctor(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "doctor", allow_abbrev=False, help="check each op against fp64 truth on this machine; 1 if any is red"
    )
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1"; default: the first GPU, else the CPU')
    parser.set_defaults(run=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from twn_kernels import doctor

    checks = []
    for check in doctor.examine(_device(arguments.device)):
        checks.append(check)
        if not arguments.json:
            print(check, flush=True)
    failed = any(check.status == doctor.FAIL for check in checks)
    if arguments.json:
        _print_json({"ok": not failed, "checks": [check.to_dict() for check in checks]})
    else:
        print(doctor.render(checks))
    return int(failed)


def _device(name: str | None):
    from twn_kernels.pipeline.loading import checked_device

    return checked_device(name)


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint, where it is a Hub id")
    parser.add_argument("--subfolder", help="folder inside the checkpoint")
    parser.add_argument("--local-files-only", action="store_true", help="never download; use what is cached")


def _checkpoint_options(arguments: argparse.Namespace) -> dict:
    names = ("revision", "subfolder", "local_files_only")
    return {name: getattr(arguments, name) for name in names}


def _add_inspect(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "inspect", allow_abbrev=False, help="what a TWN directory holds, without loading a base model"
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a directory or a Hub id")
    shipped.add_shipped(parser, "CHECKPOINT")
    _add_checkpoint_options(parser)
    parser.set_defaults(run=_inspect)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    from twn_kernels.checkpoint import inspect_checkpoint

    if arguments.checkpoint is None and arguments.shipped is None:
        arguments.parser.error("inspect needs CHECKPOINT, a directory or a Hub id; or --shipped numbers")
    shipped.take_shipped(arguments)
    report = inspect_checkpoint(arguments.checkpoint, **_checkpoint_options(arguments))
    _print_json(report.to_dict()) if arguments.json else print(report)
    return int(not report.ok)


def _add_convert(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert",
        help="a .pt file or a TWN directory to safetensors; two PEFT adapters to a TWN directory",
        description="Either SOURCE (a .pt file, or a TWN directory that holds some), or --reasoning and --embedding.",
    )
    parser.add_argument("source", nargs="?", help="a file that torch.save wrote, or a TWN directory")
    parser.add_argument("--reasoning", help="PEFT directory of the adapter that thinks")
    parser.add_argument("--embedding", help="PEFT directory of the adapter that embeds")
    parser.add_argument("--gate", help="file with the gate's tensors, for --reasoning and --embedding")
    parser.add_argument("--queries", help="file with the queries, for --reasoning and --embedding")
    parser.add_argument("--config", help="a twn_config.json, for --reasoning and --embedding")
    parser.add_argument("--out", help="file or directory to write; default for SOURCE: beside it")
    parser.set_defaults(run=_convert)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    written = _convert_source(arguments) if arguments.source else _convert_pair(arguments)
    if arguments.json:
        _print_json({"written": [str(path) for path in written]})
    else:
        print("\n".join(f"wrote {path}" for path in written) or "nothing to convert: all is safetensors already")


def _convert_source(arguments: argparse.Namespace) -> list:
    from twn_kernels.checkpoint.converting import convert_directory, convert_file

    extra = [name for name in ("reasoning", "embedding", "gate", "queries", "config") if getattr(arguments, name)]
    if extra:
        raise OptionError(f"convert takes either SOURCE or --reasoning and --embedding, got SOURCE and --{extra[0]}.")
    if os.path.isdir(arguments.source):
        return list(convert_directory(arguments.source, arguments.out))
    return [convert_file(arguments.source, arguments.out)]


def _convert_pair(arguments: argparse.Namespace) -> list:
    from twn_kernels.checkpoint.converting import convert_pair

    missing = [name for name in ("reasoning", "embedding", "out") if not getattr(arguments, name)]
    if missing:
        raise OptionError(f"convert needs SOURCE, or --reasoning, --embedding and --out; --{missing[0]} is missing.")
    pair = {"reasoning": arguments.reasoning, "embedding": arguments.embedding}
    parts = {name: getattr(arguments, name) for name in ("gate", "queries", "config")}
    return [convert_pair(pair, arguments.out, **parts)]


def _add_embed(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "embed",
        help="embed JSONL, text files or a folder of images",
        description="Inputs: FILE.jsonl (a line is a JSON string, which is text, or an object "
        'such as {"text": "...", "image": "cat.png"}; media paths are relative to the file), a text file (one input a '
        "line; with --whole-files the file is one input), an image, or a folder (its images, by name).",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    shipped.add_model(parser)
    parser.add_argument("--out", required=True, help="vectors: .safetensors or .npy; details go beside it as .jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.add_argument("--whole-files", action="store_true", help="make each text file one input")
    parser.add_argument("--think", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--threshold", type=fraction, help="think where the gate's score is at least this, 0 to 1")
    parser.add_argument("--max-think-tokens", type=count, help="cap on a thought")
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--prompt", help="instruction put before every input")
    parser.add_argument("--truncate-dim", type=count, help="keep the first so many dimensions")
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1"; default: the first GPU, else the CPU')
    parser.add_argument("--dtype", type=one_of(DTYPES), default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--impl", type=one_of(IMPLS), default="auto", help="auto, blas, triton, cuda or reference")
    decode_help = "how thoughts are decoded: auto, cuda_graph, static or dynamic; the details say which it was"
    parser.add_argument("--decode", type=one_of(DECODE_MODES), default="auto", help=decode_help)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_checkpoint_options(parser)
    parser.set_defaults(run=_embed)
    return parser


def _embed(arguments: argparse.Namespace) -> None:
    from twn_kernels.cli import embed

    if arguments.shipped is None and None in (arguments.model, arguments.checkpoint):
        arguments.parser.error("embed needs --model and --checkpoint; or --shipped numbers")
    shipped.take_shipped(arguments)
    embed.run(arguments, _device(arguments.device), _checkpoint_options(arguments), _print_json)


def _add_demo(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "demo", allow_abbrev=False, help="the shipped model at work: what thinking is worth, and what it costs"
    )
    parser.add_argument("--directory", help="where pictures and result go; default: out/demo")
    parser.add_argument("--queries", type=count, help="how many to retrieve for, half of them simple; default: 400")
    parser.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from twn_kernels import demo

    options = {name: getattr(arguments, name) for name in ("directory", "queries") if getattr(arguments, name)}
    if not arguments.json:
        demo.run_demo(**options)
        return
    _print_json(demo.run_demo(**options, say=lambda line: print(line, file=sys.stderr)))


_COMMANDS = {
    "env": _add_env,
    "doctor": _add_doctor,
    "inspect": _add_inspect,
    "convert": _add_convert,
    "embed": _add_embed,
    "demo": _add_demo,
    "bench": bench.add,
    "eval": evaluate.add,
    "train": train.add,
}
