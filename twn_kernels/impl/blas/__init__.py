"""The vendor GEMM: a masked stacked shrink, then one K-augmented product. Runs wherever torch runs, fp32 and 16-bit."""

from twn_kernels.impl.blas import panels
from twn_kernels.impl.blas.dual_lora import UNIFORM, backward, fanout, forward
from twn_kernels.impl.blas.group import group, group_backward

GROUP_UNIFORM = True  # ``group`` and ``group_backward`` understand ``routes=None`` as the linear does

__all__ = ["GROUP_UNIFORM", "UNIFORM", "backward", "fanout", "forward", "group", "group_backward", "panels"]
