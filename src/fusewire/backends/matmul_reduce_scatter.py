"""matmul_reduce_scatter over a workspace: small batches multiply and then push, large ones do both at once.

push         the matmul op's own backend, then one small kernel stores partial sums to their owners and adds: any format; alone it
             is a backend of reduce_scatter
copy_engine  the peers' rows are multiplied first, and pushed by copy engines while the rest is multiplied: any format with
             linear scales
epilogue     one kernel multiplies, keeps the peers' tiles until they fetch them, and adds what it fetches to its own: bf16, FP8
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..ops.collectives import reduce_scatter, world_size
from ..ops.dense import matmul
from ..ops.fused import matmul_reduce_scatter
from . import aten, transfer, words, workspace
from .cuda import gemm
from .transfer import join, on_side, prepare, why_not

BLOCK = 2048  # elements that one of their programs takes at once
ADDED = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 4  # blocks that are sent for one fence, if a program has more


def nbytes(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
           group: str) -> int:
    """Bytes of the workspace: each source's partial sums of this rank's rows."""
    return x[0].shape[0] * w[0].shape[0] * dtype.itemsize


def tile_bytes(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
               group: str) -> int:
    """Bytes of the workspace where tiles wait: those for each rank."""
    world = world_size(group)
    return world * gemm.most_tile_bytes(x[0].shape[0] // world, w[0].shape[0])


def _why_not(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
             group: str) -> str | None:
    return why_not(x[0].device, group)


def _why_not_by_shards(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
                       group: str) -> str | None:
    if formats.get(fmt).layout != "linear":
        return f"it multiplies one rank's rows at a time, and the scales of {fmt} are those of all rows"
    return _why_not(x, params, w, bias, fmt, dtype, group)


def _why_not_epilogue(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
                      group: str) -> str | None:
    return (_why_not(x, params, w, bias, fmt, dtype, group) or gemm.why_not_world(world_size(group))
            or gemm.why_not(x, w, bias, fmt, dtype))


def _rows(x: list[Tensor], world: int) -> int:
    if x[0].shape[0] % world:
        raise InputError(f"matmul_reduce_scatter: {x[0].shape[0]} tokens do not divide over {world} ranks; pad them or use the "
                         "replicated plan")
    return x[0].shape[0] // world


@matmul_reduce_scatter.backend("push", supports=_why_not, nbytes=nbytes, seconds=transfer.one_after_the_other)
def push(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
         group: str) -> Tensor:
    return pushed(matmul(x, params, w, bias, fmt, dtype), group)


def pushed(y: Tensor, group: str, op: str = "matmul_reduce_scatter", counts: list[int] | None = None, wait: bool = True) -> Tensor:
    """reduce_scatter of y, for `op`; by `counts`, if given, as reduce_scatter_v. `wait=False` leaves out the wait for the peers, to
    show that tests notice."""
    from .triton import transfer as kernels

    space = workspace.of(group)
    world, rank = space.world_size, space.rank
    if counts is None and y.numel() and _rows([y], world) and (out := words.reduce(y, space, op, wait)) is not None:
        return out
    counts = counts or [_rows([y], world)] * world
    out = y.new_empty((counts[rank], *y.shape[1:]))
    if (most := max(counts) * (row := y[:1].numel())) == 0:
        return out
    programs = min(transfer.most_programs(space), -(-most // BLOCK))
    blocks = -(-most // (BLOCK * programs))  # of a program
    chunk = CHUNK if blocks > 1 else 1
    chunks = -(-blocks // chunk)
    t = prepare(space, op, world * most * y.element_size(), programs * world * chunks)
    starts, sizes = (tuple(n * row for n in values[rank:] + values[:rank])
                     for values in ([sum(counts[:r]) for r in range(world)], counts))
    transfer.start(
        kernels.push_and_add, programs, t, y, out, starts, sizes, chunks, WORLD=world, LOOPBACK=space.loopback, BLOCK=BLOCK,
        CHUNK=chunk, ALIGNED=all(n * y.element_size() % 16 == 0 for n in sizes), WAIT=wait)
    return out


def _why_not_add(x: Tensor, group: str) -> str | None:
    return why_not(x.device, group) if x.dtype in ADDED else f"it adds 16-bit floats and float32, not {x.dtype}"


@reduce_scatter.backend("push", supports=_why_not_add, nbytes=lambda x, group: x.numel() * x.element_size(),
                        seconds=transfer.one_after_the_other)
def push_alone(x: Tensor, group: str) -> Tensor:
    """Where no matmul makes what is added: an embedding."""
    return pushed(x.contiguous(), group, reduce_scatter.name)


@matmul_reduce_scatter.backend("copy_engine", supports=_why_not_by_shards, nbytes=nbytes, seconds=transfer.by_copy_engines)
def copy_engine(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
                group: str) -> Tensor:
    from .triton import transfer as kernels

    space = workspace.of(group)
    rows, n = _rows(x, space.world_size), w[0].shape[0]
    out = x[0].new_empty((rows, n), dtype=dtype)
    if out.numel() == 0:
        return out
    t = prepare(space, "matmul_reduce_scatter", nbytes(x, params, w, bias, fmt, dtype, group), space.world_size)
    y = x[0].new_empty((space.world_size * rows, n), dtype=dtype)
    transfer.start(kernels.begin, 1, t, WORLD=space.world_size, LOOPBACK=space.loopback, num_warps=1)
    for owner in (*t.ranks[1:], space.rank):
        mine = slice(owner * rows, (owner + 1) * rows)
        aten.matmul_into(y[mine], [part[mine] for part in x], params, w, bias, fmt)
        if owner != space.rank:
            slot = t.slot(owner)
            with on_side(space):
                t.view(owner, slot * rows * n * dtype.itemsize, (rows, n), dtype).copy_(y[mine], non_blocking=True)
                t.flag(owner, slot).copy_(t.epoch, non_blocking=True)
    if space.shared_device or space.loopback:  # its copies may need multiprocessors, which the next kernel would hold
        join(space)
    programs = min(transfer.most_programs(space), -(-out.numel() // BLOCK))
    transfer.start(
        kernels.add, programs, t, y, out, out.numel(), WORLD=space.world_size, BLOCK=BLOCK,
        ALIGNED=out.numel() * dtype.itemsize % 16 == 0)
    join(space)
    return out


@matmul_reduce_scatter.backend("epilogue", supports=_why_not_epilogue, nbytes=tile_bytes, seconds=transfer.in_one_kernel)
def epilogue(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype,
             group: str) -> Tensor:
    space = workspace.of(group)
    rows, n = _rows(x, space.world_size), w[0].shape[0]
    out = x[0].new_empty((rows, n), dtype=dtype)
    if out.numel() == 0:
        return out
    x = [gemm.rows_apart(part) for part in x]
    config = gemm.configure(x[0], [w[0]], fmt, space.world_size, "reduce")
    gemm.load(config)
    flags = gemm.TILE_FLAGS * gemm.tiles(config, rows, n)  # of each source
    bytes_each = gemm.most_tile_bytes(rows, n)
    t = prepare(space, "matmul_reduce_scatter", bytes_each * space.world_size, flags * space.world_size)
    call = gemm.call(x, x[0].data_ptr(), x[-1].data_ptr(), params, [w], [bias], [out], fmt, space.world_size, space.rank)
    call.m, call.ahead = rows, gemm.ahead(config, x[0].shape[1] * x[0].element_size())
    for peer in range(space.world_size):  # each keeps what it made, and the owner fetches it
        call.sent[peer] = t.data(space.rank) + peer * bytes_each
        call.partial[peer] = t.data(peer) + t.slot(peer) * bytes_each
        call.flags_to[peer] = t.flags(peer) + 4 * flags * t.slot(peer)
    gemm.watch(call, t)
    gemm.launch(config, call)
    return out
