"""How the ops run. Importing this registers every backend that this machine could have, in the order in which they are tried."""
from . import aten, triton

__all__ = ["aten", "triton"]
