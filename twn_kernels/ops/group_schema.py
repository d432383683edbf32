"""Registration of the site-group ops with ``torch.library``: schemas, shapes without data, autograd.

Two ops: ``dual_lora_group`` is differentiable and holds the products alone; ``dual_lora_group_inference`` adds what
stands before and after them (norm or gate, SwiGLU, residual), where nothing has to be kept for a backward pass.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from twn_kernels.ops import choice
from twn_kernels.ops.autocast import without_autocast

_LAYERS = (
    "Tensor[] weights, Tensor[] biases, Tensor[] A_r, Tensor[] B_r, Tensor[] A_e, Tensor[] B_e, "
    "float[] scaling_r, float[] scaling_e, Tensor? routes, int present, bool is_uniform, Tensor[] packed, "
    "str impl, str? site"
)

_LIBRARY = torch.library.Library("twn", "FRAGMENT")
_LIBRARY.define(f"dual_lora_group(Tensor x, {_LAYERS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"dual_lora_group_inference(Tensor x, Tensor? norm_weight, float eps, bool gated, bool swiglu, Tensor? residual, "
    f"{_LAYERS}) -> Tensor"
)
_LIBRARY.define(
    "dual_lora_group_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] A_r, Tensor[] B_r, Tensor[] A_e, "
    "Tensor[] B_e, float[] scaling_r, float[] scaling_e, Tensor s, Tensor? routes, int present, bool is_uniform, "
    "bool[] needs, str impl, str? site) -> Tensor[]"
)


def products(x: Tensor, *layers) -> tuple[Tensor, Tensor]:
    """``y [tokens, sum of out_features]`` and ``s``, differentiable."""
    _refuse_tangents((x, layers))
    return torch.ops.twn.dual_lora_group(x, *layers)


def inference(x: Tensor, norm_weight, eps, gated, swiglu, residual, *layers) -> Tensor:
    """The whole group without a backward pass: straight to the implementation in plain eager mode."""
    args = (x, norm_weight, eps, gated, swiglu, residual, *layers)
    _refuse_tangents(args)
    run = _inference if _plain_eager(args) else torch.ops.twn.dual_lora_group_inference
    return run(*args)


def tensors_of(args) -> list[Tensor]:
    """Every tensor of nested arguments."""
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found += tensors_of(arg)
    return found


def _refuse_tangents(args) -> None:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors_of(args)):
        raise NotImplementedError(
            "dual_lora_group has no forward-mode derivative; kernels would drop the tangent. Use reverse mode."
        )


def _plain_eager(args) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() for t in tensors_of(args))


def _routes(module, routes: Tensor | None, present: int, is_uniform: bool) -> Tensor | None:
    """None where every row takes exactly ``present`` and the implementation knows what to make of that."""
    known = present == 0 or (is_uniform and getattr(module, "GROUP_UNIFORM", False))
    return None if known else routes


def _lent(asked: str, x: Tensor, site: str | None) -> dict:
    """The fused producer that Triton lends to the vendor GEMM; it is no default before it was measured."""
    if x.device.type != "cuda" or not _has_producer(x.device, x.dtype):
        return {}
    if not choice.is_deliberate(asked, x.device, x.dtype, site=site, tokens=x.shape[0]):
        return {}
    return {"produce": choice.load("triton").produce_}


@functools.cache
def _has_producer(device: torch.device, dtype: torch.dtype) -> bool:
    return choice.unavailable_reason("triton", device, dtype) is None


def _run(x, norm_weight, eps, gated, swiglu, residual, layers, **options) -> tuple[Tensor, Tensor]:
    weights, biases, *adapters, routes, present, is_uniform, packed, asked, site = layers
    # Autograd gives gradients to lists of tensors alone, so an absent bias travels as an empty one.
    biases = [bias if bias.numel() else None for bias in biases]
    # Here and not where the op is called: a traced call must not look at its token count.
    impl, refused = asked, ""
    if asked in (choice.AUTO, choice.DIFFERENTIABLE):
        impl, refused = choice.serving(asked, x, (weights, *adapters[:4]), site=site, tokens=x.shape[0])
    module = choice.load(impl)
    if impl != "blas":
        options = {}  # the vendor GEMM alone knows packed weights and borrows a producer
    else:
        options |= {"packed": packed} | ({} if refused else _lent(asked, x, site))
    routes = _routes(module, routes, present, is_uniform)
    with without_autocast(x.device):
        return module.group(
            x, norm_weight, eps, gated, weights, biases, *adapters, routes, present, swiglu, residual, **options
        )


def _inference(x, norm_weight, eps, gated, swiglu, residual, *layers) -> Tensor:
    return _run(x, norm_weight, eps, gated, swiglu, residual, layers, needs_s=False)[0]


def _forward(x, *layers) -> tuple[Tensor, Tensor]:
    return _run(x, None, 0.0, False, False, None, layers)


def _backward(
    dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, is_uniform, needs, impl, site
) -> list[Tensor]:
    if impl in (choice.AUTO, choice.DIFFERENTIABLE):
        impl = choice.resolve(choice.DIFFERENTIABLE, x.device, x.dtype, site=site, tokens=x.shape[0])
    module = choice.load(impl)
    with without_autocast(x.device):
        dx, *lists = module.group_backward(
            dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, _routes(module, routes, present, is_uniform),
            present, _nested(needs, len(weights)),
        )  # fmt: skip
    flat = [dx, *(grad for grads in lists for grad in grads)]
    return [x.new_empty(0) if grad is None else grad for grad in flat]


def _nested(needs: list[bool], count: int) -> tuple:
    return (needs[0], *(list(needs[1 + i * count : 1 + (i + 1) * count]) for i in range(5)))


def _fake_forward(x, weights, biases, A_r, B_r, A_e, *_):
    y = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    return y, A_r[0].new_empty(x.shape[0], sum(a.shape[0] for a in (*A_r, *A_e)))


def _fake_inference(x, norm_weight, eps, gated, swiglu, residual, weights, *_):
    outputs = [weight.shape[0] for weight in weights]
    return x.new_empty(x.shape[0], outputs[0] if swiglu else sum(outputs))


def _fake_backward(dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, is_uniform, needs, *_):
    biases = [dy.new_empty(weight.shape[0]) for weight in weights]
    likes = [x, *A_r, *B_r, *A_e, *B_e, *biases]
    return [like.new_empty(like.shape) if need else x.new_empty(0) for like, need in zip(likes, needs, strict=True)]


def _save(ctx, inputs, output) -> None:
    x, weights, _, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, is_uniform, packed, impl, site = inputs
    s = output[1]
    ctx.mark_non_differentiable(s)
    ctx.count, ctx.packed = len(weights), len(packed)
    ctx.save_for_backward(x, s, routes, *weights, *A_r, *B_r, *A_e, *B_e)
    ctx.options = (list(scaling_r), list(scaling_e), present, is_uniform, impl, site)


def _gradients(ctx, dy: Tensor, _ds) -> tuple:
    x, s, routes, *flat = ctx.saved_tensors
    count = ctx.count
    weights, A_r, B_r, A_e, B_e = (flat[i * count : (i + 1) * count] for i in range(5))
    scaling_r, scaling_e, present, is_uniform, impl, site = ctx.options
    need_x, need_weights, need_biases, *need_adapters = ctx.needs_input_grad[:7]
    needs = [need_x, *(need for needed in need_adapters for need in needed), *need_biases]
    dy = dy.contiguous()
    grads = torch.ops.twn.dual_lora_group_backward(
        dy, x, weights, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, is_uniform, needs, impl, site
    )
    kept = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    dA_r, dB_r, dA_e, dB_e, dbias = (kept[1 + i * count : 1 + (i + 1) * count] for i in range(5))
    dweights, dpacked = _weight_gradients(dy, x, weights, need_weights), [None] * ctx.packed
    return kept[0], dweights, dbias, dA_r, dB_r, dA_e, dB_e, *[None] * 5, dpacked, None, None


def _weight_gradients(dy: Tensor, x: Tensor, weights: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """A base weight is meant to be frozen; where it is not, it gets nn.Linear's gradient rather than silence."""
    parts = dy.split([weight.shape[0] for weight in weights], dim=1)
    with without_autocast(x.device):
        return [part.t() @ x if need else None for part, need in zip(parts, needs, strict=True)]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "dual_lora_group has no second derivative: its gradient was differentiated again (create_graph=True). "
        "Compute gradient penalties on the unpatched model, or with merged weights."
    )


def _register() -> None:
    table = {
        "dual_lora_group": (_forward, _fake_forward, _gradients, _save),
        "dual_lora_group_inference": (_inference, _fake_inference, None, None),
        "dual_lora_group_backward": (_backward, _fake_backward, _no_second_derivative, None),
    }
    for name, (kernel, fake, gradients, saves) in table.items():
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"twn::{name}", fake, lib=_LIBRARY)
        if gradients is not None:
            torch.library.register_autograd(f"twn::{name}", gradients, setup_context=saves, lib=_LIBRARY)


_register()
