"""A group of ranks: real processes, threads that simulate them, or shapes alone.

Ops name a group by a string. `resolve` finds it among the groups made here, else among torch's process groups, so graphs
that PyTorch itself captured work too.
"""
from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import compat
from .errors import FusewireError

workspaces: dict[str, int | str] = {}
"""Group name -> the bytes that one exchange may use of the group's workspace, or why there is no workspace."""

_made: dict[str, Group] = {}
_barriers: dict[str, threading.Barrier] = {}
_releases: dict[str, list[Callable[[], None]]] = {}
_count = itertools.count()
_thread = threading.local()


@dataclass(frozen=True)
class Group:
    """world_size ranks that exchange bytes.

    rank        () -> this rank
    all_gather  (n,) uint8 -> (world_size * n,) uint8, in rank order
    all_to_all  (world_size * n,) uint8 -> the same shape; chunk i goes to rank i, chunk j of the result came from rank j
    """

    name: str
    world_size: int
    rank: Callable[[], int]
    all_gather: Callable[[Tensor], Tensor]
    all_to_all: Callable[[Tensor], Tensor]


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

    return Group(pg.group_name, pg.size(), lambda: dist.get_rank(pg), all_gather, all_to_all)


def fake_group(world_size: int, rank: int = 0) -> Group:
    """A group of which only the shapes exist: graphs can be captured and explained with it, not run."""

    def refuse(x: Tensor) -> Tensor:
        raise FusewireError(f"a fake group of {world_size} ranks cannot communicate: it exists to explain a model, not to run it")

    return _register(Group(f"fake{next(_count)}", world_size, lambda: rank, refuse, refuse))


def loopback_group(world_size: int, rank: int = 0) -> Group:
    """One process that plays all ranks: whatever it sends, each peer is taken to have sent the same to it. It times kernels
    and protocols without the wire."""

    def all_to_all(x: Tensor) -> Tensor:
        return x.chunk(world_size)[rank].repeat(world_size)

    return _register(Group(f"loopback{next(_count)}", world_size, lambda: rank, lambda x: x.repeat(world_size), all_to_all))


def kind(name: str) -> str:
    """"fake", "loopback" or "simulated" for a group that was made here, "" for one of processes."""
    return name.rstrip("0123456789") if name in _made else ""


def simulated_group(world_size: int, timeout_s: float = 60.0) -> Group:
    """`world_size` ranks that are threads of this process; run their programs with `simulate`."""
    slots: list[Tensor] = [torch.empty(0)] * world_size
    barrier = threading.Barrier(world_size, timeout=timeout_s)

    def exchange(x: Tensor) -> list[Tensor]:
        slots[_thread.rank] = x
        barrier.wait()
        seen = list(slots)
        barrier.wait()  # nobody overwrites a slot that another rank has yet to read
        return seen

    def all_to_all(x: Tensor) -> Tensor:
        return torch.cat([y.chunk(world_size)[_thread.rank] for y in exchange(x)])

    group = Group(f"simulated{next(_count)}", world_size, lambda: _thread.rank, lambda x: torch.cat(exchange(x)), all_to_all)
    _barriers[group.name] = barrier
    return _register(group)


def simulate(group: Group, program: Callable[[int], object]) -> list:
    """Run `program(rank)` on every rank of a simulated group at once; the results in rank order.

    The first error of any rank is raised after all threads ended; ranks that wait for each other in different
    collectives are a FusewireError after the group's time limit.
    """
    results: list = [None] * group.world_size
    errors: list[BaseException] = []
    barrier = _barriers[group.name]
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
            barrier.abort()

    threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(group.world_size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
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
    _made.pop(group.name, None)
    _barriers.pop(group.name, None)


def _register(group: Group) -> Group:
    _made[group.name] = group
    return group
