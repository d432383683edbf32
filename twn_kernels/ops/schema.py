"""Registration with ``torch.library``: schemas, shapes without data, autograd.

``define``/``impl`` rather than ``custom_op``: the boundary costs half as much. Eager calls without gradients bypass the
dispatcher altogether (see :func:`call`), since at decode the boundary costs more than the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from twn_kernels.ops import choice
from twn_kernels.ops.autocast import without_autocast

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor A_r, Tensor B_r, Tensor A_e, Tensor B_e, "
    "float scaling_r, float scaling_e, Tensor routes, int present, bool is_uniform, "
    "float dropout_r, float dropout_e, Tensor? seed, str impl"
)

_LIBRARY = torch.library.Library("twn", "DEF")
_LIBRARY.define(f"dual_lora_linear({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIBRARY.define(f"dual_lora_linear_fanout({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "dual_lora_linear_backward(Tensor dy, Tensor? dy_r, Tensor? dy_e, Tensor x, Tensor weight, "
    "Tensor A_r, Tensor B_r, Tensor A_e, Tensor B_e, float scaling_r, float scaling_e, Tensor s, "
    "Tensor routes, int present, bool is_uniform, float dropout_r, float dropout_e, Tensor? seed, bool[] needs, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def call(name: str, *args) -> tuple[Tensor, ...]:
    """Run a forward op: straight to the implementation in plain eager inference, through the dispatcher otherwise."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(args)
    if _plain_eager(args):
        return _FORWARD[name](*args)
    return getattr(torch.ops.twn, name)(*args)


def _refuse_tangents(args: tuple) -> None:
    if any(forward_ad.unpack_dual(arg).tangent is not None for arg in args if isinstance(arg, Tensor)):
        raise NotImplementedError(
            "dual_lora_linear has no forward-mode derivative; kernels would drop the tangent. Use reverse mode."
        )


def _plain_eager(args: tuple) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # Transforms wrap tensors without changing their type, and kernels cannot see lazy negations.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg() for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _runs(function: str):
    """``forward`` or ``fanout`` of whichever implementation a call names."""

    def run(
        x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, is_uniform, p_r, p_e, seed, impl
    ):  # fmt: skip
        tensors = ([weight], [A_r], [B_r], [A_e], [B_e])
        impl = _resolved(impl, x, tensors, measured=function == "forward")
        routes = _routes(impl, routes, is_uniform)
        with without_autocast(x.device):
            return getattr(choice.load(impl), function)(
                x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, p_r, p_e, seed
            )

    return run


def _backward(
    dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, is_uniform,
    dropout_r, dropout_e, seed, needs, impl,
):  # fmt: skip
    if impl in (choice.AUTO, choice.DIFFERENTIABLE):
        tokens = x.shape[0] if dy_r is None else None
        impl = choice.resolve(choice.DIFFERENTIABLE, x.device, x.dtype, tokens=tokens)
    with without_autocast(x.device):
        grads = choice.load(impl).backward(
            dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, _routes(impl, routes, is_uniform),
            present, dropout_r, dropout_e, seed, tuple(needs),
        )  # fmt: skip
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _resolved(impl: str, x: Tensor, tensors: tuple, *, measured: bool) -> str:
    """What serves ``"auto"``, now that the token count is known; the fan-out borrows no measurement of the linear."""
    if impl not in (choice.AUTO, choice.DIFFERENTIABLE):
        return impl
    return choice.serving(impl, x, tensors, tokens=x.shape[0] if measured else None).impl


def _with_shrinks(function):
    """A registered op gives every tensor of its schema: zeros for the ``s`` of an implementation for inference."""

    def run(x, weight, bias, A_r, B_r, A_e, *rest):
        *outputs, s = function(x, weight, bias, A_r, B_r, A_e, *rest)
        return (*outputs, A_r.new_zeros(x.shape[0], A_r.shape[0] + A_e.shape[0]) if s is None else s)

    return run


