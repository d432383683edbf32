"""Each input embedded twice, once plain and once thoughtful, so that any gate can be judged without another run.

Owns the two passes, their seconds, and the errors that an input can cause. How an input thinks is the pipeline's.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twn_kernels.errors import InputError, OptionError
from twn_kernels.evaluation.dataset import Entry

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TwoWays", "embed_both_ways", "encode_entries", "errors_naming", "timed_auto"]


@dataclass(frozen=True)
class TwoWays:
    """Vectors of some inputs, both ways.

    Attributes:
        plain: float32 ``[inputs, width]``.
        thoughtful: the same for inputs that were sent to think; the plain vector where the thought was not closed.
            None where only the plain pass ran.
        gate_scores: float64 ``[inputs]``, of the plain pass; None where the checkpoint has no gate.
        tokens: int64 ``[inputs]``: written by the thoughtful pass, also for thoughts that were not closed.
        fell_back: bool ``[inputs]``: the thought was not closed.
        seconds_plain, seconds_thoughtful: of the two passes; the thoughtful one reads the input again.
    """

    plain: np.ndarray
    thoughtful: np.ndarray | None
    gate_scores: np.ndarray | None
    tokens: np.ndarray
    fell_back: np.ndarray
    seconds_plain: float
    seconds_thoughtful: float

    def vectors(self, thinks: np.ndarray) -> np.ndarray:
        """The vectors where those inputs think that ``thinks`` (bool ``[inputs]``) says."""
        import numpy as np

        if self.thoughtful is None:
            if thinks.any():
                raise OptionError("these inputs were embedded plainly alone; embed them with thoughtful=True.")
            return self.plain
        return np.where(thinks[:, None], self.thoughtful, self.plain)


def embed_both_ways(
    embedder: Any, entries: Sequence[Entry], role: str, *, thoughtful: bool = True, **options: Any
) -> TwoWays:
    """Embed entries plainly and, where asked, thoughtfully.

    Args:
        embedder: a :class:`~twn_kernels.TWNEmbedder`, or anything with its ``encode_query`` and ``encode_document``.
        entries: what to embed.
        role: ``"query"`` or ``"document"``.
        thoughtful: whether to run the second pass.
        options: of ``encode``, the same for both passes.

    Raises:
        InputError: an entry cannot be embedded; the message names it.
    """
    import numpy as np

    plain, details, seconds_plain = encode_entries(embedder, entries, role, think="never", **options)
    scores = [detail.gate_score for detail in details]
    gate_scores = None if any(score is None for score in scores) else np.array(scores, dtype=np.float64)
    if not thoughtful:
        nothing = np.zeros(len(entries), dtype=np.int64)
        return TwoWays(plain, None, gate_scores, nothing, nothing.astype(bool), seconds_plain, 0.0)
    vectors, details, seconds = encode_entries(embedder, entries, role, think="always", **options)
    return TwoWays(
        plain,
        vectors,
        gate_scores,
        np.array([detail.tokens for detail in details], dtype=np.int64),
        np.array([detail.fallback is not None for detail in details]),
        seconds_plain,
        seconds,
    )


def timed_auto(embedder: Any, entries: Sequence[Entry], role: str, threshold: float, **options: Any) -> float:
    """Seconds that the embedder itself takes when its gate decides."""
    return encode_entries(embedder, entries, role, think="auto", think_threshold=threshold, **options)[2]


def encode_entries(
    embedder: Any, entries: Sequence[Entry], role: str, **options: Any
) -> tuple[np.ndarray, list, float]:
    """Embed entries in one pass.

    Args:
        embedder, entries, role: as in :func:`embed_both_ways`.
        options: of ``encode``.

    Returns:
        vectors, details and seconds.

    Raises:
        InputError: an entry cannot be embedded; the message names it.
    """
    encode = embedder.encode_query if role == "query" else embedder.encode_document
    start = time.perf_counter()
    with errors_naming(entries, role):
        vectors, details = encode([entry.input for entry in entries], return_details=True, **options)
    return vectors, details, time.perf_counter() - start


@contextlib.contextmanager
def errors_naming(entries: Sequence[Entry], role: str) -> Iterator[None]:
    """The embedder counts inputs; who wrote the data wants the id of the entry in the error."""
    try:
        yield
    except InputError as error:
        found = re.match(r"input (\d+): ", str(error))
        if found is None:
            raise
        raise InputError(f'{role} "{entries[int(found[1])].id}": {str(error)[found.end() :]}') from error
