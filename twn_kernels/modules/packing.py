"""``PackedGroup``: the base weights of one site group moved into panels, beside a shadow of their adapters' ``lora_B``.

The vendor GEMM then multiplies base and adapters in one product that copies no weight. Parameters stay the same
objects: only their memory moves, one panel at a time, and a pitched view of a panel takes its place. What may happen to
a model afterwards (moved, cast, copied, loaded, saved, an adapter changed or replaced) is noticed here, from what the
host can see; what no longer fits is packed anew or left alone, and never multiplied.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.ops import Projection
from twn_kernels.ops.choice import load

__all__ = ["PackedGroup", "steady_shadows"]

_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)
_STEADY = contextvars.ContextVar("twn_steady_shadows", default=False)


@contextlib.contextmanager
def steady_shadows() -> Iterator[None]:
    """CUDA graphs captured in this block read the shadows as they are, instead of refreshing them in every replay.

    Whoever replays such a graph calls :meth:`PackedGroup.panels` before a replay wherever an adapter may have changed,
    and captures anew where :attr:`PackedGroup.is_clean` has changed.
    """
    token = _STEADY.set(True)
    try:
        yield
    finally:
        _STEADY.reset(token)


class PackedGroup:
    """The weights of a site group in packed form, for ``dual_lora_group(..., packed=group.panels())``.

    Packs at once where it can, and in a later call where it could not; :attr:`reason` says why it has not. Only 16-bit
    weights beside adapters of the same dtype are packed.

    Args:
        members: one to three linears that read the same input, in the order of the call: ``nn.Linear``, or layers that
            offer ``site_projection()``.

    ``state_dict()`` gives contiguous copies of packed weights, since a pitched view would be refused or saved with its
    whole panel. They cost the memory of those weights while the state dict lives, and writing into them does not reach
    the model (``load_state_dict``, and ``state_dict(keep_vars=True)``, do).

    An edit of ``lora_B`` through ``.data`` leaves no trace that the host could see, so calls that may be part of
    training, and the first one after them, look at every ``lora_B`` anew; calls on a CPU always do. On a GPU, call
    :meth:`refresh` after such an edit between two calls without gradients. Every other edit is seen.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self._members = tuple(members)
        self._places: dict[int, tuple] = {}  # where each weight was left, as _place
        self._owed = False
        self._forget(None)
        for linear in self._linears():
            if _contiguous_weight not in linear._state_dict_hooks.values():
                linear.register_state_dict_post_hook(_contiguous_weight)
        projections = self._projections()
        if (seen := _seen(projections)) is None:
            self._forget("a weight or adapter is no plain tensor")
        else:
            self._pack(projections, seen, anew=True)

    @property
    def reason(self) -> str | None:
        """Why the weights are not packed; None where they are."""
        return self._reason

    @property
    def is_clean(self) -> bool:
        """Whether every ``lora_B`` is known to be finite, so that calls need not ask which is not."""
        return self._clean

    @property
    def is_settling(self) -> bool:
        """Whether :attr:`is_clean` awaits an answer of the device."""
        return self._pending is not None

    def shadowed(self) -> list[Tensor]:
        """Every ``lora_B`` that has a shadow here."""
        if self._plan is None:
            return []
        return [lora.B for projection in self._projections() for lora in projection[2:] if lora is not None]

    @property
    def added_bytes(self) -> int:
        """What packing added: the shadow of every ``lora_B``, and columns that pad rows to whole cache lines."""
        if self._plan is None:
            return 0
        weights = sum(self._plan.outputs) * self._plan.in_features
        panels = sum(panel.numel for panel in self._plan.panels)
        return (panels - weights) * self._key.element_size() + self._bits.numel() + self._poison.numel()

    def panels(self, projections: Sequence[Projection] | None = None) -> tuple[Tensor, ...]:
        """What to pass as ``packed``: tensors in the form of ``impl="blas"``, up to date, or () where nothing fits.

        Never waits for a device. Under CUDA graph capture the shadow is brought up to date as part of the graph, so
        that replays see what the adapters hold by then, unless :func:`steady_shadows` says that they need not. Traced
        code gets ().

        Args:
            projections: of the members with all of their adapters, where the caller has them already.
        """
        if not self._members or not _is_plain_eager():
            return ()
        projections = self._projections() if projections is None else projections
        seen = _seen(projections)
        if seen is None:
            return ()
        device = projections[0].weight.device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and _STEADY.get() and seen == self._fresh and not self._always and not self.is_settling:
            capturing = False
        elif seen != self._fresh or self._always or capturing:
            self._prepare(projections, seen, capturing)
        elif self._pending is not None:
            self._settle()
        if self._plan is None or (capturing and seen[0] != self._weights):
            return ()
        if torch.is_grad_enabled() and any(
            lora is not None and lora.B.requires_grad for p in projections for lora in p[2:]
        ):
            self._fresh = None  # an optimizer may step through .data, which the host does not see
        views = _storages(self._plan, projections)
        return (self._key, *views) if self._clean and not capturing else (self._key, *views, self._poison)

    def refresh(self) -> None:
        """Bring the shadow of every ``lora_B`` up to date in the next call, whatever the host has seen."""
        self._fresh = None

    def remove(self) -> None:
        """Put the weights back into contiguous memory of their own; the parameters stay the same objects."""
        for index, linear in enumerate(self._linears()):
            _drop_hook(linear)
            weight = linear._parameters.get("weight")
            if index in self._places and weight is not None and weight.stride()[:1] == self._places[index][1:2]:
                with torch.inference_mode(False), torch.no_grad():
                    weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self._members, self._places = (), {}
        self._forget("removed")

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters have memory of their own: it packs them in its first call.
        return {"members": self._members, "places": self._places, "reason": self._reason}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._members, self._places = state["members"], state["places"]
        self._owed = bool(self._members)
        self._forget(state["reason"] or "copied; packs when it is used")

    def _forget(self, reason: str | None) -> None:
        """Back to not packed; weights stay where they are."""
        self._reason = reason
        self._plan = self._key = self._bits = self._poison = None
        self._weights = self._kinds = self._fresh = None
        self._always, self._clean = False, False
        self._pending = self._flag = None

    def _linears(self) -> Iterator[nn.Module]:
        """The modules that own the weights: PEFT's layers keep theirs one level down."""
        return (member._modules.get("base_layer", member) for member in self._members)

    def _projections(self) -> list[Projection]:
        return [
            member.site_projection()
            if hasattr(type(member), "site_projection")
            else Projection(member.weight, member.bias)
            for member in self._members
        ]

    def _prepare(self, projections: Sequence[Projection], seen: tuple, capturing: bool) -> None:
        """Pack anew where weights or layout changed; bring the shadow up to date."""
        if seen[0] != self._weights or _kinds(seen[1]) != self._kinds:
            if capturing:
                return
            self._pack(projections, seen)
            seen = (self._weights, seen[1])
        if self._plan is not None:
            self._update(projections, seen, capturing)
        elif not capturing:
            self._fresh = seen

    def _pack(self, projections: Sequence[Projection], seen: tuple, anew: bool = False) -> None:
        """Move the weights, or note why not; a refusal stands until the host sees a change."""
        weights = [projection.weight for projection in projections]
        self._forget(_refusal(projections) or self._not_ours(weights, anew))
        owed, self._owed = self._owed, False
        self._weights, self._kinds = seen[0], _kinds(seen[1])
        if self._reason is not None:
            self._owed = owed
            return
        panels = load("blas").panels
        plan = panels.layout(
            weights[0].shape[1],
            tuple(w.shape[0] for w in weights),
            tuple(_ranks(projection) for projection in projections),
        )
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._move(plan, panels, weights)
                self._key, self._bits = panels.key(plan, weights[0]), panels.adapter_bits(plan, weights[0].device)
                self._poison = torch.zeros_like(self._bits)
                if weights[0].is_cuda:
                    self._flag = torch.zeros(1, dtype=torch.bool, pin_memory=True)
        except torch.OutOfMemoryError:
            self._reason = "no memory for another panel"
        else:
            self._plan = plan
        self._weights = tuple(_place(weight) for weight in weights)

    def _move(self, plan, panels, weights: Sequence[nn.Parameter]) -> None:
        for panel in plan.panels:
            like = weights[panel.projections[0]]
            storage = torch.empty((panel.rows, panel.pitch), dtype=like.dtype, device=like.device)
            panels.clear_padding_(plan, panel, storage)
            for index in panel.projections:
                view = panels.weight_view(plan, panel, storage, index)
                view.copy_(weights[index].data)
                weights[index].data = view
                self._places[index] = _place(weights[index])

    def _not_ours(self, weights: Sequence[nn.Parameter], anew: bool) -> str | None:
        """Why the weights may not be moved: others may hold views of their memory. At first, the caller asks for it."""
        for index, weight in enumerate(weights):
            if self._owed or self._places.get(index) == _place(weight):
                continue
            size = weight.numel() * weight.element_size()
            if not weight.is_contiguous() or not (anew or weight.untyped_storage().nbytes() == size):
                return "a weight is a view of memory that is not its own"
        return None

    def _update(self, projections: Sequence[Projection], seen: tuple, capturing: bool) -> None:
        """Refresh the shadow, and find out whether all of it is finite without waiting for the answer."""
        B = [None if lora is None else lora.B for projection in projections for lora in projection[2:]]
        with torch.no_grad():
            storages = _storages(self._plan, projections)
            load("blas").panels.fill_adapters_(self._plan, storages, B, self._bits, self._poison)
            if capturing:  # recorded, not run: what the host knew stays true
                return
            self._fresh, self._clean, self._pending = seen, False, None
            # The host cannot tell whether an inference tensor changed; on a CPU, looking costs no more than copying.
            self._always = self._flag is None or any(adapter is not None and adapter[0] is None for adapter in seen[1])
            if self._flag is None:
                self._clean = not self._poison.any()
                return
            self._flag.copy_(self._poison.any(), non_blocking=True)
            self._pending = torch.cuda.Event()
            self._pending.record(torch.cuda.current_stream(self._poison.device))

    def _settle(self) -> None:
        """Take the answer of :meth:`_update` if it has arrived; until then, other streams must wait for the shadow."""
        if self._pending.query():
            self._clean, self._pending = not self._flag.item(), None
        else:
            self._pending.wait(torch.cuda.current_stream(self._poison.device))


