"""Transfers: rows or partial sums on their way to the peers while a matmul runs. workspace.py says which rules make them safe."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..group import resolve
from ..op import Usage
from . import device
from .workspace import Workspace, op_number, regions


@dataclass(frozen=True)
class Transfer:
    """One use of a half of the transfers' region: what it holds, and where.

    A rank sends to the *slot* of itself in a peer's half, so every half has a slot for each source. In loopback, where a peer's
    memory is this rank's own, it is the slot of the peer, where that peer's push would land.
    """

    space: Workspace
    op: str
    half: int

    @property
    def ranks(self) -> list[int]:
        """This rank, then its peers in the order in which they send to it."""
        return [(self.space.rank + i) % self.space.world_size for i in range(self.space.world_size)]

    def slot(self, rank: int) -> int:
        """Which source's slot in `rank`'s memory this rank writes to."""
        return rank if self.space.loopback else self.space.rank

    def data(self, rank: int) -> int:
        """Address of a rank's half."""
        return self._base(rank) + self._data

    def flags(self, rank: int) -> int:
        """Address of a rank's flags, int32."""
        return self._base(rank) + self._flags

    def entered(self, rank: int) -> int:
        """Address of what the peers of a rank have entered, int32 by peer."""
        return self._base(rank) + regions(self.space.nbytes, self.space.flag_count)[2]

    def view(self, rank: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A part of a rank's half, from byte `start` on, as a contiguous tensor."""
        return _view(self.space.memories[rank], self._data + start, shape, dtype)

    def flag(self, rank: int, index: int) -> Tensor:
        """One of a rank's flags: int32 (1,)."""
        return _view(self.space.memories[rank], self._flags + 4 * index, (1,), torch.int32)

    @property
    def epoch(self) -> Tensor:
        """int32 (1,) on the device: this transfer's epoch, for copy engines and kernels that did not begin it."""
        return self.space.last[1, self.half:self.half + 1]

    def _base(self, rank: int) -> int:
        return self.space.memories[rank].data_ptr()

    @property
    def _data(self) -> int:
        return regions(self.space.nbytes, self.space.flag_count)[4] + self.half * self.space.nbytes

    @property
    def _flags(self) -> int:
        return regions(self.space.nbytes, self.space.flag_count)[1] + self.half * 4 * self.space.flag_count

    def kernel_args(self) -> tuple:
        """What each kernel that begins or waits for a transfer takes, see triton/transfer.py."""
        space = self.space
        return (tuple(self.data(r) for r in self.ranks), tuple(self.flags(r) for r in self.ranks),
                tuple(self.entered(r) for r in self.ranks), space.state, space.last, space.report, self.half, space.rank,
                op_number(self.op), space.limit_ns)


WARPS, REGISTERS = 8, 64  # of the kernels that move data


def why_not(on: torch.device, group: str) -> str | None:
    """Why ranks cannot send to one another by transfers, None if they can."""
    if (why := device.why_not(on)) is None and resolve(group).world_size == 1:
        why = "one rank has nothing to send"
    return why


# Without measurements: what a backend takes beside the wire and the matmul, from measurements on an H200.
PUSH_S, COPY_ENGINE_S, ONE_KERNEL_S = 5e-6, 20e-6, 12e-6


def one_after_the_other(usage: Usage) -> float:
    """Seconds of a call that sends and then multiplies, or the other way round."""
    return PUSH_S + usage.wire_s + usage.matmul_s


def by_copy_engines(usage: Usage) -> float:
    """Seconds of a call that sends while it multiplies one rank's rows after the other's."""
    return COPY_ENGINE_S + max(usage.wire_s, usage.matmul_s)


def in_one_kernel(usage: Usage) -> float:
    """Seconds of a call that sends while it multiplies all rows."""
    return ONE_KERNEL_S + max(usage.wire_s, usage.matmul_s)


def prepare(space: Workspace, op: str, nbytes: int, flag_count: int) -> Transfer:
    """The transfer that the next call of an op is; a FusewireError if the workspace is too small for it."""
    space.need(op, nbytes, flag_count)
    half, space.turn = space.turn, 1 - space.turn
    return Transfer(space, op, half)


def most_programs(space: Workspace) -> int:
    """How many programs of `start` are on the device at once: with WARPS warps and REGISTERS registers a thread, four on each
    multiprocessor. Ranks have as many, which `workspace.open` makes sure of."""
    return 4 * device.processors(space.device)


def start(kernel: Any, programs: int, t: Transfer, *args: Any, num_warps: int = WARPS, registers: int = REGISTERS,
          **constants: Any) -> None:
    """Launch a kernel that begins or waits for a transfer. One that is not compiled yet is refused while a CUDA graph is
    captured."""
    key = (t.op, kernel, num_warps, *sorted(constants.items()), t.space.device, *(_specialised(a) for a in args))
    device.warm_up(key, f"{t.op}: its kernel {kernel.__name__}")
    kernel[(programs,)](*t.kernel_args(), *args, num_warps=num_warps, maxnreg=registers, **constants)


def _specialised(arg: Any) -> Any:
    """What of an argument Triton compiles a kernel for."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple(map(_specialised, arg))
    return arg == 1, arg % 16 == 0, arg < 1 << 31


@contextlib.contextmanager
def on_side(space: Workspace) -> Iterator[None]:
    """What is started within runs on the copy engines' stream, after the work so far; `join` waits for it."""
    main = torch.cuda.current_stream(space.device)
    space.side.wait_stream(main)
    with torch.cuda.stream(space.side):
        yield


def join(space: Workspace) -> None:
    torch.cuda.current_stream(space.device).wait_stream(space.side)


def _view(memory: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = dtype.itemsize
    for n in shape:
        count *= n
    return memory[start:start + count].view(dtype).view(shape)
