"""all_gather_matmul over a workspace: small batches push and then multiply, large ones do both at once.

push         one small kernel stores the rows to every rank, then the matmul op's own backend runs: any format
copy_engine  copy engines push while this rank's own rows are multiplied, then those of each peer: any format with linear scales
gated        one kernel sends this rank's rows and multiplies all rows, in the order in which they come: bf16, FP8
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import formats
from ..ops.collectives import world_size
from ..ops.dense import matmuls_of_linear, split_weights
from ..ops.fused import all_gather_matmul
from . import aten, device, transfer, words, workspace
from .cuda import gemm
from .transfer import Transfer, join, on_side, prepare, why_not
from .workspace import ALIGN, align

BLOCK = 2048  # elements that one of its programs copies at once


def nbytes(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
           group: str) -> int:
    """Bytes of the workspace: the gathered parts."""
    return sum(align(world_size(group) * t.numel() * t.element_size(), ALIGN) for t in x)


def _why_not(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
             group: str) -> str | None:
    return why_not(x[0].device, group)


def _why_not_by_shards(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                       dtype: torch.dtype, group: str) -> str | None:
    if formats.get(fmt).layout != "linear":
        return f"it multiplies one rank's rows at a time, and the scales of {fmt} are those of all rows"
    return _why_not(x, params, ws, biases, fmt, dtype, group)


def _why_not_gated(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                   dtype: torch.dtype, group: str) -> str | None:
    if (why := _why_not(x, params, ws, biases, fmt, dtype, group) or gemm.why_not_world(world_size(group))) is not None:
        return why
    for w, bias in zip(split_weights(ws, fmt), biases, strict=True):
        if (why := gemm.why_not(x, w, bias, fmt, dtype)) is not None:
            return why
    return None


def _outputs(x: list[Tensor], ws: list[Tensor], fmt: str, dtype: torch.dtype, rows: int) -> list[Tensor]:
    return [x[0].new_empty((rows, w[0].shape[0]), dtype=dtype) for w in split_weights(ws, fmt)]


@all_gather_matmul.backend("push", supports=_why_not, nbytes=nbytes, seconds=transfer.one_after_the_other)
def push(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
         group: str) -> list[Tensor]:
    return pushed(x, params, ws, biases, fmt, dtype, group)


def pushed(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
           group: str, wait: bool = True) -> list[Tensor]:
    """The op; `wait=False` leaves out the wait for the peers, to show that tests notice."""
    from .triton import transfer as kernels

    space = workspace.of(group)
    x = [t.contiguous() for t in x]
    if x[0].shape[0] == 0:
        return _outputs(x, ws, fmt, dtype, 0)
    if (full := words.gather(x, space, "all_gather_matmul", wait)) is not None:
        return matmuls_of_linear(full, params, ws, biases, fmt, dtype)
    units = [_units(part) for part in x]
    programs = min(transfer.most_programs(space), max(-(-u.numel() // BLOCK) for u in units))
    t = prepare(space, "all_gather_matmul", nbytes(x, params, ws, biases, fmt, dtype, group), programs * space.world_size)
    starts = _starts(x, space.world_size)
    assert len(units) <= 2, "no format has more than two parts"
    second = units[-1]
    transfer.start(
        kernels.push, programs, t, units[0], units[0].numel(), second, second.numel(), starts[-1],
        WORLD=space.world_size, LOOPBACK=space.loopback, BLOCK=BLOCK, TWO=len(units) == 2, X_ALIGNED=_whole(units[0]),
        Y_ALIGNED=_whole(second), WAIT=wait)
    return matmuls_of_linear(_gathered(t, x), params, ws, biases, fmt, dtype)


@all_gather_matmul.backend("copy_engine", supports=_why_not_by_shards, nbytes=nbytes, seconds=transfer.by_copy_engines)
def copy_engine(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                dtype: torch.dtype, group: str) -> list[Tensor]:
    from .triton import transfer as kernels

    space = workspace.of(group)
    x = [t.contiguous() for t in x]
    rows = x[0].shape[0]
    if rows == 0:
        return _outputs(x, ws, fmt, dtype, 0)
    t = prepare(space, "all_gather_matmul", nbytes(x, params, ws, biases, fmt, dtype, group), space.world_size)
    transfer.start(kernels.begin, 1, t, WORLD=space.world_size, LOOPBACK=space.loopback, num_warps=1)
    with on_side(space):
        _copy(t, x)
    out = _outputs(x, ws, fmt, dtype, rows * space.world_size)
    for rank in t.ranks:
        if rank != space.rank:
            transfer.start(kernels.wait, 1, t, rank, rank, num_warps=1)
        shard = x if rank == space.rank else _slots(t, x, rank)
        for y, w, bias in zip(out, split_weights(ws, fmt), biases, strict=True):
            aten.matmul_into(y[rank * rows:(rank + 1) * rows], shard, params, w, bias, fmt)
    join(space)
    return out


@all_gather_matmul.backend("gated", supports=_why_not_gated, nbytes=nbytes, seconds=transfer.in_one_kernel)
def gated(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str, dtype: torch.dtype,
          group: str) -> list[Tensor]:
    return in_one_kernel(x, params, ws, biases, fmt, dtype, group)


def in_one_kernel(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                  dtype: torch.dtype, group: str, wait: bool = True) -> list[Tensor]:
    """The op; `wait=False` leaves out the wait for the peers, to show that tests notice."""
    space = workspace.of(group)
    x = [gemm.rows_apart(t) for t in x]
    rows = x[0].shape[0]
    out = _outputs(x, ws, fmt, dtype, rows * space.world_size)
    if rows == 0:
        return out
    weights = split_weights(ws, fmt)
    config = gemm.configure(x[0], [w[0] for w in weights], fmt, space.world_size, "gather")
    gemm.load(config)
    unit = gemm.unit(rows, device.processors(x[0].device))
    units = -(-rows // unit)
    t = prepare(space, "all_gather_matmul", nbytes(x, params, ws, biases, fmt, dtype, group), space.world_size * units)
    full = _gathered(t, x)
    for i in range(0, len(weights), gemm.MAX_WEIGHTS):
        some = slice(i, i + gemm.MAX_WEIGHTS)
        call = gemm.call(x, full[0].data_ptr(), full[-1].data_ptr(), params, weights[some], biases[some], out[some], fmt,
                         space.world_size, space.rank)
        gemm.watch(call, t)
        call.begins, call.gate, call.unit = int(i == 0), int(wait), unit
        for peer in t.ranks[1:]:
            slots = _slots(t, x, t.slot(peer), peer)
            call.rows_to[peer], call.scales_to[peer] = slots[0].data_ptr(), slots[-1].data_ptr()
            call.flags_to[peer] = t.flags(peer) + 4 * t.slot(peer) * units
        gemm.launch(config, call)
    return out


def _copy(t: Transfer, x: list[Tensor]) -> None:
    """Have copy engines push this rank's parts to the peers, and then a flag."""
    for peer in reversed(t.ranks[1:]):  # so that in every step each rank receives from one peer
        slot = t.slot(peer)
        for part, to in zip(x, _slots(t, x, slot, peer), strict=True):
            to.copy_(part, non_blocking=True)
        t.flag(peer, slot).copy_(t.epoch, non_blocking=True)


