"""What the Triton backends share: what they take, and how a kernel over a workspace is launched."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import formats
from ...ops.collectives import world_size
from ...ops.dense import linear
from .. import device, workspace

HIDDEN = range(64, 16384 + 1)


def why_not(x: Tensor, residual: Tensor | None, weight: Tensor, fmt: str, group: str) -> str | None:
    """Why rows x (rows, hidden) cannot be normalized, quantized and exchanged here; None if they can."""
    if (why := device.why_not(x.device)) is not None:
        return why
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


def block_of(hidden: int) -> int:
    """Elements that a program has of a row: a power of two."""
    return max(128, 1 << (hidden - 1).bit_length())


def new_parts(x: Tensor, rows: int, fmt: str) -> list[Tensor]:
    """The parts of a (rows, hidden) activation, not written yet; none for bf16."""
    f = formats.get(fmt)
    return [] if fmt == "bf16" else [x.new_empty(p.shape(rows, x.shape[1]), dtype=p.dtype) for p in f.parts]


def row_bytes(x: Tensor, fmt: str) -> list[int]:
    """Bytes of a row of x in each part that travels."""
    if fmt == "bf16":
        return [x.shape[1] * x.element_size()]
    return [p.shape(1, x.shape[1])[1] * p.dtype.itemsize for p in formats.get(linear(fmt)).parts]


def row_constants(x: Tensor, residual: Tensor | None, offset: float, cast_first: bool, keep_norm: bool, fmt: str,
                  space: workspace.Workspace) -> dict[str, Any]:
    """The constants that all kernels of rows have."""
    return dict(
        WORLD=space.world_size, LOOPBACK=space.loopback, HIDDEN=x.shape[1], BLOCK=block_of(x.shape[1]), X_STRIDE=x.stride(0),
        RESIDUAL_STRIDE=0 if residual is None else residual.stride(0), HAS_RESIDUAL=residual is not None,
        HAS_OFFSET=offset != 0.0, CAST_FIRST=cast_first, KEEP_NORM=keep_norm, FMT=fmt.partition(":")[0],
        SWIZZLED=formats.get(fmt).layout == "128x4",
    )


def launch(kernel: Any, op: str, programs: int, warps: int, resident: int, space: workspace.Workspace, tensors: list[Tensor | None],
           numbers: tuple, constants: dict[str, Any], words: bool = False, counts: tuple[int, ...] = ()) -> None:
    """Launch a kernel whose arguments are tensors, those of the workspace, `counts`, `numbers` and constants.

    words     it has the words instead of the data
    counts    numbers that Triton compiles it for: whether they are 1 or multiples of 16
    programs  of `warps` warps, of which `resident` fit on a multiprocessor: all of a launch must be on the device at once, as
              they wait for peers whose programs wait for them
    """
    constants["num_warps"] = warps
    constants["maxnreg"] = min(255, 65536 // (32 * warps * resident) // 8 * 8)  # registers are given out by eights
    key = (op, kernel.__name__, space.device, *sorted(constants.items()),
           *((None if t is None else (t.dtype, t.data_ptr() % 16)) for t in tensors),
           *((n == 1, n % 16 == 0) for n in counts))
    what = f" for hidden = {constants['HIDDEN']} and {constants['FMT']}" if "HIDDEN" in constants else ""
    device.warm_up(key, f"{op}: its kernel {kernel.__name__}{what}")
    data, flags, all_words = space.from_here
    where, nbytes = (all_words, space.word_bytes) if words else (data, space.nbytes)
    kernel[(programs,)](*tensors, where, flags, space.state, space.report, nbytes, space.flag_count, space.rank,
                        workspace.op_number(op), space.limit_ns, *counts, *numbers, **constants)
