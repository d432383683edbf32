"""The decode loop: write thoughts for a batch under ``reasoning``, and hand each row over the moment it ends.

Rows end on their own: a stop closes the thought, the cap or an early end-of-sequence breaks it. Ended rows leave the
batch, so the remaining ones decode in a smaller one. Knows nothing of embeddings, nor how a step is run: a
:class:`Running` grows its cache, a :class:`StaticRunning` steps on buffers that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import twn_kernels.patching as patching
from twn_kernels.pipeline.backbone import Backbone, rows_of
from twn_kernels.pipeline.decode_graph import DecodeGraph
from twn_kernels.pipeline.static_cache import as_index
from twn_kernels.settings import REASONING

__all__ = ["Running", "StaticRunning", "StopRule", "Thought", "think"]


@dataclass
class Thought:
    """What one row wrote.

    Attributes:
        ids: sampled token ids, the closing ones included.
        text: what was written before the stop.
        broken: why the thought cannot be used, or None.
        decode: how it was decoded: ``"dynamic"``, ``"static"`` or ``"cuda_graph"``.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    broken: str | None = None
    decode: str = "dynamic"


@dataclass
class Running:
    """A batch on its way: everything of its rows that later steps need.

    Attributes:
        rows: which inputs of the original batch these are.
        cache: holds all of their tokens so far.
        mask: ``[rows, cached]``.
        next_position: ``[rows]``.
        logits: fp32 ``[rows, vocabulary]`` for the next token.
    """

    rows: list[int]
    cache: object
    mask: Tensor
    next_position: Tensor
    logits: Tensor

    mode = "dynamic"

    def select(self, keep: Sequence[int]) -> Running:
        """These rows alone, by place in this batch; the tensors are copies."""
        index = as_index(keep, self.mask.device)
        return Running(
            [self.rows[i] for i in keep],
            rows_of(self.cache, index),
            self.mask[index],
            self.next_position[index],
            self.logits[index],
        )

    def keep(self, places: Sequence[int]) -> Running:
        """The batch of the rows that go on; this one is consumed."""
        return self.select(places) if places else Running([], None, *[self.mask[:0]] * 3)

    def advance(self, backbone: Backbone, ids: Tensor) -> None:
        """Extend every row by its tokens under ``reasoning``; in place.

        Args:
            backbone: of the patched model.
            ids: int64 ``[rows, count]``.
        """
        self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], dim=1)
        with patching.route(backbone.model, REASONING):
            hidden = backbone.continue_(backbone.embeddings(ids), self.mask, self.next_position, self.cache)
        self.next_position = self.next_position + ids.shape[1]
        self.logits = backbone.logits(hidden[:, -1])


class StaticRunning:
    """The same batch on the buffers of a :class:`DecodeGraph`; what it was before is consumed.

    Args:
        running: the batch.
        graph: its buffers are taken over.
        room: steps that a row may still take.
    """

    def __init__(self, running: Running, graph: DecodeGraph, room: int) -> None:
        graph.load(running.cache, running.mask, running.next_position, room=room, routes=REASONING)
        self.rows, self.logits, self.graph = running.rows, running.logits, graph
        running.cache = None

    @property
    def mode(self) -> str:
        return "cuda_graph" if self.graph.capture else "static"

    def select(self, keep: Sequence[int]) -> Running:
        """These rows alone, by place in this batch, on a cache of their own that holds nothing else."""
        rows = [self.rows[place] for place in keep]
        return Running(rows, *self.graph.take(keep), self.logits[as_index(keep, self.logits.device)])

    def keep(self, places: Sequence[int]) -> StaticRunning:
        """The batch of the rows that go on, on the same buffers; nothing is copied until the batch has halved."""
        self.rows = [self.rows[place] for place in places]
        self.graph.keep(places)
        return self

    def advance(self, backbone: Backbone, ids: Tensor) -> None:
        """Extend every row by one token; ``ids`` ``[rows, 1]``."""
        self.logits = self.graph.step(ids[:, 0])


