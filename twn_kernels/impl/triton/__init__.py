"""Triton: a masked stacked shrink, then one fused GEMM whose main loop runs over the base and the low-rank ranges.

The portable GPU implementation (Ampere and newer) and the training kernels. On a CPU it runs only in the interpreter.
"""

from twn_kernels.impl.triton.group_grad import group_backward
from twn_kernels.impl.triton.launch import backward, fanout, forward
from twn_kernels.impl.triton.produce import produce_

__all__ = ["backward", "fanout", "forward", "group_backward", "produce_"]
