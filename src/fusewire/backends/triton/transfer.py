"""Triton kernels of transfers. Only backends import it, when they run: Triton comes with CUDA builds of torch alone."""
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from .kernels import _count_in, _end_late, _epoch, _leave_epoch, _wait

# data, flags, entered: int64 addresses of a half, its flags and the `entered` of each rank, in the order rank, rank + 1, ...


@triton.jit
def _acquire(flag):
    """The int32 at `flag`; all lanes of a warp get lane 0's value, so that a warp leaves a loop over it as one."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 v; ld.acquire.sys.global.b32 v, [$1]; shfl.sync.idx.b32 $0, v, 0, 31, 0xffffffff; }",
        "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait_after(flag, before, peer, report, op, limit_ns):
    """Until the flag is later than `before`, or `limit_ns` have passed."""
    seen = _acquire(flag)
    if seen - before <= 0:
        start = globaltimer()
        late = False
        while (seen - before <= 0) & (not late):
            seen = _acquire(flag)
            late = globaltimer() - start > limit_ns
        if seen - before <= 0:
            _end_late(flag, before, -1, peer, seen, report, op, limit_ns)


@triton.jit
def _leave(epoch, state, last, counted):
    """Set a half's last epoch, by whoever was counted last, and the next one."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .b32 t, n;
        mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        cvt.u32.u64 t, $2; add.u32 t, t, 1; cvt.u32.u64 n, $3; setp.eq.and.u32 q, t, n, p;
        @q st.relaxed.gpu.global.b32 [$1], $4; @q st.relaxed.gpu.global.b32 [$1 + 8], $4; mov.b32 $0, 0; }""",
        "=r,l,l,l,r", [last, counted, tl.num_programs(0).to(tl.int64), epoch], dtype=tl.int32, is_pure=False, pack=1)
    _leave_epoch(state, counted)


@triton.jit
def _begin(entered, state, last, report, half, rank, op, limit_ns, WORLD: tl.constexpr, LOOPBACK: tl.constexpr):
    """The epoch of this transfer, once every peer has left the half."""
    epoch = _epoch(state)
    before = tl.load(last + half, volatile=True)
    tl.debug_barrier()  # one thread counts its program in, and when all are in, what every warp has to have read is changed
    counted = _count_in(state)
    if not LOOPBACK:
        if tl.program_id(0) == 0:
            for i in tl.static_range(1, WORLD):
                tl.atomic_xchg((entered[i] + rank * 4).to(tl.pointer_type(tl.int32)), epoch, sem="release", scope="sys")
        for i in tl.static_range(1, WORLD):
            peer = (rank + i) % WORLD
            _wait_after((entered[0] + peer * 4).to(tl.pointer_type(tl.int32)), before, peer, report, op, limit_ns)
    _leave(epoch, state, last + half, counted)
    return epoch


@triton.jit(do_not_specialize=["half", "rank", "op", "limit_ns"])
def begin(data, flags, entered, state, last, report, half, rank, op, limit_ns, WORLD: tl.constexpr, LOOPBACK: tl.constexpr):
    """One program: begin a transfer that others carry out."""
    _begin(entered, state, last, report, half, rank, op, limit_ns, WORLD, LOOPBACK)


@triton.jit(do_not_specialize=["half", "rank", "op", "limit_ns", "index", "peer"])
def wait(data, flags, entered, state, last, report, half, rank, op, limit_ns, index, peer):
    """One program: until flag `index`, which `peer` sets, has come."""
    epoch = tl.load(last + 2 + half)
    _wait((flags[0] + index * 4).to(tl.pointer_type(tl.int32)), epoch, index, peer, report, op, limit_ns, 1)


@triton.jit
def _at(address, start, like, ALIGNED: tl.constexpr):
    """Pointer to elements like those of `like`, `start` of them after the address."""
    to = address + tl.cast(start, tl.int64) * (like.dtype.element_ty.primitive_bitwidth // 8)
    to = to.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        to = tl.multiple_of(to, 16)  # of the pointer: what is said of the number is lost, and elements are stored one by one
    return to


@triton.jit
def _signal(epoch, flags, rank, WORLD: tl.constexpr, LOOPBACK: tl.constexpr, chunk=0, chunks=1):
    """Tell every peer that what this program stored is there, the `chunk`-th of `chunks` times."""
    tl.debug_barrier()  # the stores of all threads come before the release of one
    for i in tl.static_range(1, WORLD):
        slot = (rank + i) % WORLD if LOOPBACK else rank
        flag = flags[i] + ((slot * chunks + chunk) * tl.num_programs(0) + tl.program_id(0)) * 4
        tl.atomic_xchg(flag.to(tl.pointer_type(tl.int32)), epoch, sem="release", scope="sys")


@triton.jit
def _wait_all(epoch, flags, rank, report, op, limit_ns, WORLD: tl.constexpr, chunk=0, chunks=1):
    """Until the programs of the peers with this one's number have signalled, likewise."""
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        flag = flags[0] + ((peer * chunks + chunk) * tl.num_programs(0) + tl.program_id(0)) * 4
        _wait(flag.to(tl.pointer_type(tl.int32)), epoch, tl.program_id(0), peer, report, op, limit_ns, 1)


