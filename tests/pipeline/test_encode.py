"""``encode`` as its users meet it: shapes and types, single inputs, stops, sampling, and each refusal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import twn_kernels
from twn_kernels import TWNEmbedder
from twn_kernels.errors import CheckpointError, InputError, MissingDependency, OptionError, UnsupportedModel
from twn_kernels.pipeline.options import EncodeDetails
from twn_kernels.pipeline.sampling import chooser
from twn_kernels.pipeline.thinking import StopRule, Thought
from twn_kernels.testing.oracle import assert_as_good_as_torch

TEXTS = ["a red flower", "the old temple", "seven"]


@pytest.fixture
def llama(world, monkeypatch):
    this = world("llama", "mean_last")
    config = dataclasses.replace(this.embedder.checkpoint.config, max_think_tokens=5)
    monkeypatch.setattr(this.embedder, "config", config)
    return this


def test_types_and_shapes(llama):
    encode, hidden = llama.embedder.encode, llama.embedder.get_sentence_embedding_dimension()
    array = encode(TEXTS, think="never")
    assert isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == (3, hidden)
    assert np.abs(np.linalg.norm(array, axis=1) - 1).max() < 4 * np.finfo(np.float32).eps
    single = encode(TEXTS[0], think="never")
    assert single.shape == (hidden,)
    tensor = encode(TEXTS, think="never", convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), array)
    vectors = encode(TEXTS, think="never", convert_to_numpy=False)
    assert isinstance(vectors, list) and len(vectors) == 3 and vectors[0].shape == (hidden,)
    assert encode([], think="never").shape == (0, hidden)
    assert encode([], think="never", truncate_dim=8, return_details=True)[0].shape == (0, 8)


def test_truncation_and_normalisation(llama):
    encode = llama.embedder.encode
    raw = encode(TEXTS, think="never", normalize_embeddings=False, convert_to_tensor=True)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    whole = encode(TEXTS, think="never", convert_to_tensor=True)
    assert torch.equal(whole, torch.nn.functional.normalize(raw, dim=1))
    cut = encode(TEXTS, think="never", truncate_dim=8, convert_to_tensor=True)
    assert torch.equal(cut, torch.nn.functional.normalize(raw[:, :8], dim=1))


def test_details_of_a_single_input_and_of_many(llama):
    _, detail = llama.embedder.encode(TEXTS[0], think="never", return_details=True)
    assert isinstance(detail, EncodeDetails)
    assert not detail.thought and detail.tokens == 0 and detail.text is None and detail.fallback is None
    _, details = llama.embedder.encode(TEXTS, think="always", return_details=True)
    assert len(details) == 3 and all(0 <= d.gate_score <= 1 for d in details)
    assert all(1 <= d.tokens <= 5 for d in details)


def test_a_broken_thought_gives_the_plain_vector_and_says_why(llama, monkeypatch):
    config = dataclasses.replace(llama.embedder.config, think_end=("never written",))
    monkeypatch.setattr(llama.embedder, "config", config)
    vectors, details = llama.embedder.encode(TEXTS, think="always", return_details=True)
    assert np.array_equal(vectors, llama.embedder.encode(TEXTS, think="never"))
    reasons = {d.fallback for d in details}
    assert reasons <= {"the thought was not closed within 5 tokens", "the text ended before the thought was closed"}
    assert len(reasons) >= 1 and not any(d.thought for d in details)


def test_prompts_change_the_vector_and_have_names(llama):
    embedder = llama.embedder
    embedder.prompts = {"query": "Find the document that answers the question."}
    try:
        plain, asked = embedder.encode(TEXTS, think="never"), embedder.encode_query(TEXTS, think="never")
        assert np.abs(plain - asked).max() > 1e-3
        assert np.array_equal(asked, embedder.encode(TEXTS, think="never", prompt=embedder.prompts["query"]))
        assert np.array_equal(plain, embedder.encode_document(TEXTS, think="never"))
    finally:
        embedder.prompts = {}


def test_similarity():
    a = np.array([[3.0, 4.0], [1.0, 0.0]])
    truth = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    assert_as_good_as_torch(TWNEmbedder.similarity(a, a), truth, truth.float())
    one = TWNEmbedder.similarity(a[0], [torch.tensor([0.0, 2.0])])
    assert_as_good_as_torch(one, torch.tensor([[0.8]], dtype=torch.float64), torch.tensor([[0.8]]))
    with pytest.raises(OptionError, match="vectors of one width, got 2 and 3"):
        TWNEmbedder.similarity(a, np.zeros((1, 3)))
    with pytest.raises(InputError, match="a must be vectors"):
        TWNEmbedder.similarity("no vectors", a)


def test_sampling_is_seeded_and_a_narrow_nucleus_is_greedy():
    logits = torch.randn(64, 50)
    cpu = torch.device("cpu")
    greedy = chooser(0.0, 1.0, 0, cpu)(logits)
    assert torch.equal(greedy, logits.argmax(1))
    assert torch.equal(chooser(1.0, 1e-6, 0, cpu)(logits), greedy)
    first, again, other = (chooser(1.5, 0.9, seed, cpu)(logits) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, greedy)
    probabilities = (logits / 1.5).softmax(1)
    order = probabilities.argsort(1, descending=True)
    for row, token in enumerate(first.tolist()):
        rank = order[row].tolist().index(token)
        assert probabilities[row][order[row][:rank]].sum() < 0.9


def test_sampled_frequencies_follow_the_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    drawn = chooser(1.0, 0.8, 0, torch.device("cpu"))(logits)
    share = torch.bincount(drawn, minlength=4) / 4000
    # 0.5 and 0.3 make up the nucleus of 0.8.
    assert share[2:].sum() == 0 and abs(share[0] - 0.625) < 4 * (0.625 * 0.375 / 4000) ** 0.5


def test_stop_rule_finds_strings_that_span_tokens():
    pieces = {1: "so </th", 2: "ink> and", 3: "more", 4: "<eos>", 5: "<special>", 9: "<stop>"}

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    def clean(ids):
        return decode([i for i in ids if i != 5])

    rule = StopRule(decode, clean, ("</think>", 9), [4], limit=3)

    def run(ids):
        thought = Thought()
        for place, token in enumerate(ids, 1):
            thought.ids.append(token)
            if rule.ended(thought):
                return place, thought.text, thought.broken
        return None

    assert run([1, 2]) == (2, "so ", None)
    assert run([3, 9]) == (2, "more", None)
    assert run([3, 4]) == (2, "more", "the text ended before the thought was closed")
    assert run([5, 1, 2]) == (3, "so ", None)
    assert run([3, 3, 3]) == (3, "moremoremore", "the thought was not closed within 3 tokens")
    assert run([3, 1, 2])[2] is None, "a thought that closes with its last token is closed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "alway"}, "think must be one of .* got 'alway'. Did you mean \"always\""),
        ({"think_threshold": 1.5}, r"think_threshold must be a number in \[0, 1\], got 1.5"),
        ({"think_threshold": float("nan")}, r"think_threshold must be a number in \[0, 1\], got nan"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_think_tokens": 0}, "max_think_tokens must be a whole number of at least 1, got 0"),
        ({"truncate_dim": 100000}, "truncate_dim must be at most the model's hidden size, 64, got 100000"),
        ({"batchsize": 3}, 'encode has no option "batchsize".* Did you mean "batch_size"'),
    ],
)
def test_wrong_options(llama, options, message):
    with pytest.raises(OptionError, match=message):
        llama.embedder.encode(TEXTS, **options)


def test_a_bad_input_is_named_before_anything_runs(llama, monkeypatch):
    monkeypatch.setattr(llama.embedder, "_run", lambda *_: pytest.fail("something ran"))
    with pytest.raises(InputError, match="input 1"):
        llama.embedder.encode(["fine", None], batch_size=1)


def test_auto_without_a_gate_and_a_checkpoint_without_queries(llama, tmp_path):
    from twn_kernels.testing.twn_directory import write_twn_directory

    plain = twn_kernels.unpatch(TWNEmbedder.from_pretrained(llama.base, llama.twn, device="cpu").model)
    no_gate = write_twn_directory(tmp_path / "no_gate", plain, gate_input=None)
    embedder = TWNEmbedder.from_pretrained(llama.base, no_gate, device="cpu")
    with pytest.raises(OptionError, match='think="auto" needs a gate.* Use think="never" or "always"'):
        embedder.encode(TEXTS)
    _, details = embedder.encode(TEXTS, think="never", return_details=True)
    assert details[0].gate_score is None
    no_queries = write_twn_directory(tmp_path / "no_queries", plain, gate_input=None, num_queries=0)
    with pytest.raises(CheckpointError, match="has no queries; expected queries.safetensors or queries.pt"):
        TWNEmbedder.from_pretrained(llama.base, no_queries, device="cpu")


def test_a_model_that_is_loaded_or_already_patched(llama):
    from twn_kernels.pipeline import loading

    model = loading.base_model(llama.base, torch.float32, "cpu", {})
    expected = llama.embedder.encode(TEXTS, think="never")
    fresh = TWNEmbedder.from_pretrained(model, llama.twn)
    assert np.array_equal(fresh.encode(TEXTS, think="never"), expected)
    again = TWNEmbedder.from_pretrained(model, llama.twn)
    assert again.model is model and np.array_equal(again.encode(TEXTS, think="never"), expected)


def test_wrong_bases(llama, tmp_path):
    from transformers import BertConfig, BertModel

    with pytest.raises(CheckpointError, match="has no config.json; base must be a HuggingFace model directory"):
        TWNEmbedder.from_pretrained(tmp_path, llama.twn)
    with pytest.raises(OptionError, match="base must be a directory, a hub id or a loaded model, got int"):
        TWNEmbedder.from_pretrained(3, llama.twn)
    with pytest.raises(OptionError, match="dtype must be a torch.dtype, .* got 'float3'"):
        TWNEmbedder.from_pretrained(llama.base, llama.twn, dtype="float3")
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    bert = twn_kernels.patch(BertModel(BertConfig(**small)), rank=2)
    with pytest.raises(UnsupportedModel, match="BertModel is no decoder with a language-model head"):
        TWNEmbedder(bert, llama.embedder.checkpoint, llama.embedder.processor)


def test_a_checkpoint_for_a_base_of_another_width(llama, world):
    other = world("llama", "mean_last")
    queries = torch.randn(3, 48)
    with pytest.raises(CheckpointError, match=r"queries are \[3, 48\] but the model's hidden size is 64"):
        TWNEmbedder(
            other.embedder.model,
            dataclasses.replace(llama.embedder.checkpoint, queries=queries),
            llama.embedder.processor,
        )


def test_progress_names_each_phase(llama, capsys):
    llama.embedder.encode(TEXTS, think="always", show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "think" in shown and "3/3" in shown
    llama.embedder.encode(TEXTS, think="never", show_progress_bar=False)
    assert capsys.readouterr().err == ""


def test_an_old_transformers_is_named(llama, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.51.3" if name == "transformers" else real(name))
    with pytest.raises(MissingDependency, match=r"needs transformers>=5.17 \(found 4.51.3\)"):
        TWNEmbedder.from_pretrained(llama.base, llama.twn)


def test_wrong_keywords_devices_and_paths_of_from_pretrained(llama, tmp_path):
    with pytest.raises(OptionError, match='from_pretrained has no option "devic".* Did you mean "device"'):
        TWNEmbedder.from_pretrained(llama.base, llama.twn, devic="cpu")
    with pytest.raises(OptionError, match="device must be one torch knows, .* got 'cdua'"):
        TWNEmbedder.from_pretrained(llama.base, llama.twn, device="cdua")
    with pytest.raises(CheckpointError, match="does not exist; give a HuggingFace model directory or a hub id"):
        TWNEmbedder.from_pretrained(tmp_path / "nowhere", llama.twn)
    with pytest.raises(CheckpointError, match=f"config.json is a file; give the directory that holds it: {llama.base}"):
        TWNEmbedder.from_pretrained(llama.base / "config.json", llama.twn)
    with pytest.raises(OptionError, match="base is empty; give a HuggingFace model directory"):
        TWNEmbedder.from_pretrained("", llama.twn)


@pytest.mark.parametrize("device", ["cuda:99", "mps", torch.device("cuda", 99)], ids=str)
def test_a_device_that_is_not_here_is_one_option_error(llama, device):
    from twn_kernels.pipeline import loading

    if str(device) == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is an MPS device here")
    with pytest.raises(OptionError, match=f'device "{device}" is not there: torch .* here.* Use device='):
        TWNEmbedder.from_pretrained(llama.base, llama.twn, device=device)
    model = loading.base_model(llama.base, torch.float32, "cpu", {})
    with pytest.raises(OptionError, match="is not there"):
        loading.base_model(model, None, device, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_cpu_build_asked_for_cuda_says_so(llama):
    with pytest.raises(OptionError, match='device "cuda" is not there: torch sees 0 GPUs here'):
        TWNEmbedder.from_pretrained(llama.base, llama.twn, device="cuda")


def test_an_image_that_the_processor_refuses_is_found_before_the_first_batch(world, monkeypatch):
    from twn_kernels.pipeline import embedder as module

    eye = world("qwen3_vl").embedder
    monkeypatch.setattr(module, "run_batch", lambda *_: pytest.fail("a batch ran"))
    with pytest.raises(InputError, match="^input 3: the model's processor refuses it: absolute aspect ratio"):
        eye.encode(["a", "b", "c", np.zeros((1, 300, 3), np.uint8)], batch_size=2, think="never")


def test_another_checkpoint_for_a_patched_model_is_refused(llama, tmp_path):
    from twn_kernels.errors import PatchError
    from twn_kernels.pipeline import loading
    from twn_kernels.testing.twn_directory import write_twn_directory

    model = loading.base_model(llama.base, torch.float32, "cpu", {})
    other = write_twn_directory(tmp_path / "other", model, seed=7, num_queries=3)
    TWNEmbedder.from_pretrained(model, llama.twn)
    with pytest.raises(PatchError, match="patched already, .*weights of the checkpoint are not those"):
        TWNEmbedder.from_pretrained(model, other)


def test_a_peft_model_keeps_its_adapters(llama):
    from peft import PeftModel

    from twn_kernels.pipeline import loading

    model = loading.base_model(llama.base, torch.float32, "cpu", {})
    model = PeftModel.from_pretrained(model, llama.twn / "reasoning", adapter_name="reasoning")
    model.load_adapter(llama.twn / "embedding", adapter_name="embedding")
    embedder = TWNEmbedder.from_pretrained(model, llama.twn, processor=llama.embedder.processor)
    embedder.config = llama.embedder.config
    assert np.array_equal(embedder.encode(TEXTS, think="always"), llama.embedder.encode(TEXTS, think="always"))


def test_a_stop_that_is_a_special_token_is_seen(llama, monkeypatch):
    tokenizer = llama.embedder.processor.tokenizer
    eos = tokenizer.eos_token
    config = dataclasses.replace(llama.embedder.config, think_end=(eos,), max_think_tokens=24)
    monkeypatch.setattr(llama.embedder, "config", config)
    _, details = llama.embedder.encode(
        [*TEXTS, "Find the document.", "Describe the image."], think="always", return_details=True
    )
    closed = [d for d in details if d.thought]
    assert closed and all(eos not in d.text for d in closed)
    assert not any("ended before" in (d.fallback or "") for d in details)
