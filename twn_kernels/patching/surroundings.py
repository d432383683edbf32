"""What a patched model needs around its layers, all on the instance and all undone by ``unpatch``.

``save_pretrained`` must write the base alone; activation checkpointing must replay a block under the route of its
forward; ``generate`` must tell how often it copies each row; and a running model must tell its batch's shape, for
layers whose input has lost it. Nothing here imports transformers: what a module offers is read from its class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from twn_kernels.modules.routing import RouteState
from twn_kernels.patching.specs import in_tower

__all__ = ["Surroundings"]

_EXPAND = "_expand_inputs_for_generation"
_CHECKPOINT = "_gradient_checkpointing_func"
_IGNORED = "_keys_to_ignore_on_save"
_IDS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Surroundings:
    """Everything that ``patch`` puts around the layers of one model.

    Args:
        root: the patched model.
        state: the routes that its layers follow.
    """

    def __init__(self, root: nn.Module, state: RouteState) -> None:
        self.state = state
        self._saved: list[tuple[nn.Module, str, Any]] = []
        self._handles: list = []
        self._blocks = [module for module in root.modules() if hasattr(module, "gradient_checkpointing")]
        self._root = root

    def install(self, adapter_keys: bool) -> None:
        """Put everything in place.

        Args:
            adapter_keys: keep the layers' own ``lora_A`` and ``lora_B`` out of ``save_pretrained``.
        """
        for path, module in self._root.named_modules():
            if module is not self._root and (not _is_pretrained(module) or in_tower(path)):
                continue
            hook = functools.partial(_before_forward, surroundings=self)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if hasattr(type(module), _EXPAND):
                self._set(module, _EXPAND, _ExpandRecorder(module, self.state, module.__dict__.get(_EXPAND)))
        if adapter_keys:
            self._ignore_adapters_on_save()
        self.wrap_checkpointing()

    def remove(self) -> None:
        """Take everything away again."""
        for handle in self._handles:
            handle.remove()
        for module, name, value in reversed(self._saved):
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        for block in self._blocks:
            replay = block.__dict__.get(_CHECKPOINT)
            if isinstance(replay, _RouteKeeping):
                block.__dict__[_CHECKPOINT] = replay.checkpoint
        self._handles, self._saved = [], []

    def wrap_checkpointing(self) -> None:
        """Make the blocks' checkpoint functions remember routes; checkpointing may be enabled after the patch."""
        for block in self._blocks:
            checkpoint = block.__dict__.get(_CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _RouteKeeping):
                block.__dict__[_CHECKPOINT] = _RouteKeeping(checkpoint, self.state)

    def _ignore_adapters_on_save(self) -> None:
        for module in self._root.modules():
            if not _is_pretrained(module):
                continue
            keys = {
                f"{path}.{name}" if path else name
                for path, inner in module.named_modules()
                if hasattr(inner, "lora_A") and hasattr(inner, "routing")
                for name in _adapter_keys(inner)
            }
            before = module.__dict__.get(_IGNORED, getattr(type(module), _IGNORED, None))
            self._set(module, _IGNORED, set(before or ()) | keys)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._saved.append((module, name, module.__dict__.get(name, _MISSING)))
        module.__dict__[name] = value


class _Missing:
    """Marks an attribute that the instance did not have; a class, so that copies keep its identity."""


_MISSING = _Missing


class _ExpandRecorder:
    """Stands for a model's ``_expand_inputs_for_generation`` and notes how many copies of each row it makes."""

    def __init__(self, model: nn.Module, state: RouteState, before: Any) -> None:
        self.model, self.state, self.before = model, state, before

    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        self.state.expand = expand_size
        method = self.before
        if method is None:
            method = inspect.getattr_static(type(self.model), _EXPAND).__get__(self.model, type(self.model))
        return method(expand_size, *args, **kwargs)


class _RouteKeeping:
    """A checkpoint function that runs a block under one route, both in its forward and when backward replays it."""

    def __init__(self, checkpoint: Any, state: RouteState) -> None:
        self.checkpoint, self.state = checkpoint, state

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        state, spec, expand, shape = self.state, self.state.spec, self.state.expand, self.state.batch_shape

        def run(*inputs: Any, **named: Any) -> Any:
            before = (state.spec, state.expand, state.batch_shape, state.replaying)
            state.spec, state.expand, state.batch_shape = spec, expand, shape
            state.replaying = torch._C._current_graph_task_id() != -1
            try:
                return block(*inputs, **named)
            finally:
                state.spec, state.expand, state.batch_shape, state.replaying = before

        return self.checkpoint(run, *args, **kwargs)


def _before_forward(module: nn.Module, args: tuple, kwargs: dict, *, surroundings: Surroundings) -> None:
    if torch.compiler.is_compiling():
        return
    shape = next(_batch_shapes(args, kwargs), None)
    if shape is not None:
        surroundings.state.batch_shape = shape
    if module.training:
        surroundings.wrap_checkpointing()


def _batch_shapes(args: tuple, kwargs: dict) -> Iterator[tuple[int, int]]:
    named = [kwargs.get(name) for name in _IDS]
    for value in [*named, *args[:1]]:
        if isinstance(value, torch.Tensor) and value.dim() in (2, 3):
            if value.dim() == 3 or not value.is_floating_point():
                yield tuple(value.shape[:2])


def _is_pretrained(module: nn.Module) -> bool:
    return hasattr(type(module), "save_pretrained") and hasattr(type(module), _IGNORED)


def _adapter_keys(layer: nn.Module) -> list[str]:
    return [f"{part}.{name}" for part in ("lora_A", "lora_B") for name in getattr(layer, part)]
