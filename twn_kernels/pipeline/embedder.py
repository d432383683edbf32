"""``TWNEmbedder``: inputs in, unit vectors out, thinking where the gate says so.

Owns loading, the ``encode`` family under the names that sentence-transformers gave them, batching and the progress bar.
What happens to one batch is ``graphs``' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.checkpoint import Checkpoint, TWNConfig, load_checkpoint
from twn_kernels.errors import CheckpointError, OptionError, reject_unknown
from twn_kernels.modules import QueryBank
from twn_kernels.ops import pool_queries
from twn_kernels.pipeline import loading
from twn_kernels.pipeline.backbone import Backbone
from twn_kernels.pipeline.decode_choice import DecodeChoice, check_mode
from twn_kernels.pipeline.decoding import Decoding
from twn_kernels.pipeline.graphs import BatchResult, Method, Thinking, run_batch
from twn_kernels.pipeline.inputs import EncodedBatch, as_list
from twn_kernels.pipeline.options import EncodeDetails, EncodeOptions
from twn_kernels.pipeline.processor import Processor, load_processor
from twn_kernels.pipeline.progress import Progress
from twn_kernels.pipeline.sampling import chooser
from twn_kernels.pipeline.thinking import StopRule

__all__ = ["TWNEmbedder"]

_OPTIONS = [
    *("prompt", "batch_size", "show_progress_bar", "normalize_embeddings", "truncate_dim", "convert_to_numpy"),
    *("convert_to_tensor", "think", "think_threshold", "max_think_tokens", "return_details"),
]
_LOADING_OPTIONS = [
    *("processor", "dtype", "device", "impl", "prompts", "max_image_pixels", "seed", "decode"),
    *("revision", "token", "cache_dir", "local_files_only"),
]


class TWNEmbedder:
    """An embedder that thinks when needed. Build one with :meth:`from_pretrained`.

    Args:
        model: a HuggingFace model, patched with ``checkpoint``'s adapters.
        checkpoint: queries, gate and configuration.
        processor: turns inputs into tensors.
        prompts: instruction by name, used by ``encode_query`` (``"query"``) and ``encode_document`` (``"document"``).
        seed: of the generator that samples thoughts where the configuration asks for sampling.
        decode: how thoughts are decoded, as in :meth:`from_pretrained`.

    Attributes:
        model, checkpoint, processor, prompts, seed: as given.
        config: how the method runs; replace it to run the same weights in another way.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        processor: Processor,
        *,
        prompts: Mapping[str, str] | None = None,
        seed: int = 0,
        decode: str = "auto",
    ) -> None:
        checkpoint.require("queries")
        self.model, self.checkpoint, self.processor = model.eval(), checkpoint, processor
        self.config: TWNConfig = checkpoint.config
        self.prompts, self.seed = dict(prompts or {}), seed
        self._backbone = Backbone(model)
        self._queries = QueryBank(checkpoint.queries).to(self._backbone.device)
        if self._queries.queries.shape[1] != self._backbone.hidden_size:
            raise CheckpointError(
                f"queries are {list(checkpoint.queries.shape)} but the model's hidden size is "
                f"{self._backbone.hidden_size}; the checkpoint was trained on another base"
                f"{f' ({checkpoint.base_model_name})' if checkpoint.base_model_name else ''}."
            )
        self._gate = loading.gate_module(checkpoint, self._backbone)
        self._decoding = Decoding(self._backbone, decode)

    @classmethod
    def from_pretrained(
        cls,
        base: str | PathLike | nn.Module,
        checkpoint: str | PathLike | Checkpoint,
        *,
        processor: Processor | Any = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        impl: str = "auto",
        prompts: Mapping[str, str] | None = None,
        max_image_pixels: int | None = None,
        seed: int = 0,
        decode: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        **unknown: Any,
    ) -> TWNEmbedder:
        """Load a base model and a TWN checkpoint, patch the one with the other, and return an embedder.

        Args:
            base: a directory, a hub id, or a loaded model, which is patched here. A ``PeftModel`` keeps its own
                adapters and takes queries, gate and configuration from ``checkpoint``.
            checkpoint: a TWN directory, a hub id, or a loaded checkpoint; it must have queries.
            processor: a HuggingFace processor or tokenizer; None: the one beside ``base``.
            dtype: of a model that is loaded here; None: as its configuration says.
            device: where to put the model; None: the first GPU, else the CPU; a loaded model stays where it is.
            impl: implementation of the patched layers.
            prompts: instruction by name; ``encode_query`` uses ``"query"``, ``encode_document`` ``"document"``.
            max_image_pixels: larger images are refused before they are decoded; None: the default of the inputs.
            seed: for sampled thoughts.
            decode: how thoughts are decoded. ``"dynamic"``: a cache that grows, one launch after another.
                ``"static"``: a cache of fixed size and buffers of fixed address. ``"cuda_graph"``: the same, each step
                replayed from a CUDA graph. ``"auto"``: a CUDA graph on a GPU where the model allows one, else dynamic;
                :attr:`decode_choice` says which and why. The named ones never fall back. The buffers stay allocated
                between calls; :meth:`free_decode_buffers` returns them.
            revision, token, cache_dir, local_files_only: for hub ids, as in transformers; for both.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another base.
            UnsupportedModel, PatchError: the model cannot be patched or is no decoder.
            MissingDependency: transformers is absent or too old.
            ImplUnavailable: a named ``impl`` or ``decode`` cannot run here; the message says why.
            OptionError: an argument is unknown or of the wrong kind.
        """
        reject_unknown(unknown, _LOADING_OPTIONS, "from_pretrained")
        check_mode(decode)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(checkpoint, **hub)
        checkpoint.require("queries")
        model = loading.base_model(base, dtype, device, hub)
        if processor is None:
            processor = loading.processor_source(base, model)
        loaded = load_processor(processor, max_image_pixels=max_image_pixels, **hub)
        loading.patch_for(model, checkpoint, impl)
        return cls(model, checkpoint, loaded, prompts=prompts, seed=seed, decode=decode)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._backbone.device

    @property
    def decode_choice(self) -> DecodeChoice:
        """How thoughts would be decoded now, and why: ``mode`` and ``reason``."""
        return self._decoding.choice

    def free_decode_buffers(self) -> None:
        """Free the memory that decoding keeps between calls (fixed caches and CUDA graphs)."""
        self._decoding.release()

    def get_sentence_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self._backbone.hidden_size

    def encode(
        self,
        inputs: Any,
        *,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        think: str = "auto",
        think_threshold: float | None = None,
        max_think_tokens: int | None = None,
        return_details: bool = False,
        **unknown: Any,
    ) -> Any:
        """Embed inputs.

        Args:
            inputs: one input or a list of them: a string; an image (path, PIL image, array); a dict of modalities with
                keys ``text``, ``image``, ``video``; or chat messages (a list of ``{"role", "content"}``).
            prompt: an instruction, put before each input as the system turn.
            batch_size: inputs that run together.
            show_progress_bar: None follows the logger ``twn_kernels``: shown at level INFO.
            normalize_embeddings: scale to unit length (after ``truncate_dim``).
            truncate_dim: keep this many leading dimensions.
            convert_to_numpy: return a numpy array; False with ``convert_to_tensor`` False gives a list of tensors.
            convert_to_tensor: return one tensor on the model's device; takes precedence.
            think: ``"never"``, ``"always"``, or ``"auto"``: where the gate score reaches the threshold.
            think_threshold: in [0, 1]; None: the checkpoint's.
            max_think_tokens: cap of a thought; None: the checkpoint's. A thought that is not closed by then gives the
                plain embedding, and the details say so.
            return_details: also return :class:`EncodeDetails` of each input.

        Returns:
            ``[inputs, hidden]`` float32 in the order of the inputs (``[hidden]`` for a single one); with
            ``return_details``, a pair of that and the details.

        Raises:
            InputError: an input cannot be embedded; the message begins with its index.
            OptionError: an option is unknown or out of range.
        """
        reject_unknown(unknown, _OPTIONS, "encode")
        options = EncodeOptions(batch_size, truncate_dim, think, think_threshold, max_think_tokens)
        options.check_dim(self._backbone.hidden_size)
        if think == "auto" and self._gate is None:
            raise OptionError('think="auto" needs a gate, and the checkpoint has none. Use think="never" or "always".')
        values, single = as_list(inputs)
        self._check_inputs(values, batch_size)
        config = options.applied_to(self.config)
        vectors: list[Tensor] = []
        details: list[EncodeDetails] = []
        with Progress(len(values), show_progress_bar) as progress:
            for batch in self._batches(values, prompt, batch_size):
                result = self._run(batch, config, options, progress)
                vectors += self._pooled(result.states, config, normalize_embeddings, truncate_dim)
                details += _details(result, len(batch))
                progress.done(len(batch))
        out = self._converted(vectors, single, truncate_dim, convert_to_numpy, convert_to_tensor)
        return (out, details[0] if single else details) if return_details else out

    def encode_query(self, inputs: Any, *, prompt: str | None = None, **options: Any) -> Any:
        """:meth:`encode` with the prompt named ``"query"`` unless another is given."""
        return self.encode(inputs, prompt=self.prompts.get("query") if prompt is None else prompt, **options)

    def encode_document(self, inputs: Any, *, prompt: str | None = None, **options: Any) -> Any:
        """:meth:`encode` with the prompt named ``"document"`` unless another is given."""
        return self.encode(inputs, prompt=self.prompts.get("document") if prompt is None else prompt, **options)

    def gate_states(self, inputs: Any, *, prompt: str | None = None, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """What a gate reads of each input, in order to train one: states of the plain pass. Needs no gate.

        A :class:`~twn_kernels.modules.GateMLP` gives these states the scores that :meth:`encode` would decide by.

        Args:
            inputs, prompt, batch_size: as in :meth:`encode`.

        Returns:
            query states ``[inputs, num_queries, hidden]`` and states of the last prompt token ``[inputs, hidden]``, in
            the model's dtype, on the CPU: of many inputs they may not fit a GPU beside the model.

        Raises:
            InputError: an input cannot be embedded; the message begins with its index.
            OptionError: ``batch_size`` is no whole number of at least 1.
        """
        options = EncodeOptions(batch_size, think="never")
        values, _ = as_list(inputs)
        self._check_inputs(values, batch_size)
        shape = (self._queries.num_queries, self._backbone.hidden_size)
        states = [torch.empty(0, *shape, dtype=self._backbone.dtype)]
        prompt_states = [states[0][:, 0]]
        with Progress(len(values), None) as progress:
            for batch in self._batches(values, prompt, batch_size):
                result = self._run(batch, self.config, options, progress)
                states.append(result.states.cpu())
                prompt_states.append(result.prompt_state.cpu())
                progress.done(len(batch))
        return torch.cat(states), torch.cat(prompt_states)

    @staticmethod
    def similarity(a: Any, b: Any) -> Tensor:
        """Cosine similarity.

        Args:
            a, b: ``[n, hidden]`` and ``[m, hidden]`` (or one vector): arrays, tensors or lists of vectors.

        Returns:
            fp32 ``[n, m]`` on the device of ``a``.
        """
        left, right = (loading.as_matrix(value, name) for value, name in ((a, "a"), (b, "b")))
        if left.shape[1] != right.shape[1]:
            raise OptionError(
                f"similarity needs vectors of one width, got {left.shape[1]} and {right.shape[1]}. "
                "Use the same truncate_dim for both."
            )
        left, right = (nn.functional.normalize(value, dim=1) for value in (left, right.to(left.device)))
        return left @ right.T

    def _check_inputs(self, values: list, batch_size: int) -> None:
        """Read every input once before the first batch runs, and keep none: a corpus of images would not fit."""
        if len(values) > batch_size:
            for index, value in enumerate(values):
                self.processor.parse(value, index)

    def _batches(self, values: list, prompt: str | None, batch_size: int) -> Iterator[EncodedBatch]:
        for start in range(0, len(values), batch_size):
            chunk = values[start : start + batch_size]
            parsed = [self.processor.parse(value, start + place) for place, value in enumerate(chunk)]
            yield self.processor.batch(parsed, prompt, first_index=start)

    def _run(self, batch: EncodedBatch, config: TWNConfig, options: EncodeOptions, progress: Progress) -> BatchResult:
        processor = self.processor
        method = Method(
            self._backbone,
            self._queries,
            self._gate,
            config,
            processor.token_ids(config.think_prompt),
            lambda whole, rows, suffixes: whole.extended(rows, suffixes),
            self._decoding,
            loading.routes_media(self.model),
        )
        rule = StopRule(
            processor.raw_text_of,
            processor.text_of,
            config.think_end,
            loading.end_of_sequence(self.model, processor),
            config.max_think_tokens,
        )
        choose = chooser(config.temperature, config.top_p, self.seed, self._backbone.device)
        return run_batch(method, batch, Thinking(options.decide(config.think_threshold), rule, choose), progress.phase)

    def _pooled(self, states: Tensor, config: TWNConfig, normalize: bool, dim: int | None) -> list[Tensor]:
        pooled = pool_queries(states, pooling=config.pooling, normalize=False)[:, :dim]
        return list(nn.functional.normalize(pooled, dim=1) if normalize else pooled)

    def _converted(self, vectors: list[Tensor], single: bool, dim: int | None, to_numpy: bool, to_tensor: bool) -> Any:
        if not (to_numpy or to_tensor) and not single:
            return vectors
        width = dim or self._backbone.hidden_size
        out = torch.stack(vectors) if vectors else torch.empty(0, width, device=self._backbone.device)
        out = out[0] if single else out
        return out if to_tensor or not to_numpy else out.cpu().numpy()


def _details(result: BatchResult, count: int) -> Sequence[EncodeDetails]:
    details = []
    for place in range(count):
        score = None if result.scores is None else result.scores[place]
        thought = result.thoughts.get(place)
        if thought is None:
            details.append(EncodeDetails(score, False))
        else:
            closed, count = thought.broken is None, len(thought.ids)
            details.append(EncodeDetails(score, closed, thought.text, count, thought.broken, thought.decode))
    return details
