"""The ops: meaning only. How they run is in `fusewire.backends`."""
from . import collectives, dense, fused, moe, norm

__all__ = ["collectives", "dense", "fused", "moe", "norm"]