@triton.jit
def _send(v, x, n, start, data, rank, WORLD: tl.constexpr, LOOPBACK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Copy (n,) into its slots here and on every peer; the slots, of n each, start at byte `start`. v: the first block."""
    for b in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for i in tl.static_range(0, WORLD):
            slot = (rank + i) % WORLD if LOOPBACK else rank
            tl.store(_at(data[i] + start, tl.cast(slot, tl.int64) * n, x, ALIGNED) + at, v, mask=at < n)
        at += tl.num_programs(0) * BLOCK
        v = tl.load(x + at, mask=at < n)


@triton.jit(do_not_specialize=["half", "rank", "op", "limit_ns"])
def push(data, flags, entered, state, last, report, half, rank, op, limit_ns, x, n, y, m, y_start,
           WORLD: tl.constexpr, LOOPBACK: tl.constexpr, BLOCK: tl.constexpr, TWO: tl.constexpr,
           X_ALIGNED: tl.constexpr, Y_ALIGNED: tl.constexpr, WAIT: tl.constexpr):
    """all_gather of x (n,) and, if TWO, y (m,) into every rank's half: x's slots at its start, y's at byte `y_start`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n)  # under way before the epoch is asked for
    epoch = _begin(entered, state, last, report, half, rank, op, limit_ns, WORLD, LOOPBACK)
    _send(v, x, n, 0, data, rank, WORLD, LOOPBACK, BLOCK, X_ALIGNED)
    if TWO:
        v = tl.load(y + at, mask=at < m)
        _send(v, y, m, y_start, data, rank, WORLD, LOOPBACK, BLOCK, Y_ALIGNED)
    _signal(epoch, flags, rank, WORLD, LOOPBACK)
    if WAIT:
        _wait_all(epoch, flags, rank, report, op, limit_ns, WORLD)


@triton.jit
def _sum(mine, out, n, at, data, rank, WORLD: tl.constexpr, ALIGNED: tl.constexpr):
    """out = the sum over sources in rank order, float32: this rank's own part, and the slots."""
    acc = tl.zeros(at.shape, tl.float32)
    for p in tl.static_range(WORLD):
        theirs = tl.load(_at(data[0], tl.cast(p, tl.int64) * n, out, ALIGNED) + at, mask=(at < n) & (rank != p), other=0.0,
                         cache_modifier=".cg")
        part = tl.where(rank == p, mine, theirs).to(tl.float32)
        acc = part if p == 0 else acc + part  # starting at 0.0 would lose the sign of -0.0
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _scatter(v, i, at, n, data, rank, like, WORLD: tl.constexpr, LOOPBACK: tl.constexpr, ALIGNED: tl.constexpr):
    """Store a part of the i-th peer's chunk to its owner."""
    slot = (rank + i) % WORLD if LOOPBACK else rank
    tl.store(_at(data[i], tl.cast(slot, tl.int64) * n, like, ALIGNED) + at, v, mask=at < n)


@triton.jit
def _block(b, BLOCK: tl.constexpr):
    return tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["half", "rank", "op", "limit_ns", "chunks"])
def push_and_add(data, flags, entered, state, last, report, half, rank, op, limit_ns, y, out, starts, sizes, chunks,
                 WORLD: tl.constexpr, LOOPBACK: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
                 WAIT: tl.constexpr):
    """reduce_scatter of y to out: chunks of y, sizes[i] elements from starts[i] on, in the order rank, rank + 1, ..., go to their
    owners' slots, and each owner adds them.

    A program has at most `chunks` times CHUNK blocks of each. When it has sent CHUNK of them it says so, and adds those before,
    which the peers have sent by then: so most is added while the wire is busy. On every rank `chunks` is the same.
    """
    n = sizes[0]
    mine, to_first = y + tl.cast(starts[0], tl.int64), y + tl.cast(starts[1], tl.int64)
    step = tl.num_programs(0)
    sending = tl.program_id(0)
    adding = sending
    at = _block(sending, BLOCK)
    v = tl.load(to_first + at, mask=at < sizes[1])  # under way before the epoch is asked for
    own = tl.load(mine + at, mask=at < n)
    epoch = _begin(entered, state, last, report, half, rank, op, limit_ns, WORLD, LOOPBACK)
    for chunk in range(chunks + 1):
        if chunk < chunks:
            for _ in range(CHUNK):
                at = _block(sending, BLOCK)
                _scatter(v, 1, at, sizes[1], data, rank, y, WORLD, LOOPBACK, ALIGNED)
                for i in tl.static_range(2, WORLD):
                    to_other = tl.load(y + tl.cast(starts[i], tl.int64) + at, mask=at < sizes[i])
                    _scatter(to_other, i, at, sizes[i], data, rank, y, WORLD, LOOPBACK, ALIGNED)
                sending += step
                at = _block(sending, BLOCK)
                v = tl.load(to_first + at, mask=at < sizes[1])
            _signal(epoch, flags, rank, WORLD, LOOPBACK, chunk, chunks)
        if chunk > 0:
            if WAIT:
                _wait_all(epoch, flags, rank, report, op, limit_ns, WORLD, chunk - 1, chunks)
            for _ in range(CHUNK):
                _sum(own, out, n, _block(adding, BLOCK), data, rank, WORLD, ALIGNED)
                adding += step
                at = _block(adding, BLOCK)
                own = tl.load(mine + at, mask=at < n)


@triton.jit(do_not_specialize=["half", "rank", "op", "limit_ns"])
def add(data, flags, entered, state, last, report, half, rank, op, limit_ns, y, out, n,
              WORLD: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """out (n,) = the sum of y's own chunk and of what copy engines brought to the slots, once their flags (by source) have come."""
    epoch = tl.load(last + 2 + half)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        _wait((flags[0] + peer * 4).to(tl.pointer_type(tl.int32)), epoch, tl.program_id(0), peer, report, op, limit_ns, 1)
    for b in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mine = tl.load(y + tl.cast(rank, tl.int64) * n + at, mask=at < n)
        _sum(mine, out, n, at, data, rank, WORLD, ALIGNED)
