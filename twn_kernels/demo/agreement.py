"""That the patched model is PEFT's: logits, greedy tokens, what patching adds, and what unpatching leaves."""

from __future__ import annotations

from collections.abc import Callable

import torch

import twn_kernels.patching as patching
from twn_kernels.checkpoint import load_checkpoint
from twn_kernels.demo.setting import Setting
from twn_kernels.settings import EMBEDDING, REASONING

__all__ = ["against_peft", "patch_cost"]

_NEW_TOKENS = 16


def against_peft(setting: Setting, say: Callable[[str], None]) -> dict:
    """One batch that mixes both adapters and base rows, and greedy generation, against PEFT with ``adapter_names``."""
    peft_model, patched = setting.peft_model(), setting.embedder.model
    texts = setting.texts(4)
    spec = [REASONING, EMBEDDING, None, REASONING][: len(texts)]
    rows = [name or "__base__" for name in spec]
    batch = setting.batch(texts)
    seen = batch["attention_mask"].bool()
    greedy = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        expected = peft_model(**batch, adapter_names=rows).logits[seen]
        with patching.route(patched, spec):
            got = patched(**batch).logits[seen]
        untouched = patched(**batch).logits[seen]
        with peft_model.disable_adapter():
            plain = peft_model(**batch).logits[seen]
        expected_tokens = peft_model.generate(**batch, **greedy, adapter_names=rows)[:, seen.shape[1] :]
        with patching.route(patched, spec):
            tokens = patched.generate(**batch, **greedy)[:, seen.shape[1] :]
    equal = int((tokens == expected_tokens).sum())
    figures = {
        "largest_logit": expected.abs().max().item(),
        "largest_difference": (got - expected).abs().max().item(),
        "largest_difference_base_rows": (untouched - plain).abs().max().item(),
        "adapter_effect": (expected - plain).abs().max().item(),
        "greedy_tokens_equal": equal,
        "greedy_tokens": expected_tokens.numel(),
    }
    say(f"\n4. against PEFT, one batch of rows [{', '.join(name or 'base' for name in spec)}], float32")
    say(
        f"   largest logit difference   {figures['largest_difference']:.2e}   "
        f"(logits up to {figures['largest_logit']:.2f}, moved by the adapters by up to {figures['adapter_effect']:.2f})"
    )
    say(f"   without a route, base rows {figures['largest_difference_base_rows']:.2e}")
    say(f"   greedy tokens equal        {equal} of {figures['greedy_tokens']}")
    return figures


def patch_cost(setting: Setting, say: Callable[[str], None]) -> dict:
    """Bytes that ``patch`` adds to a fresh backbone, and whether ``unpatch`` restores its module objects."""
    model = setting.base_model()
    before, modules = _bytes(model), dict(model.named_modules())
    checkpoint = load_checkpoint(setting.model.twn)
    adapters = sum(
        layer.A.nbytes + layer.B.nbytes for adapter in checkpoint.adapters.values() for layer in adapter.layers.values()
    )
    patching.patch(model, checkpoint)
    added = _bytes(model) - before
    patching.unpatch(model)
    restored = all(module is modules.get(name) for name, module in model.named_modules())
    figures = {
        "base_bytes": before,
        "adapter_bytes": adapters,
        "added_bytes": added,
        "beyond_adapters_percent_of_base": 100 * (added - adapters) / before,
        "unpatch_restores_modules": restored,
    }
    say("\n5. patch(model, checkpoint)")
    say(f"   base {before:,} bytes; adapters {adapters:,}; added by patch {added:,}")
    say(
        f"   beyond the adapters: {figures['beyond_adapters_percent_of_base']:.2f} % of the base "
        "(promised: at most 1 %)"
    )
    say(f"   unpatch restores the same module objects: {'yes' if restored else 'NO'}")
    return figures


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of every distinct storage that the model's parameters and buffers hold."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
