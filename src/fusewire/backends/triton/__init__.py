"""Kernels in Triton. Importing this needs no Triton: an op's backend refuses, in a sentence, where there is none."""
from . import all_reduce_norm_quant, expert_parallel, moe, norm_quant_all_gather_matmul

__all__ = ["all_reduce_norm_quant", "expert_parallel", "moe", "norm_quant_all_gather_matmul"]
