"""``PackedGroup``: the base weights of one site group moved into panels, beside their adapters' ``lora_B``.

The vendor GEMM then multiplies base and adapters in one product that copies no weight. Parameters stay the same
objects: only their memory moves, one panel at a time, and a pitched view of a panel takes its place. What may happen to
a model afterwards (moved, cast, copied, loaded, saved, an adapter changed or replaced) is noticed here, from what the
host can see; what no longer fits is packed anew or left alone, and never multiplied. What the columns of ``lora_B``
hold is :mod:`.shadows`' business.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twn_kernels.modules.shadows import AdapterColumns, leave_panel
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

    Packing moves every ``lora_B`` that is finite, and alone in its memory, into the panels as well: the same parameter
    as a pitched view, *shared* between model and panel. It gets contiguous memory of its own for good, and its columns
    a copy, when it gets a gradient and in the first call that finds it edited, or that may be part of training (grad
    mode, and it requires grad); until the weights are packed anew, or :meth:`share` is called. A ``lora_B`` on a CPU is
    shared only while it requires no grad: torch's fused optimizers would step it as if it were contiguous. Views of its
    memory that were taken before either move do not follow it. What needs it contiguous before its first training call
    (``view(-1)``, a fused optimizer fed with gradients by hand) calls :meth:`unshare` first.

    ``state_dict()`` gives contiguous copies of packed weights and of every shared ``lora_B``, since a pitched view
    would be refused or saved with its whole panel. They cost the memory of those tensors while the state dict lives,
    and writing into them does not reach the model (``load_state_dict``, and ``state_dict(keep_vars=True)``, do).

    An edit of ``lora_B`` through ``.data`` leaves no trace that the host could see, so calls that may be part of
    training, and the first one after them, look at every ``lora_B`` that requires grad anew; calls on a CPU always look
    at all. On a GPU, call :meth:`refresh` after such an edit between two calls without gradients. Every other edit is
    seen.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self._members = tuple(members)
        self._places: dict[int, tuple] = {}  # where each weight was left, as _place
        self._columns: AdapterColumns | None = None
        self._strays: list[tuple[weakref.ref, int]] = []  # each lora_B that a copy may have left in a panel, and where
        self._owed = False
        self._forget(None)
        for linear in self._linears():
            _add_hook(linear)
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
        return self._columns is not None and self._columns.is_clean

    @property
    def is_settling(self) -> bool:
        """Whether :attr:`is_clean` awaits an answer of the device."""
        return self._columns is not None and self._columns.is_settling

    def shadowed(self) -> list[Tensor]:
        """Every ``lora_B`` that has columns here: its shadow, or itself."""
        return [] if self._plan is None else [B for B in _adapters(self._projections()) if B is not None]

    @property
    def added_bytes(self) -> int:
        """What packing added: columns that pad, and a shadow of every ``lora_B`` that is not shared."""
        if self._plan is None:
            return 0
        moved = sum(self._plan.outputs) * self._plan.in_features + sum(B.numel() for B in self._columns.shared)
        panels = sum(panel.numel for panel in self._plan.panels)
        return (panels - moved) * self._key.element_size() + self._columns.flag_bytes

    def panels(self, projections: Sequence[Projection] | None = None) -> tuple[Tensor, ...]:
        """What to pass as ``packed``: tensors in the form of ``impl="blas"``, up to date, or () where nothing fits.

        Waits for the device only where it packs. Under CUDA graph capture shadows are brought up to date as part of the
        graph, so that replays see what the adapters hold by then, unless :func:`steady_shadows` says that they need
        not. A shared ``lora_B`` needs none of that: a graph reads the parameter itself, so replays follow edits until
        a call finds one; from then on call this before a replay, as with :func:`steady_shadows`. To have the graph
        copy it instead, call :meth:`unshare` before the capture. Traced code gets ().

        Args:
            projections: of the members with all of their adapters, where the caller has them already.
        """
        if not self._members or not _is_plain_eager():
            return ()
        projections = self._projections() if projections is None else projections
        seen = _seen(projections)
        if seen is None:
            return ()
        device, columns = projections[0].weight.device, self._columns
        trains = torch.is_grad_enabled() and any(B is not None and B.requires_grad for B in _adapters(projections))
        is_fresh = seen == self._fresh and not (columns is not None and columns.is_blind)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and _STEADY.get() and is_fresh and not self.is_settling:
            capturing = False
        elif not is_fresh or capturing or trains:
            self._prepare(projections, seen, trains, capturing)
            columns = self._columns
        elif self.is_settling:
            columns.settle()
        if self._plan is None:
            return ()
        if capturing and (seen[0] != self._weights or not columns.are_intact(_adapters(projections))):
            return ()
        if trains:
            self._fresh = None  # an optimizer may step through .data, which the host does not see
        views = _storages(self._plan, projections)
        is_known = columns.is_clean and not (capturing and columns.has_shadows)
        return (self._key, *views) if is_known else (self._key, *views, columns.poison)

    def share(self) -> None:
        """Let every ``lora_B`` live in the panels again that may, such as after training. Waits for the device."""
        projections = self._projections()
        seen = _seen(projections)
        if self._plan is not None and seen is not None and (seen[0], _kinds(seen[1])) == (self._weights, self._kinds):
            self._share(projections)
            self._fresh = None

    def unshare(self) -> None:
        """Give every ``lora_B`` contiguous memory of its own; the parameters stay the same objects."""
        if self._columns is not None:
            self._columns.leave()
        for parameter, address in self._strays:
            leave_panel(parameter(), address)
        self._strays = []

    def refresh(self) -> None:
        """Have the next call look at every ``lora_B``, whatever the host has seen; none is shared from here on."""
        self.unshare()
        self._fresh = None

    def remove(self) -> None:
        """Put weights and adapters back into contiguous memory of their own; the parameters stay the same objects."""
        for index, linear in enumerate(self._linears()):
            weight = linear._parameters.get("weight")
            if index in self._places and weight is not None and weight.stride()[:1] == self._places[index][1:2]:
                with torch.inference_mode(False), torch.no_grad():
                    weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        for module in (module for member in self._members for module in member.modules()):
            _drop_hook(module)
        self._members, self._places = (), {}
        self._forget("removed")

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters have memory of their own: it packs them in its first call.
        shared = [parameter() for parameter, _ in self._strays if parameter() is not None]
        shared += [] if self._columns is None else self._columns.shared
        return {"members": self._members, "places": self._places, "reason": self._reason, "shared": shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._members, self._places = state["members"], state["places"]
        self._owed = bool(self._members)
        self._columns, self._strays = None, [(weakref.ref(B), B.data_ptr()) for B in state["shared"]]
        self._reset(state["reason"] or "copied; packs when it is used")

    def _forget(self, reason: str | None) -> None:
        """Back to not packed; weights stay where they are, adapters do not."""
        self.unshare()
        self._reset(reason)

    def _reset(self, reason: str | None) -> None:
        self._reason = reason
        self._plan = self._key = self._columns = None
        self._weights = self._kinds = self._fresh = None

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

    def _prepare(self, projections: Sequence[Projection], seen: tuple, trains: bool, capturing: bool) -> None:
        """Pack anew where weights or layout changed; bring the shadows up to date."""
        if seen[0] != self._weights or _kinds(seen[1]) != self._kinds:
            if capturing:
                return
            self._pack(projections, seen)
        if self._plan is not None:
            with torch.no_grad():
                storages = _storages(self._plan, projections)
                self._columns.update(storages, _adapters(projections), trains=trains, capturing=capturing)
        if not capturing:
            self._fresh = _seen(projections)

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
                self._key, self._columns = panels.key(plan, weights[0]), AdapterColumns(plan, weights[0])
            self._plan = plan
            self._share(projections)
        except torch.OutOfMemoryError:
            self._forget("no memory for another panel")
            self._kinds = _kinds(seen[1])
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

    def _share(self, projections: Sequence[Projection]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._columns.share(_storages(self._plan, projections), _adapters(projections))
        shared = {id(parameter) for parameter in self._columns.shared}
        for module in (module for member in self._members for module in member.modules()):
            if any(id(parameter) in shared for parameter in module._parameters.values()):
                _add_hook(module)


def _contiguous_parameters(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook: contiguous copies instead of views of a panel; ``keep_vars=True`` still gives the parameters."""
    for name in module._parameters:
        tensor = state_dict.get(f"{prefix}{name}")
        if type(tensor) is Tensor and not tensor.is_contiguous():
            state_dict[f"{prefix}{name}"] = tensor.contiguous()


def _add_hook(module: nn.Module) -> None:
    if _contiguous_parameters not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_contiguous_parameters)


def _drop_hook(module: nn.Module) -> None:
    for key in [key for key, hook in module._state_dict_hooks.items() if hook is _contiguous_parameters]:
        del module._state_dict_hooks[key]


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


def _adapters(projections: Sequence[Projection]) -> list[Tensor | None]:
    """``lora_B`` of each block of the layout."""
    return [None if lora is None else lora.B for projection in projections for lora in projection[2:]]


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
