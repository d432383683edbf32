"""Processors load from directories and objects, with and without torchvision, and refuse what they cannot take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

import twn_kernels
from twn_kernels.errors import CheckpointError, InputError, OptionError
from twn_kernels.pipeline.inputs import Message, Part
from twn_kernels.pipeline.processor import load_processor
from twn_kernels.testing.tiny_directory import write_tiny_model


@pytest.fixture(scope="module")
def sighted(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


def _ids(processor, value, prompt=None):
    return processor.batch([processor.parse(value, 0)], prompt).tensors["input_ids"]


def test_a_directory_and_its_objects_give_the_same(sighted, blind):
    for directory, auto in ((sighted, AutoProcessor), (blind, AutoTokenizer)):
        given = load_processor(auto.from_pretrained(directory))
        loaded = load_processor(directory)
        assert loaded.takes_images == given.takes_images == (directory is sighted)
        assert torch.equal(_ids(given, "some text"), _ids(loaded, "some text"))


def test_text_equals_the_tokenizers_own_template(blind):
    tokenizer = AutoTokenizer.from_pretrained(blind)
    turns = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "a flower"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert _ids(load_processor(blind), "a flower", "Find it.")[0].tolist() == expected


def test_without_a_template_the_text_is_plain(blind):
    tokenizer = AutoTokenizer.from_pretrained(blind)
    tokenizer.chat_template = None
    processor = load_processor(tokenizer)
    assert processor.render(processor.parse("a flower", 0), "Find it.") == "Find it.\na flower"
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert processor.render(processor.parse(chat, 0)) == "one\ntwo"


def test_a_template_without_system_turns_gets_the_prompt_before_the_text(blind):
    tokenizer = AutoTokenizer.from_pretrained(blind)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    silent = "{% for m in messages if m['role'] == 'user' %}[{{ m['content'] }}]{% endfor %}"
    for template in (refusal + silent, silent):
        tokenizer.chat_template = template
        processor = load_processor(tokenizer)
        assert processor.render(processor.parse("a flower", 0), "Find it.") == "[Find it.\na flower]"
        assert processor.render([Message("user", [Part("text", "x")])], None) == "[x]"


def test_a_missing_padding_token_becomes_the_end_of_text_in_a_copy(blind, sighted):
    tokenizer = AutoTokenizer.from_pretrained(blind)
    whole = AutoProcessor.from_pretrained(sighted)
    for given, own in ((tokenizer, tokenizer), (whole, whole.tokenizer)):
        own.pad_token = None
        processor = load_processor(given)
        batch = processor.batch([processor.parse(text, 0) for text in ("x", "a longer text")])
        padding = batch.tensors["input_ids"][batch.tensors["attention_mask"] == 0]
        assert len(padding) and (padding == own.eos_token_id).all()
        assert own.pad_token is None
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="neither a padding nor an end-of-text token. Set tokenizer.pad_token."):
        load_processor(tokenizer)


def test_what_the_model_cannot_take_is_refused(sighted, blind):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    processor = load_processor(blind)
    for value, kind in ((pixels, "an image"), ({"video": [pixels]}, "a video")):
        with pytest.raises(InputError, match=f"^input 5: the model takes text only, got {kind}.$"):
            processor.parse(value, 5)
    processor = load_processor(sighted)
    for token in ("<|image_pad|>", "<|video_pad|>"):
        message = f'input 1: the text holds "{token}", which stands for pixels in this model. Remove it.'
        with pytest.raises(InputError, match=re.escape(message)):
            processor.parse(f"a {token} b", 1)
    narrow = Image.new("RGB", (900, 2))
    message = "^input 8: the model's processor refuses it: absolute aspect ratio must be"
    with pytest.raises(InputError, match=message):
        processor.parse(narrow, 8)
    with pytest.raises(InputError, match=message):
        processor.batch([processor.parse("fine", 7), [Message("user", [Part("image", narrow)])]], first_index=7)


def test_the_limit_of_pixels_is_the_processors(sighted):
    with pytest.raises(InputError, match="^input 0: image has 8 x 8 = 64 pixels; at most 63 are decoded."):
        load_processor(sighted, max_image_pixels=63).parse(np.zeros((8, 8)), 0)
    for limit in (0, 1.5, True):
        with pytest.raises(OptionError, match=f"max_image_pixels must be a whole number of at least 1, got {limit}."):
            load_processor(sighted, max_image_pixels=limit)


def test_what_is_no_processor_is_named(tmp_path):
    with pytest.raises(OptionError, match="processor must be a directory, .*; got int."):
        load_processor(5)
    with pytest.raises(CheckpointError, match='empty" holds neither a processor nor a tokenizer that loads: '):
        (tmp_path / "empty").mkdir()
        load_processor(tmp_path / "empty", local_files_only=True)


def test_images_are_refused_with_the_reason_where_the_processor_does_not_load(sighted, tmp_path):
    shutil.copytree(sighted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").unlink()
    processor = load_processor(tmp_path, local_files_only=True)
    assert processor.render(processor.parse("x", 0)).endswith("assistant\n")
    with pytest.raises(InputError, match="takes text only, got an image. Its processor does not load: ."):
        processor.parse(np.zeros((8, 8)), 0)


def test_token_ids_and_text_are_inverse(sighted):
    processor = load_processor(sighted)
    assert processor.token_ids("") == []
    assert processor.text_of(processor.token_ids("<think> a thought </think>")) == "<think> a thought </think>"
    assert processor.text_of(processor.token_ids("x<|im_end|>")) == "x"


_WITHOUT_TORCHVISION = """
import json, sys
sys.modules["torchvision"] = None
import numpy as np, torch
from transformers import Qwen2VLImageProcessorPil
from twn_kernels.errors import MissingDependency
from twn_kernels.pipeline.processor import load_processor
from twn_kernels.testing.tiny_directory import write_tiny_model

