"""What the pipeline needs of a HuggingFace model, and the only file that knows how families differ in it.

A model is used below its head: embeddings go in, hidden states of the last layer come out, positions are always given
explicitly (multimodal rotary ids included), so that a step on a cache sees exactly what one whole forward would see.
Media enter with the prompt; vectors appended to it continue as ordinary text positions.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.errors import UnsupportedModel

__all__ = ["Backbone", "Prompt"]

# A thought that contained one would announce an image that is not there.
_PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_NOT_MEDIA = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass
class Prompt:
    """A left-padded batch as the backbone reads it.

    Attributes:
        ids, mask: int64 ``[batch, tokens]``; mask is 1 on tokens and 0 on padding.
        positions: ``[batch, tokens]``, or ``[3, batch, tokens]`` where the family has multimodal rotary ids.
        next_position: int64 ``[batch]``: the position of the first text token after the prompt.
        media: what the processor gave beside the tokens, such as ``pixel_values`` and ``image_grid_thw``.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    next_position: Tensor
    media: dict[str, Any]


class Backbone:
    """A decoder with a head, with or without vision.

    Args:
        model: a HuggingFace causal or image-text-to-text model, possibly inside a ``PeftModel``.

    Raises:
        UnsupportedModel: the model has no decoder below a head, or a cache that cannot be rolled back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.whole = whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = getattr(whole, "get_output_embeddings", lambda: None)()
        self.inner = getattr(whole, getattr(whole, "base_model_prefix", "") or "model", None)
        self.embeddings = getattr(whole, "get_input_embeddings", lambda: None)()
        if self.head is None or self.embeddings is None or not isinstance(self.inner, nn.Module):
            raise UnsupportedModel(
                f"{type(whole).__name__} is no decoder with a language-model head; the embedder needs one to think. "
                "Load it with AutoModelForImageTextToText or AutoModelForCausalLM."
            )
        self.decoder = getattr(self.inner, "language_model", self.inner)
        self.config = getattr(whole.config, "get_text_config", lambda: whole.config)()
        self.whole_config = whole.config
        self._never_written = [
            token for name in _PLACEHOLDERS if (token := getattr(whole.config, name, None)) is not None
        ]
        self._rope_index = getattr(self.inner, "get_rope_index", None)
        self._refuse_stateful(whole)

    def _refuse_stateful(self, whole: nn.Module) -> None:
        layers = getattr(self.config, "layer_types", None) or ()
        kinds = {kind for kind in layers if "attention" not in kind or "linear" in kind}
        if kinds or getattr(whole, "_is_stateful", False):
            raise UnsupportedModel(
                f"{type(whole).__name__} keeps a recurrent state ({', '.join(sorted(kinds)) or 'stateful'}), which "
                "cannot be rolled back after the query pass. The embedder needs attention layers throughout."
            )

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def prompt(self, tensors: dict[str, Any]) -> Prompt:
        """The positions of a processor's batch.

        Args:
            tensors: ``input_ids`` and ``attention_mask`` ``[batch, tokens]``, left-padded, and what belongs to media.
        """
        tensors = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in tensors.items()
        }
        ids, mask = tensors["input_ids"], tensors["attention_mask"].long()
        media = {name: value for name, value in tensors.items() if name not in _NOT_MEDIA and value is not None}
        media = {
            # Pixels alone: rounding a video's seconds per frame would move its positions.
            name: value.to(self.dtype) if name.startswith("pixel_values") else value
            for name, value in media.items()
        }
        kinds = tensors.get("mm_token_type_ids")
        positions, next_position = self._positions(ids, mask, media, kinds)
        return Prompt(ids, mask, positions, next_position, media)

    def _positions(self, ids: Tensor, mask: Tensor, media: dict, kinds: Tensor | None) -> tuple[Tensor, Tensor]:
        lengths = mask.sum(1)
        if self._rope_index is None:
            return (mask.cumsum(1) - 1).clamp_min(0), lengths
        if not any(name.endswith("grid_thw") for name in media):
            return (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1), lengths
        arguments = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": self._token_kinds(ids) if kinds is None else kinds,
            **media,
        }
        accepted = inspect.signature(self._rope_index).parameters
        positions, deltas = self._rope_index(**{name: arguments[name] for name in arguments if name in accepted})
        return positions, lengths + deltas.view(-1).to(lengths)

    def _token_kinds(self, ids: Tensor) -> Tensor:
        kinds = torch.zeros_like(ids)
        for kind, name in ((1, "image_token_id"), (2, "video_token_id")):
            token = getattr(self.whole_config, name, None)
            if token is not None:
                kinds = torch.where(ids == token, kind, kinds)
        return kinds

    def text_positions(self, first: Tensor, count: int) -> Tensor:
        """Positions of ``count`` text tokens after ``first`` ``[batch]``, in the family's shape."""
        positions = first[:, None] + torch.arange(count, device=first.device)
        return positions if self._rope_index is None else positions.expand(3, -1, -1)

    def new_cache(self):
        """An empty cache that keeps every token, so that it can be rolled back also under sliding windows."""
        from transformers import DynamicCache

        return DynamicCache()

    def read(self, prompt: Prompt, tail: Tensor | None = None, cache=None) -> Tensor:
        """Hidden states of the prompt followed by ``tail``, in one forward.

        Args:
            prompt: the batch.
            tail: ``[batch, count, hidden]`` vectors that continue the prompt as text; None: nothing.
            cache: filled with all of it; None: no cache is kept.

        Returns:
            ``[batch, tokens + count, hidden]`` of the last layer, after its norm.
        """
        embeds, mask, positions = self.embeddings(prompt.ids), prompt.mask, prompt.positions
        if tail is not None:
            embeds = torch.cat([embeds, tail.to(embeds)], dim=1)
            mask = torch.cat([mask, mask.new_ones(tail.shape[:2])], dim=1)
            positions = torch.cat([positions, self.text_positions(prompt.next_position, tail.shape[1])], dim=-1)
        return self.run(embeds, mask, positions, prompt.media, cache)

    def run(
        self, embeds: Tensor, mask: Tensor | dict[str, Tensor], positions: Tensor, media: dict[str, Any], cache=None
    ) -> Tensor:
        """Hidden states of a whole sequence that the caller has laid out.

        Args:
            embeds: ``[batch, tokens, hidden]``; the pixels of ``media`` take the place of their placeholders' vectors.
            mask: ``[batch, tokens]``, or prepared as in :meth:`continue_`.
            positions: as in :class:`Prompt`.
            media: of a :class:`Prompt`.
            cache: filled with all of it; None: no cache is kept.

        Returns:
            ``[batch, tokens, hidden]`` of the last layer, after its norm.
        """
        known = inspect.signature(self.inner.forward).parameters
        media = {name: value for name, value in media.items() if name in known}
        return self._run(self.inner if media else self.decoder, embeds, mask, positions, cache, **media)

    def continue_(self, embeds: Tensor, mask: Tensor | dict[str, Tensor], first: Tensor, cache) -> Tensor:
        """Hidden states of text vectors after what the cache holds.

        Args:
            embeds: ``[batch, count, hidden]``.
            mask: ``[batch, cached + count]``; or prepared as the attention takes it, ``[batch, 1, count, columns]``,
                one for all layers or one for each kind of layer.
            first: ``[batch]`` position of the first vector.
            cache: extended by ``count``.

        Returns:
            ``[batch, count, hidden]``.
        """
        return self._run(self.decoder, embeds, mask, self.text_positions(first, embeds.shape[1]), cache)

    def _run(self, module: nn.Module, embeds, mask, positions, cache, **media) -> Tensor:
        out = module(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **media,
        )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``[batch, vocabulary]`` of hidden states ``[batch, hidden]``, scaled as the family scales them.

        Placeholders of media get minus infinity: a thought is text.
        """
        logits = self.head(hidden).float()
        if getattr(self.config, "logit_scale", None):
            logits = logits * self.config.logit_scale
        if getattr(self.config, "logits_scaling", None):
            logits = logits / self.config.logits_scaling
        cap = getattr(self.config, "final_logit_softcapping", None)
        logits = torch.tanh(logits / cap) * cap if cap else logits
        # One fill each: a list of indices would be copied to the device, which a CUDA graph cannot capture.
        for token in self._never_written:
            logits.select(1, token).fill_(-torch.inf)
        return logits


def roll_back(cache, count: int) -> None:
    """Forget the last ``count`` tokens of every row."""
    if count:
        cache.crop(-count)


def rows_of(cache, rows: Tensor):
    """A cache over some rows; the one it was taken from stays as it is."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(rows)
    return part