def _starts(x: list[Tensor], world: int) -> list[int]:
    starts = [0]
    for part in x[:-1]:
        starts.append(starts[-1] + align(world * part.numel() * part.element_size(), ALIGN))
    return starts


def _slots(t: Transfer, x: list[Tensor], source: int, rank: int | None = None) -> list[Tensor]:
    """The parts of `source`'s rows in `rank`'s half (None: this rank's)."""
    rank = t.space.rank if rank is None else rank
    return [t.view(rank, start + source * part.numel() * part.element_size(), tuple(part.shape), part.dtype)
            for start, part in zip(_starts(x, t.space.world_size), x, strict=True)]


def _gathered(t: Transfer, x: list[Tensor]) -> list[Tensor]:
    """The gathered parts in this rank's half."""
    world = t.space.world_size
    return [t.view(t.space.rank, start, (world * part.shape[0], *part.shape[1:]), part.dtype)
            for start, part in zip(_starts(x, world), x, strict=True)]


def _units(x: Tensor) -> Tensor:
    """A contiguous tensor as a flat one of the widest integers that divide it."""
    flat = x.view(-1).view(torch.uint8)
    return flat.view(torch.int32) if flat.numel() % 4 == 0 else flat


def _whole(units: Tensor) -> bool:
    """Whether slots of so many units follow one another at multiples of 16 bytes."""
    return units.numel() * units.element_size() % 16 == 0


