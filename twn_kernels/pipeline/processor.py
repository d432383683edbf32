"""A model's own processor or tokenizer behind one face: templates, tokens, pixel values.

Owns how a directory's processor is loaded (with and without torchvision) and how messages become a left-padded batch.
Which inputs there are, and their errors, is :mod:`twn_kernels.pipeline.inputs`'.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from twn_kernels.errors import CheckpointError, InputError, MissingDependency, OptionError
from twn_kernels.pipeline.inputs import EncodedBatch, Message, Part, parse_input
from twn_kernels.pipeline.media import DEFAULT_MAX_IMAGE_PIXELS, Video

__all__ = ["Processor", "load_processor"]

_IMAGE_TOKEN, _VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
_TORCHVISION = "which is not installed. Run: pip install torchvision"
_KEPT_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


class _Parts(NamedTuple):
    """What a directory's processor consists of; ``whole`` is HuggingFace's processor, where it could be made."""

    tokenizer: Any
    whole: Any = None
    images: Any = None
    template: str | None = None
    missing: str = ""  # why there is a tokenizer alone, where more was looked for


class Processor:
    """Messages in, tensors out.

    Prompts are rendered with the directory's chat template and end with its generation prompt; a model without a
    template gets plain text. Padding is on the left; a tokenizer without a padding token pads with its end of text.

    Attributes:
        tokenizer: HuggingFace's.
        max_image_pixels: larger images are refused before they are decoded.
    """

    def __init__(self, parts: _Parts, *, max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> None:
        if isinstance(max_image_pixels, bool) or not isinstance(max_image_pixels, int) or max_image_pixels < 1:
            raise OptionError(f"max_image_pixels must be a whole number of at least 1, got {max_image_pixels!r}.")
        parts = _with_padding(parts)
        self._whole, self._images, self.tokenizer = parts.whole, parts.images, parts.tokenizer
        self._template = parts.template or getattr(parts.whole, "chat_template", None)
        self._template = self._template or getattr(parts.tokenizer, "chat_template", None)
        self.max_image_pixels = max_image_pixels
        self._videos = getattr(parts.whole, "video_processor", None)
        self._missing = f" Its processor does not load: {parts.missing}" if parts.missing else ""
        self._system_turns = self._takes_system_turns()

    @property
    def takes_images(self) -> bool:
        """Whether there is a processor of images."""
        return self._images is not None

    @property
    def takes_videos(self) -> bool:
        """Whether there is a processor of videos."""
        return self._videos is not None

    def parse(self, value: Any, index: int) -> list[Message]:
        """Read one input for this model; arguments and errors as in :func:`twn_kernels.pipeline.inputs.parse_input`."""
        fps, most = getattr(self._videos, "fps", None) or 2.0, getattr(self._videos, "max_frames", None) or 768
        limit = self.max_image_pixels
        messages = parse_input(value, index, max_image_pixels=limit, fps=float(fps), max_frames=int(most))
        for part in (part for message in messages for part in message.parts):
            self._check(part, index)
        return messages

    def _check(self, part: Part, index: int) -> None:
        if part.kind == "text":
            if token := self.placeholder_in(part.value):
                raise InputError(
                    f'input {index}: the text holds "{token}", which stands for pixels in this model. Remove it.'
                )
        elif part.kind == "image" and not self.takes_images:
            raise InputError(f"input {index}: the model takes text only, got an image.{self._missing}")
        elif part.kind == "image":
            self._check_size(part.value, index)
        elif part.kind == "video" and not self.takes_videos:
            if self.takes_images and self._whole is None:
                raise MissingDependency(f"input {index}: videos need torchvision, {_TORCHVISION}")
            takes = "text and images" if self.takes_images else "text only"
            raise InputError(f"input {index}: the model takes {takes}, got a video.{self._missing}")

    def _check_size(self, image: Any, index: int) -> None:
        """What the processor would refuse in its batch (such as an extreme aspect ratio), by its own function."""
        resize = getattr(sys.modules[type(self._images).__module__], "smart_resize", None)
        if resize is None or not getattr(self._images, "do_resize", False):
            return
        try:
            resize(height=image.height, width=image.width)
        except TypeError:  # another model's function of that name
            return
        except ValueError as error:
            raise InputError(f"input {index}: the model's processor refuses it: {error}") from error

    def placeholder_in(self, text: str) -> str | None:
        """The first token in a text that stands for an image's or a video's pixels; None where there is none."""
        known = [self._token("image")] * self.takes_images
        known += [self._token("video")] * (self.takes_videos or self._composed())
        return next((token for token in known if token in text), None)

    def _composed(self) -> bool:
        return self._whole is None and self._images is not None

    def _token(self, kind: str) -> str:
        default = _IMAGE_TOKEN if kind == "image" else _VIDEO_TOKEN
        token = getattr(self._whole, f"{kind}_token", None) or getattr(self.tokenizer, f"{kind}_token", None)
        return str(token or default)

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text without any that the tokenizer would put around it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def raw_text_of(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text_of(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[Message], prompt: str | None = None) -> str:
        """The prompt's text, with one placeholder for each image and video, ending with the generation prompt.

        Args:
            messages: one input.
            prompt: an instruction. It becomes the system turn, before the text of one that is there; where the template
                takes no system turn, or there is none, it comes before the input's first text on a line of its own.
        """
        messages = _instructed(messages, prompt, as_system=self._system_turns)
        if self._template is None:
            return "\n".join(self._plain(message) for message in messages)
        turns = [{"role": message.role, "content": self._content(message)} for message in messages]
        return self._apply(turns)

    def _apply(self, turns: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )

    def _content(self, message: Message) -> str | list[dict]:
        """Typed parts for models that see; text models' templates take strings."""
        if self.takes_images:
            parts = message.parts
            return [{"type": "text", "text": value} if kind == "text" else {"type": kind} for kind, value in parts]
        return "".join(part.value for part in message.parts)

    def _plain(self, message: Message) -> str:
        vocabulary = self.tokenizer.get_vocab()
        around = ("<|vision_start|>", "<|vision_end|>") if "<|vision_start|>" in vocabulary else ("", "")
        pieces = [part.value if part.kind == "text" else self._token(part.kind).join(around) for part in message.parts]
        return "".join(pieces)

    def _takes_system_turns(self) -> bool:
        if self._template is None:
            return False
        marks = ["7f3a9c", "b2e81d"]
        turns = [Message(role, [Part("text", mark)]) for role, mark in zip(("system", "user"), marks, strict=True)]
        try:
            text = self._apply([{"role": turn.role, "content": self._content(turn)} for turn in turns])
        except Exception:  # templates refuse a role by raising whatever they like
            return False
        return all(mark in text for mark in marks)

    def batch(
        self, conversations: Sequence[Sequence[Message]], prompt: str | None = None, *, first_index: int = 0
    ) -> EncodedBatch:
        """Encode inputs together.

        Args:
            conversations: one list of messages an input, from :meth:`parse`.
            prompt: an instruction for all of them; see :meth:`render`.
            first_index: index of the first among the inputs, for errors.

        Raises:
            InputError: the template or the processor refuses an input; the message begins with its index.
        """
        if not conversations:
            raise InputError("a batch must have at least one input, got none.")
        if prompt is not None and not isinstance(prompt, str):
            raise OptionError(f"prompt must be a string or None, got {type(prompt).__name__}.")
        try:
            return self._batch(conversations, prompt)
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            for place, conversation in enumerate(conversations):
                try:
                    self._batch([conversation], prompt)
                except Exception as single:
                    where = f"input {first_index + place}"
                    raise InputError(f"{where}: the model's processor refuses it: {single}") from single
            raise InputError(f"inputs from {first_index}: the model's processor refuses the batch: {error}") from error

    def _batch(self, conversations: Sequence[Sequence[Message]], prompt: str | None) -> EncodedBatch:
        texts = [self.render(conversation, prompt) for conversation in conversations]
        media = [[part for message in messages for part in message.parts] for messages in conversations]
        images = [[part.value for part in parts if part.kind == "image"] for parts in media]
        videos = [[part.value for part in parts if part.kind == "video"] for parts in media]
        for text, own_images, own_videos in zip(texts, images, videos, strict=True):
            self._check_placeholders(text, len(own_images), len(own_videos))
        flat_images = [image for own in images for image in own]
        flat_videos = [video for own in videos for video in own]
        encode = self._with_whole if self._whole is not None else self._without_whole
        tensors = encode(texts, flat_images, flat_videos)
        kept = {name: value for name, value in tensors.items() if name in _KEPT_TEXT or not name.endswith("_ids")}
        counts = [[len(own) for own in kind] for kind in (images, videos)]
        return EncodedBatch(kept, *counts, pad_id=self.tokenizer.pad_token_id)

    def _check_placeholders(self, text: str, images: int, videos: int) -> None:
        for kind, count in (("image", images), ("video", videos)):
            if count and text.count(self._token(kind)) != count:
                raise ValueError(
                    f"the chat template writes {text.count(self._token(kind))} placeholders "
                    f'"{self._token(kind)}" for {count} {kind}s'
                )

    def _text_options(self, texts: Sequence[str]) -> dict[str, Any]:
        # A template writes the tokens that begin a text itself; without one they are the tokenizer's to add.
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        begin = self.tokenizer.bos_token
        if self._template is not None and (self._whole is None or (begin and texts[0].startswith(begin))):
            options["add_special_tokens"] = False
        return options

    def _with_whole(self, texts: list[str], images: list, videos: list[Video]) -> dict[str, Any]:
        options = self._text_options(texts)
        if images:
            options["images"] = images
        if videos:
            least = getattr(self._videos, "temporal_patch_size", None) or 1
            padded = [_at_least(video, least) for video in videos]
            options["videos"] = [video.frames for video in padded]
            # The frames that were given, or sampled from the file, are the frames that are embedded.
            options["do_sample_frames"] = False
            options["video_metadata"] = [
                {"fps": video.fps, "total_num_frames": video.indices[-1] + 1, "frames_indices": list(video.indices)}
                for video in padded
            ]
        return dict(self._whole(text=texts, **options))

    def _without_whole(self, texts: list[str], images: list, videos: list[Video]) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        if images:
            # Pillow images have their channels last, also where their height is 1 or 3 and a guess would fail.
            tensors = dict(self._images(images=images, return_tensors="pt", input_data_format="channels_last"))
            merged = tensors["image_grid_thw"].prod(1) // self._images.merge_size**2
            counts = iter(merged.tolist())
            token = self._token("image")
            texts = [re.sub(re.escape(token), lambda _: token * next(counts), text) for text in texts]
        tensors = dict(self.tokenizer(texts, **self._text_options(texts))) | tensors
        if self.takes_images:
            ids = tensors["input_ids"]
            tensors["mm_token_type_ids"] = (ids == self.tokenizer.convert_tokens_to_ids(self._token("image"))).to(ids)
        return tensors


