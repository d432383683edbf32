"""Routes through whole models: by token, by row, under generation and beams; scopes; specs that do not fit."""

import copy

import pytest
import torch

from twn_kernels import patch, route, status
from twn_kernels.errors import DtypeError, OptionError, PatchError, ShapeError
from twn_kernels.modules import DualLoRALinear
from twn_kernels.ops import RoutePlan
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.testing.tiny_models import FAMILIES, tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")


def _fill_(model):
    """Nonzero B everywhere, so that every route differs."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, DualLoRALinear):
            for name in NAMES:
                B = layer.lora_B[name].data
                B.copy_(torch.randn(B.shape, generator=generator) * 0.4)
    return model


@pytest.fixture(scope="module")
def models():
    """By family: a patched model with trained-like adapters."""
    return {family: _fill_(patch(tiny_model(family), rank=3)) for family in FAMILIES}


def _slow(patched, routes, dtype):
    """The base model with a hook on every target that adds each token's adapters, one token at a time."""
    plain = copy.deepcopy(patched)
    layers = {path: layer for path, layer in plain.named_modules() if isinstance(layer, DualLoRALinear)}
    adapters = {
        path: {n: [t.detach().to(dtype) for t in layer.lora(n)[:2]] for n in NAMES} for path, layer in layers.items()
    }
    from twn_kernels import unpatch

    plain = unpatch(plain).to(dtype)

    def hook_for(path):
        def hook(module, args, out):
            x, out = args[0], out.clone()
            for row in range(x.shape[0]):
                for token in range(x.shape[1]):
                    bits = int(routes[row, token]) if x.shape[1] == routes.shape[1] else int(routes[row, -1])
                    for bit, name in ((1, "reasoning"), (2, "embedding")):
                        if bits & bit:
                            A, B = adapters[path][name]
                            out[row, token] += B @ (A @ x[row, token])
            return out

        return hook

    for path in layers:
        plain.get_submodule(path).register_forward_hook(hook_for(path))
    return plain


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_token_routes_equal_a_loop_over_tokens(family, models, in_double):
    inputs = tiny_inputs(family, 3)
    routes = torch.randint(0, 4, inputs["input_ids"].shape, dtype=torch.int8)
    truth = _slow(models[family], routes, torch.float64)(**in_double(inputs)).logits
    naive = _slow(models[family], routes, torch.float32)(**inputs).logits
    with route(models[family], routes):
        actual = models[family](**inputs).logits
    assert_as_good_as_torch(actual, truth, naive, family)
    with route(models[family], RoutePlan.from_routes(routes.flatten())):
        assert torch.equal(models[family](**inputs).logits, actual)


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_generation_continues_each_rows_last_route(family, models):
    inputs = tiny_inputs(family, 3, tokens=12)
    routes = torch.randint(0, 4, inputs["input_ids"].shape, dtype=torch.int8)
    routes[:, -1] = torch.tensor([1, 2, 0])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = _slow(models[family], routes, torch.float32).generate(**inputs, **options)
    with route(models[family], routes):
        assert torch.equal(models[family].generate(**inputs, **options), expected)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others_route(models):
    model, inputs = models["llama"], tiny_inputs("llama", 3, padded=False)
    with route(model, "reasoning"):
        alone = model(**inputs).logits
    with route(model, ["reasoning", None, "embedding"]):
        mixed = model(**inputs).logits
    with route(model, None):
        base = model(**inputs).logits
    truth = copy.deepcopy(model).double()
    with route(truth, "reasoning"):
        assert_as_good_as_torch(mixed[0], truth(**inputs).logits[0], alone[0])
    assert_as_good_as_torch(mixed[1], truth(**inputs).logits[1], base[1])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_follow_their_row(pair, options):
    reference, patched, inputs = pair("qwen3_vl", batch=2, inputs={"tokens": 12})
    patch(patched)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    expected = reference.generate(**inputs, **options, adapter_names=["reasoning", "embedding"])
    with route(patched, list(NAMES)):
        assert torch.equal(patched.generate(**inputs, **options), expected)
    with route(patched, torch.tensor([[1], [2]], dtype=torch.int8).expand(2, 12)):
        assert torch.equal(patched.generate(**inputs, **options), expected)


