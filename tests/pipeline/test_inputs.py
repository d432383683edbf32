"""Each form of an input reads as HuggingFace's own call would, batches split exactly, bad input names its index."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from twn_kernels.errors import InputError, MissingDependency, ShapeError, TWNWarning
from twn_kernels.pipeline.inputs import EncodedBatch, as_list, parse_input
from twn_kernels.pipeline.media import DEFAULT_MAX_IMAGE_PIXELS
from twn_kernels.pipeline.processor import load_processor
from twn_kernels.testing.tiny_directory import write_tiny_model
from twn_kernels.testing.tiny_models import VISION_FAMILIES


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def directory(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def processor(directory):
    return load_processor(directory)


def _pixels(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _direct(directory, content, *, system=None, **media):
    """What HuggingFace's processor gives for one user turn, called as its documentation says."""
    whole = AutoProcessor.from_pretrained(directory)
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turns.append({"role": "user", "content": content})
    text = whole.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return dict(whole(text=[text], padding=True, return_tensors="pt", **media))


def _same(batch, expected):
    got = batch.tensors if isinstance(batch, EncodedBatch) else batch
    expected = expected.tensors if isinstance(expected, EncodedBatch) else expected
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value)), name


def _encode(processor, *values, prompt=None):
    return processor.batch([processor.parse(value, index) for index, value in enumerate(values)], prompt)