directory = write_tiny_model(sys.argv[2], "qwen2_vl") if sys.argv[1] == "write" else sys.argv[1]
processor = load_processor(directory)
images = [np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed, shape in
          enumerate([(24, 32, 3), (3, 40, 3)])]
values = ["a text", {"image": images, "text": "two"}, images[1]]
batch = processor.batch([processor.parse(value, place) for place, value in enumerate(values)], "Find it.")
pillow = Qwen2VLImageProcessorPil.from_pretrained(directory)
parts = [pillow(images=processor.parse(image, 0)[0].parts[0].value, return_tensors="pt",
         input_data_format="channels_last")["pixel_values"] for image in (*images, images[1])]
try:
    processor.parse({"video": [images[0]] * 2}, 4)
    video = "taken"
except MissingDependency as error:
    video = str(error)
part = batch.select([2])
alone = processor.batch([processor.parse(values[2], 0)], "Find it.")
print(json.dumps({
    "ids": batch.tensors["input_ids"].tolist(), "grid": batch.tensors["image_grid_thw"].tolist(),
    "kinds": batch.tensors["mm_token_type_ids"].tolist(), "video": video,
    "pixels": torch.equal(batch.tensors["pixel_values"], torch.cat(parts)),
    "select": all(torch.equal(part.tensors[name], alone.tensors[name]) for name in alone.tensors),
}))
"""


def _without_torchvision(*arguments):
    root = str(Path(twn_kernels.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _WITHOUT_TORCHVISION, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_text_and_images_work_without_torchvision(sighted, tmp_path):
    got = _without_torchvision(sighted)
    assert got["pixels"] and got["select"]
    assert got["video"] == ("input 4: videos need torchvision, which is not installed. Run: pip install torchvision")
    processor = load_processor(sighted)
    images = [
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        for seed, shape in enumerate([(24, 32, 3), (3, 40, 3)])
    ]
    values = ["a text", {"image": images, "text": "two"}, images[1]]
    batch = processor.batch([processor.parse(value, place) for place, value in enumerate(values)], "Find it.")
    for name, key in (("ids", "input_ids"), ("grid", "image_grid_thw"), ("kinds", "mm_token_type_ids")):
        assert got[name] == batch.tensors[key].tolist(), name
    own = _without_torchvision("write", tmp_path)
    assert own["pixels"] and own["ids"] == got["ids"]
