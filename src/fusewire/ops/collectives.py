"""Primitive collectives: the only ops that put bytes on the wire. They cut and join dim 0, the token dim.

`wire` is what one rank sends, counted as rings do: (world_size - 1) / world_size of the whole for an all_gather or a
reduce_scatter. The references exchange exactly those bytes on any backend that moves uint8 (gloo refuses FP8 tensors):
a reduction is an all_to_all of the input's dtype and a float32 sum in rank order, so every rank gets the same bits.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..group import resolve
from ..op import op


def world_size(group: str) -> int:
    return resolve(group).world_size


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def _all_gather_flat(x: list[Tensor], group: str) -> list[Tensor]:
    """Every tensor as (world_size, *shape), through one message."""
    g = resolve(group)
    sizes = [t.numel() * t.element_size() for t in x]
    if sum(sizes) == 0:
        return [t.new_empty((g.world_size, *t.shape)) for t in x]
    wire = g.all_gather(torch.cat([_bytes(t) for t in x])).view(g.world_size, -1)
    # clone: a view as a wider dtype needs an aligned start
    return [w.clone().view(-1).view(t.dtype).view(g.world_size, *t.shape) for w, t in zip(wire.split(sizes, 1), x, strict=True)]


def _sum_of_chunks(x: Tensor, group: str) -> Tensor:
    """x: (world_size * n,). This rank's (n,) chunk, summed over the ranks in rank order, in float32 at least."""
    g = resolve(group)
    if x.numel() == 0:
        return x.clone()
    chunks = g.all_to_all(_bytes(x)).view(x.dtype).view(g.world_size, -1)
    total = chunks[0].to(torch.promote_types(x.dtype, torch.float32))
    for chunk in chunks[1:]:
        total = total + chunk
    return total.to(x.dtype)


def nbytes(x: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in x)


def _gathered(x: list[Tensor], group: str) -> list[Tensor]:
    return [t.new_empty((t.shape[0] * world_size(group), *t.shape[1:])) for t in x]


def _sharded(x: Tensor, group: str) -> Tensor:
    return x.new_empty((x.shape[0] // world_size(group), *x.shape[1:]))


def _check_divides(x: Tensor, group: str, what: str) -> None:
    if x.shape[0] % (w := world_size(group)):
        raise InputError(f"{what}: {x.shape[0]} tokens do not divide over {w} ranks; pad them or use the replicated plan")


@op(fake=_gathered, wire=lambda x, group: (world_size(group) - 1) * nbytes(x))
def all_gather(x: list[Tensor], group: str) -> list[Tensor]:
    """Each (n, ...) -> (world_size * n, ...), the ranks' tensors in rank order. All tensors travel in one message."""
    return [t.flatten(0, 1) for t in _all_gather_flat(x, group)]


@op(rows=("x",), fake=_sharded, wire=lambda x, group: (world_size(group) - 1) * nbytes([x]) // world_size(group))
def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """(world_size * n, ...) -> (n, ...): the sum over ranks of this rank's rows, float32 in rank order, then rounded."""
    _check_divides(x, group, "reduce_scatter")
    return _sum_of_chunks(x.reshape(-1), group).view(_sharded(x, group).shape)


@op(fake=lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format),
    wire=lambda x, group: 2 * (world_size(group) - 1) * -(-x.numel() // world_size(group)) * x.element_size())
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Any shape -> the same: the sum over ranks, the same bits as reduce_scatter then all_gather, on every rank."""
    n = x.numel()
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -n % world_size(group)))
    return _all_gather_flat([_sum_of_chunks(flat, group)], group)[0].reshape(-1)[:n].view(x.shape)


@op(fake=lambda x, group: torch.empty_like(x), wire=lambda x, group: (world_size(group) - 1) * nbytes([x]))
def all_reduce_max(x: Tensor, group: str) -> Tensor:
    """Elementwise maximum over ranks, NaN wins: for the few bytes of an amax."""
    return _all_gather_flat([x], group)[0].amax(0)


@op(fake=_sharded)
def shard(x: Tensor, group: str) -> Tensor:
    """This rank's rows of a tensor that every rank holds: no wire. The rank is looked up when it runs, so graphs of
    different ranks are the same graph."""
    _check_divides(x, group, "shard")
    return x.chunk(world_size(group))[resolve(group).rank()].clone() if x.shape[0] else x.clone()
