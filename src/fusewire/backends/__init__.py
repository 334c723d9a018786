"""How the ops run. Importing this registers every backend that this machine could have, in the order in which they are tried."""
from . import all_gather_matmul, aten, matmul_reduce_scatter, moe, triton

__all__ = ["all_gather_matmul", "aten", "matmul_reduce_scatter", "moe", "triton"]
