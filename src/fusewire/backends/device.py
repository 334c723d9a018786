"""Which devices kernels run on, and what the host has to know of one."""
from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from ..errors import FusewireError

HOPPER = (9, 0)
_warm: set[tuple] = set()


@functools.cache
def why_not(device: torch.device, highest: tuple[int, int] | None = None, triton: bool = True) -> str | None:
    """Why a kernel cannot run on a device, None if it can: it needs CUDA, Triton unless that is False, and the compute capability
    of Hopper, or any from there to `highest`; None: without end."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if triton and find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < HOPPER or (highest is not None and capability > highest):
        return f"it is for compute capability {HOPPER[0]}.{HOPPER[1]}, and this device has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def warm_up(key: tuple, what: str) -> None:
    """Call this before each launch of a Triton kernel, `what` in words: one that is not compiled yet is refused while a CUDA graph
    is captured. The key is whatever it is compiled for."""
    if key not in _warm:
        if torch.cuda.is_current_stream_capturing():
            raise FusewireError(f"{what} would be compiled while a CUDA graph is captured; run the model once before the capture")
        _warm.add(key)
