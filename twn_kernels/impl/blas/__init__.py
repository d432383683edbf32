"""The vendor GEMM: a masked stacked shrink, then one K-augmented product. Runs wherever torch runs, fp32 and 16-bit."""

from twn_kernels.impl.blas.dual_lora import UNIFORM, backward, fanout, forward

__all__ = ["UNIFORM", "backward", "fanout", "forward"]
