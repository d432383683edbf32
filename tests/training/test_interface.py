"""The detached interface: ordinary attention going forward, no gradient between adapters going back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from twn_kernels.errors import OptionError
from twn_kernels.testing.oracle import assert_as_good_as_torch
from twn_kernels.training.interface import Part, detached_attention

MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
PARTS = [Part(4, "embedding"), Part(7, "reasoning"), Part(9, "embedding")]
OF = [0] * 4 + [1] * 3 + [2] * 2  # the part of each token


def config():
    return SimpleNamespace(_attn_implementation="sdpa")


def states(dtype=torch.float64):
    """Queries, keys and values of nine tokens: four heads, two of keys and values."""
    return [torch.randn(2, heads, 9, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def mask(dtype=torch.float64):
    return torch.zeros(9, 9, dtype=dtype).masked_fill_(~torch.ones(9, 9).bool().tril(), -torch.inf).expand(2, 1, 9, 9)


def attended(query, key, value, parts):
    own = config()
    with detached_attention(own, parts):
        attend = AttentionInterface()[own._attn_implementation]
        return attend(MODULE, query, key, value, mask(query.dtype), scaling=0.3, dropout=0.0)[0]


def by_hand(query, key, value):
    """``[batch, tokens, heads, width]`` of causal attention; each pair of heads shares one of keys and values."""
    key, value = (states.repeat_interleave(2, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3 + mask(query.dtype)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("parts", [PARTS, [Part(9, "embedding")], [Part(9, None)]], ids=len)
def test_forward_is_ordinary_attention(parts):
    wide = states()
    narrow = [tensor.detach().float() for tensor in wide]
    assert_as_good_as_torch(attended(*narrow, parts), by_hand(*wide), by_hand(*narrow))


def test_gradients_stay_within_an_adapter():
    """Each part's outputs, part by part: keys and values of parts under another adapter get exactly nothing."""
    query, key, value = states()
    out = attended(query, key, value, PARTS)
    for part in range(3):
        tokens = [place for place, of in enumerate(OF) if of == part]
        loss = (out[:, tokens] * torch.randn(2, len(tokens), 4, 8, dtype=torch.float64)).sum()
        grads = torch.autograd.grad(loss, (query, key, value), retain_graph=True)
        reached = [[of for of in range(3) if grad[:, :, [o == of for o in OF]].any()] for grad in grads]
        assert reached[0] == [part]
        assert reached[1] == reached[2] == {0: [0], 1: [1], 2: [0, 2]}[part]


def cut_by_hand(query, key, value, weight, parts):
    """Gradients of a weighted sum of ordinary attention whose keys and values were detached before."""
    total = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    start = 0
    for end, name in parts:
        adapters = [next(adapter for until, adapter in parts if place < until) for place in range(9)]
        own = torch.tensor([adapter == name for adapter in adapters])[:, None]
        seen = [torch.where(own, tensor, tensor.detach()) for tensor in (key, value)]
        loss = (by_hand(query, *seen) * weight)[:, start:end].sum()
        for sum_, grad in zip(total, torch.autograd.grad(loss, (query, key, value)), strict=True):
            sum_ += grad
        start = end
    return total


@pytest.mark.parametrize("parts", [PARTS, [Part(4, "embedding"), Part(9, "embedding")]], ids=["cut", "not cut"])
def test_gradients_within_an_adapter_are_attentions_own(parts):
    wide = states()
    narrow = [tensor.detach().float().requires_grad_() for tensor in wide]
    weight = torch.randn(2, 9, 4, 8)
    actual = torch.autograd.grad((attended(*narrow, parts) * weight).sum(), narrow)
    expected, torch_own = (cut_by_hand(*given, weight.to(given[0]), parts) for given in (wide, narrow))
    for name, *results in zip(("query", "key", "value"), actual, expected, torch_own, strict=True):
        assert_as_good_as_torch(*results, name)


def test_the_models_attention_is_put_back_also_after_an_error():
    own = config()
    with pytest.raises(ZeroDivisionError), detached_attention(own, PARTS):
        assert own._attn_implementation != "sdpa"
        raise ZeroDivisionError
    assert own._attn_implementation == "sdpa"


def test_another_attention_is_refused_before_anything_is_trained(embedder_of, trainee_of):
    """Whatever the graph: masks of training are dense, which other attentions may not read."""
    embedder = embedder_of("llama", graph="reencode")
    embedder.model.config.get_text_config()._attn_implementation = "eager"
    with pytest.raises(OptionError, match='^training needs attn_implementation="sdpa", got "eager". Load the model'):
        trainee_of(embedder)


def test_another_attention_is_refused():
    own = SimpleNamespace(_attn_implementation="eager")
    message = 'training needs attn_implementation="sdpa", got "eager". Load the model with attn_implementation="sdpa".'
    with pytest.raises(OptionError) as caught, detached_attention(own, PARTS):
        pass
    assert str(caught.value) == message and own._attn_implementation == "eager"
