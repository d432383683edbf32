"""The whole path on this machine in a minute or two: build, patch, compare with PEFT, embed in three modes, measure.

The model is a tiny one of the real Qwen3-VL classes with random weights, so what it embeds means nothing; what the demo
shows is that every step is the real one and that the numbers agree. Every figure printed is measured in the same run.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from twn_kernels.errors import MissingDependency

_MODES = ("never", "auto", "always")
_MAX_THINK_TOKENS = 24
_FUSED_IMPLS = ("triton", "cuda")
# Modules that the demo imports beyond torch, and what pip calls them.
_NEEDED = {"transformers": "transformers", "peft": "peft", "sklearn": "scikit-learn", "PIL": "pillow"}

# Wide enough for products to outweigh Python, small enough for a laptop.
_TIMING_MODEL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2}
_TIMING_RANK = 16

Say = Callable[[str], None]


def run_demo(directory: str | Path | None = None, say: Say = print) -> dict:
    """Build a tiny model and a TWN directory, embed real images and texts, and report what was measured.

    Args:
        directory: where to put the model (``base/``) and the adapters (``twn/``); None: a temporary directory.
        say: receives each line of the report.

    Returns:
        The measured figures, ready for JSON.

    Raises:
        MissingDependency: a library that the demo compares with or takes inputs from is not installed.
        OptionError: ``directory`` is a file, or holds files of somebody else where the demo would write.
    """
    _require_libraries()
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="twn-demo-") as temporary, _without_progress_bars():
            return _run(Path(temporary), say)
    from twn_kernels.testing.ownership import check_writable

    for name in ("base", "twn", "timing/base", "timing/twn"):
        check_writable(Path(directory) / name)
    with _without_progress_bars():
        return _run(Path(directory), say)


def _require_libraries() -> None:
    absent = []
    for module, package in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(package)
    if absent:
        raise MissingDependency(
            f"the demo compares with PEFT and embeds images that scikit-learn ships; not installed: "
            f"{', '.join(absent)}. Run: pip install {' '.join(absent)}"
        )


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _run(directory: Path, say: Say) -> dict:
    start = time.perf_counter()
    say("twn_kernels demo: a tiny Qwen3-VL with random, UNTRAINED weights. Vectors and thoughts mean nothing;")
    say("what counts here is that the path is real and that the numbers agree.\n")
    base, twn = _build(directory, say)
    figures = {"peft": _agreement(base, twn, say), "patch": _patch_cost(base, twn, say)}
    inputs, names = _inputs()
    figures["embed"] = _embed(base, twn, inputs, names, say)
    figures["time"] = _timing(directory, say)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    say(f"\ndone in {figures['seconds']} s on {_device_line()}")
    return figures


def _build(directory: Path, say: Say) -> tuple[Path, Path]:
    from twn_kernels.testing.demo_directories import write_demo_directories

    base, twn = write_demo_directories(directory)
    say(f"1. built   {base}  (model, tokenizer, processor: an ordinary HuggingFace directory)")
    say(f"           {twn}  (two adapters written by PEFT, gate, queries)")
    return base, twn


def _load(base: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).to(_device()).eval()


def _load_peft(base: Path, twn: Path) -> torch.nn.Module:
    from peft import PeftModel

    model = PeftModel.from_pretrained(_load(base), twn / "reasoning", adapter_name="reasoning")
    model.load_adapter(twn / "embedding", adapter_name="embedding")
    return model.eval()


def _text_batch(model: torch.nn.Module, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random text tokens below the special ones, without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (rows, tokens), generator=generator).to(_device())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _agreement(base: Path, twn: Path, say: Say) -> dict:
    """One batch that mixes both adapters and base rows, and greedy generation, against PEFT with ``adapter_names``."""
    import twn_kernels

    peft_model, patched = _load_peft(base, twn), twn_kernels.patch(_load(base), twn)
    rows = ["reasoning", "embedding", "__base__", "reasoning"]
    spec = [None if row == "__base__" else row for row in rows]
    batch = _text_batch(patched, len(rows), 33)
    with torch.no_grad():
        expected = peft_model(**batch, adapter_names=rows).logits
        with twn_kernels.route(patched, spec):
            got = patched(**batch).logits
        untouched = patched(**batch).logits
        with peft_model.disable_adapter():
            plain = peft_model(**batch).logits
        greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
        expected_tokens = peft_model.generate(**batch, **greedy, adapter_names=rows)
        with twn_kernels.route(patched, spec):
            tokens = patched.generate(**batch, **greedy)
    new = expected_tokens[:, batch["input_ids"].shape[1] :]
    equal = int((tokens[:, batch["input_ids"].shape[1] :] == new).sum())
    figures = {
        "largest_logit": expected.abs().max().item(),
        "largest_difference": (got - expected).abs().max().item(),
        "largest_difference_base_rows": (untouched - plain).abs().max().item(),
        "adapter_effect": (expected[0] - plain[0]).abs().max().item(),
        "greedy_tokens_equal": equal,
        "greedy_tokens": new.numel(),
    }
    say("\n2. against PEFT, one batch of rows [reasoning, embedding, base, reasoning], float32")
    say(
        f"   largest logit difference   {figures['largest_difference']:.2e}   "
        f"(logits up to {figures['largest_logit']:.2f}, moved by the adapters by up to {figures['adapter_effect']:.2f})"
    )
    say(f"   without a route, base rows {figures['largest_difference_base_rows']:.2e}")
    say(f"   greedy tokens equal        {equal} of {new.numel()}")
    return figures


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of every distinct storage that the model's parameters and buffers hold."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _patch_cost(base: Path, twn: Path, say: Say) -> dict:
    import twn_kernels

    model = _load(base)
    before, modules = _bytes(model), dict(model.named_modules())
    checkpoint = twn_kernels.load_checkpoint(twn)
    adapters = sum(
        layer.A.nbytes + layer.B.nbytes for adapter in checkpoint.adapters.values() for layer in adapter.layers.values()
    )
    twn_kernels.patch(model, checkpoint)
    added = _bytes(model) - before
    twn_kernels.unpatch(model)
    restored = all(module is modules.get(name) for name, module in model.named_modules())
    figures = {
        "base_bytes": before,
        "adapter_bytes": adapters,
        "added_bytes": added,
        "beyond_adapters_percent_of_base": 100 * (added - adapters) / before,
        "unpatch_restores_modules": restored,
    }
    say("\n3. patch(model, checkpoint)")
    say(f"   base {before:,} bytes; adapters {adapters:,}; added by patch {added:,}")
    say(
        f"   beyond the adapters: {figures['beyond_adapters_percent_of_base']:.2f} % of the base "
        "(promised: at most 1 %)"
    )
    say(f"   unpatch restores the same module objects: {'yes' if restored else 'NO'}")
    return figures


def _inputs() -> tuple[list, list[str]]:
    """Eight inputs: two handwritten digits and two photographs that scikit-learn ships, two texts, two of both."""
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits().images
    photographs = load_sample_images().images

    def digit(index: int):
        gray = Image.fromarray((digits[index] * (255 / 16)).astype("uint8"))
        return gray.resize((64, 64), Image.Resampling.NEAREST).convert("RGB")

    def photograph(index: int):
        return Image.fromarray(photographs[index]).resize((160, 96))

    inputs = {
        "handwritten digit (image)": digit(3),
        "another digit (image)": digit(7),
        "photograph of a temple (image)": photograph(0),
        "photograph of a flower (image)": photograph(1),
        "a short text": "a red flower",
        "a longer text": "The old temple stands above the trees; its roofs are gold and red in the evening light.",
        "digit with a question (both)": {"image": digit(5), "text": "Which number is this?"},
        "photograph with a question": {"image": photograph(1), "text": "What is in the foreground?"},
    }
    return list(inputs.values()), list(inputs)


def _embed(base: Path, twn: Path, inputs: list, names: list[str], say: Say) -> dict:
    import twn_kernels

    embedder = twn_kernels.TWNEmbedder.from_pretrained(base, twn, device=_device())
    scores = [d.gate_score for d in embedder.encode(inputs, think="never", return_details=True)[1]]
    # Untrained scores crowd together; the median as threshold lets the gate split the batch.
    threshold = sorted(scores)[len(scores) // 2]
    figures: dict = {"threshold": threshold, "modes": {}}
    say(
        f"\n4. embed {len(inputs)} inputs in one batch; "
        f"auto thinks where the gate reaches {threshold:.4f} (their median)"
    )
    options = {"think_threshold": threshold, "max_think_tokens": _MAX_THINK_TOKENS, "return_details": True}
    embedder.encode(inputs, think="always", **options)  # what only a first call pays is no mode's time
    say("   mode     decided to think  closed  fell back  tokens  seconds")
    vectors, details = {}, {}
    for mode in _MODES:
        start = time.perf_counter()
        vectors[mode], details[mode] = embedder.encode(inputs, think=mode, **options)
        counts = {"seconds": time.perf_counter() - start, **_counts(details[mode])}
        figures["modes"][mode] = counts
        say(
            f"   {mode:<7}  {counts['decided']:>16}  {counts['closed']:>6}  {counts['fell_back']:>9}  "
            f"{counts['tokens']:>6}  {counts['seconds']:7.2f}"
        )
    say(f"   fell back: no closed thought within {_MAX_THINK_TOKENS} tokens, so the input got its plain vector")
    say("\n   gate score  auto        tokens  input")
    for name, detail in zip(names, details["auto"], strict=True):
        decision = "thinks" if detail.thought else "falls back" if detail.fallback else "embeds"
        say(f"   {detail.gate_score:.4f}      {decision:<10}  {detail.tokens:6d}  {name}")
    figures["gate_scores"] = dict(zip(names, scores, strict=True))
    figures["shape"] = list(vectors["auto"].shape)
    return figures


def _counts(details: list) -> dict[str, int]:
    """How many inputs were sent to think, how many of the thoughts closed, how many did not."""
    closed, fell_back = (
        sum(map(bool, column)) for column in zip(*((d.thought, d.fallback) for d in details), strict=True)
    )
    tokens = sum(detail.tokens for detail in details)
    return {"decided": closed + fell_back, "closed": closed, "fell_back": fell_back, "tokens": tokens}


def _timing(directory: Path, say: Say) -> dict:
    """A prefill that mixes both adapters, one that uses one, and the plain model, interleaved."""
    import twn_kernels
    from twn_kernels.benchmarking.timing import compare
    from twn_kernels.testing import write_tiny_model, write_twn_directory

    base = write_tiny_model(directory / "timing" / "base", **_TIMING_MODEL)
    twn = write_twn_directory(directory / "timing" / "twn", _load(base), rank=_TIMING_RANK)
    peft_model, patched, plain = _load_peft(base, twn), twn_kernels.patch(_load(base), twn), _load(base)
    rows = ["reasoning", "embedding"] * 4
    batch = _text_batch(patched, len(rows), 64)

    impl = twn_kernels.ops.choice.chosen("auto", _device(), torch.float32)
    ours = "fused" if impl.impl in _FUSED_IMPLS else "patched"

    def routed(spec):
        with twn_kernels.route(patched, spec):
            return patched(**batch)

    def peft_single():
        return peft_model(**batch)

    peft_model.set_adapter("reasoning")
    with torch.no_grad():
        timings = compare(
            {
                "plain model, no adapters": lambda: plain(**batch),
                "PEFT, one adapter": peft_single,
                f"{ours}, one adapter": lambda: routed("reasoning"),
                "PEFT, rows of both adapters": lambda: peft_model(**batch, adapter_names=rows),
                f"{ours}, rows of both adapters": lambda: routed(rows),
            },
            rounds=9,
        )
    sizes = ", ".join(f"{name} {value}" for name, value in _TIMING_MODEL.items())
    say(f"\n5. forward of {len(rows)} x 64 tokens through a wider model ({sizes}, rank {_TIMING_RANK}),")
    say("   median of 9 interleaved rounds (20 % … 80 %)")
    for name, timing in timings.items():
        say(f"   {name:<30} {timing.median_ms:7.2f} ms   ({timing.p20_ms:.2f} … {timing.p80_ms:.2f})")
    say(f"   impl: {impl.impl} ({impl.reason}).")
    say("   Times of this machine and this size alone; they say nothing about a GPU.")
    return {name: timing._asdict() for name, timing in timings.items()}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_line() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU with {torch.get_num_threads()} threads"