def _contiguous_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook: a contiguous copy instead of a view of a panel; ``keep_vars=True`` still gives the parameter."""
    weight = state_dict.get(f"{prefix}weight")
    if type(weight) is Tensor and not weight.is_contiguous():
        state_dict[f"{prefix}weight"] = weight.contiguous()


def _drop_hook(linear: nn.Module) -> None:
    for key in [key for key, hook in linear._state_dict_hooks.items() if hook is _contiguous_weight]:
        del linear._state_dict_hooks[key]


def _is_plain_eager() -> bool:
    """Whether tensors hold data here: neither traced, nor under a dispatch mode or a transform."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _storages(plan: Any, projections: Sequence[Projection]) -> list[Tensor]:
    """The panels, found from the weights in them: nothing else keeps a panel alive when its weights have left it."""
    return [
        torch.as_strided(projections[panel.projections[0]].weight.data, (panel.rows, panel.pitch), (panel.pitch, 1), 0)
        for panel in plan.panels
    ]


def _place(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.stride(0), weight.dtype


def _seen(projections: Sequence[Projection]) -> tuple[tuple, tuple] | None:
    """All that the host can see of weights and of every ``lora_B``; None where one is no plain tensor."""
    weights, adapters = [], []
    for weight, _, *loras in projections:
        if type(weight) is not nn.Parameter or weight.dim() != 2:
            return None
        weights.append(_place(weight))
        for lora in loras:
            if lora is None:
                adapters.append(None)
                continue
            B = lora.B
            if type(B) not in _PLAIN:
                return None
            version = None if B.is_inference() else B._version
            adapters.append((version, B.data_ptr(), B.shape, lora.A.shape, B.dtype))
    return tuple(weights), tuple(adapters)


def _kinds(adapters: tuple) -> tuple:
    """What of the adapters decides the layout."""
    return tuple(None if adapter is None else adapter[2:] for adapter in adapters)


def _ranks(projection: Projection) -> tuple[int, int]:
    reasoning, embedding = (
        0 if lora is None else lora.B.shape[1] for lora in (projection.reasoning, projection.embedding)
    )
    return reasoning, embedding


def _refusal(projections: Sequence[Projection]) -> str | None:
    """Why these tensors cannot be packed."""
    first = projections[0].weight
    if first.dtype not in _HALF:
        return f"weights of {str(first.dtype).removeprefix('torch.')}; only 16-bit ones are packed"
    if first.device.type == "meta":
        return "weights without data"
    if len({id(projection.weight) for projection in projections}) < len(projections):
        return "one weight serves two linears"
    loras = [lora for projection in projections for lora in projection[2:] if lora is not None]
    if not loras:
        return "no adapters"
    for tensor in [*(projection.weight for projection in projections), *(lora.B for lora in loras)]:
        if tensor.dtype != first.dtype:
            return "weights and adapters of several dtypes"
        if tensor.device != first.device:
            return "weights and adapters on several devices"
    for weight, _, *pair in projections:
        if weight.shape[1] != first.shape[1] or 0 in weight.shape:
            return "weights that do not read the same input"
        for lora in pair:
            if lora is not None and lora.B.shape != (weight.shape[0], lora.A.shape[0]):
                return "an adapter that does not fit its weight"
    return None
