"""``GateMLP``: the gate as a module whose parameters carry the names that a checkpoint gave them.

Owns how the gate's features are made from the model's states; the arithmetic is :func:`twn_kernels.ops.gate_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from twn_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError, did_you_mean, quoted
from twn_kernels.ops.gate_scores import GateStep, check_activation, gate_scores
from twn_kernels.ops.small_ops import check_impl

__all__ = ["GATE_INPUTS", "GateMLP"]

GATE_INPUTS = ("mean", "last", "concat", "mean_last")


class NamedLayer(Protocol):
    """What is read of a layer of a checkpoint's gate: the names of its tensors, and whether the activation follows."""

    weight: str
    bias: str | None
    activated: bool | None


class _Names(NamedTuple):
    weight: str
    bias: str | None
    activated: bool | None = None


class GateMLP(nn.Module):
    """The gate: from the states of one pass to a score in [0, 1] an input.

    Args:
        tensors: the gate's weights by name, such as a checkpoint's ``gate`` or the ``state_dict()`` of an
            ``nn.Sequential``; copied into parameters of the same names and dtypes, so ``state_dict()`` gives them back.
        layers: the steps in order, each with the names of its ``weight`` and ``bias`` (or None) and ``activated``,
            such as ``gate_layout().layers`` of a checkpoint. None: in the order of ``tensors``, one step for each
            ``weight``, with the activation right before every linear layer but the first.
        activation: as in :func:`twn_kernels.ops.gate_scores`.
        gate_input: what the gate reads: ``"mean"`` of the query states ``[hidden]``, ``"last"`` prompt token
            ``[hidden]``, ``"concat"`` of the query states ``[num_queries * hidden]``, or ``"mean_last"``, the mean
            followed by the last prompt token ``[2 * hidden]``.
        impl: as in :func:`twn_kernels.ops.gate_scores`, which pools too.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: the tensors make no gate, ``layers`` names a tensor that is
            not there or leaves one out, or an option is outside its names.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from twn_kernels.modules import GateMLP
        >>> gate = GateMLP(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 1)).state_dict())
        >>> gate(torch.randn(2, 4, 16)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        layers: Sequence[NamedLayer] | None = None,
        *,
        activation: str = "gelu",
        gate_input: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_impl(impl)
        if not isinstance(gate_input, str) or gate_input not in GATE_INPUTS:
            raise OptionError(
                f"gate_input must be one of {quoted(GATE_INPUTS)}, got {gate_input!r}."
                f"{did_you_mean(gate_input, GATE_INPUTS)}"
            )
        self.activation, self.gate_input, self.impl = activation, gate_input, impl
        steps = _in_order(tensors) if layers is None else [_Names(x.weight, x.bias, x.activated) for x in layers]
        _check_names(tensors, steps)
        self.in_features = tensors[steps[0].weight].shape[-1] if tensors[steps[0].weight].dim() else 0
        self._steps = tuple(steps)
        for step in steps:
            for name in (step.weight, step.bias):
                if name is not None:
                    _register(self, name, tensors[name])
        # A wrong gate is refused when it is made, not when the first batch has been prefilled.
        first = self._tensor(steps[0].weight)
        empty = first.new_empty((0, self.in_features))
        gate_scores(empty, self._gate_steps(), activation=activation, impl="reference")

    def forward(
        self,
        query_states: Tensor | None,
        last_prompt_state: Tensor | None = None,
        *,
        threshold: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            query_states: ``[batch, num_queries, hidden]``; may be None where ``gate_input`` is ``"last"``.
            last_prompt_state: ``[batch, hidden]``, the state of the last prompt token; not read where ``gate_input``
                is ``"mean"`` or ``"concat"``.
            threshold: in [0, 1]; also return which inputs reach it.

        Returns:
            ``[batch]`` in fp32 (fp64 for fp64 states), in [0, 1]; with a threshold, that and bool ``[batch]``.

        Raises:
            ShapeError, DtypeError, DeviceError: a state that ``gate_input`` needs is missing or does not fit.
            OptionError: the threshold is no number in [0, 1].
            ImplUnavailable: ``impl`` was named and cannot serve the call; the message says why.
        """
        features, last = self._features(query_states, last_prompt_state)
        made = features.shape[-1] + (0 if last is None else last.shape[1])
        if made != self.in_features:
            shapes = ", ".join(
                f"{name} {list(state.shape)}"
                for name, state in (("query_states", query_states), ("last_prompt_state", last_prompt_state))
                if state is not None
            )
            raise ShapeError(
                f'the gate reads {self.in_features} features but gate_input "{self.gate_input}" makes '
                f"{made} of {shapes}. Use the model, the queries and the gate_input it was trained with."
            )
        return gate_scores(
            features, self._gate_steps(), activation=self.activation, last=last, threshold=threshold, impl=self.impl
        )

    def _features(self, query_states: Tensor | None, last_prompt_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``features`` and ``last`` of the op, as ``gate_input`` says."""
        queries = last = None
        if self.gate_input != "last":
            queries = self._state("query_states", query_states, 3, "[batch, num_queries, hidden]")
        if self.gate_input in ("last", "mean_last"):
            last = self._state("last_prompt_state", last_prompt_state, 2, "[batch, hidden]")
        if self.gate_input == "last":
            return last, None
        if self.gate_input == "concat":
            return queries.flatten(1), None
        if self.gate_input == "mean":
            return queries, None
        if last.shape != (queries.shape[0], queries.shape[2]):
            raise ShapeError(
                f"last_prompt_state must be {[queries.shape[0], queries.shape[2]]} (batch and hidden of query_states), "
                f"got {list(last.shape)}."
            )
        if last.device != queries.device:
            raise DeviceError(
                f"last_prompt_state must be on the device of query_states ({queries.device}), got {last.device}. "
                "Move one of them."
            )
        return queries, last

    def _state(self, name: str, state: Tensor | None, dims: int, shape: str) -> Tensor:
        if not isinstance(state, Tensor):
            raise DtypeError(
                f'{name} must be a tensor {shape}: gate_input "{self.gate_input}" reads it, got {type(state).__name__}.'
            )
        if state.dim() != dims or 0 in state.shape[1:]:
            raise ShapeError(f"{name} must be {shape}, got {list(state.shape)}.")
        if not state.is_floating_point():
            raise DtypeError(f"{name} must be floating point, got {state.dtype}.")
        return state

    def _gate_steps(self) -> list[GateStep]:
        return [
            GateStep(self._tensor(step.weight), None if step.bias is None else self._tensor(step.bias), step.activated)
            for step in self._steps
        ]

    def _tensor(self, name: str) -> Tensor:
        *path, leaf = name.split(".")
        module = self
        for part in path:
            module = module._modules[part]
        return module._parameters[leaf]

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{step.weight} {list(self._tensor(step.weight).shape)}" for step in self._steps)
        return f'gate_input="{self.gate_input}", activation="{self.activation}", {shapes}'


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` a parameter of ``root`` under a name with dots.

    The names are a stranger's and may equal an attribute of ``nn.Module`` ("float", "type"), which ``add_module``
    refuses; the tables behind it do not mind.
    """
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules.setdefault(part, nn.Module())
    root._parameters[leaf] = nn.Parameter(tensor.detach().clone())


def _in_order(tensors: Mapping[str, Tensor]) -> list[_Names]:
    steps = []
    for name in tensors:
        prefix, dot, leaf = name.rpartition(".")
        if leaf == "weight":
            bias = f"{prefix}{dot}bias"
            steps.append(_Names(name, bias if bias in tensors else None))
    return steps


def _check_names(tensors: Mapping[str, Tensor], steps: Sequence[_Names]) -> None:
    if not steps:
        raise ShapeError(f"the gate must have one layer or more, got none in tensors {quoted(tensors)}.")
    used = [name for step in steps for name in (step.weight, step.bias) if name is not None]
    if missing := [name for name in used if name not in tensors]:
        raise OptionError(
            f"layers names {quoted(missing)}, which tensors does not hold: {quoted(tensors)}."
            f"{did_you_mean(missing[0], tensors)}"
        )
    if unused := [name for name in tensors if name not in used]:
        raise OptionError(f"every tensor must belong to a layer of the gate, but no layer names {quoted(unused)}.")
    if repeated := sorted({name for name in used if used.count(name) > 1}):
        raise OptionError(f"a tensor must belong to one layer, but layers names {quoted(repeated)} more than once.")
    for name in used:
        if not isinstance(tensors[name], Tensor) or not tensors[name].is_floating_point():
            got = tensors[name].dtype if isinstance(tensors[name], Tensor) else type(tensors[name]).__name__
            raise DtypeError(f'"{name}" of the gate must be a floating-point tensor, got {got}.')
