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
def _wait_for_words(words, mask, epoch, row, peer, report, op, limit_ns):
    """The data, int32, of words (int64 addresses) that all carry the epoch; 0 where the mask is false.

    Each thread waits for its own words, four at a time, whichever four they are: a loop in Triton would need a reduction over
    the whole program for every look. Loads are relaxed, as a word guards only itself. A wait over the limit ends as in
    `_end_late`.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p0, p1, p2, p3, missing, again; .reg .b64 w0, w1, w2, w3, start, now; .reg .b32 e0, e1, e2, e3;
        setp.ne.b32 p0, $8, 0; setp.ne.b32 p1, $9, 0; setp.ne.b32 p2, $10, 0; setp.ne.b32 p3, $11, 0;
        cvt.u64.u32 w0, 0; mov.b64 w1, w0; mov.b64 w2, w0; mov.b64 w3, w0; mov.b64 start, w0;
        LOOK:
        @p0 ld.relaxed.sys.global.b64 w0, [$4];
        @p1 ld.relaxed.sys.global.b64 w1, [$5];
        @p2 ld.relaxed.sys.global.b64 w2, [$6];
        @p3 ld.relaxed.sys.global.b64 w3, [$7];
        mov.b64 {$0, e0}, w0; mov.b64 {$1, e1}, w1; mov.b64 {$2, e2}, w2; mov.b64 {$3, e3}, w3;
        @!p0 mov.b32 e0, $12; @!p1 mov.b32 e1, $12; @!p2 mov.b32 e2, $12; @!p3 mov.b32 e3, $12;
        setp.ne.b32 missing, e0, $12; setp.ne.or.b32 missing, e1, $12, missing;
        setp.ne.or.b32 missing, e2, $12, missing; setp.ne.or.b32 missing, e3, $12, missing;
        @!missing bra DONE;
        mov.u64 now, %globaltimer;
        setp.eq.b64 again, start, 0; @again mov.b64 start, now;
        sub.s64 now, now, start;
        setp.lt.s64 again, now, $32; @again bra LOOK;
        setp.eq.b32 again, e0, $12; @again mov.b32 e0, e1;
        setp.eq.b32 again, e0, $12; @again mov.b32 e0, e2;
        setp.eq.b32 again, e0, $12; @again mov.b32 e0, e3;
        cvt.s64.s32 w1, $12; st.global.b64 [$16 + 8], w1;
        st.global.b64 [$16 + 16], $20;
        cvt.s64.s32 w1, e0; st.global.b64 [$16 + 24], w1;
        cvt.s64.s32 w1, $24; st.global.b64 [$16 + 32], w1;
        fence.acq_rel.sys;
        cvt.s64.s32 w1, $28; st.global.b64 [$16], w1;
        mov.u64 start, %globaltimer;
        DELAY:
        mov.u64 now, %globaltimer; sub.s64 now, now, start;
        setp.lt.s64 again, now, 5000000000; @again bra DELAY;
        trap;
        DONE:
        bar.warp.sync 0xffffffff;
        }""",
        "=&r,=&r,=&r,=&r,l,l,l,l,r,r,r,r,r,r,r,r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r,l,l,l,l",
        [words, mask.to(tl.int32), epoch, report, row, peer, op, limit_ns], dtype=tl.int32, is_pure=False, pack=4)


@triton.jit
def _halves(pair, T: tl.constexpr):
    """Two 16-bit floats of type T in an int32, the first in the low half, as two float32."""
    if T == tl.bfloat16:
        return _float(pair << 16), _float(pair & -65536)
    return ((pair & 65535).to(tl.int16).to(T, bitcast=True).to(tl.float32),
            ((pair >> 16) & 65535).to(tl.int16).to(T, bitcast=True).to(tl.float32))


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


# `peers`: int64 addresses of data, flags or words in the half of this epoch's parity 0, in the order rank, rank + 1, ... (mod
# WORLD), as arguments of the kernel: a table in device memory would cost a load before the first store. In a half, a row of a
# source rank has slot `source * rows + row`; in loopback a push to a peer lands where the peer's own would.


