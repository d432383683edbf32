"""A checkpoint meets a model: equal to PEFT loading it, over key prefixes and dtypes; and what does not fit."""

import dataclasses

import pytest
import torch

from twn_kernels import Checkpoint, load_checkpoint, patch, route, save_checkpoint, status, unpatch
from twn_kernels.checkpoint import Adapter
from twn_kernels.errors import CheckpointError, OptionError, PatchError
from twn_kernels.patching import adapters_of
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, tiny_inputs, tiny_model
from twn_kernels.testing.twn_directory import write_twn_directory

NAMES = ("reasoning", "embedding")
RANKS = {"reasoning": 5, "embedding": 3}


def _peft(directory, family, dtype=torch.float32):
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        tiny_model(family, dtype=dtype), directory / "reasoning", adapter_name="reasoning", autocast_adapter_dtype=False
    )
    model.load_adapter(directory / "embedding", adapter_name="embedding", autocast_adapter_dtype=False)
    return model.eval()


def _renamed(checkpoint, rename):
    """The same weights under other module paths, as another release of transformers would have written them."""
    adapters = {}
    for name, adapter in checkpoint.adapters.items():
        layers = {rename(path): weights for path, weights in adapter.layers.items()}
        adapters[name] = dataclasses.replace(adapter, layers=layers, keys={}, header=None)
    return dataclasses.replace(checkpoint, adapters=adapters)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """By family: a TWN directory written by PEFT."""
    root = tmp_path_factory.mktemp("twn")
    made = {}

    def get(family):
        if family not in made:
            made[family] = write_twn_directory(
                root / family, tiny_model(family), rank=RANKS, rslora={"reasoning": True}
            )
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equal_to_peft_loading_the_same_files(family, directories, peft_logits, in_double):
    directory, inputs = directories(family), tiny_inputs(family, 3)
    reference = _peft(directory, family)
    exact, exact_inputs = in_double(reference), in_double(inputs)
    model = patch(tiny_model(family), directory)
    for spec in ("reasoning", "embedding", "both", None, ["embedding", None, "reasoning"]):
        truth, naive = peft_logits(exact, exact_inputs, spec), peft_logits(reference, inputs, spec)
        with route(model, spec):
            assert_as_good_as_torch(model(**inputs).logits, truth, naive, f"{family} {spec}")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_dtypes_lose_nothing(base, stored, tmp_path, in_double, peft_logits):
    """Adapters are held in a dtype that holds the file's values exactly, and used so."""
    directory = write_twn_directory(tmp_path, tiny_model("llama"), dtype=stored)
    model, inputs = patch(tiny_model("llama", dtype=base), directory), tiny_inputs("llama", 2)
    layer = model.model.layers[0].self_attn.q_proj
    file = load_checkpoint(directory).adapters["reasoning"].layers["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer.lora_A["reasoning"].double(), file.A.double())
    assert layer.lora_A["reasoning"].dtype == (base if base in (stored, torch.float32) else torch.float32)
    reference = _peft(directory, "llama", base)
    truth, naive = peft_logits(in_double(reference), inputs, "reasoning"), peft_logits(reference, inputs, "reasoning")
    with route(model, "reasoning"):
        assert_as_good_as_torch(model(**inputs).logits, truth, naive)


@pytest.mark.parametrize(
    "prefix",
    ["model.layers", "model.model.layers", "language_model.model.layers", "model.language_model.layers", "layers"],
)
@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
@torch.no_grad()
def test_key_prefixes_of_other_releases(family, prefix, directories):
    checkpoint, inputs = load_checkpoint(directories(family)), tiny_inputs(family, 2)
    own = patch(tiny_model(family), checkpoint)
    renamed = _renamed(checkpoint, lambda path: f"{prefix}.{path.split('layers.', 1)[1]}")
    other = patch(tiny_model(family), renamed)
    with route(own, "both"), route(other, "both"):
        assert torch.equal(own(**inputs).logits, other(**inputs).logits)
    assert set(adapters_of(other)["reasoning"].layers) == set(renamed.adapters["reasoning"].layers)


@torch.no_grad()
def test_on_the_text_model_alone(directories):
    checkpoint, model = load_checkpoint(directories("qwen3_vl")), tiny_model("qwen3_vl")
    patch(model.model.language_model, checkpoint)
    whole = patch(tiny_model("qwen3_vl"), checkpoint)
    inputs = tiny_inputs("qwen3_vl", 2)
    with route(model, "both"), route(whole, "both"):
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)


