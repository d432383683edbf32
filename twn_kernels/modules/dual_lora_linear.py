"""``DualLoRALinear``: an ``nn.Linear`` that holds up to two LoRA adapters and follows its model's route.

An existing linear becomes one in place (:meth:`DualLoRALinear.adopt`) and turns back (:meth:`DualLoRALinear.release`):
the module stays the same object, so its parameters, their names, its hooks and every reference to it survive by
construction. The layer knows no model; who shares a :class:`RouteState` among layers decides what they follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_kernels.errors import OptionError, PatchError, did_you_mean, quoted
from twn_kernels.modules.routing import RouteSpec, RouteState, UniformSpec
from twn_kernels.modules.site_group import fitting_dtype
from twn_kernels.ops import LoRA, Projection, RoutePlan, dual_lora_linear
from twn_kernels.ops.autocast import autocast_is_on
from twn_kernels.settings import ADAPTERS, EMBEDDING, MAX_RANK, REASONING, ROUTE_BITS

__all__ = ["DualLoRALinear", "LayerAdapter", "fused_linear"]

_OWN_ATTRIBUTES = ("scaling", "lora_dropout", "routing", "impl", "path", "follows_rows")


class LayerAdapter(NamedTuple):
    """One adapter on one layer, before it is attached.

    Attributes:
        A: ``[rank, in_features]``.
        B: ``[out_features, rank]``.
        scaling: ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rsLoRA.
        dropout: probability in [0, 1) on the input of ``A`` while training.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    dropout: float = 0.0

    @classmethod
    def fresh(cls, linear: nn.Linear, rank: int, *, dropout: float = 0.0) -> LayerAdapter:
        """An untrained adapter for ``linear``: A as PEFT draws it, B zero, scaling 1 (``lora_alpha = rank``)."""
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        A = torch.zeros(rank, linear.in_features, **like)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return cls(A, torch.zeros(linear.out_features, rank, **like), 1.0, dropout)


