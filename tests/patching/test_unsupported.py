"""What cannot be patched exactly is refused, with every instance named and nothing changed; options."""

import pytest
import torch
from torch import nn

from twn_kernels import patch, route, status, unpatch
from twn_kernels.errors import OptionError, PatchError, UnsupportedModel
from twn_kernels.modules import DualLoRALinear
from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model


def _types(model):
    return {path: (id(module), type(module)) for path, module in model.named_modules()}


def _refused(model, error, message, **options):
    before = _types(model)
    with pytest.raises(error, match=message):
        patch(model, **options)
    assert _types(model) == before and not status(model).patched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"use_dora": True},
            r'Dora \(a LoRA variant\) in "embedding": base_model\.model\.model\.layers\.\{0-1\}\.self_attn',
        ),
        (
            {"lora_bias": True, "target_modules": ["dense"]},
            r'lora_bias in "embedding": base_model.model.gpt_neox.layers',
        ),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(a whole trained copy.*: base_model\.model\.lm_head"),
        ({"trainable_token_indices": [1, 2]}, r"TrainableTokensWrapper \(trained parts.*embed_tokens"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"Embedding is no LoRA on an nn\.Linear: .*embed_tokens"),
        ({"r": 300}, r'rank 300 in "embedding" \(the largest is 256\)'),
    ],
    ids=["dora", "lora_bias", "modules_to_save", "tokens", "embedding", "rank"],
)
@pytest.mark.filterwarnings("ignore")
def test_peft_kinds(options, message):
    from peft import LoraConfig, get_peft_model

    plain = {"r": 2, "target_modules": ["dense"] if "dense" in str(options) else ["q_proj"]}
    base = tiny_model("gpt_neox" if "dense" in str(options) else "llama")
    model = get_peft_model(base, LoraConfig(**plain), adapter_name="reasoning")
    model.add_adapter("embedding", LoraConfig(**(plain | options)))
    _refused(model, UnsupportedModel, message)


@pytest.mark.filterwarnings("ignore")
def test_peft_of_another_method():
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(tiny_model("llama"), config, adapter_name="reasoning")
    model.add_adapter("embedding", config)
    _refused(model, UnsupportedModel, r'IA3 is not LoRA: adapter "reasoning", adapter "embedding"')


def test_all_peft_problems_are_listed(pair):
    model = pair("llama")[1]
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.base_layer.register_forward_hook(lambda *_: None)
    other = model.base_model.model.model.layers[0].mlp.up_proj
    other.forward = lambda x: x
    message = r"(?s)forward set on the instance .*layers\.0\.mlp\.up_proj.*hooks on the inner .*layers\.1\.mlp\.up_proj"
    _refused(model, UnsupportedModel, message)


def test_a_third_adapter_is_named(pair):
    from peft import LoraConfig

    model = pair("llama")[1]
    model.add_adapter("style", LoraConfig(r=2, target_modules=["q_proj"]))
    _refused(model, PatchError, r'holds "style" beside "reasoning", "embedding"; exactly two.*delete_adapter')
    model.delete_adapter("style")
    patch(model)
    model.add_adapter("style", LoraConfig(r=2, target_modules=["q_proj"]))
    inputs = tiny_inputs("llama", 2)
    model.set_adapter("style")
    message = (
        r'"style" is active on layer "base_model\.model.*q_proj", but the model was patched for "reasoning", "embed'
    )
    with pytest.raises(PatchError, match=message):
        model(**inputs)
    with pytest.raises(PatchError, match='adapter "style" is not loaded'), route(model, "style"):
        pass
    with route(model, "reasoning"):
        model(**inputs)
    with pytest.raises(PatchError, match='"style" is active'):
        model(**inputs, adapter_names=["style", "reasoning"])


def test_a_missing_adapter_and_a_typo(with_peft, pair):
    model = pair("llama")[1]
    message = r'^adapter "embeding" is not loaded; loaded: "embedding", "reasoning"\. Did you mean "embedding"\?$'
    _refused(model, PatchError, message, adapters=("reasoning", "embeding"))
    model.delete_adapter("embedding")
    _refused(
        model, PatchError, r'^adapter "embedding" is not loaded; loaded: "reasoning"\. Load both: model\.load_adapter'
    )
    named = with_peft(tiny_model("llama"), names=("think", "embed"))
    _refused(
        named, PatchError, r"\"reasoning\" and adapter \"embedding\" are not loaded.*adapters=\('think', 'embed'\)"
    )


def test_two_sources_of_adapters(pair, tmp_path):
    _refused(
        pair("llama")[1],
        OptionError,
        "checkpoint cannot be given together with the model's PEFT adapters",
        checkpoint=tmp_path,
    )
    _refused(pair("llama")[1], OptionError, "targets and rank cannot be given", targets=["q_proj"], rank=3)


