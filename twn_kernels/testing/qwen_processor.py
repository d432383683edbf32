"""A real tokenizer and a real processor of the Qwen-VL classes, made here: nothing is downloaded.

Owns the tokenizer (a byte-level BPE like Qwen's, trained on a corpus that the caller gives), the chat template and the
processors of images and videos. Which model they belong to is the caller's business.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from twn_kernels.testing.tiny_models import VISION_FAMILIES

__all__ = ["EOS", "PAD", "SPECIAL_TOKENS", "THINK_TOKENS", "qwen_token_ids", "qwen_tokenizer", "write_processor"]

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
THINK_TOKENS = ("<think>", "</think>")

PAD, EOS = "<|endoftext|>", "<|im_end|>"
# The split of Qwen's tokenizers: contractions, words with their leading space, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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


def qwen_tokenizer(family: str, corpus: Iterable[str], *, merges: int = 128, think_tokens: bool = True):
    """Qwen2's tokenizer class over a vocabulary of the 256 bytes, the merges of a corpus and the added tokens.

    Args:
        family: of the model that it is for; one that sees gets a chat template with images and videos.
        corpus: what the merges are learned from.
        merges: how many there may be at most; pairs that occur once are never merged.
        think_tokens: make each of :data:`THINK_TOKENS` one ordinary token.
    """
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
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    if think_tokens:
        bpe.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    with tempfile.TemporaryDirectory() as directory:
        bpe.save(str(Path(directory) / "tokenizer.json"))
        tokenizer = Qwen2TokenizerFast.from_pretrained(
            directory,
            unk_token=None,
            eos_token=EOS,
            pad_token=PAD,
            padding_side="left",
            model_max_length=4096,
            clean_up_tokenization_spaces=False,
        )
    tokenizer.chat_template = _TEMPLATE.replace("MEDIA", _MEDIA if family in VISION_FAMILIES else _NO_MEDIA)
    return tokenizer


def qwen_token_ids(tokenizer, family: str) -> dict[str, int]:
    """The fields of a configuration that name special tokens of :func:`qwen_tokenizer`."""
    token_id = tokenizer.convert_tokens_to_ids
    ids = {"bos_token_id": token_id(PAD), "eos_token_id": token_id(EOS), "pad_token_id": token_id(PAD)}
    if family in VISION_FAMILIES:
        ids |= {
            "image_token_id": token_id("<|image_pad|>"),
            "video_token_id": token_id("<|video_pad|>"),
            "vision_start_token_id": token_id("<|vision_start|>"),
            "vision_end_token_id": token_id("<|vision_end|>"),
        }
    return ids


def write_processor(
    out: Path, family: str, tokenizer, vision, *, image_area: tuple[int, int] = (16 * 16, 64 * 64)
) -> None:
    """Save the family's processor; without torchvision, the same files without a processor of videos.

    Args:
        out: the model's directory.
        family: one of :data:`twn_kernels.testing.tiny_models.VISION_FAMILIES`.
        tokenizer: of :func:`qwen_tokenizer`.
        vision: the model's ``vision_config``, for the size of its patches.
        image_area: smallest and largest area that an image is resized to, in pixels; all frames of a video together
            have from twice the one to four times the other.
    """
    import transformers

    image_size, video_size = (
        {"shortest_edge": times[0] * image_area[0], "longest_edge": times[1] * image_area[1]}
        for times in ((1, 1), (2, 4))
    )

    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    look = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]} if family == "qwen3_vl" else {}
    if not _has_torchvision():
        image = transformers.Qwen2VLImageProcessorPil(size=image_size, **sizes, **look)
        image.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return
    image = transformers.Qwen2VLImageProcessor(size=image_size, **sizes, **look)
    video_class, processor_class, more = {
        "qwen2_vl": (transformers.Qwen2VLVideoProcessor, transformers.Qwen2VLProcessor, {}),
        "qwen2_5_vl": (transformers.Qwen2VLVideoProcessor, transformers.Qwen2_5_VLProcessor, {}),
        # Unset, transformers warns at each video that the default will become True.
        "qwen3_vl": (transformers.Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor, {"cap_pixels_per_frame": True}),
    }[family]
    video = video_class(size=video_size, min_frames=2, max_frames=16, **sizes, **look, **more)
    processor = processor_class(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(out)


def _has_torchvision() -> bool:
    try:
        return find_spec("torchvision") is not None
    except ValueError:  # sys.modules holds None in its place
        return False
