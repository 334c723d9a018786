"""Which part of a whole tensor a rank holds: pure arithmetic, shared by the in-memory surgery and the checkpoint reader."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class Slice(NamedTuple):
    """Elements [start, stop) of one dimension, then zeros up to `size` elements."""

    start: int
    stop: int
    size: int

    def times(self, n: int) -> Slice:
        """The same slice of a dimension where every element became n."""
        return Slice(self.start * n, self.stop * n, self.size * n)


class Heads(NamedTuple):
    """One rank's attention heads: query head i uses key/value head i // (q.size // kv.size), as in the whole model."""

    q: Slice
    kv: Slice


def whole(n: int) -> Slice:
    return Slice(0, n, n)


def even(n: int, rank: int, world_size: int) -> Slice:
    """n elements in world_size equal runs; the last ones are padded when n does not divide."""
    size = -(-n // world_size)
    return Slice(min(rank * size, n), min((rank + 1) * size, n), size)


def heads(n_q: int, n_kv: int, rank: int, world_size: int) -> Heads:
    """The heads of `rank`: its query heads are one run of the original ones, then padding, and so are its key/value heads.

    With as many key/value heads as ranks or more, they are padded to a multiple of world_size and every rank takes the same
    number, with all their query heads. With fewer, they are padded to a divisor of world_size, each is held by several
    ranks, and its query heads are split over those. InputError if a rank would have no query head.
    """
    if n_q < 1 or n_kv < 1 or n_q % n_kv:
        raise InputError(f"{n_q} query heads do not divide over {n_kv} key/value heads; the model's config is broken")
    if world_size > n_q:
        raise InputError(f"{world_size} ranks share {n_q} query heads, so a rank would have none; use at most {n_q} ranks")
    per_kv = n_q // n_kv
    if n_kv >= world_size:
        kv = even(n_kv, rank, world_size)
        return Heads(kv.times(per_kv), kv)
    padded = next(d for d in range(n_kv, world_size + 1) if world_size % d == 0)
    copies = world_size // padded
    head, part = divmod(rank, copies)
    if head >= n_kv:  # a padded key/value head
        return Heads(Slice(n_q, n_q, -(-per_kv // copies)), Slice(n_kv, n_kv, 1))
    q = even(per_kv, part, copies)
    return Heads(Slice(head * per_kv + q.start, head * per_kv + q.stop, q.size), Slice(head, head + 1, 1))


def cut(x: Tensor, *dims: Slice) -> Tensor:
    """x with one Slice for each leading dim: a fresh contiguous tensor, zero where it is padded."""
    out = x.new_zeros([s.size for s in dims] + list(x.shape[len(dims):]))
    out[tuple(slice(0, s.stop - s.start) for s in dims)] = x[tuple(slice(s.start, s.stop) for s in dims)]
    return out


def has_data(x: Tensor) -> bool:
    """False for meta and fake tensors: only their shapes exist."""
    return not x.is_meta and type(x.detach()) is torch.Tensor


def blocks(s: Slice, block: int) -> Slice | None:
    """The slice of a scale dimension, where one element stands for `block` elements (0: for all) of the dimension that `s` cuts.

    None if `s` starts inside a block and goes on past its end: then no scale fits a local block.
    """
    if block == 1:
        return s
    if block == 0:
        return whole(1)
    size = -(-s.size // block)
    if s.start == s.stop:
        return Slice(0, 0, size)
    first, last = s.start // block, (s.stop - 1) // block
    return Slice(first, last + 1, size) if s.start % block == 0 or first == last else None
