"""all_reduce_norm_quant as one Triton kernel over a group's workspace: NVLink or any peer access, no multicast."""
from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from ... import formats
from ...errors import FusewireError
from ...ops.collectives import world_size
from ...ops.fused import all_reduce_norm_quant
from .. import workspace

HIDDEN = range(64, 16384 + 1)
_warm: set[tuple] = set()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _why_not(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if not _has_triton():
        return "Triton is not installed"
    if (capability := torch.cuda.get_device_capability(x.device)) < (9, 0):
        return f"it needs compute capability 9.0, and this device has {capability[0]}.{capability[1]}"
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes (tokens, hidden) of bfloat16 or float16, not {x.dim()} dimensions of {x.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual must be {x.dtype} like x, not {residual.dtype}"
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1) or weight.stride(0) != 1:
        return "x, residual and weight must be contiguous along hidden"
    if (hidden := x.shape[1]) not in HIDDEN:
        return f"hidden = {hidden} is not in {HIDDEN.start} to {HIDDEN.stop - 1}"
    if hidden % (multiple := formats.get(fmt).k_multiple):
        return f"hidden = {hidden} is not a multiple of {multiple}, as {fmt} needs"
    if world_size(group) == 1:
        return "one rank has nothing to exchange"
    return None


def _launch(rows: int, hidden: int) -> tuple[int, int]:
    """(warps of a program, programs on a multiprocessor at once), the fastest of those tried on an H200."""
    block = _block(hidden)
    if rows <= 8:
        return min(32, max(1, block // 256)), 1
    return min(16, max(1, block // 1024)), 2


def _block(hidden: int) -> int:
    return max(128, 1 << (hidden - 1).bit_length())


def _nbytes(x: Tensor, *args) -> int:
    return world_size(args[-1]) * x.shape[0] * max(_slot(x), workspace.BYTES_PER_FLAG)


def _slot(x: Tensor) -> int:
    """Bytes of a row in the workspace."""
    return -(-x.shape[1] // 8) * 8 * x.element_size()


# 5 us: a row on two H200. A rank sends its rows to each peer, world_size / 2 times the bytes of a ring.
@all_reduce_norm_quant.backend("triton", supports=_why_not, nbytes=_nbytes,
                               seconds=lambda u: 5e-6 + u.world_size / 2 * u.wire_s)
def one_shot(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> list[Tensor]:
    return exchange(x, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, group)


def exchange(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str, wait: bool = True) -> list[Tensor]:
    """The op; `wait=False` leaves out the wait for the peers, to show that tests notice."""
    from . import kernels

    space = workspace.of(group)
    rows, hidden = x.shape
    total = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    norm = torch.empty_like(total) if keep_norm else None
    f = formats.get(fmt)
    parts = [] if fmt == "bf16" else [(x.new_zeros if p.multiple != (1, 1) else x.new_empty)(p.shape(rows, hidden), dtype=p.dtype)
                                      for p in f.parts]
    out = [total, *([] if norm is None else [norm]), *parts]
    if rows == 0:
        return out
    space.need("all_reduce_norm_quant", space.world_size * rows * _slot(x), space.world_size * rows)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    warps, resident = _launch(rows, hidden)
    programs = min(rows, resident * processors)
    constants = dict(
        WORLD=space.world_size, LOOPBACK=space.loopback, HIDDEN=hidden, BLOCK=_block(hidden), X_STRIDE=x.stride(0),
        RESIDUAL_STRIDE=0 if residual is None else residual.stride(0), HAS_RESIDUAL=residual is not None,
        HAS_OFFSET=offset != 0.0, CAST_FIRST=cast_first, KEEP_NORM=keep_norm, FMT=fmt.split(":")[0],
        SWIZZLED=f.layout == "128x4", ONE_ROW=programs == rows, WAIT=wait, num_warps=warps,
        maxnreg=min(255, 65536 // (32 * warps * resident)),  # so that all programs of a launch are on the device at once
    )
    tensors = [x, residual, weight, params[0] if params else None, total, norm, parts[0] if parts else None,
               parts[1] if len(parts) > 1 else None]
    key = (x.device, *sorted(constants.items()), *((None if t is None else (t.dtype, t.data_ptr() % 16)) for t in tensors))
    if key not in _warm:
        if torch.cuda.is_current_stream_capturing():
            raise FusewireError(f"all_reduce_norm_quant: a kernel for hidden = {hidden} and {fmt} would be compiled while a CUDA "
                                "graph is captured; run the model once before the capture")
        _warm.add(key)
    kernels.all_reduce_norm_quant[(programs,)](
        *tensors, *space.from_here, space.state, space.report, space.nbytes, space.flag_count, space.rank,
        workspace.op_number("all_reduce_norm_quant"), space.limit_ns, rows, eps, offset, **constants)
    return out