def test_every_way_of_naming_a_checkpoint(directories):
    directory = directories("llama")
    pair = {name: directory / name for name in NAMES}
    model = patch(tiny_model("llama"), directory)
    for same in (directory, str(directory), pair, load_checkpoint(directory)):
        assert patch(model, same) is model
    other = load_checkpoint(directory)
    other.adapters["reasoning"].layers["model.layers.0.mlp.up_proj"].A[0, 0] += 1
    with pytest.raises(
        PatchError, match="patched already, with other arguments: the weights of the checkpoint are not those"
    ):
        patch(model, other)
    with pytest.raises(PatchError, match="source is 'checkpoint' and now 'fresh adapters'"):
        patch(model)
    assert status(model).adapters == "a checkpoint"


def test_the_checkpoint_in_memory_is_not_the_model(directories):
    checkpoint = load_checkpoint(directories("llama"))
    before = checkpoint.adapters["reasoning"].layers["model.layers.0.mlp.up_proj"].A.clone()
    model = patch(tiny_model("llama"), checkpoint)
    model.model.layers[0].mlp.up_proj.lora_A["reasoning"].data.zero_()
    assert torch.equal(checkpoint.adapters["reasoning"].layers["model.layers.0.mlp.up_proj"].A, before)


def test_dropout_and_scaling_come_from_the_files(tmp_path):
    options = {"dropout": {"reasoning": 0.1, "embedding": 0.0}, "rslora": {"embedding": True}, "alpha": 6}
    model = patch(tiny_model("llama"), write_twn_directory(tmp_path, tiny_model("llama"), rank=4, **options))
    layer = model.model.layers[1].mlp.down_proj
    assert layer.scaling == {"reasoning": 1.5, "embedding": 3.0}
    assert layer.lora_dropout == {"reasoning": 0.1, "embedding": 0.0}


def test_an_adapter_on_fewer_layers(tmp_path):
    targets = {"reasoning": ["q_proj", "v_proj"], "embedding": ["v_proj", "down_proj"]}
    model = patch(tiny_model("llama"), write_twn_directory(tmp_path, tiny_model("llama"), targets=targets))
    ranks = {layer.layer.rsplit(".")[-1]: set(layer.ranks) for layer in status(model).layers}
    assert ranks == {"q_proj": {"reasoning"}, "v_proj": set(NAMES), "down_proj": {"embedding"}}


def test_saving_what_was_trained(directories, tmp_path):
    directory = directories("qwen3_vl")
    checkpoint = load_checkpoint(directory)
    model = patch(tiny_model("qwen3_vl"), checkpoint)
    checkpoint.adapters = adapters_of(model)
    save_checkpoint(checkpoint, tmp_path / "same")
    for name in NAMES:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "same" / name / file).read_bytes() == (directory / name / file).read_bytes()
    model.model.language_model.layers[0].mlp.up_proj.lora_B["embedding"].data.fill_(0.25)
    checkpoint.adapters = adapters_of(model)
    save_checkpoint(checkpoint, tmp_path / "trained")
    again = load_checkpoint(tmp_path / "trained").adapters["embedding"].layers
    assert (again["model.language_model.layers.0.mlp.up_proj"].B == 0.25).all()


def test_saving_fresh_adapters(tmp_path):
    model = patch(tiny_model("llama"), rank=3, targets=["q_proj"])
    for layer in model.model.layers:
        layer.self_attn.q_proj.lora_B["embedding"].data.normal_()
    save_checkpoint(Checkpoint(adapters_of(model)), tmp_path / "twn")
    other, inputs = patch(tiny_model("llama"), tmp_path / "twn"), tiny_inputs("llama", 2)
    with route(model, "embedding"), route(other, "embedding"):
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)


def test_pefts_adapters_are_pefts_to_save(pair):
    with pytest.raises(PatchError, match="adapters are PEFT's, which saves them itself"):
        adapters_of(patch(pair("llama")[1]))


def _without(checkpoint, name, drop):
    adapter = checkpoint.adapters[name]
    layers = {path: weights for path, weights in adapter.layers.items() if drop not in path}
    checkpoint.adapters[name] = dataclasses.replace(adapter, layers=layers)
    return checkpoint


