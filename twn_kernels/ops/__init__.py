"""Public functions: one op a file, each with its contract, its validation and its choice of implementation."""

from twn_kernels.ops.choice import Choice
from twn_kernels.ops.dual_lora_linear import dual_lora_linear
from twn_kernels.ops.dual_lora_linear_fanout import dual_lora_linear_fanout
from twn_kernels.ops.gate_scores import GateStep, gate_scores
from twn_kernels.ops.lora import LoRA
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.ops.pool_queries import pool_queries

__all__ = [
    "Choice",
    "GateStep",
    "LoRA",
    "RoutePlan",
    "dual_lora_linear",
    "dual_lora_linear_fanout",
    "gate_scores",
    "pool_queries",
]
