"""The CUDA extension for tests without a GPU: its ops compute with the reference and check what they are given.

Everything above the ops is the package's own: the choice of the kernel, slices, copies, refusals.
"""

from __future__ import annotations

import pytest
import torch

from twn_kernels.impl import cuda, reference
from twn_kernels.impl.cuda import fitness, launch, loader, pooling
from twn_kernels.impl.reference import gate
from twn_kernels.impl.reference import pooling as pool
from twn_kernels.impl.reference.group import _input as group_input
from twn_kernels.ops import choice

ARCHS = "8.0;9.0a;9.0+PTX"
DECODE_ROWS = 64


class StandIn:
    """What was launched, as ``(op, rows of x)`` in order, and the last call's ``present``."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []
        self.present: list[int] = []

    @property
    def taken(self) -> list[tuple[str, int]]:
        """The launches since the last look."""
        launches, self.launches = self.launches, []
        return launches

    def op(self, name: str):
        ops = {"decode_group": self._decode, "prefill_group": self._prefill, "front": self._front}
        return (ops | {"gate_scores": self._gate, "pool_queries": self._pool})[name]

    def _decode(self, x, *call) -> torch.Tensor:
        assert 1 <= x.shape[0] <= DECODE_ROWS
        return self._group("decode_group", x, *call)

    def _prefill(self, x, norm_weight, eps, gated, *call) -> torch.Tensor:
        assert norm_weight is None and not gated, "front makes the input of a prefill"
        return self._group("prefill_group", x, norm_weight, eps, gated, *call)

    def _front(self, x, norm_weight, eps, gated) -> torch.Tensor:
        self.launches.append(("front", x.shape[0]))
        _check_words(x)
        return group_input(x, norm_weight, eps, gated)

    def _pool(self, states, pooling, normalize) -> torch.Tensor:
        self.launches.append(("pool_queries", states.shape[0]))
        return pool.pool_queries(states, ("mean", "last", "first")[pooling], normalize)

    def _gate(self, states, last, weights, biases, activated, activation, threshold) -> tuple:
        self.launches.append(("gate_scores", states.shape[0]))
        steps = [(w, b if b.numel() else None, bool(on)) for w, b, on in zip(weights, biases, activated, strict=True)]
        name = tuple(gate.ACTIVATIONS)[activation]
        scores, think = gate.gate_scores(states, last, steps, name, threshold)
        return scores, torch.empty(0, dtype=torch.bool) if think is None else think

    def _group(
        self, name, x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes,
        present, swiglu, residual,
    ) -> torch.Tensor:  # fmt: skip
        self.launches.append((name, x.shape[0]))
        self.present.append(present)
        lists = (weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e)
        assert all(type(entry) is list and len(entry) == len(weights) for entry in lists)
        assert all(type(flag) is bool for flag in (gated, swiglu)) and type(eps) is float
        for tensor in (x, *weights):
            _check_words(tensor)
        assert x.stride(0) >= x.shape[1], "rows overlap"
        assert residual is None or residual.stride(1) == 1
        if routes is None:
            routes = torch.full((x.shape[0],), present, dtype=torch.int8)
        assert routes.shape == (x.shape[0],) and routes.is_contiguous()
        biases = [bias if bias.numel() else None for bias in biases]
        return reference.group(
            x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e, routes, present,
            swiglu, residual,
        )[0]  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, *, capability=(9, 0), archs: str = ARCHS) -> StandIn:
    """Let ``impl="cuda"`` run on this machine's tensors, as on a GPU of ``capability`` with a build for ``archs``."""
    stand_in = StandIn()
    kernels = "decode_sm80" + " prefill_sm90a" * ("9.0a" in archs)
    built = loader.BuildInfo(True, "", archs, "13.0", torch.__version__, kernels)
    for module in (fitness, launch):
        monkeypatch.setattr(module, "capability_of", lambda index: capability)
    monkeypatch.setattr(fitness, "_on_gpu", lambda x: True)
    monkeypatch.setattr(loader, "build_info", lambda: built)
    monkeypatch.setattr(loader, "load", lambda: None)
    for module in (loader, cuda):
        monkeypatch.setattr(module, "unavailable_reason", lambda **_: None)
    real = fitness.device_reason

    def device_reason(device, dtype=None, **options):
        return real(torch.device("cuda", 0), dtype, **options)

    for module in (fitness, launch, cuda):
        monkeypatch.setattr(module, "device_reason", device_reason)
    for module in (launch, pooling):
        monkeypatch.setattr(module, "_op", stand_in.op)
    monkeypatch.setattr(pooling, "_load", lambda device: None)
    for name in ("_kernels", "_none"):
        monkeypatch.setattr(launch, name, getattr(launch, name).__wrapped__)
    return stand_in


def install_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension itself where there is a GPU, or a skipped test where it does not run on that; else the stand-in."""
    if not torch.cuda.is_available():
        install(monkeypatch)
    elif (reason := choice.unavailable_reason("cuda", torch.device("cuda"))) is not None:
        pytest.skip(f"needs the CUDA extension: {' '.join(reason.split())}")


def _check_words(tensor: torch.Tensor) -> None:
    assert tensor.stride(1) == 1 and tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0
