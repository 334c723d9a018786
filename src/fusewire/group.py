"""A group of ranks: real processes, threads that simulate them, or shapes alone.

Ops name a group by a string. `resolve` finds it among the groups made here, else among torch's process groups, so graphs
that PyTorch itself captured work too.
"""
from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import compat
from .errors import FusewireError, InputError

workspaces: dict[str, int | str] = {}
"""Group name -> the bytes that one exchange may use of the group's workspace, or why there is no workspace."""

_made: dict[str, Group] = {}
_barriers: dict[str, list[threading.Barrier]] = {}
_grids: dict[tuple[str, int], list[Group]] = {}
_making = threading.Lock()
_releases: dict[str, list[Callable[[], None]]] = {}
_count = itertools.count()


class _Thread(threading.local):
    rank = 0  # outside of `simulate`, where only shapes are asked for


_thread = _Thread()


def _cannot_exchange(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    raise FusewireError("this group has no exchange of unequal sizes; give one of processes, or one that is made here")


@dataclass(frozen=True)
class Group:
    """world_size ranks that exchange bytes.

    rank        () -> this rank
    all_gather  (n,) uint8 -> (world_size * n,) uint8, in rank order
    all_to_all  (world_size * n,) uint8 -> the same shape; chunk i goes to rank i, chunk j of the result came from rank j
    exchange    (x uint8, sent, received): the first sent[0] bytes of x go to rank 0, the next sent[1] to rank 1, and so on;
                the result has received[j] bytes from rank j, in rank order. Every rank knows both lists, zeros included.
    """

    name: str
    world_size: int
    rank: Callable[[], int]
    all_gather: Callable[[Tensor], Tensor]
    all_to_all: Callable[[Tensor], Tensor]
    exchange: Callable[[Tensor, list[int], list[int]], Tensor] = _cannot_exchange


def resolve(name: str) -> Group:
    """The group called `name`."""
    return _made.get(name) or of_process_group(compat.process_group(name))


def of_process_group(pg: dist.ProcessGroup) -> Group:
    """A torch process group (gloo, nccl) seen as a Group. Gloo moves what lies on a CUDA device through the CPU."""

    def here(x: Tensor) -> Tensor:
        return x.cpu() if x.is_cuda and "cuda:nccl" not in dist.get_backend_config(pg) else x

    def all_gather(x: Tensor) -> Tensor:
        mine = here(x)
        out = mine.new_empty(pg.size() * mine.numel())
        compat.all_gather_into(out, mine, pg)
        return out.to(x.device)

    def all_to_all(x: Tensor) -> Tensor:
        mine = here(x)
        out = torch.empty_like(mine)
        dist.all_to_all_single(out, mine, group=pg)
        return out.to(x.device)

    def exchange(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        mine = here(x)
        out = mine.new_empty(sum(received))
        dist.all_to_all_single(out, mine, received, sent, group=pg)
        return out.to(x.device)

    return Group(pg.group_name, pg.size(), lambda: dist.get_rank(pg), all_gather, all_to_all, exchange)


def fake_group(world_size: int, rank: int = 0) -> Group:
    """A group of which only the shapes exist: graphs can be captured and explained with it, not run."""

    def refuse(*_: object) -> Tensor:
        raise FusewireError(f"a fake group of {world_size} ranks cannot communicate: it exists to explain a model, not to run it")

    return _register(Group(f"fake{next(_count)}", world_size, lambda: rank, refuse, refuse, refuse))


def loopback_group(world_size: int, rank: int = 0) -> Group:
    """One process that plays all ranks: whatever it sends, each peer is taken to have sent the same to it. It times kernels
    and protocols without the wire."""

    def all_to_all(x: Tensor) -> Tensor:
        return x.chunk(world_size)[rank].repeat(world_size)

    def exchange(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        mine = x.split(sent)[rank]
        return torch.cat([mine[:n] if n <= mine.numel() else mine.new_zeros(n) for n in received])

    name = f"loopback{next(_count)}"
    return _register(Group(name, world_size, lambda: rank, lambda x: x.repeat(world_size), all_to_all, exchange))


def kind(name: str) -> str:
    """"fake", "loopback" or "simulated" for a group that was made here, "" for one of processes."""
    return name.rstrip("0123456789") if name in _made else ""


def simulated_group(world_size: int, timeout_s: float = 60.0) -> Group:
    """`world_size` ranks that are threads of this process; run their programs with `simulate`."""
    return _simulated(list(range(world_size)), timeout_s)


def _simulated(members: list[int], timeout_s: float) -> Group:
    """A group of some of the threads that `simulate` starts, by their numbers there."""
    world_size, at = len(members), {m: i for i, m in enumerate(members)}
    slots: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=timeout_s)

    def rank() -> int:
        return at[_thread.rank]

    def swap(x: Any) -> list[Any]:
        slots[rank()] = x
        barrier.wait()
        seen = list(slots)
        barrier.wait()  # nobody overwrites a slot that another rank has yet to read
        return seen

    def all_to_all(x: Tensor) -> Tensor:
        return torch.cat([y.chunk(world_size)[rank()] for y in swap(x)])

    def exchange(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        pieces = [y[rank()] for y in swap(x.split(sent))]
        if [p.numel() for p in pieces] != received:
            raise FusewireError(f"rank {rank()} expects {received} bytes and is sent {[p.numel() for p in pieces]}")
        return torch.cat(pieces)

    group = Group(f"simulated{next(_count)}", world_size, rank, lambda x: torch.cat(swap(x)), all_to_all, exchange)
    _barriers[group.name] = [barrier]
    return _register(group)


def grid(group: Group, columns: int) -> tuple[Group, Group]:
    """The ranks as rows of `columns` consecutive ones: (the group of this rank's column, the group of its row).

    Every rank of the group calls it, in the same order as other collective set-up. InputError if the ranks do not divide.
    """
    n = group.world_size
    if n % columns:
        raise InputError(f"{n} ranks do not divide into rows of {columns}; use a number of ranks that is a multiple of it")
    down = [list(range(c, n, columns)) for c in range(columns)]
    across = [list(range(r * columns, (r + 1) * columns)) for r in range(n // columns)]
    with _making:
        if group.name not in _made:
            over, mine = dist.get_process_group_ranks(compat.process_group(group.name)), group.rank()
            column, row = ([over[m] for m in next(members for members in way if mine in members)] for way in (down, across))
            made = [dist.new_group(ranks, use_local_synchronization=True) for ranks in (column, row)]
            return of_process_group(made[0]), of_process_group(made[1])
        if (group.name, columns) not in _grids:
            _grids[group.name, columns] = [_part(group, members) for members in (*down, *across)]
        groups, mine = _grids[group.name, columns], group.rank()
    return groups[mine % columns], groups[columns + mine // columns]


def _part(group: Group, members: list[int]) -> Group:
    """Some ranks of a group that was made here, as a group of the same kind."""
    if group.name.startswith("simulated"):
        made = _simulated(members, 60.0)
        _barriers[group.name] += _barriers[made.name]  # broken together, when a rank fails
        return made
    make = fake_group if group.name.startswith("fake") else loopback_group
    return make(len(members), members.index(group.rank()) if group.rank() in members else 0)


def simulate(group: Group, program: Callable[[int], object]) -> list:
    """Run `program(rank)` on every rank of a simulated group at once; the results in rank order.

    The first error of any rank is raised after all threads ended; ranks that wait for each other in different
    collectives are a FusewireError after the group's time limit.
    """
    results: list = [None] * group.world_size
    errors: list[BaseException] = []
    for barrier in _barriers[group.name]:
        barrier.reset()

    def work(rank: int) -> None:
        _thread.rank = rank
        try:
            with torch.no_grad():
                results[rank] = program(rank)
        except threading.BrokenBarrierError:
            errors.append(FusewireError(f"rank {rank} of a simulated group waited for ranks that did not come to its collective"))
        except BaseException as e:
            errors.insert(0, e)
            for barrier in _barriers[group.name]:
                barrier.abort()

    threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(group.world_size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    # Python lets go of a thread before it has ended, and a process that forks meanwhile inherits the locks that MKL takes then.
    while any(os.path.exists(f"/proc/self/task/{t.native_id}") for t in threads):
        time.sleep(1e-4)
    if errors:
        raise errors[0]
    return results


def on_close(name: str, release: Callable[[], None]) -> None:
    """Have `release` called when the group called `name` is closed: whoever keeps memory for a group frees it there."""
    _releases.setdefault(name, []).append(release)


def close(group: Group) -> None:
    """Free what is kept for a group; one that was made here is forgotten. Close a process group's before it is destroyed."""
    for release in _releases.pop(group.name, []):
        release()
    workspaces.pop(group.name, None)
    for key in [k for k in _grids if k[0] == group.name]:
        for part in _grids.pop(key):
            close(part)
    _made.pop(group.name, None)
    _barriers.pop(group.name, None)


def _register(group: Group) -> Group:
    _made[group.name] = group
    return group
