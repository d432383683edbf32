"""``twn-kernels eval``: evaluate an embedder on a data folder, show a result again, compare two, make the number task.

Owns the options, what is printed, and what is written where. What is measured and derived is
:mod:`twn_kernels.evaluation`'s.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from twn_kernels.cli.shipped import add_model, name_of, take_shipped
from twn_kernels.cli.values import DTYPES, count, fraction, one_of, whole
from twn_kernels.errors import OptionError, did_you_mean, quoted
from twn_kernels.settings import DECODE_MODES, IMPLS

__all__ = ["add"]

_MODES = ("never", "always", "auto")
_METRICS = ("ndcg", "recall", "mrr", "hit")
# What only the evaluation of a data folder reads, and what a result that is shown again reads too.
_OF_A_RUN = (
    *("model", "model_revision", "checkpoint", "shipped", "split", "think", "threshold", "think_documents"),
    *("time_auto", "k", "metric", "resamples", "max_think_tokens", "batch_size", "query_prompt", "document_prompt"),
    *("device", "dtype", "impl", "decode", "revision", "subfolder", "local_files_only"),
)
_OF_A_RESULT = ("out", "plot", "compare", "overwrite")


def add(subparsers) -> argparse.ArgumentParser:
    """Add ``eval``."""
    parser = subparsers.add_parser(
        "eval",
        allow_abbrev=False,
        help="retrieval with never, always and adaptive thinking, and whether the gate is worth it",
        description="DATA: a folder in BEIR's format (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; entries may name "
        "an image), which needs --model and --checkpoint, or --shipped; or a result.json, which is shown again.",
    )
    parser.add_argument("data", nargs="?", metavar="DATA")
    add_model(parser)
    parser.add_argument("--split", action="append", metavar="NAME", help="may be repeated; default: all")
    parser.add_argument("--think", type=_modes, default=_MODES, help="modes, with commas; default: never,always,auto")
    parser.add_argument("--threshold", type=fraction, help="of auto, 0 to 1; default: the checkpoint's")
    parser.add_argument("--think-documents", action="store_true", help="documents think as queries do")
    parser.add_argument("--time-auto", action="store_true", help="also run auto itself, for its seconds")
    parser.add_argument("--k", type=count, default=10, help="cutoff of nDCG, recall and MRR; default: 10")
    parser.add_argument("--metric", type=one_of(_METRICS), default="ndcg", help="what decides: ndcg, recall, mrr, hit")
    parser.add_argument("--seed", type=whole, default=0, help="of bootstrap and random gate, or of --make-numbers")
    parser.add_argument("--resamples", type=count, default=2000, help="of the bootstrap; default: 2000")
    parser.add_argument("--out", metavar="DIR", help="result.json, and the result in MTEB's and MMEB's formats")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against tokens: .svg, .png or .pdf")
    parser.add_argument("--compare", metavar="RESULT", help="table this run beside the result.json of another")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    _add_embedding(parser)
    parser.add_argument("--make-numbers", metavar="DIR", help="write the number task there and do nothing else")
    parser.add_argument("--queries", type=count, help="of each test split, for --make-numbers; default: 200")
    parser.set_defaults(run=_run)
    return parser


def _add_embedding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-think-tokens", type=count, help="cap on a thought")
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--query-prompt", help="instruction put before every query")
    parser.add_argument("--document-prompt", help="instruction put before every document")
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1"; default: the first GPU, else the CPU')
    parser.add_argument("--dtype", type=one_of(DTYPES), default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--impl", type=one_of(IMPLS), default="auto", help="auto, blas, triton, cuda or reference")
    parser.add_argument("--decode", type=one_of(DECODE_MODES), default="auto", help="how thoughts are decoded")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint, where it is a Hub id")
    parser.add_argument("--subfolder", help="folder inside the checkpoint")
    parser.add_argument("--local-files-only", action="store_true", help="never download; use what is cached")


def _modes(word: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in word.split(","))
    for name in names:
        if name not in _MODES:
            near = did_you_mean(name, _MODES)
            raise argparse.ArgumentTypeError(f'must be of {quoted(_MODES)}, with commas between, got "{word}".{near}')
    return names


def _run(arguments: argparse.Namespace) -> None:
    if arguments.make_numbers is not None:
        _make_numbers(arguments)
        return
    if arguments.queries is not None:
        raise OptionError("--queries belongs to --make-numbers; name splits with --split instead.")
    if arguments.data is None:
        raise OptionError("eval needs DATA, a data folder or a result.json; or --make-numbers DIR.")
    from twn_kernels.evaluation import gating, load_result, plots

    if arguments.plot is not None:
        plots.require_matplotlib(arguments.plot)
    if arguments.compare is not None:
        gating.require_statistics()
    other = None if arguments.compare is None else load_result(arguments.compare)
    if Path(arguments.data).is_file():
        document = _again(arguments)
    else:
        document = _evaluated(arguments)
    written = _written(document, arguments)
    _tell(document, other, written, arguments)


def _make_numbers(arguments: argparse.Namespace) -> None:
    from twn_kernels.evaluation import split_names
    from twn_kernels.evaluation.number_task import make_number_task

    if arguments.data is not None:
        raise OptionError(f'--make-numbers writes data and takes none, got "{arguments.data}".')
    for option in _given(arguments, *_OF_A_RUN, *_OF_A_RESULT):
        raise OptionError(f"{option} has no meaning for --make-numbers, which takes --queries and --seed.")
    folder = make_number_task(arguments.make_numbers, queries=arguments.queries or 200, seed=arguments.seed)
    if arguments.json:
        _print_json({"folder": str(folder), "splits": split_names(folder), "seed": arguments.seed})
    else:
        print(f"wrote {folder}: {', '.join(split_names(folder))}")


def _again(arguments: argparse.Namespace) -> dict:
    from twn_kernels.evaluation import load_result

    for option in _given(arguments, *_OF_A_RUN, "seed"):
        raise OptionError(f'{option} needs a data folder as DATA; "{arguments.data}" is a file, a result to show.')
    return load_result(arguments.data)


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    """The options of these names that are not at their defaults, as they are written."""
    given = [name for name in names if getattr(arguments, name) != arguments.parser.get_default(name)]
    return [f"--{name.replace('_', '-')}" for name in given]


def _evaluated(arguments: argparse.Namespace) -> dict:
    from twn_kernels.evaluation import EvaluationOptions, evaluate, gating, metrics
    from twn_kernels.evaluation.dataset import require_split, split_names

    # Before a model is loaded.
    for name in arguments.split or split_names(arguments.data):
        require_split(arguments.data, name)
    metrics.require_trec_eval()
    gating.require_statistics()
    take_shipped(arguments)
    missing = [name for name in ("model", "checkpoint") if getattr(arguments, name) is None]
    if missing:
        raise OptionError(
            f"eval of a data folder needs --model and --checkpoint, or --shipped; --{missing[0]} is missing."
        )
    _require_free(arguments)
    options = EvaluationOptions(
        splits=None if arguments.split is None else tuple(dict.fromkeys(arguments.split)),
        **{
            name: getattr(arguments, name)
            for name in (
                *("think", "threshold", "think_documents", "k", "metric", "batch_size", "max_think_tokens"),
                *("query_prompt", "document_prompt", "time_auto", "seed", "resamples"),
            )
        },
    )

    def say(line: str) -> None:
        if not arguments.quiet:
            print(f"twn-kernels eval: {line}", file=sys.stderr)

    return evaluate(
        _embedder(arguments),
        arguments.data,
        options,
        names={part: name_of(arguments, part) for part in ("model", "checkpoint")},
        command=shlex.join(["twn-kernels", *arguments.words]),
        say=say,
        show_progress_bar=not arguments.quiet,
    )


def _require_free(arguments: argparse.Namespace) -> None:
    """What would be replaced is found before the model runs, not after."""
    files = [] if arguments.out is None else [Path(arguments.out) / "result.json"]
    files += [] if arguments.plot is None else [Path(arguments.plot)]
    for path in files:
        if path.exists() and not arguments.overwrite:
            raise OptionError(f'"{path}" exists. Name another place, or replace it with --overwrite.')
    if arguments.out is not None and Path(arguments.out).is_file():
        raise OptionError(f'--out: "{arguments.out}" is a file. Name a folder.')


def _embedder(arguments: argparse.Namespace):
    from twn_kernels.checkpoint import load_checkpoint
    from twn_kernels.pipeline import TWNEmbedder
    from twn_kernels.pipeline.loading import checked_device

    if arguments.quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    hub = {name: getattr(arguments, name) for name in ("revision", "subfolder", "local_files_only")}
    return TWNEmbedder.from_pretrained(
        arguments.model,
        load_checkpoint(arguments.checkpoint, **hub),
        dtype=None if arguments.dtype == "auto" else arguments.dtype,
        device=checked_device(arguments.device),
        impl=arguments.impl,
        decode=arguments.decode,
        revision=arguments.model_revision,
        local_files_only=arguments.local_files_only,
    )


def _written(document: dict, arguments: argparse.Namespace) -> list[Path]:
    from twn_kernels.evaluation import formats, plots, save_result

    _require_free(arguments)
    written = []
    if arguments.out is not None:
        written.append(save_result(document, Path(arguments.out) / "result.json"))
        written += formats.write_formats(document, arguments.out)
    if arguments.plot is not None:
        written.append(plots.draw(document, arguments.plot))
    return written


def _tell(document: dict, other: dict | None, written: list[Path], arguments: argparse.Namespace) -> None:
    from twn_kernels.evaluation import tables

    rows = None if other is None else tables.compare(document, other)
    if arguments.json:
        report = {"result": document, "written": [str(path) for path in written]}
        _print_json(report if rows is None else report | {"comparison": rows})
        return
    print(tables.render(document))
    if rows is not None:
        print("\n" + tables.render_comparison(rows, arguments.compare))
    if written:
        print(f"\nwrote {written[0]}" + f" and {len(written) - 1} more" * (len(written) > 1))


def _print_json(document: dict) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))
