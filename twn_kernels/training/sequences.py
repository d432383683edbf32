"""How prompt, thought and queries lie in one training sequence: positions, masks and parts.

A row is the prompt (padded on the left), its thought (padded on the right), the queries of the plain embedding and the
queries of the thoughtful one. Both sets of queries continue the text where inference would put them, and neither sees
the other; so one forward gives what the pipeline computes in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twn_kernels.errors import ShapeError
from twn_kernels.pipeline.backbone import Backbone, Prompt
from twn_kernels.pipeline.inputs import EncodedBatch

__all__ = ["Rows", "Sequences", "lay_out"]


@dataclass
class Rows:
    """Inputs of one forward.

    Attributes:
        batch: the encoded prompts.
        thoughts: token ids of each row's thought, what closes it included; None: no row has one. An empty list is a row
            without.
    """

    batch: EncodedBatch
    thoughts: Sequence[Sequence[int]] | None = None


@dataclass
class Sequences:
    """Rows laid out; T prompt tokens, L of thought (0 without thoughts), N queries.

    Attributes:
        prompt: as the backbone reads it.
        thought_ids: int64 ``[batch, L]``: what opens a thought, and the thought.
        labels: int64 ``[batch, L]``: the thought's own ids, -100 elsewhere.
        positions: ``[batch, S]`` or ``[3, batch, S]`` over S = T + L + N, and N more with thoughts.
        places: int64 ``[batch, S]``: tokens of its text before each token, which is what a sliding window counts.
        seen: bool ``[batch, S, S]``: which tokens each token attends to.
    """

    prompt: Prompt
    thought_ids: Tensor
    labels: Tensor
    positions: Tensor
    places: Tensor
    seen: Tensor

    @property
    def prompt_end(self) -> int:
        """Where the prompts end."""
        return self.prompt.ids.shape[1]

    @property
    def thought_end(self) -> int:
        """Where the thoughts end and the queries begin."""
        return self.prompt_end + self.thought_ids.shape[1]

    def masks(self, config, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """``seen`` as layers take it, additive ``[batch, 1, S, S]``: one for all, or one by kind where kinds differ."""
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        if not any("sliding" in kind for kind in kinds):
            return _additive(self.seen, dtype)
        near = self.places[:, :, None] - self.places[:, None, :] < config.sliding_window
        return {kind: _additive(self.seen & near if "sliding" in kind else self.seen, dtype) for kind in kinds}


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # A boolean mask would be turned into this one in every layer.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def lay_out(backbone: Backbone, rows: Rows, opening: Sequence[int], num_queries: int) -> Sequences:
    """Lay rows out.

    Args:
        backbone: of the model; its device is where everything goes.
        rows: prompts and thoughts.
        opening: token ids that the pipeline itself writes before a thought.
        num_queries: of one embedding.

    Raises:
        ShapeError: there is not one thought for each row.
    """
    if rows.thoughts is not None and len(rows.thoughts) != len(rows.batch):
        raise ShapeError(
            f"thoughts must have one list of ids for each of {len(rows.batch)} rows (an empty one where there is "
            f"none), got {len(rows.thoughts)}."
        )
    prompt = backbone.prompt(rows.batch.tensors)
    thoughts = [[*opening, *thought] if thought else [] for thought in rows.thoughts or ()]
    length = max(map(len, thoughts), default=0)
    ids = prompt.ids.new_full((len(rows.batch), length), rows.batch.pad_id)
    labels = torch.full_like(ids, -100)
    for row, thought in enumerate(thoughts):
        ids[row, : len(thought)] = torch.tensor(thought, dtype=torch.long)
        labels[row, len(opening) : len(thought)] = ids[row, len(opening) : len(thought)]
    lengths = prompt.next_position.new_tensor([len(thought) for thought in thoughts] or [0] * len(rows.batch))
    # Of what follows the prompt: where each piece begins after it, and how long it is.
    pieces = [(torch.zeros_like(lengths), length), (torch.zeros_like(lengths), num_queries)]
    pieces += [(lengths, num_queries)] if length else []
    after = [backbone.text_positions(prompt.next_position + start, count) for start, count in pieces]
    positions = torch.cat([prompt.positions, *after], dim=-1)
    counted = [(prompt.mask.sum(1) + start)[:, None] + torch.arange(n, device=ids.device) for start, n in pieces]
    places = torch.cat([prompt.mask.cumsum(1) - 1, *counted], dim=1)
    seen = _seen(prompt.mask.bool(), lengths, length, num_queries, sets=len(pieces) - 1)
    return Sequences(prompt, ids, labels, positions, places, seen)


def _seen(prompt_mask: Tensor, lengths: Tensor, length: int, num_queries: int, sets: int) -> Tensor:
    """bool ``[batch, S, S]``; a padding token sees itself alone, so that no row of the softmax is empty."""
    batch, tokens = prompt_mask.shape
    written = torch.arange(length, device=lengths.device) < lengths[:, None]
    queries = prompt_mask.new_ones(batch, sets * num_queries)
    valid = torch.cat([prompt_mask, written, queries], dim=1)
    size = valid.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=valid.device).tril()
    plain = slice(tokens + length, tokens + length + num_queries)
    causal[plain, tokens : tokens + length] = False
    causal[plain.stop :, plain] = False
    seen = causal & valid[:, None, :]
    return seen | torch.eye(size, dtype=torch.bool, device=valid.device)