class DualLoRALinear(nn.Linear):
    """A linear layer with a ``reasoning`` and an ``embedding`` adapter, each token using those that its route selects.

    ``weight`` and ``bias`` are those of ``nn.Linear``; ``lora_A`` and ``lora_B`` are keyed by adapter, so a state dict
    has ``weight``, ``lora_A.reasoning``, ``lora_B.reasoning`` and so on. An adapter that does not touch this layer has
    no entry.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        rank: of both adapters, or one for each by name; 1 … 256. An adapter without a rank is absent.
        dropout: LoRA dropout of both adapters, in [0, 1); active in training mode.
        impl: as in :func:`twn_kernels.ops.dual_lora_linear`.

    Raises:
        OptionError: a rank, dropout or adapter name out of range.

    Example:
        >>> import torch
        >>> from twn_kernels.modules import DualLoRALinear
        >>> from twn_kernels.ops import RoutePlan
        >>> layer = DualLoRALinear(16, 8, rank={"reasoning": 4, "embedding": 2})
        >>> layer(torch.randn(5, 16), RoutePlan.uniform("reasoning", 5)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | Mapping[str, int] = 64,
        dropout: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(ADAPTERS, rank)
        for name, value in ranks.items():
            check_rank(value, f"rank of {name}")
        check_dropout(dropout)
        adapters = {name: LayerAdapter.fresh(self, value, dropout=dropout) for name, value in ranks.items()}
        self._attach(adapters, RouteState(UniformSpec(0)), impl=impl, path="", follows_rows=True)

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        adapters: Mapping[str, LayerAdapter],
        routing: RouteState,
        *,
        impl: str = "auto",
        path: str = "",
        follows_rows: bool = True,
    ) -> DualLoRALinear:
        """Turn ``linear`` itself into a dual-LoRA layer; its parameters and hooks stay as they are.

        Args:
            linear: an ``nn.Linear``, or a subclass that computes nothing else.
            adapters: by name; their tensors become parameters without a copy.
            routing: what the layer follows; shared by the layers of a model.
            impl: as in :func:`twn_kernels.ops.dual_lora_linear`.
            path: of the layer in its model, for messages.
            follows_rows: False where the layer's tokens do not belong to the batch's rows in order.

        Raises:
            PatchError: ``linear`` is no ``nn.Linear``, or dual already.
            OptionError: an adapter's name is unknown.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, DualLoRALinear):
            raise PatchError(f'layer "{path}" must be a plain nn.Linear to adopt, got {type(linear).__name__}.')
        for name in adapters:
            if name not in ADAPTERS:
                raise OptionError(
                    f"adapter must be one of {quoted(ADAPTERS)}, got {name!r}.{did_you_mean(name, ADAPTERS)}"
                )
        linear.plain_class, linear.__class__ = type(linear), cls
        try:
            linear._attach(adapters, routing, impl=impl, path=path, follows_rows=follows_rows)
        except BaseException:
            linear.release()
            raise
        return linear

    def _attach(self, adapters, routing: RouteState, *, impl: str, path: str, follows_rows: bool) -> None:
        self.lora_A = nn.ParameterDict({name: nn.Parameter(adapter.A) for name, adapter in adapters.items()})
        self.lora_B = nn.ParameterDict({name: nn.Parameter(adapter.B) for name, adapter in adapters.items()})
        self.lora_A.train(self.training)
        self.lora_B.train(self.training)
        self.scaling = {name: float(adapter.scaling) for name, adapter in adapters.items()}
        self.lora_dropout = {name: float(adapter.dropout) for name, adapter in adapters.items()}
        self.routing, self.impl, self.path, self.follows_rows = routing, impl, path, follows_rows

    def release(self) -> nn.Linear:
        """Turn this layer back into the plain linear it was; the adapters are dropped."""
        for name in ("lora_A", "lora_B"):
            self._modules.pop(name, None)
        self.__class__ = self.__dict__.pop("plain_class", nn.Linear)
        for name in _OWN_ATTRIBUTES:
            self.__dict__.pop(name, None)
        return self

    def lora(self, name: str) -> LoRA | None:
        """One adapter of this layer, or None where it does not touch the layer."""
        if name not in self.scaling:
            return None
        # Read in every call: a ParameterDict's own indexing takes several times as long.
        return LoRA(getattr(self._modules["lora_A"], name), getattr(self._modules["lora_B"], name), self.scaling[name])

    def forward(self, input: Tensor, plan: RoutePlan | None = None) -> Tensor:
        """The layer's output.

        Args:
            input: ``[..., in_features]``.
            plan: over the tokens of ``input``; None: what :attr:`routing` says (base only outside scopes).

        Returns:
            ``[..., out_features]``.

        Raises:
            ShapeError, DtypeError, DeviceError: as in :func:`twn_kernels.ops.dual_lora_linear`; or the route in force
                does not fit the tokens.
        """
        if plan is None:
            plan = self.routing.plan_for(input, self)
        dropout = (0.0, 0.0)
        if self.training:
            dropout = (self.lora_dropout.get(REASONING, 0.0), self.lora_dropout.get(EMBEDDING, 0.0))
        return fused_linear(
            input, self.weight, self.bias, self.lora(REASONING), self.lora(EMBEDDING), plan, dropout, self.impl
        )

    def site_refusal(self) -> str | None:
        """Why this layer must run by itself now; as :class:`~twn_kernels.modules.site_group.SiteMember`."""
        if type(self).forward is not DualLoRALinear.forward:
            return f"{type(self).__name__} has a forward of its own"
        if self.training and any(self.lora_dropout.values()):
            return "LoRA dropout in training"
        return None

    def site_spec(self) -> RouteSpec:
        """The routes that this layer would follow now."""
        return self.routing.current

    def site_projection(self) -> Projection:
        """The weight, the bias and both adapters."""
        return Projection(self.weight, self.bias, self.lora(REASONING), self.lora(EMBEDDING))

    def extra_repr(self) -> str:
        ranks = {name: self.lora_A[name].shape[0] for name in self.scaling}
        return f"{super().extra_repr()}, rank={ranks}"


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reasoning: LoRA | None,
    embedding: LoRA | None,
    plan: RoutePlan | None,
    dropout: tuple[float, float],
    impl: str,
) -> Tensor:
    """The op as a layer needs it: no work for adapters that no token uses, and the adapters' dtype made to fit.

    Args:
        plan: None where no token uses an adapter: the plain linear then, bit for bit.
        others: as in :func:`twn_kernels.ops.dual_lora_linear`.
    """
    present = 0 if plan is None else plan.present
    reasoning = reasoning if present & ROUTE_BITS[REASONING] else None
    embedding = embedding if present & ROUTE_BITS[EMBEDDING] else None
    if reasoning is None and embedding is None:
        return F.linear(x, weight, bias)
    if not autocast_is_on(x.device):
        reasoning, embedding = _fitting(x.dtype, reasoning, embedding)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return dual_lora_linear(x, weight, bias, reasoning, embedding, plan, dropout=dropout, impl=impl)


def _fitting(dtype: torch.dtype, reasoning: LoRA | None, embedding: LoRA | None) -> tuple[LoRA | None, LoRA | None]:
    """The adapters in the dtype of x where all are, else in fp32 beside a 16-bit x, else in the dtype of x."""
    target = fitting_dtype(dtype, {lora.A.dtype for lora in (reasoning, embedding) if lora is not None})
    if target is None:
        return reasoning, embedding
    return tuple(
        None if lora is None else LoRA(lora.A.to(target), lora.B.to(target), lora.scaling)
        for lora in (reasoning, embedding)
    )


def check_rank(rank: object, name: str = "rank") -> None:
    """Raise OptionError unless ``rank`` is a whole number in 1 … 256."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise OptionError(f"{name} must be a whole number in [1, {MAX_RANK}], got {rank!r}.")


def check_dropout(dropout: float) -> None:
    """Raise OptionError unless ``dropout`` is a probability below 1."""
    if not 0.0 <= dropout < 1.0:
        raise OptionError(f"dropout must be in [0, 1), got {dropout!r}.")
