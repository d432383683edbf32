"""Retrieval evaluation: is the embedder good, and is its gate genuine?

Reads and writes data in BEIR's folder format, embeds each input once plain and once thoughtful, and derives from that
what never, always and adaptive thinking give, at every threshold, beside an oracle and a random gate. Training is not
its business.
"""

from twn_kernels.evaluation.dataset import Entry, Split, read_split, split_names, write_dataset
from twn_kernels.evaluation.embedding import TwoWays
from twn_kernels.evaluation.results import load_result, save_result
from twn_kernels.evaluation.runner import EvaluationOptions, evaluate

__all__ = [
    "Entry",
    "EvaluationOptions",
    "Split",
    "TwoWays",
    "evaluate",
    "load_result",
    "read_split",
    "save_result",
    "split_names",
    "write_dataset",
]
