"""The memory of a group that kernels of every rank write to: allocated once, before the first run, never grown.

How kernels use it (an *exchange* is one launch of one op, the same on all ranks, with the same shapes):

*   Every exchange has an epoch, the same number on every rank, kept in device memory so that a CUDA graph replays with new
    ones. It reads and writes only the half `epoch % 2` of data and flags, on its own rank and on the others.
*   A flag is an int32 that holds the epoch of the exchange that last set it. To push: store the data to the peer, then store the
    epoch to its flag with release semantics at system scope. To receive: load the flag with acquire semantics at system
    scope until it *equals* the epoch, then read the data, which now lies in local memory.
*   In every exchange every rank waits for something from every peer. That makes two halves enough: a rank that starts epoch
    e + 2 has finished e + 1, so every peer has started e + 1, and so (kernels of one stream run one after the other) has
    finished e and reads nothing of that half any more.
*   Hence all exchanges of a group run on one stream, in the same order on all ranks, and a rank replays a graph as often as its
    peers do. Kernels that start before their predecessor ended (programmatic dependent launch) would break this.
*   A wait is bounded: after `limit_s` the kernel writes what it waited for to `report`, in host memory, where a thread finds
    it, prints one sentence and ends the process. A rank that ends takes its peers along, by their own limits at the latest.

Copy engines cannot choose a half by an epoch that they do not know: a CUDA graph holds their addresses. What they take part in
is a *transfer* (see `transfer.py`), in a region of its own, whose half is chosen by the host when the op is called or captured:

*   A transfer has an epoch of the same sequence, so the rule above holds for it too: every rank waits for every peer in it.
*   A rank that begins one says so to its peers (`entered`: its epoch), which means that it has finished all before. Nobody writes
    to a half of a peer before that peer has entered a later epoch than that of the last transfer in this half. As a rule the
    halves take turns, and then this is known from the transfer in between.

A flag costs a fence: its release waits until the peer has all that was stored before. Rows of most exchanges come in *words*
instead, in a region of their own, which nothing else uses:

*   A word is 32 bits of data that say themselves that they have come: as long as it holds 0xFFFFFFFF, nothing has. No such word is
    ever sent; what data could be that is sent as another NaN. To receive: load the words, relaxed at system scope, until none of
    them holds it. Each word is looked at, so nothing is asked of the order in which they arrive.
*   The region has three thirds, which take turns: an exchange pushes to and reads from one, and makes the one before it hold
    0xFFFFFFFF again, as far as it was used; `state` says which, and how far, so that a CUDA graph replays with new ones.
*   That third is not written by a peer before it has been cleared: a peer uses it in the next exchange but one, which it begins
    when it has finished the next one, for which this rank has pushed to it; and this rank pushed after the exchange that cleared
    had ended (kernels of one stream). Nor is it cleared too early: the exchange that read it has ended on this rank.

Flags, epochs and everything else that is waited for are compared as integers.
"""
from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .. import compat, consensus
from .. import group as groups
from ..errors import FusewireError, InputError, MismatchError
from .device import processors

BYTES_PER_FLAG = 32  # of a half: more flags than any op with a flag for each row or tile needs
WORD_BYTES = 128 << 20  # of a third, at most: 4096 rows of 8192 in 16 bits from each of 2 ranks
REPORT_WORDS = 8
EXIT_CODE = 70  # of a process that a bounded wait ended
ALIGN = 256  # bytes, of what lies behind one another
_POLL_S = 0.02

_open: dict[str, Workspace] = {}
_ops: list[str] = []


