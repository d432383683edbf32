"""A tiny model with a real tokenizer and a real processor, saved as any HuggingFace directory.

Owns the tokenizer's few sentences and the tuning of the output layer; the model itself is
:mod:`twn_kernels.testing.tiny_models`', tokenizer and processor are :mod:`twn_kernels.testing.qwen_processor`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twn_kernels.errors import OptionError, did_you_mean, quoted
from twn_kernels.testing.ownership import claim, mark
from twn_kernels.testing.qwen_processor import (
    EOS,
    PAD,
    SPECIAL_TOKENS,
    THINK_TOKENS,
    qwen_token_ids,
    qwen_tokenizer,
    write_processor,
)
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES, tiny_config, tiny_model

__all__ = ["SPECIAL_TOKENS", "THINK_TOKENS", "write_tiny_model"]

_CORPUS = (
    "The old temple stands above the trees; its roofs are gold and red in the evening light.",
    "A red flower grows in the garden, and a small bird rests on the stone wall.",
    "What is in the picture? There is a number on the page, and the number is seven.",
    "Which of these images shows the same thing as the text? Think first, then answer in a word.",
    "Find the document that answers the question. Describe the image in one sentence.",
    "The user asks about the photograph, so the answer is about the thing in the foreground.",
    "system user assistant thinking image video question answer query document page",
)

# Random attention averages its context away and greedy text would forget the prompt; larger output projections keep it.
_ATTENTION_GAIN = 2.0
_ATTENTION_OUTPUTS = ("o_proj.weight", "attention.dense.weight")
_THOUGHT_TOKENS = 24
_FREE_STEPS = 3
# Share of the prompts below whose greedy text writes the token within that many.
_STOP_SHARES = {"</think>": 0.35, EOS: 0.2}
_PROMPTS = tuple(f"{head} {tail}" for head in _CORPUS[:4] for tail in ("Why?", "In one word.", "Name it.", "12"))


def write_tiny_model(
    directory: str | Path,
    family: str = "qwen3_vl",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    think_tokens: bool = True,
    **overrides: Any,
) -> Path:
    """Write a tiny model of ``family``, its tokenizer and, for a vision family, its processor.

    ``AutoModelForImageTextToText`` or ``AutoModelForCausalLM``, ``AutoTokenizer`` and ``AutoProcessor`` read it like
    any other. The same arguments write the same bytes. The weights are random and mean nothing, but greedy text depends
    on the input, and the output rows of ``</think>`` and ``<|im_end|>`` are scaled so that, over sixteen prompts run
    here, they end about a third and a fifth of the texts within 24 tokens. Where the output layer has weights of its
    own, those of the other special tokens and of bytes that are no ASCII text are zero, so that greedy text is readable
    and holds no placeholder of an image.

    Args:
        directory: where; made when missing. It must be empty or written by this function before.
        family: one of :data:`twn_kernels.testing.tiny_models.FAMILIES`.
        seed: of the weights. The tokenizer is always the same.
        dtype: of the weights.
        think_tokens: make ``<think>`` and ``</think>`` one ordinary token each, as Qwen3's tokenizer does; otherwise
            they are plain text of several tokens, as in Qwen2's, and no thought closes by itself.
        overrides: fields of the configuration, as in :func:`twn_kernels.testing.tiny_models.tiny_config`.

    Returns:
        ``directory`` as a path.

    Raises:
        OptionError: there is no such family, ``overrides`` name the vocabulary, which is the tokenizer's, or
            ``directory`` is a file or holds files of somebody else.
    """
    if family not in FAMILIES:
        raise OptionError(
            f'family "{family}" has no tiny model; there is one of {quoted(FAMILIES)}.{did_you_mean(family, FAMILIES)}'
        )
    taken = sorted(set(overrides) & {"vocab_size", "image_token_id", "video_token_id", "eos_token_id", "pad_token_id"})
    if taken:
        raise OptionError(f"{quoted(taken)} cannot be chosen: the vocabulary is that of the tokenizer written with it")
    out = claim(directory)
    mark(out)
    tokenizer = qwen_tokenizer(family, _CORPUS, think_tokens=think_tokens)
    config = _config(family, tokenizer, overrides)
    model = tiny_model(family, seed=seed, config=config)
    _set_generation(model, tokenizer)
    _tune_output(model, tokenizer, seed)
    model.to(dtype).save_pretrained(out)
    if family in VISION_FAMILIES:
        write_processor(out, family, tokenizer, config.vision_config)
    else:
        tokenizer.save_pretrained(out)
    return out


def _config(family: str, tokenizer, overrides: dict[str, Any]):
    return tiny_config(family, vocab_size=len(tokenizer), **qwen_token_ids(tokenizer, family), **overrides)


def _tune_output(model: torch.nn.Module, tokenizer, seed: int) -> None:
    """Let greedy text depend on the prompt, end now and then, and (untied) hold nothing but text."""
    for name, parameter in model.named_parameters():
        if name.endswith(_ATTENTION_OUTPUTS):
            parameter.data *= _ATTENTION_GAIN
    weight = model.get_output_embeddings().weight.data
    vocabulary = tokenizer.get_vocab()
    stops = {vocabulary[token]: share for token, share in _STOP_SHARES.items() if token in vocabulary}
    if weight.data_ptr() != model.get_input_embeddings().weight.data_ptr():
        weight[[index for index in range(len(tokenizer)) if not _is_text(tokenizer, index)]] = 0.0
    states, best = _greedy_states(model, tokenizer)
    generator = torch.Generator().manual_seed(20_000 + seed)
    # Directions that texts share: their mean, and that of each of the first steps.
    shared = torch.cat([states.mean((0, 1))[None], states.mean(0)[:_FREE_STEPS]])
    span = torch.linalg.qr(shared.T).Q
    for index, share in stops.items():
        row = torch.randn(weight.shape[1], generator=generator)
        # Without them the logit has no constant part: it peaks at some steps of some texts, and not at the start.
        row -= span @ (span.T @ row)
        needed = (best / (states @ row).clamp_min(1e-3)).amin(1)
        # Rounded, so that the order of a sum on another machine does not show.
        weight[index] = row * round(needed.quantile(share).item(), 2)


def _greedy_states(model: torch.nn.Module, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the output layer ``[prompts, steps, hidden]`` along greedy texts, and their best logits."""
    turns = [[{"role": "user", "content": prompt}] for prompt in _PROMPTS]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    states: list[torch.Tensor] = []
    output = model.get_output_embeddings()
    hook = output.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][:, -1]))
    steps = {"max_new_tokens": _THOUGHT_TOKENS, "min_new_tokens": _THOUGHT_TOKENS, "do_sample": False}
    try:
        with torch.no_grad():
            model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **steps)
            taken = torch.stack(states, 1)
            best = output(taken).amax(-1)
    finally:
        hook.remove()
    return taken, best


def _is_text(tokenizer, index: int) -> bool:
    token = tokenizer.decode([index])
    return token not in (*SPECIAL_TOKENS, *THINK_TOKENS) and token.isascii() and token.isprintable()


def _set_generation(model: torch.nn.Module, tokenizer) -> None:
    generation = model.generation_config
    generation.bos_token_id = tokenizer.convert_tokens_to_ids(PAD)
    generation.pad_token_id = tokenizer.convert_tokens_to_ids(PAD)
    generation.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in (EOS, PAD)]
    generation.do_sample = False