def _at_least(video: Video, frames: int) -> Video:
    """The video with its last frame repeated where it has fewer frames than one temporal patch."""
    missing = max(0, frames - len(video.frames))
    return Video(video.frames + video.frames[-1:] * missing, video.fps, video.indices + video.indices[-1:] * missing)


def _instructed(messages: Sequence[Message], prompt: str | None, *, as_system: bool) -> list[Message]:
    messages = list(messages)
    if not prompt or not prompt.strip():
        return messages
    if as_system and messages[0].role != "system":
        return [Message("system", [Part("text", prompt)]), *messages]
    head = messages[0]
    parts = list(head.parts)
    place = next((i for i, part in enumerate(parts) if part.kind == "text"), None)
    if place is None:
        parts.append(Part("text", prompt))
    else:
        parts[place] = Part("text", f"{prompt}\n{parts[place].value}")
    return [Message(head.role, parts), *messages[1:]]


def _with_padding(parts: _Parts) -> _Parts:
    tokenizer = parts.tokenizer
    if tokenizer.pad_token_id is not None:
        return parts
    if tokenizer.eos_token is None:
        raise CheckpointError("the tokenizer has neither a padding nor an end-of-text token. Set tokenizer.pad_token.")
    # A copy: the caller's own object stays as it is.
    if parts.whole is not None:
        whole = copy.deepcopy(parts.whole)
        tokenizer = whole.tokenizer
        parts = parts._replace(whole=whole)
    else:
        tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return parts._replace(tokenizer=tokenizer)


