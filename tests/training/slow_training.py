"""Joint training as its definition reads: PEFT's adapters, one row at a time, one forward for each adapter's tokens.

Slow and obvious on purpose. What one adapter wrote is handed to the other as a cache of detached keys and values; there
is no padding, no mask, no batch and no shared forward. Nothing of ``twn_kernels`` runs but the processor.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor
from transformers import DynamicCache

Piece = tuple[Tensor, str | None, dict]  # vectors [tokens, hidden], adapter, media


class SlowTrainer:
    """The adapters of a ``PeftModel`` and the queries, trained with torch alone."""

    def __init__(self, model, queries: Tensor, method, processor, settings) -> None:
        self.model, self.method, self.processor, self.settings = model.eval(), method, processor, settings
        self.whole = model.get_base_model()
        self.inner, self.embed = self.whole.base_model, self.whole.get_input_embeddings()
        self.queries = torch.nn.Parameter(queries.to(self.embed.weight.dtype).clone())
        self.reasoning, self.embedding = (
            [p for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in name]
            for adapter in ("reasoning", "embedding")
        )
        self.lora = [*self.reasoning, *self.embedding]
        self.opening = processor.token_ids(method.think_prompt)
        self.optimizer = torch.optim.AdamW(
            [*self.lora, self.queries],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=settings.weight_decay,
        )

    def run(self, batches: list) -> list[dict[str, float]]:
        """One step a batch of examples; the losses of each."""
        told = []
        for number, examples in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self._share(number)
            losses = self.losses(examples)
            self.optimizer.zero_grad()
            losses["loss"].backward()
            for job in (self.reasoning, [*self.embedding, self.queries]):
                torch.nn.utils.clip_grad_norm_(job, self.settings.max_grad_norm)
            self.optimizer.step()
            told.append({name: float(value.detach()) for name, value in losses.items()})
        return told

    def _share(self, number: int) -> float:
        """Of the learning rate: a line up, then half a cosine down to nothing."""
        warmup, steps = self.settings.warmup_steps, self.settings.steps
        if number < warmup:
            return number / warmup
        return 0.5 * (1 + math.cos(math.pi * (number - warmup) / (steps - warmup)))

    def losses(self, examples: list) -> dict[str, Tensor]:
        """``loss`` and its parts."""
        plain, thoughtful, documents, thought, tokens = [], [], [], 0.0, 0
        for example in examples:
            written = self.processor.token_ids(example.thought + "</think>") if example.thought else []
            vectors = self.query(example.query.input, written)
            plain.append(vectors[0])
            thoughtful.append(vectors[1])
            thought, tokens = thought + vectors[2], tokens + len(written)
            documents.append(self.query(example.document.input, [])[0])
        losses = {
            "plain_loss": self.contrastive(plain, documents, examples, self.settings.plain_truncation),
            "thoughtful_loss": self.contrastive(thoughtful, documents, examples, 0.0),
            "thought_loss": thought / tokens,
        }
        weights = {name: getattr(self.settings, name.replace("_loss", "_weight")) for name in losses}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items())} | losses

    def contrastive(self, queries: list[Tensor], documents: list[Tensor], examples: list, q: float) -> Tensor:
        """Each query's own document against those of other queries that are not relevant to it; of its probability p
        the logarithm, or ``(1 - p**q) / q``."""
        total = 0.0
        for place, query in enumerate(queries):
            allowed = [
                other
                for other, example in enumerate(examples)
                if other == place or example.document.id not in examples[place].relevant
            ]
            scores = torch.stack([query @ documents[other] / self.settings.temperature for other in allowed])
            probability = scores.softmax(0)[allowed.index(place)]
            total = total + ((1 - probability**q) / q if q else -probability.log())
        return total / len(queries)

    def query(self, value, written: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Plain and thoughtful vector of one input, and the summed loss of its thought."""
        batch = self.processor.batch([self.processor.parse(value, 0)])
        shared = self.method.graph == "shared_kv"
        reader = self.method.prefill_adapter if shared else "embedding"
        writer = "reasoning" if shared else "embedding"
        tail = (self.queries, "embedding", {})
        prompt = self._prompt(batch)
        plain = self._vector(self._states(batch, [(*prompt[:1], reader, prompt[1]), tail]))
        if not written:
            return plain, plain, torch.zeros(())
        ids = torch.tensor([*self.opening, *written])
        thought = self.embed(ids).detach()
        pieces = [(prompt[0], reader, prompt[1]), (thought, writer, {}), tail]
        thoughtful = self._vector(self._states(batch, pieces))
        pieces = [(prompt[0], reader if shared else "reasoning", prompt[1]), (thought, "reasoning", {})]
        predicting = self._states(batch, pieces)[len(self.opening) - 1 : -1]
        logits = self.whole.get_output_embeddings()(predicting)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if hasattr(self.whole.config, name):  # a thought is text
                logits[:, getattr(self.whole.config, name)] = -torch.inf
        return plain, thoughtful, torch.nn.functional.cross_entropy(logits, torch.tensor(written), reduction="sum")

    def _vector(self, states: Tensor) -> Tensor:
        pooled = states[-len(self.queries) :].mean(0)
        return pooled / pooled.norm()

    def _prompt(self, batch) -> tuple[Tensor, dict]:
        dtype = self.embed.weight.dtype
        media = {
            name: value.to(dtype) if name.startswith("pixel_values") else value
            for name, value in batch.tensors.items()
            if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        return self.embed(batch.tensors["input_ids"][0]).detach(), media

    def _states(self, batch, pieces: list[Piece]) -> Tensor:
        """Last hidden states of the last piece: each piece runs under its adapter, and reads those before it."""
        positions = self._positions(batch, sum(len(vectors) for vectors, *_ in pieces))
        kept: list[tuple[str | None, list[tuple[Tensor, Tensor]]]] = []
        start = 0
        for vectors, adapter, media in pieces:
            end = start + len(vectors)
            cache = DynamicCache()
            for index in range(self.inner_layers()):
                before = [tuple(t if name == adapter else t.detach() for t in layers[index]) for name, layers in kept]
                if before:
                    cache.update(*(torch.cat(tensors, dim=2) for tensors in zip(*before, strict=True)), index)
            self._activate(adapter)
            known = inspect.signature(self.inner.forward).parameters
            out = self.inner(
                inputs_embeds=vectors[None],
                attention_mask=torch.ones(1, end, dtype=torch.long),
                position_ids=positions[..., start:end],
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in media.items() if name in known},
            )
            kept.append((adapter, [(c.keys[:, :, start:], c.values[:, :, start:]) for c in cache.layers]))
            start = end
        return out.last_hidden_state[0]

    def inner_layers(self) -> int:
        return self.whole.config.get_text_config().num_hidden_layers

    def _activate(self, adapter: str | None) -> None:
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.base_model.set_adapter(adapter)
        for parameter in self.lora:  # PEFT freezes what is not active, also for a backward still to come
            parameter.requires_grad_(True)

    def _positions(self, batch, total: int) -> Tensor:
        tensors = batch.tensors
        if "image_grid_thw" not in tensors:
            return torch.arange(total)[None]
        more = total - tensors["input_ids"].shape[1]
        ids, kinds = (
            torch.cat([tensors[name], torch.zeros(1, more, dtype=torch.long)], dim=1)
            for name in ("input_ids", "mm_token_type_ids")
        )
        given = dict(tensors) | {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
        accepted = inspect.signature(self.inner.get_rope_index).parameters
        return self.inner.get_rope_index(**{name: given[name] for name in given if name in accepted})[0]