def test_returned_sequences_follow_their_row(models):
    inputs = tiny_inputs("llama", 2)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    out = []
    for spec in (["reasoning", None], ["reasoning"] * 3 + [None] * 3):
        torch.manual_seed(0)
        given = inputs
        if len(spec) == 6:
            given = {key: value.repeat_interleave(3, 0) for key, value in inputs.items()}
        with route(models["llama"], spec):
            out.append(
                models["llama"].generate(**given, **(options | {"num_return_sequences": 6 // len(given["input_ids"])}))
            )
    assert torch.equal(*out)


@torch.no_grad()
def test_scopes_nest_and_come_back(models):
    model, inputs = models["llama"], tiny_inputs("llama", 2)
    plain = model(**inputs).logits
    with route(model, "reasoning") as same:
        assert same is model
        outer = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), route(model, ["embedding", "embedding"]):
            assert not torch.equal(model(**inputs).logits, outer)
            raise ZeroDivisionError
        assert torch.equal(model(**inputs).logits, outer)
        assert status(model).current_route == "reasoning"
    assert torch.equal(model(**inputs).logits, plain)
    assert status(model).current_route == status(model).default_route == "base only"


@torch.no_grad()
def test_base_only_is_the_base_bit_for_bit(models):
    for family, patched in models.items():
        inputs = tiny_inputs(family, 2)
        expected = tiny_model(family)(**inputs).logits
        assert torch.equal(patched(**inputs).logits, expected)
        for spec in (None, [None, None]):
            with route(patched, spec):
                assert torch.equal(patched(**inputs).logits, expected)


@torch.no_grad()
def test_a_plan_is_built_once_a_shape(models, monkeypatch):
    from twn_kernels.modules import routing

    built = []
    real = routing.RowSpec._build
    monkeypatch.setattr(routing.RowSpec, "_build", lambda self, *args: built.append(args[0]) or real(self, *args))
    with route(models["llama"], ["reasoning", None]):
        for _ in range(3):
            models["llama"](**tiny_inputs("llama", 2))
        models["llama"].generate(**tiny_inputs("llama", 2), max_new_tokens=5, eos_token_id=None)
    assert built == [(2, 14), (2, 1)]


@torch.no_grad()
def test_a_refreshed_plan_changes_the_route(models, in_double):
    model, inputs = models["llama"], tiny_inputs("llama", 2)
    exact, same = in_double(model), []
    tokens = inputs["input_ids"].numel()
    plan = RoutePlan.from_routes(torch.ones(tokens, dtype=torch.int8))
    with route(model, plan):
        first = model(**inputs).logits
        plan.refresh_(torch.full((tokens,), 2, dtype=torch.int8))
        second = model(**inputs).logits
    for refreshed, bits in ((first, 1), (second, 2)):
        spec = torch.full((2, 14), bits, dtype=torch.int8)
        with route(model, spec), route(exact, spec):
            same.append((refreshed, exact(**inputs).logits, model(**inputs).logits))
    assert_as_good_as_torch(*map(torch.stack, zip(*same, strict=True)), "after refresh_")
    assert (first - second).abs().max() > 0.1


def test_wrappers_and_parts_find_the_routes(models):
    model = models["qwen3_vl"]
    wrapped = torch.nn.Sequential(model)
    for other in (wrapped, model.model.language_model):
        with route(other, "embedding"):
            assert status(model).current_route == "embedding"
    both = torch.nn.ModuleList([models["llama"], models["phi3"]])
    with pytest.raises(PatchError, match="ModuleList holds 2 models that were patched one by one"), route(both, None):
        pass


def test_flat_inputs_are_split_by_the_running_batch(models):
    class Flattening(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)

        def forward(self, input_ids, hidden):
            return self.proj(hidden.flatten(0, 1)).view(hidden.shape)

    model = _fill_(patch(Flattening(), rank=2))
    ids, hidden = torch.zeros(3, 5, dtype=torch.long), torch.randn(3, 5, 4)
    names = ["reasoning", "embedding", None]
    with torch.no_grad(), route(model, names):
        out = model(input_ids=ids, hidden=hidden)
        with pytest.raises(ShapeError, match=r'layer "proj" got a flat input of 9 tokens.*3 rows.*batch of \(3, 5\)'):
            model.proj(hidden.flatten(0, 1)[:9])
        expected = model.proj(hidden.flatten(0, 1), RoutePlan.from_rows(names, 5))
    assert torch.equal(out.flatten(0, 1), expected)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "embeding",
            PatchError,
            '^adapter "embeding" is not loaded; loaded: "embedding", "reasoning". Did you mean "embedding"[?]$',
        ),
        (["reasoning", "bth"], PatchError, 'adapter "bth" is not loaded.*Did you mean "both"'),
        ([], ShapeError, "names no rows"),
        ([1, 2], PatchError, 'adapter "1" is not loaded'),
        (3, OptionError, "spec must be an adapter's name, None.*got int"),
        (torch.zeros(2, 14), DtypeError, "must be int8 .*got torch.float32"),
        (torch.zeros(28, dtype=torch.int8), ShapeError, r"must be \[batch, seq\], got \[28\]"),
        (torch.full((2, 14), 4, dtype=torch.int8), OptionError, "must lie in 0 … 3.*got 4"),
        (torch.full((2, 14), -1, dtype=torch.int8), OptionError, "got -1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_specs(models, spec, error, message):
    with pytest.raises(error, match=message), route(models["llama"], spec):
        pytest.fail("the scope was entered")
    assert models["llama"]._twn_patch.state.spec is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["reasoning"] * 3, r'3 rows was given, but layer "model.layers.0.self_attn.q_proj" got 2 rows'),
        (["reasoning"], "1 rows was given, but .* got 2 rows"),
        ([None] * 3, "3 rows was given, but .* got 2 rows"),
        (torch.ones(2, 13, dtype=torch.int8), r"token of \[2, 13\] was given, but .* got 14 tokens a row"),
        (torch.ones(3, 14, dtype=torch.int8), r"token of \[3, 14\] was given, but .* got 2 rows"),
        (RoutePlan.uniform("both", 27), r"RoutePlan covers 27 tokens, but .* got 28 \(\[2, 14\]\)"),
    ],
    ids=lambda value: str(value)[:20],
)
@torch.no_grad()
def test_specs_that_do_not_fit_the_forward(models, spec, message):
    with route(models["llama"], spec), pytest.raises(ShapeError, match=message):
        models["llama"](**tiny_inputs("llama", 2))


def test_an_unpatched_model_cannot_be_routed():
    with pytest.raises(PatchError, match="route needs a patched model, but LlamaForCausalLM is not patched"):
        with route(tiny_model("llama"), None):
            pass
    with pytest.raises(PatchError, match="route needs a patched model, got dict"), route({}, None):
        pass
