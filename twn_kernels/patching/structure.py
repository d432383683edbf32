"""Whether a decoder layer is the one that a fused block replaces, down to the source of the forwards it stands for.

A block leaves out calls of norms, activation and MLP and folds the residuals, so it is right only for the very
computation that the table knows. Classes are compared by name and by what their ``forward`` does: a subclass, a patched
method, or a release of transformers that computes something else keeps its layers at linear level, with the reason.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator

from torch import nn

from twn_kernels.patching.own_forward import has_own_forward
from twn_kernels.patching.specs import BlockSpec

__all__ = ["GATE_UP", "QKV", "misfit", "parameter_defaults"]

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_SILU = {("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation")}

_LAYER = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn({arguments})
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""
_MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""


def misfit(layer: nn.Module, spec: BlockSpec) -> str | None:
    """Why ``layer`` is not the decoder layer of ``spec``; None where a block can stand for it."""
    return next(_misfits(layer, spec), None)


def parameter_defaults(layer_class: type) -> tuple[tuple[str, ...], dict]:
    """What a decoder layer's forward takes beside ``hidden_states``: names in order, and the defaults there are."""
    parameters = list(inspect.signature(layer_class.forward).parameters.values())[2:]
    named = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    defaults = {each.name: each.default for each in named if each.default is not each.empty}
    return tuple(each.name for each in named), defaults


def _misfits(layer: nn.Module, spec: BlockSpec) -> Iterator[str]:
    yield from _class_misfits("", layer, (spec.module, spec.layer))
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    yield from _class_misfits("self_attn", attention, (spec.module, spec.attention))
    yield from _class_misfits("mlp", mlp, (spec.module, spec.mlp))
    for name in _NORMS:
        yield from _class_misfits(name, layer._modules.get(name), (spec.module, spec.norm))
    activation = mlp._modules.get("act_fn")
    if (type(activation).__module__, type(activation).__name__) not in _SILU:
        yield f"its activation is {type(activation).__name__}, not SiLU"
    yield from _source_misfits(layer)
    yield from _shape_misfits(layer, attention, mlp)


def _class_misfits(name: str, module: nn.Module | None, expected: tuple[str, str]) -> Iterator[str]:
    what = f"its {name}" if name else "it"
    if (type(module).__module__, type(module).__name__) != expected:
        yield f"{what} is {type(module).__name__}, not transformers' own {expected[1]}"
    elif has_own_forward(module):
        yield f"{what} has a forward set on the instance (an offloading or wrapping hook)"


def _source_misfits(layer: nn.Module) -> Iterator[str]:
    names, _ = parameter_defaults(type(layer))
    arguments = ", ".join(["hidden_states=hidden_states", *(f"{name}={name}" for name in names), "**kwargs"])
    checks = [
        (type(layer), _is_body, _LAYER.format(arguments=arguments)),
        (type(layer.mlp), _is_body, _MLP),
        (type(layer.input_layernorm), _is_body, _NORM),
        (type(layer.self_attn), _is_attention, ""),
    ]
    for owner, check, expected in checks:
        if not check(owner.forward, expected):
            yield f"the forward of {owner.__name__} is not the one that the block stands for"


@functools.cache
def _is_body(forward: Callable, expected: str) -> bool:
    function = _parsed(forward)
    return function is not None and _normal(_statements(function)) == _normal(ast.parse(expected).body)


@functools.cache
def _is_attention(forward: Callable, _expected: str) -> bool:
    """Whether q, k and v are each called once on the attention's own input, and o once, for what it returns first."""
    function = _parsed(forward)
    if function is None:
        return False
    calls: dict[str, list[ast.Call]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self."):
            calls.setdefault(ast.unparse(node.func).removeprefix("self."), []).append(node)
    stored = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    on_input = [[ast.unparse(call) for call in calls.get(name, [])] for name in QKV]
    if on_input != [[f"self.{name}(hidden_states)"] for name in QKV] or "hidden_states" in stored:
        return False
    *_, last, end = function.body
    return len(calls.get("o_proj", [])) == 1 and (ast.unparse(last), ast.unparse(end)) == (
        "attn_output = self.o_proj(attn_output)",
        "return (attn_output, attn_weights)",
    )


def _parsed(forward: Callable) -> ast.FunctionDef | None:
    """The source of a class's ``forward``; None where it cannot be had or something foreign wraps it."""
    # Newer releases wrap the forward of every decoder layer so that it can be checkpointed.
    while getattr(forward, "__globals__", {}).get("__name__") == "transformers.modeling_layers":
        forward = forward.__wrapped__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    foreign = hasattr(forward, "__wrapped__") or not isinstance(tree, ast.FunctionDef) or tree.decorator_list
    return None if foreign else tree


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def _normal(body: list[ast.stmt]) -> list[str]:
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                node.keywords.sort(key=lambda keyword: keyword.arg or "~")
    return [ast.unparse(statement) for statement in body]


def _shape_misfits(layer: nn.Module, attention: nn.Module, mlp: nn.Module) -> Iterator[str]:
    hidden = layer.input_layernorm.weight.shape
    if hidden != layer.post_attention_layernorm.weight.shape:
        yield "its norms differ in width"
    for parent, names in ((attention, (*QKV, "o_proj")), (mlp, (*GATE_UP, "down_proj"))):
        for name in names:
            linear = parent._modules.get(name)
            features = (getattr(linear, "in_features", None), getattr(linear, "out_features", None))
            if None in features:
                yield f"its {name} is {type(linear).__name__}, not a linear"
            elif features[0 if name in (*QKV, *GATE_UP) else 1] != hidden[0]:
                yield f"its {name} is {features[0]} to {features[1]}, beside a hidden size of {hidden[0]}"
    if mlp.gate_proj.out_features != mlp.up_proj.out_features or mlp.up_proj.out_features != mlp.down_proj.in_features:
        yield "its gate_proj, up_proj and down_proj differ in width"