def _untouched(model, inputs, expected):
    assert not status(model).patched
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_all_misfits_are_listed_at_once(directories):
    checkpoint = load_checkpoint(directories("qwen3_vl"))
    reasoning, embedding = (dict(checkpoint.adapters[name].layers) for name in NAMES)
    stray = reasoning.pop("model.language_model.layers.1.mlp.up_proj")
    for index in (7, 8, 9, 12):
        reasoning[f"model.language_model.layers.{index}.mlp.up_proj"] = stray
    weights = embedding["model.language_model.layers.0.self_attn.k_proj"]
    embedding["model.language_model.layers.0.self_attn.k_proj"] = weights._replace(A=torch.zeros(3, 128))
    for name, layers in zip(NAMES, (reasoning, embedding), strict=True):
        checkpoint.adapters[name] = dataclasses.replace(checkpoint.adapters[name], layers=layers)
    model, inputs = tiny_model("qwen3_vl"), tiny_inputs("qwen3_vl", 1)
    expected = model(**inputs).logits
    with pytest.raises(CheckpointError) as error:
        patch(model, checkpoint)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("does not fit Qwen3VLForConditionalGeneration:")
    up = "model.language_model.layers.{}.mlp.up_proj"
    assert f'adapter "reasoning": tensors that fit no layer of the model: {up.format("{7-9,12}")}' in lines[1]
    assert f'adapter "reasoning": layers that its config targets, without tensors: {up.format(1)}' in lines[2]
    assert (
        'adapter "embedding": tensors for in_features 128 and out_features 32 where the model has 64 and 32 '
        "(a base of another size?): model.language_model.layers.0.self_attn.k_proj" in lines[3]
    )
    assert len(lines) == 4 or "The checkpoint names its base" in lines[4]
    _untouched(model, inputs, expected)


def test_a_base_of_another_size(directories):
    bigger = tiny_model("llama", hidden_size=128)
    with pytest.raises(CheckpointError, match=r"a base of another size\?.*model\.layers\.\{0-1\}\.self_attn\.q_proj"):
        patch(bigger, directories("llama"))
    deeper = tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"without tensors: model\.layers\.\{2-3\}\.self_attn\.q_proj"):
        patch(deeper, directories("llama"))
    with pytest.raises(CheckpointError, match=r"fit no layer of the model: model\.layers\.1\.mlp"):
        patch(tiny_model("llama", num_hidden_layers=1), directories("llama"))
    with pytest.raises(CheckpointError, match=r"fit no layer of the model: model\.layers\.\{0-1\}"):
        patch(tiny_model("phi3"), _without(load_checkpoint(directories("llama")), "reasoning", "o_proj"))


def test_a_missing_adapter(directories):
    checkpoint = load_checkpoint(directories("llama"))
    del checkpoint.adapters["embedding"]
    with pytest.raises(CheckpointError, match='adapter "embedding" is missing from the checkpoint'):
        patch(tiny_model("llama"), checkpoint)


def test_options_that_the_checkpoint_decides(directories):
    with pytest.raises(OptionError, match="rank cannot be given together with the checkpoint, which already says that"):
        patch(tiny_model("llama"), directories("llama"), rank=8)
    with pytest.raises(OptionError, match="targets cannot be given"):
        patch(tiny_model("llama"), directories("llama"), targets=["q_proj"])


def test_a_tower_in_the_checkpoint(tmp_path):
    directory = write_twn_directory(tmp_path, tiny_model("qwen3_vl"), targets=r".*visual.*qkv|.*layers.*q_proj")
    model = patch(tiny_model("qwen3_vl"), directory)
    by_row = {layer.layer: layer.by_row for layer in status(model).layers}
    assert by_row["model.visual.blocks.0.attn.qkv"] is False
    assert by_row["model.language_model.layers.0.self_attn.q_proj"] is True
    assert "one route for all rows" in str(status(model))


def test_a_model_that_once_held_peft_adapters_is_plain(directories):
    model = tiny_model("llama")
    write_twn_directory(directories("llama").parent / "again", model)
    patch(model, directories("llama"))
    assert status(model).adapters == "a checkpoint"
    unpatch(model)
    adapter = Adapter.build("reasoning", {"a": (torch.zeros(1, 2), torch.zeros(2, 1))}, lora_alpha=1)
    with pytest.raises(CheckpointError, match="fit no layer of the model: a"):
        patch(model, Checkpoint({"reasoning": adapter, "embedding": adapter}))
