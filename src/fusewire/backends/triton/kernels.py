"""Triton kernels. Only the backends beside this file import it, when they run: Triton comes with CUDA builds of torch alone."""
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

_FLT_MAX = tl.constexpr(3.4028234663852886e38)
_TINY = tl.constexpr(2.0**-126)
_SIXTH = tl.constexpr(1 / 6)
_AFTER_REPORT_NS = tl.constexpr(5_000_000_000)  # time for the host to find a report and end the process


# ---- flags and epochs: backends/workspace.py says why this is enough ----


@triton.jit
def _acquire(flag):
    """The int32 at `flag`. All threads load it, so what it guards is visible to each; all lanes of a warp get lane 0's value,
    so that a warp leaves a loop over it as one, whatever the lanes saw."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 v; ld.acquire.sys.global.b32 v, [$1]; shfl.sync.idx.b32 $0, v, 0, 31, 0xffffffff; }",
        "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _end_late(flag, epoch, row, peer, seen, report, op, limit_ns):
    """Say what a wait was for, give the host time to print it and end the process, then end the CUDA context."""
    tl.store(report + 1, epoch.to(tl.int64))
    tl.store(report + 2, tl.cast(row, tl.int64))
    tl.store(report + 3, tl.cast(seen, tl.int64))
    tl.store(report + 4, tl.cast(peer, tl.int64))
    tl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(report, op.to(tl.int64))
    start = globaltimer()
    while globaltimer() - start < _AFTER_REPORT_NS:
        _acquire(flag)
    tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait(flag, epoch, row, peer, report, op, limit_ns):
    """Until the flag equals the epoch, or `limit_ns` have passed."""
    seen = _acquire(flag)
    if seen != epoch:
        start = globaltimer()
        late = False
        while (seen != epoch) & (not late):
            seen = _acquire(flag)
            late = globaltimer() - start > limit_ns
        if seen != epoch:
            _end_late(flag, epoch, row, peer, seen, report, op, limit_ns)


@triton.jit
def _begin(state):
    """The epoch of this launch. One atomic reads it and counts this program in, so whoever comes last knows that all have read
    it, and sets the next one; no program needs to be the last to end."""
    old = tl.atomic_add(state, 1, sem="relaxed", scope="gpu")
    programs = tl.num_programs(0).to(tl.int64)
    if (old & 0xFFFFFFFF) == programs - 1:
        tl.atomic_add(state, (1 << 32) - programs, sem="relaxed", scope="gpu")
    return (old >> 32).to(tl.int32)


# ---- quantization: the formulas of formats/, bit for bit ----


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _amax_bits(x, AXIS: tl.constexpr):
    """The largest magnitude as float32 bits. As integers NaN is larger than all else, so it wins, as in torch's amax."""
    return tl.max(_bits(x) & 0x7FFFFFFF, AXIS)


@triton.jit
def _scale_of(amax):
    """max(amax / 448, 2^-126), NaN if amax is."""
    return tl.where(amax != amax, _float(tl.full(amax.shape, 0x7FC00000, tl.int32)), tl.maximum(tl.div_rn(amax, 448.0), _TINY))


@triton.jit
def _divide(y, by):
    """y / by, correctly rounded where 2^-20 < |y / by| < 2^20, of the right sign and as small or large elsewhere; `by` is a scalar.

    q = y * (1 / by) is a little off; its error, exact in one fused multiply-add, times 1 / by, makes it right (Markstein).
    That needs no intermediate to overflow or vanish: for unusual `by` the division itself is used. e4m3 rounds what is smaller
    to zero, whose sign the correction would lose, and saturates what is larger.
    """
    if (by > 2.0**-60) & (by < 2.0**60):
        inverse = tl.div_rn(1.0, by)
        q = y * inverse
        exact = tl.fma(tl.fma(-q, by, y), inverse, q)
        q = tl.where((tl.abs(q) > 2.0**-20) & (tl.abs(q) < 2.0**20), exact, q)
    else:
        q = tl.div_rn(y, by)
    return q


@triton.jit
def _e2m1(x):
    """e2m1 codes 0..15 of float32, int32: nearest, ties to the even code, saturated; NaN is 0."""
    bits = _bits(tl.minimum(tl.abs(x), 6.0))
    below_one = _bits(_float(bits) + 4194304.0) & 3  # float32 has steps of 0.5 there, and rounds as wanted
    one_mantissa_bit = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 252
    code = tl.where(bits < 0x3F800000, below_one, one_mantissa_bit) | ((_bits(x) >> 28) & 8)
    return tl.where(x == x, code, 0)


