"""Public functions: one op a file, each with its contract, its validation and its choice of implementation."""

from twn_kernels.ops.choice import Choice
from twn_kernels.ops.dual_lora_group import dual_lora_group
from twn_kernels.ops.dual_lora_linear import dual_lora_linear
from twn_kernels.ops.dual_lora_linear_fanout import dual_lora_linear_fanout
from twn_kernels.ops.gate_scores import GateStep, gate_scores
from twn_kernels.ops.lora import LoRA
from twn_kernels.ops.plan import RoutePlan
from twn_kernels.ops.pool_queries import pool_queries
from twn_kernels.ops.projection import Norm, Projection

__all__ = [
    "Choice",
    "GateStep",
    "LoRA",
    "Norm",
    "Projection",
    "RoutePlan",
    "dual_lora_group",
    "dual_lora_linear",
    "dual_lora_linear_fanout",
    "gate_scores",
    "pool_queries",
]