def _routes(impl: str, routes: Tensor, is_uniform: bool) -> Tensor | None:
    """None tells an implementation that declares ``UNIFORM`` that every row takes just the adapters in ``present``."""
    return None if is_uniform and getattr(choice.load(impl), "UNIFORM", False) else routes


_FORWARD = {"dual_lora_linear": _runs("forward"), "dual_lora_linear_fanout": _runs("fanout")}


def _shapes(x: Tensor, weight: Tensor, A_r: Tensor, A_e: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, A_r.new_empty(x.shape[0], A_r.shape[0] + A_e.shape[0])


def _fake_forward(x, weight, bias, A_r, B_r, A_e, *_):
    return _shapes(x, weight, A_r, A_e)


def _fake_fanout(x, weight, bias, A_r, B_r, A_e, *_):
    y, s = _shapes(x, weight, A_r, A_e)
    return y, torch.empty_like(y), s


def _fake_backward(
    dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, is_uniform,
    dropout_r, dropout_e, seed, needs, impl,
):  # fmt: skip
    shapes = [x.shape, A_r.shape, B_r.shape, A_e.shape, B_e.shape, (weight.shape[0],)]
    likes = [x, A_r, B_r, A_e, B_e, dy]
    return tuple(
        like.new_empty(shape) if need else x.new_empty(0)
        for like, shape, need in zip(likes, shapes, needs, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    x, weight, bias, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present, is_uniform, p_r, p_e, seed, impl = (
        inputs
    )
    s = output[-1]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, weight, A_r, B_r, A_e, B_e, s, routes, seed)
    ctx.options = (scaling_r, scaling_e, present, is_uniform, p_r, p_e, impl)


def _gradients(ctx, dy: Tensor, dy_r: Tensor | None, dy_e: Tensor | None) -> tuple:
    x, weight, A_r, B_r, A_e, B_e, s, routes, seed = ctx.saved_tensors
    scaling_r, scaling_e, present, is_uniform, p_r, p_e, impl = ctx.options
    need_x, need_weight, need_bias, *need_adapters = ctx.needs_input_grad[:7]
    needs = [need_x, *need_adapters, need_bias]
    grads = torch.ops.twn.dual_lora_linear_backward(
        dy, dy_r, dy_e, x, weight, A_r, B_r, A_e, B_e, scaling_r, scaling_e, s, routes, present, is_uniform,
        p_r, p_e, seed, needs, impl,
    )  # fmt: skip
    dx, dA_r, dB_r, dA_e, dB_e, dbias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    # The base weight is meant to be frozen; where it is not, it gets nn.Linear's gradient rather than silence.
    with without_autocast(x.device):
        dweight = dy.t() @ x if need_weight else None
    return dx, dweight, dbias, dA_r, dB_r, dA_e, dB_e, *[None] * 9


def _forward_gradients(ctx, dy, _ds):
    return _gradients(ctx, dy.contiguous(), None, None)


def _fanout_gradients(ctx, dy_r, dy_e, _ds):
    return _gradients(ctx, dy_r + dy_e, dy_r.contiguous(), dy_e.contiguous())


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "dual_lora_linear has no second derivative: its gradient was differentiated again (create_graph=True). "
        "Compute gradient penalties on the unpatched model, or with merged weights."
    )


def _register() -> None:
    table = {
        "dual_lora_linear": (_FORWARD["dual_lora_linear"], _fake_forward, _forward_gradients),
        "dual_lora_linear_fanout": (_FORWARD["dual_lora_linear_fanout"], _fake_fanout, _fanout_gradients),
        "dual_lora_linear_backward": (_backward, _fake_backward, _no_second_derivative),
    }
    for name, (kernel, fake, gradients) in table.items():
        registered = kernel if kernel is _backward else _with_shrinks(kernel)
        _LIBRARY.impl(name, registered, "CompositeExplicitAutograd")
        torch.library.register_fake(f"twn::{name}", fake, lib=_LIBRARY)
        saves = None if gradients is _no_second_derivative else _save
        torch.library.register_autograd(f"twn::{name}", gradients, setup_context=saves, lib=_LIBRARY)


_register()
