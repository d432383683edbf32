"""Layers as ``nn.Module``: the dual-LoRA linear, the gate, the learned queries. No model knowledge."""

from twn_kernels.modules.dual_lora_linear import DualLoRALinear
from twn_kernels.modules.gate_mlp import GateMLP
from twn_kernels.modules.query_bank import QueryBank

__all__ = ["DualLoRALinear", "GateMLP", "QueryBank"]
