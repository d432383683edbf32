"""Triton: a masked stacked shrink, then one fused GEMM whose main loop runs over the base and the low-rank ranges.

The portable GPU implementation (Ampere and newer) and the training kernels. On a CPU it runs only in the interpreter.
"""

from twn_kernels.impl.triton.group_grad import group_backward
from twn_kernels.impl.triton.group_product import group
from twn_kernels.impl.triton.launch import backward, fanout, forward
from twn_kernels.impl.triton.produce import produce_

GROUP_UNIFORM = True  # ``group`` and ``group_backward`` take ``routes=None``: every row uses what is in ``present``

__all__ = ["GROUP_UNIFORM", "backward", "fanout", "forward", "group", "group_backward", "produce_"]
