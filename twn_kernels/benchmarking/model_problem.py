"""Decoder layers and whole text models as tensors: real Qwen3-VL configurations, random weights drawn on the device.

The model is the text model without vision tower and output embeddings: what the adapters touch, and attention. It is
called as transformers calls it, on input embeddings. A decode step reads a cache that is filled with random keys and
values and always writes the same place, so that every step does the same work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.benchmarking.cases import Case, ModelShape
from twn_kernels.benchmarking.contender import Unavailable
from twn_kernels.benchmarking.counters import ELEMENT_BYTES, base_elements
from twn_kernels.benchmarking.environment import cache_bytes
from twn_kernels.benchmarking.problem import DTYPES, NORM_EPS, SCALINGS, draw_lora, plan_of, rotation, seed_of
from twn_kernels.ops import LoRA, RoutePlan

__all__ = ["ModelProblem", "linears_of", "sharing_copy", "storage_bytes"]

# Of Qwen3-VL: how many of the rotary frequencies follow time, height and width, and their base.
_ROPE = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True}
_MROPE_SECTION = (24, 20, 20)
_VOCABULARY = 160  # calls start from embeddings, so the table of the real size would only take memory


@dataclass
class ModelProblem:
    """One case of suite ``layer`` or ``model`` on a device.

    Attributes:
        case: what is measured.
        device: where.
        model: the plain text model; of suite ``layer``, with as many layers as rotation needs.
        loras: path of each linear to its reasoning and embedding adapter.
        hidden: ``[rows, sequence, hidden]``, the input.
        dy: the gradient of the output.
        plan: the routes of the tokens in order.
        keys, values: of each layer's cache, ``[rows, kv_heads, context, head_dim]``; empty without a cache.
        compile_backend: of torch.compile.
        patched: models that contenders share, by implementation.
        caches: that contenders share, by rows.
    """

    case: Case
    device: torch.device
    model: nn.Module
    loras: dict[str, tuple[LoRA, LoRA]]
    hidden: Tensor
    dy: Tensor
    plan: RoutePlan
    keys: list[Tensor]
    values: list[Tensor]
    compile_backend: str = "inductor"
    patched: dict[str, nn.Module] = field(default_factory=dict)
    caches: dict[tuple[int, ...] | None, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, case: Case, device: torch.device, *, compile_backend: str = "inductor") -> ModelProblem:
        """Draw the model, its adapters and the input of a case.

        Raises:
            Unavailable: transformers is not installed.
        """
        dtype, shape = DTYPES[case.dtype], case.shape
        layers = case.layers if case.suite == "model" else _layers_to_rotate(case, device)
        generator = torch.Generator(device).manual_seed(seed_of(case))
        model = _text_model(shape, layers, device, dtype)
        _draw_weights(model, generator)
        loras = {
            path: tuple(
                draw_lora(linear.in_features, linear.out_features, rank, scaling, generator, dtype)
                for rank, scaling in zip(case.ranks, SCALINGS, strict=True)
            )
            for path, linear in linears_of(model)
        }

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        size = (case.rows, case.sequence, shape.hidden)
        cached = (case.rows, shape.kv_heads, case.context, shape.head_dim)
        caches = layers if case.context is not None else 0
        return cls(
            case,
            device,
            model,
            loras,
            normal(*size),
            normal(*size),
            plan_of(case, device),
            [normal(*cached) for _ in range(caches)],
            [normal(*cached) for _ in range(caches)],
            compile_backend,
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    @property
    def used(self) -> list[int]:
        """Adapters (0 reasoning, 1 embedding) that some token uses."""
        return [adapter for adapter, rows in enumerate(self.case.uses()) if rows]

    @property
    def calls(self) -> range:
        """Places of the layers that calls rotate over; one place where the whole model runs."""
        return range(len(self.model.layers) if self.case.suite == "layer" else 1)

    def masks(self) -> list[Tensor]:
        """Bool ``[rows, sequence]`` of each adapter."""
        routes = self.plan.routes.view(self.case.rows, self.case.sequence)
        return [(routes & (1 << adapter)) != 0 for adapter in (0, 1)]

    def cache(self, rows: tuple[int, ...] | None = None) -> Any:
        """The cache over these rows of the batch (None: all); None where the case has none.

        Contenders share it: a step writes its token before it reads, and always in the same place.
        """
        if not self.keys:
            return None
        if rows not in self.caches:
            index = slice(None) if rows is None else list(rows)
            self.caches[rows] = fixed_cache([k[index] for k in self.keys], [v[index] for v in self.values])
        return self.caches[rows]

    def run(self, model: nn.Module, index: int, hidden: Tensor, start: int | None = None, cache: Any = None) -> Tensor:
        """A forward of ``model`` (or of its layer at ``index``) on some rows and positions of the input.

        Args:
            model: this problem's, a copy or a wrapper of one.
            index: of the layer, in suite ``layer``.
            hidden: ``[rows, tokens, hidden]``.
            start: position of the first token; None: 0, or after the cache of a decode step.
            cache: of :meth:`cache`, or a growing one for a forward in pieces.
        """
        start = (self.case.context or 0) if start is None else start
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        positions = positions.view(1, 1, -1).expand(4, hidden.shape[0], -1)
        if self.case.suite == "model":
            return model(
                inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state
        mask = None
        if start and hidden.shape[1] > 1:  # a piece after others: all that came before, and causal within
            mask = torch.ones(hidden.shape[1], start + hidden.shape[1], dtype=torch.bool, device=hidden.device)
            mask = mask.tril(start)[None, None]
        embeddings = self.model.rotary_emb(hidden, positions[1:])
        return model.layers[index](hidden, position_embeddings=embeddings, attention_mask=mask, past_key_values=cache)


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a text model's decoder layers, by path."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.startswith("layers."):
            yield path, module


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters are new objects over the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def storage_bytes(model: nn.Module) -> int:
    """Bytes of every distinct storage that the model's parameters and buffers hold."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def fixed_cache(keys: list[Tensor], values: list[Tensor]) -> Any:
    """A cache that holds ``keys`` and ``values`` and always writes the token after them."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class FixedLayer(CacheLayerMixin):
        """One layer's cache with one place for the step's token."""

        is_sliding = False

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            rows, heads, self.context, width = keys.shape
            self.keys, self.values = (t.new_empty(rows, heads, self.context + 1, width) for t in (keys, values))
            for own, given in ((self.keys, keys), (self.values, values)):
                own[:, :, : self.context] = given
                own[:, :, self.context :] = 0
            self.is_initialized = True

        def lazy_initialization(self, *args, **kwargs) -> None:
            """Nothing: filled from the start."""

        def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            self.keys[:, :, self.context :] = key_states
            self.values[:, :, self.context :] = value_states
            return self.keys, self.values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.context + query_length, 0

        def get_seq_length(self, *args) -> int:
            return self.context

        def get_max_length(self) -> int:
            return self.context + 1

        get_max_cache_shape = get_max_length

    return Cache(layers=[FixedLayer(k, v) for k, v in zip(keys, values, strict=True)])


def _layers_to_rotate(case: Case, device: torch.device) -> int:
    return rotation(base_elements(case.sites) * ELEMENT_BYTES[case.dtype], cache_bytes(device))


def _text_model(shape: ModelShape, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise Unavailable("transformers is not installed (pip install transformers).") from None
    half = shape.head_dim // 2
    section = [half - 2 * (half * _MROPE_SECTION[1] // 64), *[half * part // 64 for part in _MROPE_SECTION[1:]]]
    config = AutoConfig.for_model(
        "qwen3_vl_text",
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=NORM_EPS,
        max_position_embeddings=262_144,
        rope_parameters=_ROPE | {"mrope_section": section},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    # Without transformers' initialisation, which would draw billions of numbers from torch's global generator: weights
    # are drawn below, and the rotary frequencies are the only buffers.
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    return model.eval().requires_grad_(False)


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
        if parameter.dim() == 1:
            parameter.data.copy_(1 + 0.1 * noise)
        else:
            parameter.data.copy_(noise * (1.0 if "embed" in name else parameter.shape[1] ** -0.5))
