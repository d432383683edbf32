"""One forward that trains both adapters: thought under ``reasoning``, queries under ``embedding``, gradients apart.

Owns the two execution graphs as training sees them. ``shared_kv`` is one sequence a row, its adapters split by
position, detached at their interface. ``reencode`` is two rows an input, one for each adapter, in the same mixed batch;
text alone passes between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twn_kernels.patching as patching
from twn_kernels.checkpoint import TWNConfig
from twn_kernels.modules import QueryBank
from twn_kernels.ops import pool_queries
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.settings import EMBEDDING, REASONING, ROUTE_BITS
from twn_kernels.training.interface import Part, detached_attention, require_sdpa
from twn_kernels.training.sequences import Rows, Sequences, lay_out

__all__ = ["Roles", "Trainee", "Trained"]


@dataclass(frozen=True)
class Roles:
    """Which adapter does what, and whether gradients cross between adapters.

    Attributes:
        thought, queries: adapters of the two jobs; the same name is one adapter for both.
        detach: cut the gradient between tokens of different adapters.
    """

    thought: str = REASONING
    queries: str = EMBEDDING
    detach: bool = True


@dataclass
class Trained:
    """What a forward gives to losses.

    Attributes:
        plain, thoughtful: ``[batch, num_queries, hidden]`` query states; ``thoughtful`` is None without thoughts, and
            equals ``plain`` in a row that has none.
        prompt_state: ``[batch, hidden]`` of the last prompt token.
        thought_states: ``[tokens, hidden]``: the states that predict the thoughts' tokens, of all rows in order.
        thought_labels: int64 ``[tokens]``: those tokens.
        thought_rows: int64 ``[tokens]``: the row that each belongs to.
    """

    plain: Tensor
    thoughtful: Tensor | None
    prompt_state: Tensor
    thought_states: Tensor
    thought_labels: Tensor
    thought_rows: Tensor


class Trainee(nn.Module):
    """A patched model and its queries, as a trainer sees them: the adapters and the queries are all that learns.

    Args:
        model: patched; its base stays frozen.
        queries: ``[num_queries, hidden]``.
        method: the graph, the prompt's adapter and the pooling are read.
        opening: token ids that open a thought.
        roles: who does what.

    Raises:
        OptionError: the model was loaded with an attention other than ``"sdpa"``.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Tensor,
        method: TWNConfig,
        opening: Sequence[int],
        roles: Roles = Roles(),
    ) -> None:
        super().__init__()
        self.model, self.method, self.opening, self.roles = model, method, list(opening), roles
        self.bank = QueryBank(queries)
        self.backbone = Backbone(model)
        require_sdpa(self.backbone.config)
        self.learn((roles.thought, roles.queries), queries=True)

    def learn(self, adapters: Sequence[str], *, queries: bool) -> None:
        """Let these adapters learn, and the queries where asked; everything else is frozen."""
        for name, parameter in self.model.named_parameters():
            kind, adapter = ["", *name.removesuffix(".weight").split(".")][-2:]  # PEFT's are modules with a weight
            parameter.requires_grad_(kind in ("lora_A", "lora_B") and adapter in adapters)
        self.bank.requires_grad_(queries)

    def train(self, mode: bool = True) -> Trainee:
        """Stay in evaluation mode: a chunk that runs twice must give the same vectors."""
        return super().train(False)

    def forward(self, rows: Rows) -> Trained:
        """Run rows through the graph."""
        sequences = lay_out(self.backbone, rows, self.opening, self.bank.num_queries)
        if self.method.graph == "shared_kv":
            return self._shared(sequences)
        return self._reencoded(rows, sequences)

    def pooled(self, states: Tensor) -> Tensor:
        """Unit vectors ``[batch, hidden]`` of query states."""
        return pool_queries(states, pooling=self.method.pooling, normalize=True)

    def thought_loss(self, out: Trained) -> Tensor:
        """Sum of the next-token losses over the thoughts' tokens."""
        if not len(out.thought_labels):
            return out.plain.sum() * 0.0
        return F.cross_entropy(self.backbone.logits(out.thought_states), out.thought_labels, reduction="sum")

    def _shared(self, sequences: Sequences) -> Trained:
        roles, prompt_adapter = self.roles, self.method.prefill_adapter
        if roles.thought == roles.queries and prompt_adapter is not None:  # one adapter under both names
            prompt_adapter = roles.thought
        embeds = self._embeds(sequences)
        parts = [
            Part(sequences.prompt_end, prompt_adapter),
            Part(sequences.thought_end, roles.thought),
            Part(embeds.shape[1], roles.queries),
        ]
        routes = torch.empty(embeds.shape[:2], dtype=torch.int8, device=embeds.device)
        start = 0
        for end, adapter in parts:
            routes[:, start:end] = ROUTE_BITS[adapter]
            start = end
        interface = detached_attention(self.backbone.config, _merged(parts))
        with patching.route(self.model, routes), interface if roles.detach else contextlib.nullcontext():
            hidden = self._run(sequences, embeds)
        reasoned = hidden
        if roles.detach and prompt_adapter != roles.thought:
            # Without an opening the prompt's last state predicts a thought's first token: an interface too.
            reasoned = torch.cat([hidden[:, : sequences.prompt_end].detach(), hidden[:, sequences.prompt_end :]], dim=1)
        return self._taken(sequences, reasoned, hidden)

    def _reencoded(self, rows: Rows, sequences: Sequences) -> Trained:
        count = len(rows.batch)
        if sequences.thought_end == sequences.prompt_end:  # nothing for the other adapter to learn
            with patching.route(self.model, self.roles.queries):
                hidden = self._run(sequences, self._embeds(sequences))
            return self._taken(sequences, hidden, hidden)
        twice = list(range(count)) * 2
        thoughts = [rows.thoughts[row] for row in twice]
        both = lay_out(self.backbone, Rows(rows.batch.select(twice), thoughts), self.opening, self.bank.num_queries)
        adapters = [self.roles.thought] * count + [self.roles.queries] * count
        with patching.route(self.model, adapters):
            hidden = self._run(both, self._embeds(both))
        return self._taken(sequences, hidden[:count], hidden[count:])

    def _embeds(self, sequences: Sequences) -> Tensor:
        prompt, embeddings = sequences.prompt, self.backbone.embeddings
        read = embeddings(torch.cat([prompt.ids, sequences.thought_ids], dim=1))
        queries = self.bank(len(prompt.ids), read.dtype)
        sets = (sequences.positions.shape[-1] - sequences.thought_end) // self.bank.num_queries
        return torch.cat([read, *[queries] * sets], dim=1)

    def _run(self, sequences: Sequences, embeds: Tensor) -> Tensor:
        masks = sequences.masks(self.backbone.config, embeds.dtype)
        return self.backbone.run(embeds, masks, sequences.positions, sequences.prompt.media)

    def _taken(self, sequences: Sequences, reasoned: Tensor, embedded: Tensor) -> Trained:
        """The states that losses read, of the rows under each adapter."""
        end, count = sequences.thought_end, self.bank.num_queries
        plain = embedded[:, end : end + count]
        thoughtful = embedded[:, end + count :] if embedded.shape[1] > end + count else None
        labels = sequences.labels
        known = labels >= 0
        before = reasoned[:, sequences.prompt_end - 1 : end - 1] if labels.shape[1] else reasoned[:, :0]
        return Trained(
            plain,
            thoughtful,
            embedded[:, sequences.prompt_end - 1],
            before[known],
            labels[known],
            known.nonzero()[:, 0],
        )


def _merged(parts: Sequence[Part]) -> list[Part]:
    """The same without empty parts, neighbours under one adapter as one."""
    merged: list[Part] = []
    for part in parts:
        if part.end == (merged[-1].end if merged else 0):
            continue
        if merged and merged[-1].adapter == part.adapter:
            merged.pop()
        merged.append(part)
    return merged