@dataclass(eq=False)
class Workspace:
    """One group's memory, as this rank sees it.

    group       the group's name
    rank, world_size
    nbytes      of data in each half of each region, for exchanges and for transfers
    flag_count  int32 flags in each half of each region
    word_bytes  of each third of the words
    loopback    one process plays all ranks: every address below is this rank's own, and a kernel that pushes to peer p writes
                where p's own push would have arrived
    from_here   addresses, each in the order rank, rank + 1, ..., for kernels that take them as arguments: of each rank's data,
                half 0 then half 1 after `nbytes`; of its flags, likewise (4 * flag_count bytes a half); of its words
    memories    each rank's, uint8: flags of exchanges and of transfers, `entered`, data of exchanges and of transfers, words;
                an empty list once it is closed
    last        int32 (2, 2) on the device, for each half of the transfers: its last epoch (0: none), and that for copy engines
    side        the stream on which copy engines work
    turn        the half that the next transfer takes
    state       int64 (2,) on the device. epoch << 32 | how many programs of the running kernel have read it: one atomic add
                tells a program both, and the last of them to come knows that it may set the next epoch. And third << 32 | n: the
                third of the words whose turn it is, and how many 16 bytes of each rank's place in it the exchange before used.
    report      int64 (REPORT_WORDS,) in pinned host memory: [op number, epoch, row, flag seen, peer], see `sentence`
    limit_s     how long a kernel may wait
    """

    group: str
    rank: int
    world_size: int
    nbytes: int
    flag_count: int
    word_bytes: int
    loopback: bool
    device: torch.device
    limit_s: float
    from_here: tuple[tuple[int, ...], ...]
    state: Tensor
    report: Tensor
    process_group: dist.ProcessGroup | None
    memories: list[Tensor]
    last: Tensor
    side: torch.cuda.Stream
    shared_device: bool
    turn: int = 0

    @property
    def memory(self) -> Tensor:
        """This rank's own."""
        return self.memories[self.rank]

    @property
    def limit_ns(self) -> int:
        return int(self.limit_s * 1e9)

    def need(self, op: str, nbytes: int, flag_count: int) -> None:
        """FusewireError unless `op` can have so many bytes of data and flags in a half."""
        nbytes = max(nbytes, flag_count * BYTES_PER_FLAG)
        if nbytes > self.nbytes:
            raise FusewireError(
                f"{op}: it needs {nbytes} bytes of the workspace of group {self.group!r}, which has {self.nbytes}; open it with "
                f"workspace.open(group, {nbytes}) before the first run, or give fewer tokens at once"
            )

    def epoch(self) -> int:
        """The epoch of the next exchange; waits for the device."""
        return int(self.state[0].item()) >> 32


def open(group: str, nbytes: int, device: torch.device | str | None = None, limit_s: float | None = None) -> Workspace:
    """Make the workspace of a group; every rank calls this with the same arguments before the first run.

    group    of processes with one CUDA device each (or, with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, sharing one), or a
             loopback group
    nbytes   of data in each of the two halves; an op's error names what it needs
    device   this rank's CUDA device; None: the current one
    limit_s  how long a kernel waits for a peer before it ends the process; None: FUSEWIRE_WAIT_LIMIT_S, or 30 seconds

    A workspace that is already open and large enough is returned as it is. It is freed by `group.close`, or by `close` here.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise FusewireError(f"the workspace of group {group!r} cannot be made while a CUDA graph is captured; "
                            "run the model once, or open the workspace, before the capture")
    if nbytes < 1:
        raise InputError(f"a workspace of {nbytes} bytes holds nothing; give the bytes of one exchange")
    if (old := find(group)) is not None:
        if nbytes > old.nbytes:
            raise FusewireError(f"the workspace of group {group!r} has {old.nbytes} bytes and cannot grow to {nbytes}, as captured "
                                "graphs hold its addresses; close it first, or open it with the larger size at once")
        return old
    g = groups.resolve(group)
    made_here = group in groups._made
    loopback = groups.kind(group) == "loopback"
    if made_here and not loopback:
        raise InputError(f"the group {group!r} is not one of processes, so its ranks cannot share device memory; use a process "
                         "group or a loopback group")
    if not torch.cuda.is_available():
        raise FusewireError(f"the workspace of group {group!r} needs a CUDA device, and there is none here")
    dev = torch.device(device or "cuda")
    if dev.index is None:
        dev = torch.device("cuda", torch.cuda.current_device())
    limit_s = limit_s or float(os.environ.get("FUSEWIRE_WAIT_LIMIT_S", "30"))
    nbytes = align(nbytes, ALIGN)
    flag_count = -(-nbytes // BYTES_PER_FLAG // 64) * 64
    flags_end = regions(nbytes, flag_count)[-2]
    words_at = flags_end + 4 * nbytes
    word_bytes = min(nbytes, WORD_BYTES)
    total = words_at + 3 * word_bytes
    # kernels have as many programs on every rank
    consensus.agree(g, "workspace", {"bytes": nbytes, "wait limit": limit_s, "multiprocessors": processors(dev)})
    with torch.cuda.device(dev):
        pg: dist.ProcessGroup | None = None
        if loopback:
            memories = [torch.empty(total, dtype=torch.uint8, device=dev)] * g.world_size
        else:
            pg = compat.process_group(group)
            memories = compat.symmetric_memory(total, group, dev)
        rank = g.rank()
        memories[rank][:flags_end].zero_()
        memories[rank][words_at:].fill_(0xFF)
        bases = [m.data_ptr() for m in memories[rank:] + memories[:rank]]
        workspace = Workspace(
            group, rank, g.world_size, nbytes, flag_count, word_bytes, loopback, dev, limit_s,
            from_here=tuple(tuple(b + start for b in bases) for start in (flags_end, 0, words_at)),
            state=torch.tensor([1 << 32, 0], device=dev),  # flags start at 0, epochs at 1
            report=torch.zeros(REPORT_WORDS, dtype=torch.int64).pin_memory(), process_group=pg,
            memories=memories, last=torch.zeros(2, 2, dtype=torch.int32, device=dev), side=torch.cuda.Stream(dev),
            shared_device=not loopback and pg is not None and devices_shared(pg, dev),
        )
        torch.cuda.synchronize(dev)
    consensus.agree(g, "workspace is zeroed", {})  # nobody pushes to a rank whose flags and words are not set yet
    _open[group] = workspace
    groups.workspaces[group] = nbytes
    groups.on_close(group, lambda: close(group))
    threading.Thread(target=_watch, args=(workspace,), daemon=True, name=f"fusewire-watch-{group}").start()
    return workspace


def try_open(group: str, nbytes: int, device: torch.device) -> None:
    """`open` for a group that can do without: if any rank fails, no rank has a workspace, and `group.workspaces` says why.

    Of a fake group, which no kernel will ever use, it is taken to be there.
    """
    if groups.kind(group) == "fake":
        groups.workspaces[group] = nbytes
        return
    why = ""
    try:
        open(group, nbytes, device)
    except (FusewireError, RuntimeError) as e:  # torch's, of symmetric memory
        why = str(e).splitlines()[0]
    try:  # a rank that failed between the meetings of `open` is waited for there first
        consensus.agree(groups.resolve(group), "opening it", {"why not": why}, timeout_s=150.0)
    except MismatchError as e:
        why = why or str(e).partition(";")[0]
    if why:
        close(group)
        groups.workspaces[group] = f"no workspace: {why}"


def align(nbytes: int, to: int = 16) -> int:
    """The next multiple of `to`."""
    return -(-nbytes // to) * to


def regions(nbytes: int, flag_count: int) -> tuple[int, int, int, int, int]:
    """Where in the memory lie: flags of exchanges, flags of transfers, `entered`, data of exchanges, data of transfers."""
    flags = 2 * 4 * flag_count
    return 0, flags, 2 * flags, 2 * flags + ALIGN, 2 * flags + ALIGN + 2 * nbytes


def devices_shared(pg: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether some ranks of the group run on the same device."""
    seen: list[str] = [""] * pg.size()
    dist.all_gather_object(seen, str(torch.cuda.get_device_properties(device).uuid), group=pg)
    return len(set(seen)) < len(seen)


