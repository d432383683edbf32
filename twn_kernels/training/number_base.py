"""The small backbone of the number task: real Qwen3-VL classes, a tokenizer of the task's words, random weights.

Owns the sizes. What it learns before it is frozen is :mod:`twn_kernels.training.number_lessons`'.
"""

from __future__ import annotations

from pathlib import Path

from twn_kernels.evaluation import number_words as words
from twn_kernels.evaluation.number_images import SIZE
from twn_kernels.evaluation.number_words import BINARY, OPERATIONS, Step

__all__ = ["new_number_base"]

_FAMILY = "qwen3_vl"
_MERGES = 400  # enough for each word of the corpus to be one token
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# A picture of 64 x 64 pixels is 8 x 8 patches of the vision tower and 4 x 4 tokens of the text model.
_VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 8,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
}
_ROPE = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 10000.0}


def new_number_base(directory: str | Path, *, seed: int = 0):
    """Write tokenizer and processor of the number task's backbone and return its model, untrained.

    Args:
        directory: of the backbone; must exist.
        seed: of the weights.

    Returns:
        A ``Qwen3VLForConditionalGeneration`` in fp32; ``save_pretrained(directory)`` completes the directory.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from twn_kernels.testing.qwen_processor import EOS, PAD, qwen_token_ids, qwen_tokenizer, write_processor
    from twn_kernels.testing.tiny_models import tiny_config

    tokenizer = qwen_tokenizer(_FAMILY, _corpus(), merges=_MERGES)
    config = tiny_config(
        _FAMILY,
        vocab_size=len(tokenizer),
        **qwen_token_ids(tokenizer, _FAMILY),
        **_TEXT,
        rope_parameters=_ROPE,
        vision_config=dict(_VISION),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    model.generation_config.bos_token_id = model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(PAD)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in (EOS, PAD)]
    model.generation_config.do_sample = False
    write_processor(Path(directory), _FAMILY, tokenizer, config.vision_config, image_area=(16 * 16, SIZE * SIZE))
    return model


def _corpus() -> list[str]:
    """Every word of the task, twice, so that it becomes one token in the middle of a text and at its start."""
    texts, seen = ["user assistant system"], (False, True)
    for number in range(100):
        texts += [f"{name}. {name}" for unseen in seen for name in words.spoken(number, unseen=unseen)]
    for first, second in zip(OPERATIONS, OPERATIONS[::-1], strict=True):
        steps = [Step(name, 40, 4 if name in BINARY else 0) for name in (first, second)]
        for by_image in (False, True):
            texts += [text for unseen in seen for text in words.phrases(steps, by_image=by_image, unseen=unseen)]
            texts += [words.thought(40, chain, by_image=by_image) for chain in ([], steps)]
    texts += [text for unseen in seen for text in words.phrases([], by_image=True, unseen=unseen)]
    return texts + texts
