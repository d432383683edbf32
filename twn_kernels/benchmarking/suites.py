"""Which cases are measured, the most important first: a run that is cut short has what the targets ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twn_kernels.benchmarking.cases import GROUPS, LINEARS, MLP, Case, check_case
from twn_kernels.benchmarking.results import SUITES
from twn_kernels.errors import OptionError, did_you_mean, quoted

__all__ = ["SCALES", "cases"]

SCALES = ("tiny", "full")
_CONTEXT = 1024  # tokens in the cache before a decode step
_RANKS = ((16, 16), (32, 32), (48, 48), (96, 96), (128, 128), (64, 32))
_ROUTES = ("suffix", "alternating", "both", "reasoning", "base")


def cases(scale: str, suites: Sequence[str] = SUITES, *, layers: int | None = None) -> list[Case]:
    """The cases of a scale, each once, in order of importance.

    Args:
        scale: ``full``: the real shapes, for a GPU. ``tiny``: every suite, pass and route in shapes for a CPU.
        suites: which of ``linear``, ``group``, ``layer``, ``model``.
        layers: decoder layers that the model suite builds at most; None: all that the models have.

    Raises:
        OptionError: an unknown scale or suite, or a number of layers out of range.
    """
    if scale not in SCALES:
        raise OptionError(f"scale must be one of {quoted(SCALES)}, got {scale!r}.{did_you_mean(scale, SCALES)}")
    for suite in suites:
        if suite not in SUITES:
            raise OptionError(f"suite must be one of {quoted(SUITES)}, got {suite!r}.{did_you_mean(suite, SUITES)}")
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
        raise OptionError(f"layers must be a whole number of 1 or more, got {layers!r}.")
    found = _tiny() if scale == "tiny" else _full()
    chosen = [case for case in found if case.suite in suites]
    if layers is not None:
        chosen = [case.with_layers(layers) for case in chosen]
    return [check_case(case) for case in dict.fromkeys(chosen)]


def _groups(pass_: str, model: str, tokens: Iterable[int], routes: str = "half", **more) -> list[Case]:
    return [Case("group", pass_, model, t, routes, site=site, **more) for t in tokens for site in (*GROUPS, MLP)]


def _layer(pass_: str, model: str, tokens: int, routes: str = "half", **more) -> Case:
    context = _CONTEXT if pass_ == "decode" else None
    return Case("layer", pass_, model, tokens, routes, layers=1, context=context, **more)


def _model(pass_: str, model: str, tokens: int, routes: str = "half", layers: int = 36, **more) -> Case:
    context = _CONTEXT if pass_ == "decode" else None
    return Case("model", pass_, model, tokens, routes, layers=layers, context=context, **more)


def _full() -> list[Case]:
    found: list[Case] = []
    # What the targets are about.
    for model in ("8B", "4B"):
        found += _groups("decode", model, (1, 8, 32))
        found += _groups("forward", model, (4096,))
    for model in ("8B", "4B"):
        found += [_model("forward", model, 4096), _model("decode", model, 8)]
    found += [_layer("forward_backward", model, 4096) for model in ("8B", "4B")]
    for model in ("8B", "4B"):
        found += _groups("forward", model, (4096,), "base") + _groups("decode", model, (8,), "base")
        found += [_layer("forward", model, 4096), _layer("decode", model, 8)]
        found += [_layer("forward", model, 4096, "base"), _layer("decode", model, 8, "base")]
        found += _groups("forward", model, (2048,))
    # Around them: other routes, token counts, ranks, the small model.
    for routes in _ROUTES:
        found += _groups("forward", "8B", (4096,), routes)
        found += [] if routes == "suffix" else _groups("decode", "8B", (32,), routes)
    found += _groups("decode", "8B", (2, 4, 16, 64, 128, 256)) + _groups("forward", "8B", (512, 1024, 8192, 16384))
    for ranks in _RANKS:
        found += _groups("forward", "8B", (4096,), ranks=ranks) + _groups("decode", "8B", (8,), ranks=ranks)
    found += _groups("forward", "2B", (4096,)) + _groups("decode", "2B", (1, 8, 32))
    found += [_model("forward", "2B", 4096, layers=28), _model("decode", "2B", 8, layers=28)]
    found += [
        _layer(pass_, "2B", 8 if pass_ == "decode" else 4096) for pass_ in ("forward", "decode", "forward_backward")
    ]
    found += _groups("forward_backward", "8B", (4096,)) + _groups("forward_backward", "4B", (4096,))
    found += [_model("decode", model, tokens) for model in ("8B", "4B") for tokens in (1, 32)]
    found += [_model("forward", model, 4096, "suffix") for model in ("8B", "4B")]
    for site in LINEARS:
        found += [Case("linear", "forward", "8B", 4096, "half", site=site)]
        found += [Case("linear", "decode", "8B", 8, "half", site=site)]
    found += _groups("decode", "4B", (2, 4, 16, 64)) + _groups("forward", "4B", (512, 1024, 8192))
    for routes in _ROUTES:
        found += _groups("forward", "4B", (4096,), routes)
    found += _groups("forward", "8B", (4096,), dtype="fp16") + _groups("decode", "8B", (8,), dtype="fp16")
    found += [Case("linear", "forward_backward", "8B", 4096, "half", site=site) for site in LINEARS]
    # Pairs of passes whose fp64 truth keeps every layer: few layers.
    found += [_model("forward_backward", "8B", 2048, layers=4), _model("forward_backward", "4B", 2048, layers=4)]
    return found


def _tiny() -> list[Case]:
    """Every suite with every pass it has, every route, equal and unequal ranks, a 16-bit dtype and fp32."""

    def group(site: str, pass_: str, tokens: int, routes: str, ranks=(16, 8), dtype="fp32") -> Case:
        return Case("group", pass_, "tiny", tokens, routes, ranks, dtype, site=site)

    def whole(suite: str, pass_: str, tokens: int, routes: str, dtype="fp32") -> Case:
        context = 8 if pass_ == "decode" else None
        return Case(
            suite, pass_, "tiny", tokens, routes, (16, 8), dtype, layers=1 if suite == "layer" else 2, context=context
        )

    return [
        group("qkv", "decode", 3, "half", dtype="bf16"),
        group("o", "forward", 16, "half"),
        group("gate_up", "forward", 16, "suffix", dtype="bf16"),
        group("down", "forward", 16, "base", ranks=(16, 16)),
        group("qkv", "forward_backward", 16, "alternating"),
        group("mlp", "decode", 2, "half", dtype="bf16"),
        group("mlp", "forward_backward", 16, "suffix"),
        whole("model", "forward", 16, "half"),
        whole("model", "decode", 2, "reasoning"),
        whole("layer", "forward_backward", 16, "half"),
        whole("layer", "forward", 16, "suffix"),
        whole("layer", "decode", 2, "alternating", dtype="bf16"),
        Case("linear", "forward", "tiny", 16, "both", (16, 8), "fp32", site="k"),
        Case("linear", "decode", "tiny", 1, "reasoning", (16, 8), "fp16", site="o"),
        Case("linear", "forward_backward", "tiny", 16, "half", (16, 8), "fp32", site="q"),
        whole("model", "forward_backward", 16, "both"),
    ]
