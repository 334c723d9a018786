"""norm_quant_all_gather_matmul: one Triton kernel that normalizes and quantizes, and then the matmul.

pushed  the kernel pushes what it makes to every rank, then the matmul op's own backend runs: any format, and the fewest steps
apart   the kernel sends nothing; all_gather_matmul's own backend sends while it multiplies: what `gated` takes
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...op import Usage
from ...ops.collectives import world_size
from ...ops.dense import linear, matmuls, split_weights
from ...ops.fused import all_gather_matmul, norm_quant_all_gather_matmul
from .. import transfer, workspace
from ..cuda import gemm
from ..device import processors
from ..workspace import align
from .launch import block_of, launch, new_parts, row_bytes, row_constants, why_not

NAME = "norm_quant_all_gather_matmul"


class Pushed(NamedTuple):
    """What `push` made.

    total, norm   (rows, hidden) of this rank's rows, or None
    parts         of all ranks' rows (gathered), or of this rank's, linear
    ticket        int32 (1,): the epoch whose half has the peers' rows, and which their flags hold
    scales_at     byte of that half at which the peers' scales begin. Rank s's row r is row `s * rows + r` of the data, at byte 0,
                  and of the scales
    programs      flags of a rank: number `s * programs + r % programs` is set once row r and the others of its program have come
    """

    total: Tensor | None
    norm: Tensor | None
    parts: list[Tensor]
    ticket: Tensor
    scales_at: int
    programs: int


def _why_not(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool, keep_norm: bool,
             params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
             group: str) -> str | None:
    return why_not(x, residual, weight, fmt, group)


def push_bytes(x: Tensor, fmt: str, group: str) -> int:
    """Bytes of the workspace that `push` needs."""
    return sum(align(world_size(group) * x.shape[0] * b, 256) for b in row_bytes(x, fmt))


def _nbytes(x: Tensor, *args) -> int:
    return push_bytes(x, args[-3], args[-1])


# Elements of x: of more, rows are fetched to the L2 cache. The faster of both ways in loopback on an H200, hidden = 8192, FP8 and
# NVFP4: the other takes 9 % less time at 1024 rows, and this one 4 to 5 % less at 2048 and 8 to 14 % from 4096 to 16384.
_FEW = 1 << 23


def _launch_shape(hidden: int) -> tuple[int, int]:
    """(warps of a program, programs on a multiprocessor at once)."""
    warps = max(1, block_of(hidden) // 1024)
    return warps, max(2, 16 // warps)


def push(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool, keep_norm: bool,
         params: list[Tensor], fmt: str, group: str, gather: bool, wait: bool = True, send: bool = True) -> Pushed:
    """Residual add, RMSNorm, quantize this rank's rows and push the parts to every peer.

    gather   wait for the peers' rows too and return all ranks' parts, in `fmt`'s layout. Without it whoever reads the peers' rows
             waits for every flag of every peer, on this stream and before the next exchange
    wait     False leaves that wait out, to show that tests notice
    send     False: nothing is sent, and there is no exchange; not with `gather`
    """
    from . import kernels

    space = workspace.of(group)
    rows, hidden = x.shape
    total = None if residual is None else torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    norm = torch.empty(rows, hidden, dtype=x.dtype, device=x.device) if keep_norm else None
    made = fmt if gather else linear(fmt)
    parts = new_parts(x, rows * space.world_size if gather else rows, made)
    parts = parts or [x.new_empty(rows * space.world_size if gather else rows, hidden)]
    ticket = torch.empty(1, dtype=torch.int32, device=x.device)
    scales_at = align(space.world_size * rows * row_bytes(x, fmt)[0], 256)
    warps, resident = _launch_shape(hidden)
    programs = min(rows, resident * processors(x.device))
    if rows:
        if send:
            space.need(NAME, push_bytes(x, fmt, group), space.world_size * programs)
        constants = row_constants(x, residual, offset, cast_first, keep_norm, made, space)
        constants |= {"GATHER": gather, "WAIT": wait, "FETCH": x.numel() > _FEW, "SEND": send}
        tensors = [x, residual, weight, params[0] if params else None, total, norm, parts[0], parts[-1], ticket]
        launch(kernels.norm_quant_push, NAME, programs, warps, resident, space, tensors,
               (rows, eps, offset, scales_at), constants)
    return Pushed(total, norm, parts, ticket, scales_at, programs)


# 5 us: what the exchange of a row takes on two H200, see all_reduce_norm_quant.
@norm_quant_all_gather_matmul.backend("pushed", supports=_why_not, nbytes=_nbytes,
                                      seconds=lambda u: 5e-6 + u.wire_s + u.matmul_s)
def pushed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool, keep_norm: bool,
           params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
           group: str) -> list[Tensor]:
    p = push(x, residual, weight, eps, offset, cast_first, keep_norm, params, fmt, group, gather=True)
    return [*(t for t in (p.total, p.norm) if t is not None), *matmuls(p.parts, params, ws, biases, fmt, dtype)]


def _why_not_apart(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool, keep_norm: bool,
                   params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
                   group: str) -> str | None:
    why = why_not(x, residual, weight, fmt, group) or gemm.why_not_world(world_size(group))
    for w, bias in zip(split_weights(ws, fmt), biases, strict=True):
        why = why or gemm.why_not([x] if fmt == "bf16" else w, w, bias, fmt, dtype)  # FP8 rows have the weight's dtype
    return why


def _apart_seconds(u: Usage) -> float:
    """Of two kernels, where the first takes 0.6 of the wire's time, from the bytes that both move at hidden = 8192 in FP8."""
    return 0.6 * u.wire_s + transfer.in_one_kernel(u)


@norm_quant_all_gather_matmul.backend("apart", supports=_why_not_apart, nbytes=_nbytes, seconds=_apart_seconds)
def apart(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool, keep_norm: bool,
          params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
          group: str) -> list[Tensor]:
    p = push(x, residual, weight, eps, offset, cast_first, keep_norm, params, fmt, group, gather=False, send=False)
    return [*(t for t in (p.total, p.norm) if t is not None), *all_gather_matmul(p.parts, params, ws, biases, fmt, dtype, group)]