IMAGE, TEXT, VIDEO = {"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "video"}


def test_text_is_what_the_processor_gives(directory, processor):
    expected = _direct(directory, [TEXT])
    chat = [{"role": "user", "content": "What is it?"}]
    parts = [{"role": "user", "content": [TEXT]}]
    for value in ("What is it?", {"text": "What is it?"}, {"text": ["What is it?"]}, chat, parts):
        _same(_encode(processor, value), expected)


def test_a_prompt_is_the_system_turn(directory, processor):
    expected = _direct(directory, [TEXT], system="Find it.")
    _same(_encode(processor, "What is it?", prompt="Find it."), expected)
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    _same(_encode(processor, own, prompt="Find it."), _direct(directory, [TEXT], system="Find it.\nBe brief."))


def test_each_form_of_an_image_gives_the_same_tensors(directory, processor, tmp_path):
    pixels = _pixels()
    image, path = Image.fromarray(pixels), tmp_path / "picture.png"
    image.save(path)
    expected = _direct(directory, [IMAGE], images=[image])
    floats = torch.from_numpy(pixels).permute(2, 0, 1).double() / 255
    forms = [image, pixels, path, str(path), floats, floats.permute(1, 2, 0).numpy(), {"image": str(path)}]
    forms += [{"page": path}, {"images": [pixels]}, [{"role": "user", "content": [{"type": "image", "image": image}]}]]
    forms += [[{"role": "user", "content": [{"type": "image", "path": str(path)}]}]]
    for form in forms:
        batch = _encode(processor, form)
        _same(batch, expected)
        assert (batch.images_per_row, batch.videos_per_row) == ([1], [0])


def test_each_form_of_a_video_gives_the_same_tensors(directory, processor):
    frames = [Image.fromarray(_pixels(seed=seed)) for seed in range(4)]
    array = np.stack([np.asarray(frame) for frame in frames])
    metadata = [{"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}]
    how = {"videos": [frames], "do_sample_frames": False, "video_metadata": metadata}
    expected = _direct(directory, [VIDEO, TEXT], **how)
    for video in (frames, tuple(frames), array, torch.from_numpy(array).permute(0, 3, 1, 2), [array]):
        _same(_encode(processor, {"text": "What is it?", "video": video}), expected)
    _same(_encode(processor, array), _direct(directory, [VIDEO], **how))


def test_one_frame_is_a_video_of_two_equal_ones(processor):
    frame = _pixels()
    one, two = (_encode(processor, {"video": [frame] * count}) for count in (1, 2))
    assert torch.equal(one.tensors["pixel_values_videos"], two.tensors["pixel_values_videos"])


def test_modalities_of_a_dict_come_as_videos_images_texts(directory, processor):
    frames, images = [_pixels(seed=1)] * 2, [_pixels(seed=2), _pixels(40, 16, seed=3)]
    got = processor.parse({"text": ["one", "two"], "image": images, "video": frames}, 0)
    assert [part.kind for part in got[0].parts] == ["video", "image", "image", "text", "text"]
    assert [message.role for message in got] == ["user"]


def test_a_batch_is_padded_on_the_left_and_ends_with_the_generation_prompt(processor):
    batch = _encode(processor, "x", "a much longer text than the other", _pixels())
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"]
    assert (mask[:, -1] == 1).all()
    assert (mask.diff(dim=1) >= 0).all()
    assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    for text in processor.tokenizer.batch_decode(ids):
        assert text.endswith("<|im_start|>assistant\n")


def test_select_and_extended_equal_encoding_the_rows_alone(processor):
    values = [
        "short",
        {"image": [_pixels(seed=1), _pixels(48, 16, seed=2)]},
        {"video": [_pixels(seed=3)] * 3},
        _pixels(),
    ]
    values += [
        {"image": _pixels(16, 64), "text": "a text that makes this row the longest of all of them, padding included"}
    ]
    batch = _encode(processor, *values)
    for rows in ([0], [3, 1], [2, 0], [4, 3, 2, 1, 0], [1, 1]):
        part = batch.select(rows)
        _same(part, _encode(processor, *[values[row] for row in rows]))
        assert len(part) == len(rows)
    suffixes = [[5, 6, 7], []]
    grown = batch.extended([3, 0], suffixes)
    for place, row in enumerate((3, 0)):
        alone = batch.select([row]).tensors["input_ids"][0].tolist() + suffixes[place]
        mask = grown.tensors["attention_mask"][place].bool()
        assert grown.tensors["input_ids"][place][mask].tolist() == alone
    with pytest.raises(ShapeError, match=re.escape("rows must be from 0 to 4, got [5].")):
        batch.select([0, 5])


@pytest.mark.parametrize("height, width", [(3, 40), (1, 40), (40, 1), (40, 3), (1, 1)])
def test_thin_images_are_not_mistaken_for_channels(directory, processor, height, width):
    batch = _encode(processor, _pixels(height, width))
    frames, rows, columns = batch.tensors["image_grid_thw"][0].tolist()
    assert (rows <= columns) if height <= width else (rows >= columns)


def test_modes_and_orientation_become_rgb(tmp_path):
    def read(image):
        return np.asarray(parse_input(image, 0)[0].parts[0].value)

    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (read(clear) == 255).all()
    assert (read(Image.new("L", (4, 4), 7)) == 7).all()
    assert (read(Image.new("P", (4, 4), 0).convert("P")) == 0).all()
    deep = np.full((4, 4), 257 * 99, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for value in (deep, Image.fromarray(deep), tmp_path / "deep.png", Image.fromarray(deep.astype(np.int32))):
        assert (read(value) == 99).all()
    assert (read(np.full((4, 4), 1.0)) == 255).all()
    assert (read(torch.full((1, 4, 4), 1.0, dtype=torch.bfloat16)) == 255).all()
    turned = Image.fromarray(_pixels(8, 16))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (read(tmp_path / "turned.png") == np.rot90(_pixels(8, 16), -1)).all()


def test_a_string_is_text_unless_it_names_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("there.png")
    kinds = {"there.png": "image", "see there.png": "text", "http://x.org/page": "text", "a\nb.png": "text"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value, kind in kinds.items():
            assert parse_input(value, 0)[0].parts[0].kind == kind, value
        assert parse_input({"text": "there.png"}, 0)[0].parts[0].kind == "text"
    with pytest.warns(TWNWarning, match='input 4: "absent.png" names no file and is embedded as text'):
        assert parse_input("absent.png", 4)[0].parts[0].kind == "text"


def test_lists_and_single_inputs_are_told_apart():
    chat = [{"role": "user", "content": "x"}]
    for single in ("x", {"text": "x"}, chat, Path("x.png"), _pixels(), torch.zeros(3, 4, 4), Image.new("L", (2, 2))):
        values, alone = as_list(single)
        assert alone and len(values) == 1 and values[0] is single
    for many in (["x"], ("x", "y"), np.array(["x", "y"]), (text for text in "xy"), [], [chat, "x"]):
        assert not as_list(many)[1]
    with pytest.raises(InputError, match="inputs must be one input or a list of them, got NoneType."):
        as_list(None)
    with pytest.raises(InputError, match="got set. A set has no order."):
        as_list({"x"})


def _damaged(tmp_path):
    Image.fromarray(_pixels(64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    Image.new("L", (300, 300)).save(tmp_path / "large.png")


BAD = {
    "none": (None, "expected a string, an image, a video, a dict of modalities or chat messages; got NoneType."),
    "number": (7, "expected a string, an image, a video, a dict of modalities or chat messages; got int."),
    "empty string": ("", "text is empty."),
    "blank string": (" \n", "text is only white space."),
    "empty dict": ({}, 'the dict is empty; expected one or more of "video", "image", "text".'),
    "empty values": ({"text": None, "image": []}, "every value of the dict is empty."),
    "unknown key": ({"txt": "x"}, 'unknown key "txt"; expected "video", "image", "text". Did you mean "text"?'),
    "bare message": ({"role": "user", "content": "x"}, 'unknown key "role"; .* A chat message comes in a list'),
    "wrong text": ({"text": 3}, "text must be a string, got int."),
    "second text": ({"text": ["x", ""]}, "text 1 is empty."),
    "empty list": ([], "the list is empty; expected chat messages."),
    "no messages": (["x"], 'a list must hold chat messages, .* item 0 is str. Several images are {"image": [...]}'),
    "role": ([{"role": "usr", "content": "x"}], 'message 0 has role "usr"; .* Did you mean "user"?'),
    "message key": ([{"role": "user", "contents": "x"}], 'message 0 has unknown key "contents"; .* "content"?'),
    "no content": ([{"role": "user"}], "message 0, content must be a string or a list of parts, got none."),
    "empty content": ([{"role": "user", "content": []}], "message 0, content is empty."),
    "part type": ([{"role": "user", "content": [{"type": "img"}]}], "message 0, part 0 must be a dict of .* got type"),
    "part field": (
        [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
        'message 0, part 0 of type "image" must have exactly one of .* got',
    ),
    "url": ("https://x.org/a.jpg?b=1", 'image "https://.*" is not fetched; download it first and give its path.'),
    "url in dict": ({"image": "http://x.org/a"}, 'image "http://x.org/a" is not fetched; download it first'),
    "data uri": ({"image": "data:image/png;base64,AA"}, "image is a data: URI, which is not decoded"),
    "bytes": ({"image": b"abc"}, "image must be a path, .*; got bytes. Decode bytes first"),
    "absent": ({"image": "absent.png"}, 'image "absent.png" does not exist; expected a file.'),
    "folder": ({"image": "."}, 'image "." is a directory; expected a file.'),
    "null byte": ({"image": "a\0b"}, "image .* expected a file."),
    "long name": ({"image": "a" * 5000}, "image .* expected a file."),
    "truncated": ({"image": "cut.png"}, 'image "cut.png" is damaged or truncated: .'),
    "no image": (
        {"image": "text.png"},
        r'image "text.png" is not an image of a format that Pillow reads \(10 bytes\).',
    ),
    "zero bytes": ({"image": "empty.png"}, r'image "empty.png" is not an image .* \(0 bytes\).'),
    "too large": (
        {"image": "large.png"},
        'image "large.png" has 300 x 300 = 90,000 pixels; at most 10,000 are decoded.',
    ),
    "large array": (np.zeros((200, 200)), "image has 200 x 200 = 40,000 pixels; .* or raise max_image_pixels."),
    "no pixels": (np.zeros((0, 4, 3)), "image is empty: 4 x 0 pixels."),
    "nan": (np.full((4, 4), np.nan), "image holds NaN or infinity; expected finite values from 0 to 1."),
    "float range": (np.full((4, 4), 200.0), "image holds floats from 200 to 200; expected 0 to 1."),
    "int range": (np.full((4, 4), -1), "image holds integers from -1 to -1; expected 0 to 255"),
    "dtype": (np.zeros((4, 4), bool), "image has dtype bool; expected uint8"),
    "channels first": (
        np.zeros((3, 8, 9)),
        r"image must be an array .* got \[3, 8, 9\]. Turn it with .transpose\(1, 2, 0\)",
    ),
    "channels last": (torch.zeros(8, 9, 3), r"image must be a tensor .* Turn it with .permute\(2, 0, 1\)"),
    "dimensions": (np.zeros(5), r"image must be an array \[height, width, 3\] or \[height, width\], got \[5\]."),
    "second image": ({"image": [np.zeros((4, 4)), np.zeros(3)]}, "image 1 must be an array"),
    "no frames": ({"video": []}, "video has no frames."),
    "frame sizes": ({"video": [_pixels(8, 8), _pixels(8, 9)]}, "video: frames must be of one size; frame 0 has 8 x 8"),
    "bad frame": ({"video": [np.zeros((4, 4)), np.zeros(2)]}, "video, frame 1 must be an array"),
    "not a video": ({"video": 5}, "video must be a list of frames, .* or a path; got int."),
    "no film": ({"video": "gone.mp4"}, 'video "gone.mp4" does not exist; expected a file.'),
    "too many frames": (
        {"video": [np.zeros((2, 2))] * 9},
        "video has 9 frames; the model takes 8 at most. Sample them",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_with_its_index(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _damaged(tmp_path)
    value, message = BAD[name]
    pattern = "^input 3: " + message.replace("?", "[?]").replace("[...]", ".....")
    with pytest.raises(InputError, match=pattern):
        parse_input(value, 3, max_image_pixels=10_000, max_frames=8)


def test_a_bomb_is_refused_from_its_header_alone(tmp_path, monkeypatch):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    for side, message in ((9000, "81,000,000 pixels; at most 64,000,000"), (60000, "larger than Pillow opens at all")):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))
        with pytest.raises(InputError, match=f"^input 0: image .*{message}"):
            parse_input(path, 0)
    assert DEFAULT_MAX_IMAGE_PIXELS == 64_000_000


def test_a_film_without_a_decoder_names_what_to_install(tmp_path, monkeypatch):
    import sys

    path = tmp_path / "film.mp4"
    path.write_bytes(b"x")
    for name in ("av", "decord"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match="^input 2: video .* needs a video decoder.* Run: pip install av"):
        parse_input(path, 2)
