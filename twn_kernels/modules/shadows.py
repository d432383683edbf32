"""``AdapterColumns``: what lies beside the weights in the panels of a packed group, and when it is up to date.

Each ``lora_B`` is in one of two states. *Shared*: the parameter is a pitched view of its columns, so that it exists
once and has nothing to keep up to date. *Shadowed*: it has memory of its own, and its columns hold a copy in which
entries that are not finite are zeroed. Shared is what the host knows to be finite and to be stepped by nobody; the
first sign of the contrary gives a parameter its own memory back, before anything writes into its columns.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twn_kernels.ops.choice import load

__all__ = ["AdapterColumns", "leave_panel"]


class _Shared(NamedTuple):
    """A ``lora_B`` that lives in a panel, as it was when it moved there; held weakly, since it holds the panel."""

    parameter: weakref.ref[nn.Parameter]
    address: int
    version: int
    hook: Any

    def is_intact(self, B: Tensor | None) -> bool:
        is_same = B is not None and self.parameter() is B
        return is_same and B.data_ptr() == self.address and B._version == self.version


class AdapterColumns:
    """The columns of every ``lora_B`` of one packed group.

    Args:
        plan: the group's layout.
        like: a tensor of its device.
    """

    def __init__(self, plan: Any, like: Tensor) -> None:
        self._plan, self._kernel = plan, load("blas").panels
        self._bits = self._kernel.adapter_bits(plan, like.device)
        self.poison = torch.zeros_like(self._bits)
        self._flag = torch.zeros(1, dtype=torch.bool, pin_memory=True) if like.is_cuda else None
        self._shared: dict[int, _Shared] = {}
        self._pending = None
        self.has_shadows = True
        self.is_clean = False
        # The host cannot tell whether an inference tensor changed; on a CPU, looking costs no more than copying.
        self.is_blind = self._flag is None

    @property
    def shared(self) -> list[nn.Parameter]:
        """Every ``lora_B`` that lives in a panel."""
        found = [(shared.parameter(), shared.address) for shared in list(self._shared.values())]
        return [parameter for parameter, address in found if parameter is not None and _lies_at(parameter, address)]

    @property
    def is_settling(self) -> bool:
        """Whether :attr:`is_clean` awaits an answer of the device."""
        return self._pending is not None

    @property
    def flag_bytes(self) -> int:
        """Of what tells which columns are not finite."""
        return self._bits.numel() + self.poison.numel()

    def share(self, storages: Sequence[Tensor], B: Sequence[Tensor | None]) -> None:
        """Move every finite ``lora_B`` that may live in a panel there; under no_grad. Waits for the device, once.

        Args:
            storages: the panels.
            B: of each block of the layout; None where the rank is 0.
        """
        moving = [index for index, b in enumerate(B) if index not in self._shared and _may_live_there(b, B)]
        if not moving:
            return
        peaks = torch.stack([torch.linalg.vector_norm(B[index], torch.inf) for index in moving])
        for index, is_finite in zip(moving, peaks.isfinite().tolist(), strict=True):
            if is_finite:
                view = self._kernel.adapter_view(self._plan, storages, self._plan.blocks[index])
                self._shared[index] = _moved(B[index], view)

    def leave(self) -> None:
        """Give every ``lora_B`` memory of its own."""
        for index in list(self._shared):
            self._let_go(index)

    def are_intact(self, B: Sequence[Tensor | None]) -> bool:
        """Whether nothing that the host can see has happened to any shared ``lora_B``."""
        return all(shared.is_intact(B[index]) for index, shared in list(self._shared.items()))

    def update(self, storages: Sequence[Tensor], B: Sequence[Tensor | None], *, trains: bool, capturing: bool) -> None:
        """Refresh the shadows, and find out whether they are finite without waiting for the answer; under no_grad.

        Args:
            storages, B: as in :meth:`share`.
            trains: whether this call may be part of training.
            capturing: whether a CUDA graph records it.
        """
        if not capturing:
            self._let_go_of_changed(B, trains)
        own = [None if index in self._shared else b for index, b in enumerate(B)]
        shadows = any(b is not None for b in own)
        if shadows:
            self._kernel.fill_adapters_(self._plan, storages, own, self._bits, self.poison)
        if capturing:  # recorded, not run: what the host knew stays true
            return
        self.has_shadows, self.is_clean, self._pending = shadows, not shadows, None
        self.is_blind = self._flag is None or any(b is not None and b.is_inference() for b in B)
        if not shadows:
            return
        if self._flag is None:
            self.is_clean = not self.poison.any()
            return
        self._flag.copy_(self.poison.any(), non_blocking=True)
        self._pending = torch.cuda.Event()
        self._pending.record(torch.cuda.current_stream(self.poison.device))

    def settle(self) -> None:
        """Take the answer of :meth:`update` if it has arrived; until then, other streams must wait for the shadows."""
        if self._pending.query():
            self.is_clean, self._pending = not self._flag.item(), None
        else:
            self._pending.wait(torch.cuda.current_stream(self.poison.device))

    def _let_go_of_changed(self, B: Sequence[Tensor | None], trains: bool) -> None:
        for index, shared in list(self._shared.items()):
            stays = shared.is_intact(B[index]) and not (B[index].requires_grad and (trains or self._flag is None))
            if not stays or (self._flag is None and not B[index].isfinite().all()):
                self._let_go(index)

    def _let_go(self, index: int) -> None:
        shared = self._shared.pop(index, None)  # another thread may have been first
        if shared is not None:
            shared.hook.remove()
            leave_panel(shared.parameter(), shared.address)


def leave_panel(parameter: nn.Parameter | None, address: int) -> None:
    """Give a parameter contiguous memory of its own, if it still exists and lies at ``address`` in memory of more."""
    if parameter is not None and _lies_at(parameter, address):
        with torch.inference_mode(False), torch.no_grad():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _lies_at(parameter: nn.Parameter, address: int) -> bool:
    size = parameter.numel() * parameter.element_size()
    return parameter.data_ptr() == address and parameter.untyped_storage().nbytes() > size


def _may_live_there(B: Tensor | None, others: Sequence[Tensor | None]) -> bool:
    """Whether a ``lora_B`` is a parameter that is alone in its memory and that no optimizer steps for now."""
    if type(B) is not nn.Parameter or B.is_inference() or B.grad is not None or not B.numel():
        return False
    # On a CPU torch's fused optimizers (2.13) step a parameter as if it were contiguous, without a look at its strides.
    if B.requires_grad and not B.is_cuda:
        return False
    # With this switch on, torch moves a parameter by swapping it, which it refuses where something refers to it weakly.
    if torch.__future__.get_swap_module_params_on_conversion():
        return False
    is_alone = B.untyped_storage().nbytes() == B.numel() * B.element_size()
    return is_alone and B.is_contiguous() and sum(b is not None and b.data_ptr() == B.data_ptr() for b in others) == 1


def _moved(B: nn.Parameter, view: Tensor) -> _Shared:
    view.copy_(B)
    B.data = view
    # Traced code, and impls that read no panel, train a parameter unseen: its gradient is the last sign before a step.
    # The gradient holds no reference to B, so that a model without others is freed at once.
    trains = B.requires_grad
    hook = B.requires_grad_(True).register_post_accumulate_grad_hook(
        functools.partial(_leave_before_step, B.data_ptr())
    )
    B.requires_grad_(trains)
    return _Shared(weakref.ref(B), B.data_ptr(), B._version, hook)


def _leave_before_step(address: int, parameter: nn.Parameter) -> None:
    if not (parameter.is_cuda and torch.cuda.is_current_stream_capturing()):
        leave_panel(parameter, address)
