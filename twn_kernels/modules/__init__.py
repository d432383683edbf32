"""Layers as ``nn.Module``: the dual-LoRA linear, the gate, the learned queries. No model knowledge."""

from twn_kernels.modules.dual_lora_linear import DualLoRALinear

__all__ = ["DualLoRALinear"]