def find(group: str) -> Workspace | None:
    """The open workspace of a group; None if there is none, or if it belonged to a process group that is gone."""
    workspace = _open.get(group)
    if workspace is not None and workspace.process_group is not None:
        try:
            same = compat.process_group(group) is workspace.process_group
        except (RuntimeError, ValueError, LookupError):  # destroyed
            same = False
        if not same:
            close(group)
            return None
    return workspace


def of(group: str) -> Workspace:
    """The open workspace of a group, or a FusewireError that says how to get one."""
    if (workspace := find(group)) is None:
        when = " before the capture" if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing() else ""
        raise FusewireError(f"the group {group!r} has no workspace; call workspace.open(group, nbytes) on every rank{when}")
    return workspace


def close(group: str) -> None:
    """Free a group's workspace, once this rank's kernels are done with it. Graphs that were captured with it are dead."""
    if (workspace := _open.pop(group, None)) is not None:
        groups.workspaces.pop(group, None)
        torch.cuda.synchronize(workspace.device)
        workspace.memories = []


def op_number(name: str) -> int:
    """The number by which a kernel names its op in a report."""
    if name not in _ops:
        _ops.append(name)
    return _ops.index(name) + 1  # 0 means: nothing to report


def sentence(workspace: Workspace, report: Sequence[int]) -> str:
    """What a report of a wait that lasted too long says."""
    op, epoch, row, seen, peer = report[:5]
    what = "of whose row words are missing" if seen == -1 else f"whose flag held {seen}"
    return (f"rank {workspace.rank} of group {workspace.group!r} waited {workspace.limit_s:g} s in {_ops[op - 1]}, epoch {epoch}, "
            f"row {row}, for rank {peer}, {what}; that rank ended, is in another op, or replayed fewer graphs")


def _watch(workspace: Workspace) -> None:
    """End the process when a kernel reports that it waited too long: its context is lost, and its peers wait for it."""
    while workspace.memories:
        if workspace.report[0] != 0:
            time.sleep(_POLL_S)  # the first word is written last, but by another device
            print(f"fusewire: {sentence(workspace, workspace.report.tolist())}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)
        time.sleep(_POLL_S)