def load_processor(
    source: str | PathLike | Any,
    *,
    max_image_pixels: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
) -> Processor:
    """Load the processor of a model, or the tokenizer of one that only reads.

    Without torchvision, a Qwen-VL directory's texts and images still work (Pillow resizes instead); its videos do not.

    Args:
        source: a directory, a hub id, or a HuggingFace processor or tokenizer, which is left as it is.
        max_image_pixels: larger images are refused before they are decoded; None: 64 million.
        revision, token, cache_dir, local_files_only: for hub ids, as in transformers.

    Raises:
        CheckpointError: there is neither processor nor tokenizer.
        MissingDependency: transformers, or what the processor needs, is absent.
        OptionError: ``source`` or ``max_image_pixels`` is nothing that can be used.
    """
    limit = DEFAULT_MAX_IMAGE_PIXELS if max_image_pixels is None else max_image_pixels
    if isinstance(source, Processor):
        return source
    if isinstance(source, str | PathLike):
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        parts = _load(str(source), {name: value for name, value in hub.items() if value})
    else:
        parts = _given(source)
    return Processor(parts, max_image_pixels=limit)


def _given(source: Any) -> _Parts:
    if hasattr(source, "tokenizer") and callable(source):
        return _Parts(source.tokenizer, source, getattr(source, "image_processor", None))
    if hasattr(source, "convert_tokens_to_ids") and callable(source):
        return _Parts(source)
    raise OptionError(
        f"processor must be a directory, a hub id, a HuggingFace processor or a tokenizer; got {type(source).__name__}."
    )


