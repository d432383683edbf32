"""Pairs of PEFT adapters on tiny models, and one model run by PEFT beside the same one patched."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from twn_kernels.modules.site_group import SiteGroup
from twn_kernels.patching.specs import choose_targets, family_of
from twn_kernels.testing.tiny_models import tiny_inputs, tiny_model

NAMES = ("reasoning", "embedding")


def _trained_like(model: torch.nn.Module, seed: int) -> None:
    """Adapter weights of a size that moves the outputs, B included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise / parameter.shape[1] ** 0.5)


@pytest.fixture
def with_peft():
    """Give ``make(model, ...)``: a deep copy of the model with two PEFT adapters of unequal rank and odd scaling."""
    from peft import LoraConfig, get_peft_model

    def make(
        model, *, targets=None, ranks=(5, 3), dropout=0.0, seed=7, names=NAMES, autocast_adapter_dtype=True, **options
    ):
        base = copy.deepcopy(model)
        targets = list(choose_targets(base, None, family_of(base))) if targets is None else targets

        def config(rank):
            return LoraConfig(r=rank, lora_alpha=rank + 1.3, target_modules=targets, lora_dropout=dropout, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = {"autocast_adapter_dtype": autocast_adapter_dtype}
            peft = get_peft_model(base, config(ranks[0]), adapter_name=names[0], **kept)
            peft.add_adapter(names[1], config(ranks[1]), **kept)
        _trained_like(peft, seed)
        return peft.eval()

    return make


@pytest.fixture
def pair(with_peft):
    """Give ``make(family, ...)``: ``(PEFT's model, the same model again for patching, inputs)``."""

    def make(family, *, batch=3, dtype=torch.float32, inputs=None, **options):
        reference = with_peft(tiny_model(family, dtype=dtype), **options)
        prepared = tiny_inputs(family, batch, **(inputs or {}))
        return reference, copy.deepcopy(reference), prepared

    return make


@pytest.fixture
def peft_logits():
    """Give ``run(model, inputs, route)``: PEFT's own logits under a name, None, "both", or one name a row."""

    @torch.no_grad()
    def run(model, inputs, route):
        if isinstance(route, list):
            return model(**inputs, adapter_names=[name or "__base__" for name in route]).logits
        if route is None:
            with model.disable_adapter():
                return model(**inputs).logits
        model.base_model.set_adapter(list(NAMES) if route == "both" else route)
        return model(**inputs).logits

    return run


@pytest.fixture
def in_double():
    """Give ``convert(model_or_inputs)``: the same weights or inputs in fp64."""

    def convert(thing):
        if isinstance(thing, torch.nn.Module):
            return copy.deepcopy(thing).double()
        return {key: value.double() if value.is_floating_point() else value for key, value in thing.items()}

    return convert


@pytest.fixture
def runs(monkeypatch):
    """The site of every fused call, in order."""
    seen, real = [], SiteGroup.run

    def run(self, *args, **kwargs):
        seen.append(self.site)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SiteGroup, "run", run)
    return seen


@pytest.fixture
def graphs():
    """Give a compile backend that counts graphs and runs them as they are."""
    count = []

    def backend(module, _):
        count.append(module)
        return module

    torch._dynamo.reset()
    yield count, backend
    torch._dynamo.reset()