@triton.jit
def _push_data(mine, row, at, inside, parity, epoch, data, flags, nbytes, flag_count, rank, rows,
               WORLD: tl.constexpr, LOOPBACK: tl.constexpr, SLOT: tl.constexpr):
    """Store a row to every peer, SLOT elements a slot, then set its flag there."""
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
def _sum_data(mine, row, at, inside, parity, epoch, data, flags, report, nbytes, flag_count, rank, op, limit_ns, rows,
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


@triton.jit
def _push_words(mine, row, pairs, inside, parity, epoch, words, words_nbytes, rank, rows,
                WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr):
    """Store a row, as pairs of elements (int32), to every peer: twice the bytes, but neither fence nor flag."""
    word = (epoch.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for i in tl.static_range(1, WORLD):
        slot = ((rank + i) % WORLD if LOOPBACK else rank) * rows + row
        to = tl.multiple_of(words[i] + parity * words_nbytes + slot * (HIDDEN * 4), 16)
        tl.store(tl.multiple_of(to.to(tl.pointer_type(tl.int64)), 16) + pairs, word, mask=inside)


@triton.jit
def _sum_words(mine, row, pairs, inside, parity, epoch, words, report, words_nbytes, rank, op, limit_ns, rows,
               T: tl.constexpr, WORLD: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    """As `_sum_data`."""
    low, high = _halves(mine, T)
    own_low, own_high = low, high
    for i in tl.static_range(1 if WORLD == 2 else 0, WORLD):
        p = 1 - rank if WORLD == 2 else rank * 0 + i  # of two, either order gives the same bits
        at = tl.multiple_of(words[0] + parity * words_nbytes + (p * rows + row) * (HIDDEN * 4), 16)
        word = tl.multiple_of(at.to(tl.pointer_type(tl.int64)), 16) + pairs
        wanted = inside if WORLD == 2 else inside & (rank != p)
        if WAIT:
            theirs = _wait_for_words(word.to(tl.int64), wanted, epoch, row, p, report.to(tl.int64), op, limit_ns)
        else:
            theirs = tl.load(word, mask=wanted, other=0, volatile=True).to(tl.int32)
        their_low, their_high = _halves(theirs, T)
        if WORLD > 2:
            their_low = tl.where(rank == p, own_low, their_low)
            their_high = tl.where(rank == p, own_high, their_high)
        low = their_low if i == 0 else low + their_low
        high = their_high if i == 0 else high + their_high
    return tl.reshape(tl.join(low, high), (BLOCK,))


@triton.jit(do_not_specialize=["nbytes", "flag_count", "words_nbytes", "rank", "op", "limit_ns", "rows", "eps", "offset"])
def all_reduce_norm_quant(
    x, residual, weight, parameter, total, norm, data, scales,
    peer_data, peer_flags, peer_words, state, report, nbytes, flag_count, words_nbytes, rank, op, limit_ns,
    rows, eps, offset,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, WORDS: tl.constexpr, WAIT: tl.constexpr,
):
    """One-shot: each row goes to every peer whole, and every rank adds the rows of all ranks, in rank order, itself.

    A program pushes a row before it waits for the same row of the others, and all programs of a launch fit on the device at
    once, so nobody waits for a program that has not started. With flags it pushes its next row, too, before it waits.

    x, residual  (rows, HIDDEN) of one 16-bit dtype, strides (X_STRIDE, 1) and (RESIDUAL_STRIDE, 1)
    weight       (HIDDEN,) of any float dtype
    total, norm  (rows, HIDDEN) of x's dtype, contiguous
    data, scales the parts of FMT, contiguous; parameter its scalar
    WORDS        push words, for few rows: a program for each; else data and a flag for each row
    """
    T: tl.constexpr = x.dtype.element_ty
    SLOT: tl.constexpr = (HIDDEN + 7) // 8 * 8  # rows start at multiples of 16 bytes
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    pairs = tl.arange(0, BLOCK // 2)
    pairs_inside = _below(pairs, HIDDEN // 2, BLOCK // 2)
    first = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    # All that needs no epoch is under way before it is asked for.
    if WORDS:
        mine = tl.load((x + first * X_STRIDE).to(tl.pointer_type(tl.int32)) + pairs, mask=pairs_inside, other=0)
    else:
        mine = tl.load(x + first * X_STRIDE + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual + first * RESIDUAL_STRIDE + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0)
    param = 0.0
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
    epoch = _begin(state)
    parity = (epoch & 1).to(tl.int64)
    if WORDS:
        _push_words(mine, first, pairs, pairs_inside, parity, epoch, peer_words, words_nbytes, rank, rows, WORLD, LOOPBACK, HIDDEN)
    else:
        _push_data(mine, first, at, inside, parity, epoch, peer_data, peer_flags, nbytes, flag_count, rank, rows,
                   WORLD, LOOPBACK, SLOT)
    for r in range(tl.program_id(0), rows, step):
        row = tl.cast(r, tl.int64)
        if WORDS:
            acc = _sum_words(mine, row, pairs, pairs_inside, parity, epoch, peer_words, report, words_nbytes, rank, op, limit_ns,
                             rows, T, WORLD, HIDDEN, BLOCK, WAIT)
            ahead = mine
        else:
            following = row + step
            ahead = tl.load(x + following * X_STRIDE + at, mask=inside & (following < rows), other=0.0)
            if following < rows:
                _push_data(ahead, following, at, inside, parity, epoch, peer_data, peer_flags, nbytes, flag_count, rank, rows,
                           WORLD, LOOPBACK, SLOT)
            acc = _sum_data(mine, row, at, inside, parity, epoch, peer_data, peer_flags, report, nbytes, flag_count, rank, op,
                            limit_ns, rows, WORLD, SLOT, WAIT)
        mine = ahead
        summed = acc.to(T)
        if HAS_RESIDUAL:
            summed = (before.to(tl.float32) + summed.to(tl.float32)).to(T)
            if not WORDS:
                before = tl.load(residual + (row + step) * RESIDUAL_STRIDE + at, mask=inside & (row + step < rows), other=0.0)
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