@triton.jit
def _scale_at(row, columns, COLUMNS: tl.constexpr, SWIZZLED: tl.constexpr):
    """Where the scales of a row lie in the scale part."""
    if SWIZZLED:
        return ((row // 128 * ((COLUMNS + 3) // 4) + columns // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + columns % 4)
    return row * COLUMNS + columns


@triton.jit
def _below(at, END: tl.constexpr, SIZE: tl.constexpr):
    """at < END, where at counts to SIZE: a constant if that is all of it."""
    return at < END if END < SIZE else tl.full(at.shape, True, tl.int1)


@triton.jit
def _quantize(y, row, param, data, scales,
              HIDDEN: tl.constexpr, BLOCK: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr):
    """Write the parts of one row. y: float32 (BLOCK,), zero from HIDDEN on; param: the format's scalar, if it has one."""
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    if FMT == "fp8_tensor":
        tl.store(data + row * HIDDEN + at, _divide(y, param).to(tl.float8e4nv), mask=inside)
    elif FMT == "fp8_token":
        scale = _scale_of(_float(_amax_bits(y, 0)))
        tl.store(data + row * HIDDEN + at, _divide(y, scale).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)
    else:
        SIZE: tl.constexpr = 128 if FMT == "fp8_block" else 32 if FMT == "mxfp8" else 16
        COLUMNS: tl.constexpr = (HIDDEN + SIZE - 1) // SIZE
        blocks = tl.reshape(y, (BLOCK // SIZE, SIZE))
        columns = tl.arange(0, BLOCK // SIZE)
        scale_at = scales + _scale_at(row, columns, COLUMNS, SWIZZLED)
        bits = _amax_bits(blocks, 1)
        if FMT == "fp8_block":
            scale = _scale_of(_float(bits))
            q = tl.reshape(tl.div_rn(blocks, tl.broadcast_to(scale[:, None], (BLOCK // SIZE, SIZE))), (BLOCK,))
            tl.store(data + row * HIDDEN + at, q.to(tl.float8e4nv), mask=inside)
            tl.store(scale_at, scale, mask=_below(columns, COLUMNS, BLOCK // SIZE))
        elif FMT == "mxfp8":
            exponent = bits >> 23
            byte = tl.where(exponent == 255, 255, tl.maximum(exponent - 8, 0))
            # 2^(127 - byte): times it is exactly divided by 2^(byte - 127); byte 255 is NaN
            encode = _float(tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23))
            q = tl.reshape(blocks * encode[:, None], (BLOCK,))
            tl.store(data + row * HIDDEN + at, q.to(tl.float8e4nv), mask=inside)
            tl.store(scale_at, byte.to(tl.uint8), mask=_below(columns, COLUMNS, BLOCK // SIZE))
        else:
            scale = (_float(bits) * (param * _SIXTH)).to(tl.float8e4nv)  # saturates: the formula's clamp
            decode = scale.to(tl.float32) * tl.div_rn(1.0, param)
            encode = tl.div_rn(tl.full(decode.shape, 1.0, tl.float32), decode)
            encode = tl.where(encode > _FLT_MAX, _FLT_MAX, encode)  # NaN stays
            low, high = tl.split(tl.reshape(_e2m1(blocks * encode[:, None]), (BLOCK // 2, 2)))
            pairs = tl.arange(0, BLOCK // 2)
            codes = (low | high << 4).to(tl.uint8)
            tl.store(data + row * (HIDDEN // 2) + pairs, codes, mask=_below(pairs, HIDDEN // 2, BLOCK // 2))
            tl.store(scale_at, scale, mask=_below(columns, COLUMNS, BLOCK // SIZE))


# ---- all_reduce_norm_quant ----


# data, flags: int64 addresses of half 0 on each rank, in the order rank, rank + 1, ..., as arguments of the kernel: a table in
# device memory would cost a load before the first store. In a half, a row of a source rank has slot `source * rows + row`, SLOT
# elements long; in loopback a push to a peer lands where the peer's own would.


@triton.jit
def _push(mine, row, at, inside, parity, epoch, data, flags, nbytes, flag_count, rank, rows,
               WORLD: tl.constexpr, LOOPBACK: tl.constexpr, SLOT: tl.constexpr):
    """Store a row to every peer, then set its flag there."""
    for i in tl.static_range(1, WORLD):
        slot = ((rank + i) % WORLD if LOOPBACK else rank) * rows + row
        to = tl.multiple_of(data[i] + parity * nbytes + slot * (SLOT * 2), 16)
        tl.store(tl.multiple_of(to.to(tl.pointer_type(mine.dtype)), 16) + at, mine, mask=inside)
    tl.debug_barrier()  # the stores of all threads come before the release of one
    for i in tl.static_range(1, WORLD):
        slot = ((rank + i) % WORLD if LOOPBACK else rank) * rows + row
        flag = flags[i] + parity * flag_count * 4 + slot * 4
        tl.atomic_xchg(flag.to(tl.pointer_type(tl.int32)), epoch, sem="release", scope="sys")


@triton.jit
def _sum(mine, row, at, inside, parity, epoch, data, flags, report, nbytes, flag_count, rank, op, limit_ns, rows,
              WORLD: tl.constexpr, SLOT: tl.constexpr, WAIT: tl.constexpr):
    """The sum of the ranks' rows once all have come: float32, in rank order."""
    if WAIT:
        for i in tl.static_range(1, WORLD):
            peer = (rank + i) % WORLD
            flag = flags[0] + parity * flag_count * 4 + (peer * rows + row) * 4
            _wait(flag.to(tl.pointer_type(tl.int32)), epoch, row, peer, report, op, limit_ns)
    if WORLD == 2:  # either order gives the same bits
        slot = tl.multiple_of(data[0] + parity * nbytes + ((1 - rank) * rows + row) * (SLOT * 2), 16)
        slot = tl.multiple_of(slot.to(tl.pointer_type(mine.dtype)), 16)
        theirs = tl.load(slot + at, mask=inside, other=0.0, cache_modifier=".cg")
        return mine.to(tl.float32) + theirs.to(tl.float32)
    acc = tl.zeros(at.shape, tl.float32)
    for p in tl.static_range(WORLD):
        slot = tl.multiple_of(data[0] + parity * nbytes + (p * rows + row) * (SLOT * 2), 16)
        theirs = tl.load(tl.multiple_of(slot.to(tl.pointer_type(mine.dtype)), 16) + at, mask=inside & (rank != p), other=0.0,
                         cache_modifier=".cg")
        part = tl.where(rank == p, mine, theirs).to(tl.float32)
        acc = part if p == 0 else acc + part  # starting at 0.0 would lose the sign of -0.0
    return acc


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "rows", "eps", "offset"])
def all_reduce_norm_quant(
    x, residual, weight, parameter, total, norm, data, scales,
    peer_data, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, rows, eps, offset,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, ONE_ROW: tl.constexpr, WAIT: tl.constexpr,
):
    """One-shot: each row goes to every peer whole, and every rank adds the rows of all ranks, in rank order, itself.

    A program pushes a row, and the row that it will do next, before it waits for the first of the others. All programs of a
    launch fit on the device at once, so nobody waits for a program that has not started.

    x, residual  (rows, HIDDEN) of one 16-bit dtype, strides (X_STRIDE, 1) and (RESIDUAL_STRIDE, 1)
    weight       (HIDDEN,) of any float dtype
    total, norm  (rows, HIDDEN) of x's dtype, contiguous
    data, scales the parts of FMT, contiguous; parameter its scalar
    ONE_ROW      there are as many programs as rows
    WAIT         False leaves the waits out: for tests
    """
    T: tl.constexpr = x.dtype.element_ty
    SLOT: tl.constexpr = (HIDDEN + 7) // 8 * 8  # rows start at multiples of 16 bytes
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    first = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    # All that needs no epoch is under way before it is asked for.
    mine = tl.load(x + first * X_STRIDE + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual + first * RESIDUAL_STRIDE + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0)
    param = 0.0
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
    epoch = _begin(state)
    parity = (epoch & 1).to(tl.int64)
    _push(mine, first, at, inside, parity, epoch, peer_data, peer_flags, nbytes, flag_count, rank, rows, WORLD, LOOPBACK, SLOT)
    for r in range(tl.program_id(0), rows, step):
        row = tl.cast(r, tl.int64)
        following = row + step
        if not ONE_ROW:
            ahead = tl.load(x + following * X_STRIDE + at, mask=inside & (following < rows), other=0.0)
            if following < rows:
                _push(ahead, following, at, inside, parity, epoch, peer_data, peer_flags, nbytes, flag_count, rank, rows,
                      WORLD, LOOPBACK, SLOT)
        summed = _sum(mine, row, at, inside, parity, epoch, peer_data, peer_flags, report, nbytes, flag_count, rank, op, limit_ns,
                      rows, WORLD, SLOT, WAIT).to(T)
        if HAS_RESIDUAL:
            summed = (before.to(tl.float32) + summed.to(tl.float32)).to(T)
        if not ONE_ROW:
            mine = ahead
            if HAS_RESIDUAL:
                before = tl.load(residual + following * RESIDUAL_STRIDE + at, mask=inside & (following < rows), other=0.0)
        tl.store(total + row * HIDDEN + at, summed, mask=inside)
        y = summed.to(tl.float32)
        y = y * tl.rsqrt(tl.div_rn(tl.sum(y * y, 0), HIDDEN * 1.0) + eps)
        if CAST_FIRST:
            normed = (w.to(tl.float32) * y.to(T).to(tl.float32)).to(T)
        elif HAS_OFFSET:
            normed = (y * (w.to(tl.float32) + offset)).to(T)
        else:
            normed = (y * w.to(tl.float32)).to(T)
        if KEEP_NORM:
            tl.store(norm + row * HIDDEN + at, normed, mask=inside)
        if FMT != "bf16":
            y = tl.where(inside, normed.to(tl.float32), 0.0)  # a NaN factor makes NaN of the padding too
            _quantize(y, row, param, data, scales, HIDDEN, BLOCK, FMT, SWIZZLED)
