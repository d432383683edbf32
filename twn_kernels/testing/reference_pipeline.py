"""The embedding pipeline as its definition reads: one input at a time, one whole forward a step, no cache, no batch.

Slow and obvious on purpose. Positions come from the model's own rotary index over the whole sequence (queries and
thought as dummy text tokens), routes are written out token by token, and nothing is shared with the
embedder but the model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twn_kernels.checkpoint import Checkpoint
from twn_kernels.patching import route

__all__ = ["ReferenceResult", "reference_encode"]

_BITS = {None: 0, "reasoning": 1, "embedding": 2}


@dataclass
class ReferenceResult:
    """What one input gives: the unit vector ``[hidden]``, the gate's score, and the thought."""

    vector: Tensor
    score: float | None
    thought_ids: list[int]
    thoughtful: bool


@torch.no_grad()
def reference_encode(
    model: nn.Module,
    tensors: dict[str, Tensor],
    checkpoint: Checkpoint,
    *,
    think: bool,
    opening: list[int],
    closes,
    end_of_sequence: set[int],
    max_think_tokens: int,
) -> ReferenceResult:
    """Embed one input.

    Args:
        model: a patched HuggingFace model; its dtype is the dtype of everything.
        tensors: a processor's output for this one input, without padding.
        checkpoint: queries, gate and config.
        think: whether to think (the gate's score is reported, not obeyed).
        opening: token ids that open a thought.
        closes: ``list of ids -> bool``: whether the thought is closed after its last id.
        end_of_sequence: ids that break a thought that is not closed.
        max_think_tokens: cap on the thought.
    """
    config, runner = checkpoint.config, _Runner(model, tensors, checkpoint.queries)
    shared = config.graph == "shared_kv"
    prefill = config.prefill_adapter if shared else "embedding"
    hidden = runner.hidden([], prefill, None, queries=True)
    plain, last = hidden[runner.length :], hidden[runner.length - 1]
    score = None if checkpoint.gate is None else _gate(checkpoint, plain, last)
    thought: list[int] = []
    thoughtful = False
    if think:
        reader = prefill if shared else "reasoning"
        while len(thought) < max_think_tokens:
            logits = runner.head(runner.hidden([*opening, *thought], reader, "reasoning", queries=False)[-1])
            logits[runner.placeholders] = -torch.inf
            thought.append(int(logits.argmax()))
            if closes(thought):
                thoughtful = True
                break
            if thought[-1] in end_of_sequence:
                break
    states = plain
    if thoughtful:
        writer = "reasoning" if shared else "embedding"
        states = runner.hidden([*opening, *thought], prefill, writer, queries=True)[-len(plain) :]
    return ReferenceResult(_pool(states, config.pooling), score, thought, thoughtful)


class _Runner:
    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], queries: Tensor) -> None:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.inner, self.head = model, whole.base_model, whole.get_output_embeddings()
        self.embed, self.tensors = whole.get_input_embeddings(), tensors
        self.length = tensors["input_ids"].shape[1]
        self.queries = queries.to(self.embed.weight)[None]
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        self.placeholders = [getattr(whole.config, name) for name in names if hasattr(whole.config, name)]

    def hidden(self, written: list[int], prompt_route, written_route, *, queries: bool) -> Tensor:
        """Hidden states ``[tokens, hidden]`` of prompt, written ids and queries, from one forward over all of them."""
        count = self.queries.shape[1] if queries else 0
        ids = torch.cat([self.tensors["input_ids"], torch.tensor([written], dtype=torch.long)], dim=1)
        embeds = self.embed(ids)
        if queries:
            embeds = torch.cat([embeds, self.queries], dim=1)
        routes = [_BITS[prompt_route]] * self.length + [_BITS[written_route]] * len(written) + [2] * count
        media = {
            name: value.to(embeds.dtype) if name.startswith("pixel_values") else value
            for name, value in self.tensors.items()
            if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        with route(self.model, torch.tensor([routes], dtype=torch.int8)):
            return self.inner(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                position_ids=self._positions(ids, count, media),
                use_cache=False,
                **{name: media[name] for name in media if name in inspect.signature(self.inner.forward).parameters},
            ).last_hidden_state[0]

    def _positions(self, ids: Tensor, count: int, media: dict) -> Tensor:
        total = ids.shape[1] + count
        if not any(name.endswith("grid_thw") for name in media):
            return torch.arange(total)[None]
        whole = torch.cat([ids, torch.zeros(1, count, dtype=torch.long)], dim=1)
        kinds = torch.zeros_like(whole)
        kinds[:, : self.length] = self.tensors["mm_token_type_ids"]
        accepted = inspect.signature(self.inner.get_rope_index).parameters
        arguments = {"input_ids": whole, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(whole), **media}
        positions, _ = self.inner.get_rope_index(**{name: arguments[name] for name in arguments if name in accepted})
        return positions


def _gate(checkpoint: Checkpoint, queries: Tensor, last: Tensor) -> float:
    """The gate by hand in the model's dtype: linear and norm layers in order, sigmoid of one logit, softmax of two."""
    config = checkpoint.config
    mean = queries.mean(0)
    x = {
        "mean": mean,
        "last": last,
        "concat": queries.flatten(),
        "mean_last": torch.cat([mean, last]),
    }[config.gate_input]
    activations = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
        "silu": nn.functional.silu,
        "tanh": torch.tanh,
    }
    for layer in checkpoint.gate_layout().layers:
        weight = checkpoint.gate[layer.weight].to(x)
        bias = None if layer.bias is None else checkpoint.gate[layer.bias].to(x)
        if layer.kind == "linear":
            x = nn.functional.linear(x, weight, bias)
        elif bias is None:
            x = nn.functional.rms_norm(x, x.shape, weight, eps=1e-6)
        else:
            x = nn.functional.layer_norm(x, x.shape, weight, bias)
        if layer.activated:
            x = activations[config.gate_activation](x)
    return float(torch.sigmoid(x[0])) if len(x) == 1 else float(x.softmax(0)[1])


def _pool(states: Tensor, pooling: str) -> Tensor:
    pooled = {"mean": states.mean(0), "last": states[-1], "first": states[0]}[pooling]
    return pooled / pooled.norm()
