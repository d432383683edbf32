"""What thinking costs, patched against naive: always-thinking passes, and prefills whose rows use both adapters.

The contenders take turns in the same run, on the shipped model. It is small: Python outweighs its products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import twn_kernels.patching as patching
from twn_kernels.benchmarking.timing import Timing, compare
from twn_kernels.demo.naive import NaivePipeline
from twn_kernels.demo.setting import Setting, device
from twn_kernels.ops.choice import chosen
from twn_kernels.settings import EMBEDDING, REASONING

__all__ = ["compare_with_peft"]

_THINKING_ROUNDS, _PREFILL_ROUNDS = 5, 15
_THINKING_QUERIES, _PREFILL_QUERIES = 64, 64
_FUSED_IMPLS = ("triton", "cuda")


def compare_with_peft(setting: Setting, say: Callable[[str], None]) -> dict:
    """Time both, say what they gave, and return the figures."""
    impl = chosen("auto", device(), torch.float32)
    ours = "fused" if impl.impl in _FUSED_IMPLS else "patched"
    model = setting.peft_model()
    say("\n3. what it costs: PEFT against the patched model, taking turns")
    figures = {
        "impl": impl.impl,
        "thinking": _thinking(setting, model, ours, say),
        "prefill": _prefill(setting, model, ours, say),
    }
    say(f"   impl: {impl.impl} ({impl.reason}).")
    say("   Times of this machine; in so small a model Python outweighs the products. They say nothing about a GPU.")
    return figures


def _thinking(setting: Setting, model: torch.nn.Module, ours: str, say: Callable[[str], None]) -> dict:
    inputs = [entry.input for entry in setting.split.queries[:_THINKING_QUERIES]]
    naive, embedder = NaivePipeline(model, setting.embedder), setting.embedder
    expected = naive.always(inputs)
    got, details = embedder.encode(
        inputs, think="always", batch_size=len(inputs), convert_to_tensor=True, return_details=True
    )
    timings = compare(
        {
            "PEFT: set_adapter, write, set_adapter": lambda: naive.always(inputs),
            f"{ours}: encode(think='always')": lambda: embedder.encode(inputs, think="always", batch_size=len(inputs)),
        },
        rounds=_THINKING_ROUNDS,
        warmup=1,
    )
    same = sum(detail.tokens == count for detail, count in zip(details, expected.tokens, strict=True))
    difference = (got - expected.vectors).abs().max().item()
    tokens = sum(expected.tokens)
    say(f"   {len(inputs)} queries, each with a thought ({tokens} tokens); median of {_THINKING_ROUNDS} rounds")
    _say_timings(timings, say)
    say(f"      thoughts as long as PEFT's: {same} of {len(inputs)}; vectors differ by up to {difference:.1e}")
    return {
        "queries": len(inputs),
        "thoughts_as_long": same,
        "largest_difference": difference,
        "typical_entry": got.square().mean().sqrt().item(),
        "times": {name: timing._asdict() for name, timing in timings.items()},
    }


def _prefill(setting: Setting, model: torch.nn.Module, ours: str, say: Callable[[str], None]) -> dict:
    texts = setting.texts(_PREFILL_QUERIES)
    batch, plain, patched = setting.batch(texts), setting.base_model(), setting.embedder.model
    rows = [(REASONING, EMBEDDING)[place % 2] for place in range(len(texts))]

    def routed(spec):
        with patching.route(patched, spec):
            return patched(**batch)

    model.set_adapter(REASONING)
    with torch.no_grad():
        timings = compare(
            {
                "plain model, no adapters": lambda: plain(**batch),
                "PEFT, one adapter": lambda: model(**batch),
                f"{ours}, one adapter": lambda: routed(REASONING),
                "PEFT, rows of both adapters": lambda: model(**batch, adapter_names=rows),
                f"{ours}, rows of both adapters": lambda: routed(rows),
            },
            rounds=_PREFILL_ROUNDS,
        )
    count, tokens = batch["input_ids"].shape
    say(f"   one forward of {count} x {tokens} tokens; median of {_PREFILL_ROUNDS} rounds")
    _say_timings(timings, say)
    return {name: timing._asdict() for name, timing in timings.items()}


def _say_timings(timings: dict[str, Timing], say: Callable[[str], None]) -> None:
    for name, timing in timings.items():
        say(f"      {name:<42} {timing.median_ms:8.2f} ms   ({timing.p20_ms:.2f} … {timing.p80_ms:.2f})")
