"""The specification in eager PyTorch: slow, obvious, valid in fp64. Imports torch only, shares no code with kernels."""

from twn_kernels.impl.reference.dual_lora import backward, fanout, forward
from twn_kernels.impl.reference.group import group, group_backward

__all__ = ["backward", "fanout", "forward", "group", "group_backward"]