class StopRule:
    """Recognises the end of a thought in token ids, also where a stop string spans tokens.

    Args:
        decode: token ids to the text that stops are looked for in, special tokens included.
        clean: token ids to the text that is reported.
        stops: strings and token ids that close a thought.
        end_of_sequence: ids that end the text; without a stop before it, the format is broken.
        limit: tokens a thought may have.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        clean: Callable[[list[int]], str],
        stops: Sequence[str | int],
        end_of_sequence: Sequence[int],
        limit: int,
    ) -> None:
        self.decode, self.clean, self.limit = decode, clean, limit
        self.strings = tuple(stop for stop in stops if isinstance(stop, str))
        self.ids = {stop for stop in stops if isinstance(stop, int)}
        self.end_of_sequence = set(end_of_sequence) - self.ids
        # A stop that has just been completed lies within as many tokens as it has bytes; the rest is room for a
        # tokenizer that decodes the first token of a text differently.
        self._window = max((len(stop.encode()) for stop in self.strings), default=0) + 4

    def ended(self, thought: Thought) -> bool:
        """Whether the thought is over after its last token; fills in its text and what is wrong with it."""
        last = thought.ids[-1]
        tail = self.decode(thought.ids[-self._window :])
        closed = last in self.ids or any(stop in tail for stop in self.strings)
        if not closed and last in self.end_of_sequence:
            thought.broken = "the text ended before the thought was closed"
        elif not closed and len(thought.ids) >= self.limit:
            thought.broken = f"the thought was not closed within {self.limit} tokens"
        if closed or thought.broken is not None:
            thought.text = self._written(thought.ids)
            return True
        return False

    def _written(self, ids: list[int]) -> str:
        """The text before whatever ended it."""
        if ids[-1] in self.ids or ids[-1] in self.end_of_sequence:
            return self.clean(ids[:-1])
        whole = self.decode(ids)
        found = [place for stop in self.strings if (place := whole.find(stop)) >= 0]
        if not found:
            return self.clean(ids)
        # Cut by tokens, so that special tokens before the stop are left out, then by what the last of them began.
        kept = next(count for count in range(len(ids)) if len(self.decode(ids[: count + 1])) > min(found))
        return self.clean(ids[:kept]) + whole[len(self.decode(ids[:kept])) : min(found)]


@torch.no_grad()
def think(
    backbone: Backbone,
    running: Running | StaticRunning,
    rule: StopRule,
    choose: Callable[[Tensor], Tensor],
    finished: Callable[[Running, list[int]], None],
    progress: Callable[[int], None],
) -> dict[int, Thought]:
    """Decode every row of ``running`` until it ends.

    Args:
        backbone: of the patched model.
        running: the batch; consumed.
        rule: when a row ends.
        choose: ``[rows, vocabulary]`` logits to ``[rows]`` token ids.
        finished: called with the rows that have just closed their thoughts, and with their last tokens, which their
            cache does not hold yet. Broken rows are dropped without a call.
        progress: called with the number of rows that have ended so far.

    Returns:
        the thought of each row of ``running.rows``.
    """
    thoughts = {row: Thought() for row in running.rows}
    total = len(thoughts)
    while running.rows:
        chosen = choose(running.logits)
        tokens = chosen.tolist()
        closed, going = [], []
        for place, (row, token) in enumerate(zip(running.rows, tokens, strict=True)):
            thoughts[row].ids.append(token)
            thoughts[row].decode = running.mode
            if not rule.ended(thoughts[row]):
                going.append(place)
            elif thoughts[row].broken is None:
                closed.append(place)
        if closed:
            finished(running.select(closed), [tokens[place] for place in closed])
        if len(going) < len(running.rows):
            running = running.keep(going)
            chosen = chosen[as_index(going, chosen.device)]
            progress(total - len(going))
        if going:
            running.advance(backbone, chosen[:, None])
    return thoughts


def advance(backbone: Backbone, running: Running, tokens: list[list[int]]) -> None:
    """Extend every row by its tokens (equally many) under ``reasoning``; in place."""
    running.advance(backbone, torch.tensor(tokens, dtype=torch.long, device=running.mask.device))