def _load(name: str, hub: dict[str, Any]) -> _Parts:
    try:
        from transformers import AutoProcessor, AutoTokenizer
    except ImportError as error:
        raise MissingDependency("a model's processor needs transformers. Run: pip install transformers") from error
    try:
        found = AutoProcessor.from_pretrained(name, **hub)
        if hasattr(found, "tokenizer") or hasattr(found, "convert_tokens_to_ids"):
            return _given(found)
    except ImportError as error:
        return _composed(name, hub, error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        missing = (str(error).strip().splitlines() or [type(error).__name__])[0]
    else:
        missing = ""
    try:
        return _Parts(AutoTokenizer.from_pretrained(name, **hub), missing=missing)
    except Exception as error:
        raise CheckpointError(f'"{name}" holds neither a processor nor a tokenizer that loads: {error}') from error


def _composed(name: str, hub: dict[str, Any], error: ImportError) -> _Parts:
    """Tokenizer, Pillow-only image processor and template of a Qwen-VL directory, where torchvision is absent."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **hub)
    settings = _json(name, "preprocessor_config.json", hub) or _json(name, "processor_config.json", hub) or {}
    settings = settings.get("image_processor", settings)
    kind = str(settings.get("image_processor_type", ""))
    if not kind.startswith("Qwen2VLImageProcessor"):
        raise MissingDependency(f'the processor of "{name}" does not load: {str(error).strip()}') from error
    # Before transformers 5 the class without torchvision had the plain name.
    pillow = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    template = (_json(name, "chat_template.json", hub) or {}).get("chat_template")
    return _Parts(tokenizer, images=pillow.from_pretrained(name, **hub), template=template)


def _json(name: str, file: str, hub: dict[str, Any]) -> dict | None:
    from transformers.utils import cached_file

    path = cached_file(name, file, **hub, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
