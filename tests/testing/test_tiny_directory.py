"""The tiny directory is one that HuggingFace's own classes read, the same each time, and its model writes real text."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from twn_kernels import testing
from twn_kernels.errors import OptionError
from twn_kernels.testing.tiny_directory import SPECIAL_TOKENS, write_tiny_model
from twn_kernels.testing.tiny_models import FAMILIES, VISION_FAMILIES

TOPICS = ("a red flower", "42", "Paris", "the old temple", "x", "a dog in the snow", "la maison", "stock prices")


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    return request.param, write_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def _model(family, directory):
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    return auto.from_pretrained(directory).eval()


def _prompts(tokenizer):
    turns = [[{"role": "user", "content": topic}] for topic in TOPICS]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return tokenizer(texts, padding=True, return_tensors="pt")


def test_the_same_arguments_write_the_same_bytes(written, tmp_path):
    family, first = written
    second = write_tiny_model(tmp_path, family)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_another_seed_writes_another_model_and_the_same_tokenizer(tmp_path):
    one, two = (write_tiny_model(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1))
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    assert (one / "model.safetensors").read_bytes() != (two / "model.safetensors").read_bytes()


def test_the_tokenizer_knows_any_text_and_the_models_special_tokens(written):
    family, directory = written
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in ("plain words", "  two  spaces\n\n", "naïve 漢字 😀", "<think>so</think>", "\x00\x07"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for token in (*SPECIAL_TOKENS, "<think>", "</think>"):
        assert len(tokenizer(token).input_ids) == 1, token
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|endoftext|>", "<|im_end|>", "left")
    config = _model(family, directory).config
    assert config.get_text_config().vocab_size == len(tokenizer)
    if family in VISION_FAMILIES:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        assert [getattr(config, name) for name in names] == tokenizer.convert_tokens_to_ids(list(tokens))


def test_thinking_tags_can_be_plain_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path, "llama", think_tokens=False))
    assert len(tokenizer("</think>").input_ids) > 1
    assert tokenizer.decode(tokenizer("</think>").input_ids) == "</think>"


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_processor_fits_the_vision_tower(family, tmp_path):
    directory = write_tiny_model(tmp_path, family)
    processor, model = AutoProcessor.from_pretrained(directory), _model(family, directory)
    pixels = np.random.randint(0, 256, (40, 56, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    batch = processor(text=[text], images=[pixels], videos=[[pixels] * 4], do_sample_frames=False, return_tensors="pt")
    merged = model.config.vision_config.spatial_merge_size**2
    for kind in ("image", "video"):
        tokens = (batch["input_ids"] == getattr(model.config, f"{kind}_token_id")).sum()
        assert tokens == batch[f"{kind}_grid_thw"].prod(1).sum() // merged
    with torch.no_grad():
        with_image = model(**batch).logits[0, -1]
        batch["pixel_values"] = -batch["pixel_values"]
        assert torch.isfinite(with_image).all()
        assert not torch.equal(model(**batch).logits[0, -1], with_image)


def test_greedy_text_depends_on_the_prompt(written):
    family, directory = written
    tokenizer, model = AutoTokenizer.from_pretrained(directory), _model(family, directory)
    batch = _prompts(tokenizer)
    new = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=24, do_sample=False
    )[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new)
    assert len(set(texts)) >= len(TOPICS) // 2, texts
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        assert not [text for text in texts if re.search(r"<\|(image|video|vision|im_start)", text)], texts
        stripped = "".join(texts).replace("<|im_end|>", "").replace("<|endoftext|>", "")
        assert stripped.isascii() and stripped.isprintable()


def test_some_greedy_texts_end_and_some_do_not(tmp_path):
    directory = write_tiny_model(tmp_path, "qwen3_vl")
    tokenizer, model = AutoTokenizer.from_pretrained(directory), _model("qwen3_vl", directory)
    batch = _prompts(tokenizer)
    new = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=24, do_sample=False
    )[:, batch["input_ids"].shape[1] :]
    closed = ["</think>" in text for text in tokenizer.batch_decode(new)]
    assert 0 < sum(closed) < len(TOPICS)


def test_overrides_and_dtype_reach_the_model(tmp_path):
    directory = write_tiny_model(tmp_path, "qwen3_vl", dtype=torch.bfloat16, hidden_size=32, num_hidden_layers=3)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
    assert model.get_input_embeddings().weight.shape[1] == 32
    assert model.config.text_config.num_hidden_layers == 3
    assert model.dtype == torch.bfloat16


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(OptionError, match='family "qwen3vl" has no tiny model; .*Did you mean "qwen3_vl"\\?'):
        write_tiny_model(tmp_path, "qwen3vl")
    expected = '"vocab_size" cannot be chosen: the vocabulary is that of the tokenizer written with it'
    with pytest.raises(OptionError, match=expected):
        write_tiny_model(tmp_path, vocab_size=99)
    assert list(tmp_path.iterdir()) == []


def test_demo_directories_belong_together(tmp_path):
    from twn_kernels import load_checkpoint

    base, twn = testing.write_demo_directories(tmp_path)
    checkpoint = load_checkpoint(twn)
    hidden = _model("qwen3_vl", base).get_input_embeddings().weight.shape[1]
    assert tuple(checkpoint.queries.shape) == (4, hidden)
    ranks = {name: {layer.rank for layer in adapter.layers.values()} for name, adapter in checkpoint.adapters.items()}
    assert ranks == {"reasoning": {8}, "embedding": {4}}


def test_the_package_names_its_tools():
    assert testing.write_tiny_model is write_tiny_model
    with pytest.raises(AttributeError, match="has no 'write_tiny_modl'. Did you mean \"write_tiny_model\"\\?"):
        _ = testing.write_tiny_modl
