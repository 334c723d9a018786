"""Triton kernels of small gathers and sums, in words that say themselves that they have come: backends/workspace.py has the rules.

Only backends import it, when they run: Triton comes with CUDA builds of torch alone."""
from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    _at,
    _clear_words,
    _count_in,
    _epoch,
    _halves,
    _ints,
    _leave_epoch,
    _leave_words,
    _plus,
    _round,
    _scrubbed,
    _wide,
    _words,
    _words_arrived,
)

# Every program has one piece of what this rank sends to a peer, WORDS long, filled up with zeros.


@triton.jit
def _place(data, turn, nbytes, source, WORDS: tl.constexpr):
    """Address of this program's piece in the place of a source."""
    return data + turn * nbytes + (source.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (WORDS * 4)


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "x_blocks"])
def gather(
    x, y, x_out, y_out, peer_words, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, x_count, y_count, x_blocks,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, WORDS: tl.constexpr, WAIT: tl.constexpr,
):
    """all_gather of x (x_count,) and y (y_count,), int32, into x_out (WORLD, x_count) and y_out (WORLD, y_count).

    The first x_blocks programs have x, the others y. A word that means that nothing has come is sent as 0x7FFFFFFF: both are NaN
    in whatever floats they hold, but not in 4-bit codes or 8-bit exponents.
    """
    piece = tl.program_id(0)
    second = piece >= x_blocks
    count = tl.where(second, y_count, x_count)
    first = (piece - tl.where(second, x_blocks, 0)) * WORDS
    at = first + tl.arange(0, WORDS)
    own, out = x, x_out
    if second:
        own, out = y, y_out
    epoch = _epoch(state)
    turn, used = _words(state)
    mine = tl.load(own + at, mask=at < count, other=0)
    sent = tl.where(mine == -1, 0x7FFFFFFF, mine)
    for i in tl.static_range(1, WORLD):
        source = (rank + i) % WORLD if LOOPBACK else rank
        tl.store(_ints(_place(peer_words[i], turn, nbytes, source, WORDS)) + tl.arange(0, WORDS), sent)
    tl.debug_barrier()
    counted = _count_in(state)
    tl.store(out + rank.to(tl.int64) * count + at, mine, mask=at < count)
    _clear_words((turn + 2) % 3, used, peer_words, nbytes, rank, WORDS, WORLD)
    if WAIT:
        words = _words_arrived(piece, turn, epoch, peer_words, nbytes, report, rank, op, limit_ns, tl.num_programs(0), 2 * WORDS,
                               WORLD, 2 * WORDS)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        if WAIT and i == WORLD - 1:  # they are in registers
            come = words
        else:
            of = _ints(_place(peer_words[0], turn, nbytes, peer, WORDS))
            come = tl.load(of + tl.arange(0, WORDS), cache_modifier=".cg")
        tl.store(out + peer.to(tl.int64) * count + at, come, mask=at < count)
    _leave_words(state, counted, (turn + 1) % 3 << 32 | tl.num_programs(0).to(tl.int64) * (WORDS // 4))
    _leave_epoch(state, counted)


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns"])
def reduce(
    y, out, peer_words, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, count,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, WORDS: tl.constexpr, WAIT: tl.constexpr,
):
    """reduce_scatter of y (WORLD, count) to out (count,), of one 16-bit float: the sum of the ranks' chunks in float32, in rank
    order, rounded once."""
    piece = tl.program_id(0)
    inside = tl.arange(0, 2 * WORDS)
    at = piece * (2 * WORDS) + inside
    epoch = _epoch(state)
    turn, used = _words(state)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        source = peer if LOOPBACK else rank
        theirs = tl.load(y + peer.to(tl.int64) * count + at, mask=at < count, other=0.0)
        tl.store(_at(_place(peer_words[i], turn, nbytes, source, WORDS), y) + inside, _scrubbed(theirs))
    tl.debug_barrier()
    counted = _count_in(state)
    mine = tl.load(y + rank.to(tl.int64) * count + at, mask=at < count, other=0.0)
    _clear_words((turn + 2) % 3, used, peer_words, nbytes, rank, WORDS, WORLD)
    if WAIT:
        words = _words_arrived(piece, turn, epoch, peer_words, nbytes, report, rank, op, limit_ns, tl.num_programs(0), 2 * WORDS,
                               WORLD, 2 * WORDS)
    if WAIT and WORLD == 2:  # either order gives the same bits
        total = _plus(mine, _halves(words, y.dtype.element_ty))
    else:
        acc = tl.zeros(at.shape, tl.float32)
        for p in tl.static_range(WORLD):
            of = _at(_place(peer_words[0], turn, nbytes, rank * 0 + p, WORDS), y)
            come = tl.load(of + inside, cache_modifier=".cg")
            part = _wide(tl.where(rank == p, mine, come))
            acc = part if p == 0 else acc + part  # starting at 0.0 would lose the sign of -0.0
        total = _round(acc, y.dtype.element_ty)
    tl.store(out + at, total, mask=at < count)
    _leave_words(state, counted, (turn + 1) % 3 << 32 | tl.num_programs(0).to(tl.int64) * (WORDS // 4))
    _leave_epoch(state, counted)
