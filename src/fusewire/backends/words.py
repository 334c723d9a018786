"""Gathers and sums that are small enough for words, which say themselves that they have come: one kernel, no fence, no flag.

workspace.py says which rules make them safe."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from . import device
from .workspace import Workspace

WARPS, RESIDENT = 8, 4  # of a program; programs on a multiprocessor
PIECES = (1024, 2048, 4096)  # words that a program may have
BYTES_OF_A_RANK = 4 << 20  # at most
NAN_WHERE_SENT = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)  # see `gather` in triton/words.py


def gather(x: list[Tensor], space: Workspace, op: str, wait: bool = True) -> list[Tensor] | None:
    """all_gather of one or two contiguous parts along their first dimension; None if they are too large, or not of floats that
    travel as words. `wait=False` leaves out the wait for the peers, to show that tests notice."""
    from .triton import words as kernels
    from .triton.launch import launch

    if any(t.dtype not in NAN_WHERE_SENT or t.numel() * t.element_size() % 4 for t in x):
        return None
    x = [t.clone() if t.data_ptr() % 4 else t for t in x]  # where a rank's rows lie must not decide which way all take
    ints = [_ints(t) for t in x]
    if (size := _size([t.numel() for t in ints], space)) is None:
        return None
    out = [t.new_empty((space.world_size * t.shape[0], *t.shape[1:])) for t in x]
    to = [_ints(t) for t in out]
    blocks = [math.ceil(t.numel() / size) for t in ints]
    launch(kernels.gather, op, sum(blocks), WARPS, RESIDENT, space, [ints[0], ints[-1], to[0], to[-1]],
           (blocks[0],), _constants(space, size, wait), True, (ints[0].numel(), ints[-1].numel()))
    return out


def reduce(y: Tensor, space: Workspace, op: str, wait: bool = True) -> Tensor | None:
    """reduce_scatter of contiguous y along its first dimension, which the ranks share evenly; None if it is too large, or not of
    16-bit floats. `wait` as above."""
    from .triton import words as kernels
    from .triton.launch import launch

    count = y.numel() // space.world_size
    if y.dtype not in (torch.bfloat16, torch.float16) or (size := _size([math.ceil(count / 2)], space)) is None:
        return None
    out = y.new_empty((y.shape[0] // space.world_size, *y.shape[1:]))
    launch(kernels.reduce, op, math.ceil(count / (2 * size)), WARPS, RESIDENT, space, [y, out], (),
           _constants(space, size, wait), True, (count,))
    return out


def _ints(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8).view(torch.int32)


def _size(counts: list[int], space: Workspace) -> int | None:
    """Words that a program has, so that all programs are on the device at once and the words find room; None if they do not."""
    for size in PIECES:
        programs = sum(math.ceil(n / size) for n in counts)
        sent = programs * size * 4
        if (programs <= RESIDENT * device.processors(space.device) and sent <= BYTES_OF_A_RANK
                and space.world_size * sent <= space.word_bytes):
            return size
    return None


def _constants(space: Workspace, size: int, wait: bool) -> dict[str, object]:
    return {"WORLD": space.world_size, "LOOPBACK": space.loopback, "WORDS": size, "WAIT": wait}
