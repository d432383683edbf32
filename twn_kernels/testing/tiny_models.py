"""Models of the real HuggingFace classes, small enough to run anywhere, with weights that make each layer matter.

Nothing is downloaded. The stock initialisation (std 0.02) leaves such small models nearly constant, so that a wrong
adapter hardly moves an output; here every matrix keeps the variance of its input, and norms and biases are not neutral.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twn_kernels.errors import OptionError, did_you_mean, quoted

__all__ = ["FAMILIES", "VISION_FAMILIES", "tiny_config", "tiny_inputs", "tiny_model"]

VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Unlike one another: grouped queries; fused qkv and gate_up; norms on both sides; parallel blocks with biases.
FAMILIES = (*VISION_FAMILIES, "llama", "phi3", "gemma3_text", "gpt_neox")

_HIDDEN, _HEADS, _HEAD_DIM, _INTERMEDIATE, _LAYERS, _VOCAB = 64, 4, 16, 96, 2, 160
_PATCH, _TEMPORAL_PATCH, _MERGE, _GRID = 4, 2, 2, (1, 4, 4)


def tiny_config(family: str, *, vocab_size: int = _VOCAB, **overrides: Any):
    """Configuration of a tiny model of ``family``.

    Args:
        family: one of :data:`FAMILIES`, the ``model_type`` of its configuration.
        vocab_size: size of the vocabulary. In a vision family its last four ids are the image, video, vision start and
            vision end tokens unless ``overrides`` names them.
        overrides: fields of the configuration. In a vision family the token ids, ``tie_word_embeddings`` and
            ``vision_config`` (merged) go to the top level, the rest to the text model.

    Raises:
        OptionError: ``family`` is not in :data:`FAMILIES`.
    """
    from transformers import AutoConfig

    if family not in FAMILIES:
        raise OptionError(
            f'family "{family}" has no tiny model; there is one of {quoted(FAMILIES)}.{did_you_mean(family, FAMILIES)}'
        )
    text = {
        "vocab_size": vocab_size,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gpt_neox":
        text.pop("num_key_value_heads")
    if family in ("qwen3_vl", "gemma3_text"):
        text["head_dim"] = _HEAD_DIM
    if family == "gemma3_text":
        text |= {
            "query_pre_attn_scalar": _HEAD_DIM,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    if family not in VISION_FAMILIES:
        return AutoConfig.for_model(family, **(text | overrides))
    return AutoConfig.for_model(family, **_vision_family(family, text, vocab_size, overrides))


def _vision_family(family: str, text: dict, vocab_size: int, overrides: dict) -> dict:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
    top = {
        "image_token_id": vocab_size - 4,
        "video_token_id": vocab_size - 3,
        "vision_start_token_id": vocab_size - 2,
        "vision_end_token_id": vocab_size - 1,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": _PATCH,
        "temporal_patch_size": _TEMPORAL_PATCH,
        "spatial_merge_size": _MERGE,
    }
    hidden = overrides.get("hidden_size", _HIDDEN)
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": hidden}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if family == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    vision |= overrides.pop("vision_config", {})
    top |= {name: overrides.pop(name) for name in list(overrides) if name in top}
    return top | {"text_config": text | {"rope_parameters": rope} | overrides, "vision_config": vision}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, config=None, **overrides: Any):
    """A model of ``family`` with its language-model head, random weights that depend on ``seed`` alone, in eval mode.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of the weights; torch's global generator is left alone.
        dtype: of all parameters. The weights are drawn in fp32 and rounded, so two dtypes hold the same model.
        config: a configuration to use instead of ``tiny_config(family, **overrides)``.
        overrides: for :func:`tiny_config`.
    """
    import transformers

    config = tiny_config(family, **overrides) if config is None else config
    auto = transformers.AutoModelForImageTextToText if family in VISION_FAMILIES else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies embeddings by sqrt(hidden) and ties the head to them: undiminished, it repeats its input.
    embedding_std = 0.5 / _HIDDEN**0.5 if family == "gemma3_text" else 1.0
    for name, parameter in sorted(model.named_parameters()):
        _draw(name, parameter.data, generator, embedding_std)
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def _draw(name: str, weight: Tensor, generator: torch.Generator, embedding_std: float) -> None:
    noise = torch.randn(weight.shape, generator=generator)
    if weight.dim() == 1:
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.copy_(base + 0.1 * noise)
    elif "embed" in name and weight.dim() == 2:
        weight.copy_(noise * embedding_std)
    else:
        weight.copy_(noise / weight[0].numel() ** 0.5)


def tiny_inputs(
    family: str,
    batch: int = 2,
    *,
    tokens: int = 14,
    seed: int = 0,
    images: bool | None = None,
    padded: bool = True,
    config=None,
) -> dict[str, Tensor]:
    """Inputs for :func:`tiny_model`: random ids, left padding of unequal length, and one random image a row.

    Args:
        family: one of :data:`FAMILIES`.
        batch: rows.
        tokens: length of the longest row; at least 10 with images.
        seed: of ids and pixels.
        images: put one image in each row; None: wherever the family sees.
        padded: rows after the first start with up to three padding tokens; otherwise all have full length.
        config: of the model, when it is not ``tiny_config(family)``.

    Returns:
        ``input_ids``, ``attention_mask`` ``[batch, tokens]`` and, with images, ``pixel_values``, ``image_grid_thw`` and
        ``mm_token_type_ids``: keyword arguments of the model's forward and of ``generate``.

    Raises:
        OptionError: images for a family without vision, or too few tokens for one.
    """
    images = family in VISION_FAMILIES if images is None else images
    config = tiny_config(family) if config is None else config
    if images and family not in VISION_FAMILIES:
        raise OptionError(f'images=True: family "{family}" has no vision tower; {quoted(VISION_FAMILIES)} have one')
    if images and tokens < 10:
        raise OptionError(f"tokens must be at least 10 with images (4 image tokens, 2 around them, text), got {tokens}")
    generator = torch.Generator().manual_seed(seed)
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(3, vocab - 4, (batch, tokens), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if padded:
        for row in range(batch):
            mask[row, : row % 4] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    return inputs | (_images(inputs["input_ids"], config, generator) if images else {})


def _images(ids: Tensor, config, generator: torch.Generator) -> dict[str, Tensor]:
    vision = config.vision_config
    frames, height, width = _GRID
    image_tokens = frames * height * width // vision.spatial_merge_size**2
    first = 4
    ids[:, first] = config.vision_start_token_id
    ids[:, first + 1 : first + 1 + image_tokens] = config.image_token_id
    ids[:, first + 1 + image_tokens] = config.vision_end_token_id
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    rows = ids.shape[0]
    return {
        "pixel_values": torch.randn(rows * frames * height * width, patch, generator=generator),
        "image_grid_thw": torch.tensor([_GRID] * rows),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
