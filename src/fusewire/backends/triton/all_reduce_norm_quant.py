"""all_reduce_norm_quant as one Triton kernel over a group's workspace: NVLink or any peer access, no multicast."""
from __future__ import annotations

import torch
from torch import Tensor

from ... import group as groups
from ...op import Usage
from ...ops.collectives import world_size
from ...ops.fused import all_reduce_norm_quant
from .. import workspace
from ..device import processors
from ..workspace import align
from .launch import block_of, launch, new_parts, row_bytes, row_constants, why_not

NAME = "all_reduce_norm_quant"


def _why_not(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> str | None:
    return why_not(x, residual, weight, fmt, group)


def _slot(x: Tensor) -> int:
    """Bytes of a row in the workspace."""
    return align(x.shape[1] * x.element_size())


def _result(x: Tensor, fmt: str, keep_norm: bool) -> tuple[int, int, int]:
    """Where an owner's result has its data and its scales, and how long it is: behind the sum, and the norm if that is kept."""
    data, scales = [*([] if fmt == "bf16" else row_bytes(x, fmt)), 0, 0][:2]
    at = _slot(x) * (1 + keep_norm)
    return at, at + align(data), at + align(data) + align(scales)


def one_shot_bytes(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
                   params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> int:
    """Bytes of the workspace that a call needs."""
    return world_size(group) * x.shape[0] * max(_slot(x), workspace.BYTES_PER_FLAG)


def two_shot_bytes(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
                   params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> int:
    """Bytes of the workspace that a call needs."""
    world = world_size(group)
    return (x.shape[0] + world - 1) // world * world * (_slot(x) + _result(x, fmt, keep_norm)[2])


# Programs for a row of up to so many rows, beyond which each has one: the fastest of 4, 2 and 1 for FP8 and NVFP4 on two H200,
# hidden = 8192, but for 64 rows, where 4 need other warps to be faster.
_ROWS_IN_PIECES, _PIECES = 32, 4


# Programs that only push: the fastest of nine from 36 to 56 on two H200, FP8, hidden = 8192, at 512, 1024, 2048 and 4096 rows, or
# within 0.1 % of it.
_PUSHERS = 48

# Rows: a program of those that push none leaves memory alone until a word of the row so many before its own has come. The fastest
# of 0 (none waits), 48 and 96 on two H200, hidden = 8192, FP8: 0.3 to 1.3 % faster than 0 from 256 to 2048 rows.
_LEAD = 96


def _warps(hidden: int) -> int:
    """Warps of a program. They decide the order in which squares are added: a row's bits depend neither on how many come with it,
    nor on the number of shots, nor on pieces. At 8192, 8 are the fastest of 4, 8 and 16 or within 4 % of it on two H200."""
    block = block_of(hidden)
    return max(1, min(8, block // 512), block // 1024)


def _few(rows: int, hidden: int, processors: int) -> tuple[int, int, int] | None:
    """(programs for a row, warps of each, programs on a multiprocessor at once) where every program has at most one row; None for
    more rows."""
    warps, block = _warps(hidden), block_of(hidden)
    wanted = _PIECES if rows <= _ROWS_IN_PIECES else 1
    possible = (p for p in (4, 2, 1) if p <= wanted and rows * p <= processors and block // p >= max(1024, 256 * warps))
    pieces = next(possible, 1)  # 8 elements for a thread: 16 bytes
    resident = next((r for r in (1, 2) if rows * pieces <= r * processors), None)
    return None if resident is None else (pieces, warps, resident)


def _many(hidden: int) -> tuple[int, int]:
    """(warps of a program, programs on a multiprocessor at once) where programs have several rows. (8, 2) is the fastest of seven
    at 8192 from 512 rows on in one shot, and within 3 % of it in two: FP8 and NVFP4, on an H200 in loopback."""
    return _warps(hidden), max(2, 16 // _warps(hidden))


# 5 us: a row on two H200. A rank sends its rows to each peer, world_size / 2 times the bytes of a ring.
@all_reduce_norm_quant.backend("one_shot", supports=_why_not, nbytes=one_shot_bytes,
                               seconds=lambda u: 5e-6 + u.world_size / 2 * u.wire_s)
def one_shot(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> list[Tensor]:
    return exchange(x, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, group)


def _streamed_seconds(u: Usage) -> float:
    """Not better than one_shot up to 256 rows, faster for more, and the same for those that words have no room for."""
    words = u.bytes * u.world_size**2 / (2 * (u.world_size - 1))  # a ring's bytes, as the rows of all ranks
    pushed = u.world_size / 2 * u.wire_s
    return 5e-6 + pushed if words > workspace.WORD_BYTES else 5.6e-6 + 0.95 * pushed


def _why_not_streamed(*args) -> str | None:
    if (why := _why_not(*args)) is None and groups.kind(args[-1]) == "loopback":
        return "in a loopback group nothing travels, so programs that only push save nothing"
    return why


@all_reduce_norm_quant.backend("streamed", supports=_why_not_streamed, nbytes=one_shot_bytes, seconds=_streamed_seconds)
def streamed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> list[Tensor]:
    """One shot with programs that only push, in words; what these have no room for goes as in `one_shot`."""
    return exchange(x, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, group, "streamed")


# Two exchanges, one after the other; the second carries parts beside the sum, at most as many bytes again.
@all_reduce_norm_quant.backend("two_shot", supports=_why_not, nbytes=two_shot_bytes,
                               seconds=lambda u: 2 * 5e-6 + 1.5 * u.wire_s)
def two_shot(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> list[Tensor]:
    return exchange(x, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, group, "two_shot")


def exchange(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
             params: list[Tensor], fmt: str, keep_norm: bool, group: str, way: str = "one_shot", wait: bool = True,
             clear: bool = True) -> list[Tensor]:
    """The op by its backend `way`; `wait=False` leaves out the waits for the peers, `clear=False` that words are cleared: to show
    that tests notice."""
    from . import kernels

    space = workspace.of(group)
    rows, hidden = x.shape
    total = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    norm = torch.empty_like(total) if keep_norm else None
    parts = new_parts(x, rows, fmt)
    out = [total, *([] if norm is None else [norm]), *parts]
    if rows == 0:
        return out
    args = (x, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, group)
    constants = row_constants(x, residual, offset, cast_first, keep_norm, fmt, space) | {"WAIT": wait}
    numbers: tuple = (rows, eps, offset)
    words = False
    if way == "two_shot":
        per = -(-rows // space.world_size)
        space.need(NAME, two_shot_bytes(*args), 2 * space.world_size * per)
        kernel, (warps, resident) = kernels.two_shot, _many(hidden)
        programs = min(per, resident * processors(x.device))
        constants |= dict(zip(("DATA_AT", "SCALES_AT", "ROW_BYTES"), _result(x, fmt, keep_norm), strict=True))
    else:
        space.need(NAME, one_shot_bytes(*args), space.world_size * rows)
        words = space.world_size * rows * _slot(x) <= space.word_bytes
        kernel, (warps, resident) = kernels.one_shot, _many(hidden)
        programs = min(rows, resident * processors(x.device))
        if words and way == "streamed":
            pushers = min(rows, _PUSHERS)
            kernel, programs = kernels.streamed, min(rows + pushers, resident * processors(x.device))
            constants |= {"CLEAR": clear, "LEAD": _LEAD}
            numbers = (*numbers, pushers)
        elif words and (few := _few(rows, hidden, processors(x.device))) is not None:
            kernel, (pieces, warps, resident) = kernels.one_shot_few, few
            programs = rows * pieces
            constants |= {"PARTS": pieces, "CLEAR": clear}
        else:
            words = False
    tensors = [x, residual, weight, params[0] if params else None, total, norm, *[*parts, total, total][:2]]
    launch(kernel, NAME, programs, warps, resident, space, tensors, numbers, constants, words)
    return out
