"""A tiny model with a real tokenizer and a real processor, saved as any HuggingFace directory.

Owns the tokenizer (a byte-level BPE like Qwen's, trained here on a few sentences), the chat template, the processor and
the tuning of the output layer; the model itself is :mod:`twn_kernels.testing.tiny_models`'. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from twn_kernels.errors import OptionError, did_you_mean, quoted
from twn_kernels.testing.ownership import claim, mark
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES, tiny_config, tiny_model

__all__ = ["SPECIAL_TOKENS", "THINK_TOKENS", "write_tiny_model"]

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
THINK_TOKENS = ("<think>", "</think>")

_PAD, _EOS = "<|endoftext|>", "<|im_end|>"
_MERGES = 128
# The split of Qwen's tokenizers: contractions, words with their leading space, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "The old temple stands above the trees; its roofs are gold and red in the evening light.",
    "A red flower grows in the garden, and a small bird rests on the stone wall.",
    "What is in the picture? There is a number on the page, and the number is seven.",
    "Which of these images shows the same thing as the text? Think first, then answer in a word.",
    "Find the document that answers the question. Describe the image in one sentence.",
    "The user asks about the photograph, so the answer is about the thing in the foreground.",
    "system user assistant thinking image video question answer query document page",
)

_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
MEDIA
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_MEDIA = """\
{%- if part['type'] == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' %}"""
_NO_MEDIA = "{%- if part['type'] == 'text' %}"

# Smallest and largest area of an image, and of all frames of a video together, in pixels; a token is 8 x 8 of them.
_IMAGE_AREA = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
_VIDEO_AREA = {"shortest_edge": 2 * 16 * 16, "longest_edge": 4 * 64 * 64}
# Random attention averages its context away and greedy text would forget the prompt; larger output projections keep it.
_ATTENTION_GAIN = 2.0
_ATTENTION_OUTPUTS = ("o_proj.weight", "attention.dense.weight")
_THOUGHT_TOKENS = 24
_FREE_STEPS = 3
# Share of the prompts below whose greedy text writes the token within that many.
_STOP_SHARES = {"</think>": 0.35, _EOS: 0.2}
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
    tokenizer = _tokenizer(family, think_tokens)
    config = _config(family, tokenizer, overrides)
    model = tiny_model(family, seed=seed, config=config)
    _set_generation(model, tokenizer)
    _tune_output(model, tokenizer, seed)
    model.to(dtype).save_pretrained(out)
    if family in VISION_FAMILIES:
        _write_processor(out, family, tokenizer, config.vision_config)
    else:
        tokenizer.save_pretrained(out)
    return out


def _tokenizer(family: str, think_tokens: bool):
    """Qwen2's tokenizer class over a vocabulary of the 256 bytes, the merges of the corpus and the added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _MERGES, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    if think_tokens:
        bpe.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    with tempfile.TemporaryDirectory() as directory:
        bpe.save(str(Path(directory) / "tokenizer.json"))
        tokenizer = Qwen2TokenizerFast.from_pretrained(
            directory,
            unk_token=None,
            eos_token=_EOS,
            pad_token=_PAD,
            padding_side="left",
            model_max_length=4096,
            clean_up_tokenization_spaces=False,
        )
    tokenizer.chat_template = _TEMPLATE.replace("MEDIA", _MEDIA if family in VISION_FAMILIES else _NO_MEDIA)
    return tokenizer


def _config(family: str, tokenizer, overrides: dict[str, Any]):
    token_id = tokenizer.convert_tokens_to_ids
    ids = {"bos_token_id": token_id(_PAD), "eos_token_id": token_id(_EOS), "pad_token_id": token_id(_PAD)}
    if family in VISION_FAMILIES:
        ids |= {
            "image_token_id": token_id("<|image_pad|>"),
            "video_token_id": token_id("<|video_pad|>"),
            "vision_start_token_id": token_id("<|vision_start|>"),
            "vision_end_token_id": token_id("<|vision_end|>"),
        }
    return tiny_config(family, vocab_size=len(tokenizer), **ids, **overrides)


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
    generation.bos_token_id = tokenizer.convert_tokens_to_ids(_PAD)
    generation.pad_token_id = tokenizer.convert_tokens_to_ids(_PAD)
    generation.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in (_EOS, _PAD)]
    generation.do_sample = False


def _write_processor(out: Path, family: str, tokenizer, vision) -> None:
    """Save the family's processor; without torchvision, the same files without a processor of videos."""
    import transformers

    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    look = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]} if family == "qwen3_vl" else {}
    if not _has_torchvision():
        image = transformers.Qwen2VLImageProcessorPil(size=dict(_IMAGE_AREA), **sizes, **look)
        image.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return
    image = transformers.Qwen2VLImageProcessor(size=dict(_IMAGE_AREA), **sizes, **look)
    video_class, processor_class, more = {
        "qwen2_vl": (transformers.Qwen2VLVideoProcessor, transformers.Qwen2VLProcessor, {}),
        "qwen2_5_vl": (transformers.Qwen2VLVideoProcessor, transformers.Qwen2_5_VLProcessor, {}),
        # Unset, transformers warns at each video that the default will become True.
        "qwen3_vl": (transformers.Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor, {"cap_pixels_per_frame": True}),
    }[family]
    video = video_class(size=dict(_VIDEO_AREA), min_frames=2, max_frames=16, **sizes, **look, **more)
    processor = processor_class(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(out)


def _has_torchvision() -> bool:
    try:
        return find_spec("torchvision") is not None
    except ValueError:  # sys.modules holds None in its place
        return False