def test_scope_and_adapter_names_together(pair):
    model, inputs = patch(pair("llama")[1]), tiny_inputs("llama", 2)
    with route(model, "reasoning"), pytest.raises(PatchError, match="adapter_names= was given inside a route"):
        model(**inputs, adapter_names=["embedding", "embedding"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**inputs, adapter_names=["embedding"])


def test_a_hook_on_the_inner_layer_after_the_patch(pair):
    model, inputs = patch(pair("llama")[1]), tiny_inputs("llama", 2)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(PatchError, match=r"layers\.1\.mlp\.up_proj\": hooks on its base_layer would not run"):
        model(**inputs)
    handle.remove()
    model(**inputs)


def test_a_hook_of_accelerate():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = tiny_model("llama"), tiny_inputs("llama", 1)
    layer = model.model.layers[0].mlp.up_proj
    add_hook_to_module(layer, ModelHook())
    _refused(model, UnsupportedModel, r"forward set on the instance .*: model\.layers\.0\.mlp\.up_proj")
    remove_hook_from_module(layer)
    patch(model, rank=2)
    layer.lora_B["reasoning"].data.normal_()
    with route(model, "reasoning"):
        assert not torch.equal(layer(torch.ones(1, 64)), nn.functional.linear(torch.ones(1, 64), layer.weight))
        add_hook_to_module(layer, ModelHook())
        with pytest.raises(PatchError, match=r"forward of their own since the patch .*: model\.layers\.0\.mlp\.up"):
            unpatch(model)
    remove_hook_from_module(layer)
    unpatch(model)
    assert torch.equal(model(**inputs).logits, tiny_model("llama")(**inputs).logits)


class _Quantised(nn.Linear):
    pass


def test_linears_of_another_kind():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = _Quantised
    model.model.layers[0].self_attn.q_proj.forward = lambda x: x
    message = (
        r"(?s)cannot be patched exactly:.*forward set on the instance \(an offloading or wrapping hook\): "
        r"model\.layers\.0\.self_attn\.q_proj\n  _Quantised, not a plain nn\.Linear: "
        r"model\.layers\.\{0-1\}\.mlp\.up_proj"
    )
    _refused(model, UnsupportedModel, message)
    patch(model, targets=["v_proj"])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_of_another_kind():
    model = tiny_model("llama")
    half = tiny_model("llama", dtype=torch.float8_e4m3fn) if hasattr(torch, "float8_e4m3fn") else None
    if half is not None:
        _refused(half, UnsupportedModel, r"a weight of torch\.float8_e4m3fn: model\.layers\.\{0-1\}\.self_attn\.q_proj")
    _refused(model.to("meta"), UnsupportedModel, r"on the meta device \(load the model's weights first\)")
    computed = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    _refused(computed, UnsupportedModel, "no plain parameter")
    _refused(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), UnsupportedModel, "not a plain nn.Linear"
    )


@torch.no_grad()
def test_linears_that_torch_itself_bypasses():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8)).eval()
    message = r"parent reads its weight without calling it.*: 0\.self_attn\.out_proj, 0\.linear1, 0\.linear2"
    _refused(model, UnsupportedModel, message, targets="all-linear")
    assert [layer.layer for layer in status(patch(model)).layers] == ["1"]


@torch.no_grad()
def test_projections_that_a_state_space_kernel_takes():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4))
    message = r"without calling it.*: backbone\.layers\.0\.mixer\.out_proj"
    _refused(model, UnsupportedModel, message, targets=["in_proj", "out_proj"])
    assert not [layer for layer in status(patch(model)).layers if "out_proj" in layer.layer]


def test_transposed_layers_are_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    _refused(model, PatchError, 'no nn.Linear to patch. Its layers are "Conv1D", which store a transposed weight')
    _refused(
        model, UnsupportedModel, r"Conv1D, not a plain nn\.Linear: transformer\.h\.0\.attn\.c_attn", targets=["c_attn"]
    )


def test_targets_that_are_no_linear():
    _refused(
        tiny_model("llama"),
        UnsupportedModel,
        "Embedding, not a plain nn.Linear: model.embed_tokens",
        targets=["embed_tokens"],
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, OptionError, r"rank must be a whole number in \[1, 256\], got 0"),
        ({"rank": 257}, OptionError, "got 257"),
        ({"rank": 2.0}, OptionError, "got 2.0"),
        ({"rank": True}, OptionError, "got True"),
        ({"impl": "tritn"}, OptionError, 'impl must be one of .*Did you mean "triton"'),
        ({"fuse": 1}, OptionError, "fuse must be True or False, got 1"),
        ({"adapters": "reasoning"}, OptionError, "adapters must be two names, got 'reasoning'"),
        ({"adapters": ["reasoning"]}, OptionError, "two different names"),
        ({"adapters": ["reasoning", "reasoning"]}, OptionError, "two different names"),
        ({"adapters": ["reasoning", "embeding"]}, OptionError, 'unless the model holds PEFT.*Did you mean "embedding"'),
        ({"targets": []}, OptionError, r"targets must be None, a list .*got \[\]"),
        ({"targets": [3]}, OptionError, "targets must hold module names, got 3"),
        ({"targets": "(q_proj"}, OptionError, "is not a regular expression"),
        ({"targets": ["q_prj"]}, PatchError, r'targets "q_prj" match no module.*Did you mean "q_proj"\?'),
        ({"targets": ["q_proj", "qq"]}, PatchError, 'targets "qq" match no module'),
        ({"targets": "q_proj"}, PatchError, r"matches no module.*give a list: targets=\['q_proj'\]"),
    ],
    ids=str,
)
def test_options(options, error, message):
    _refused(tiny_model("llama"), error, message, **options)


def test_not_a_module():
    with pytest.raises(PatchError, match="patch needs a torch.nn.Module, got str"):
        patch("Qwen/Qwen3-VL-8B-Instruct")


def test_nothing_to_patch():
    _refused(nn.Sequential(nn.Conv2d(3, 4, 3)), PatchError, "Sequential has no nn.Linear to patch")


def test_a_layer_that_is_dual_already():
    model = nn.Sequential(nn.Linear(4, 4), DualLoRALinear(4, 4, rank=2))
    _refused(model, UnsupportedModel, "DualLoRALinear, not a plain nn.Linear: 1")


def test_an_unknown_option_offers_the_nearest():
    from twn_kernels.errors import OptionError

    with pytest.raises(OptionError, match='patch has no option "rnak"; its options are .* Did you mean "rank"'):
        patch(tiny_model("llama"), rnak=4)
