"""Fusewire hides the communication of tensor-parallel language models behind their low-precision matmuls."""

__version__ = "0.1.0"
