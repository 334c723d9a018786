"""Triton kernels. Only the backends beside this file import it, when they run: Triton comes with CUDA builds of torch alone."""
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

_FLT_MAX = tl.constexpr(3.4028234663852886e38)
_TINY = tl.constexpr(2.0**-126)
_SIXTH = tl.constexpr(1 / 6)
_448TH = tl.constexpr(1 / 448)
_AFTER_REPORT_NS = tl.constexpr(5_000_000_000)  # time for the host to find a report and end the process
_LOOKS = tl.constexpr(256)  # at a flag before the clock is read, which takes longer than a look


# ---- flags and epochs: backends/workspace.py says why this is enough ----


@triton.jit
def _acquire(flag, epoch, COUNT: tl.constexpr):
    """The epoch if all of COUNT (at most 32, a power of two) int32 from `flag` on hold it, else one that does not.

    All warps look, each lane at one of them, and leave as one, so that a loop over it is one warp's and what the flags guard is
    visible to each thread."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 lane, v, late; .reg .b64 at;
        mov.u32 lane, %laneid; and.b32 lane, lane, $3; mul.wide.u32 at, lane, 4; add.u64 at, at, $1;
        ld.acquire.sys.global.b32 v, [at];
        setp.ne.b32 p, v, $2; vote.sync.ballot.b32 late, p, 0xffffffff;
        brev.b32 late, late; clz.b32 late, late; and.b32 late, late, 31;
        shfl.sync.idx.b32 $0, v, late, 31, 0xffffffff; bar.warp.sync 0xffffffff; }""",
        "=r,l,r,n", [flag, epoch, COUNT - 1], dtype=tl.int32, is_pure=False, pack=1)


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
        _acquire(flag, epoch, 1)
    tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait(flag, epoch, row, peer, report, op, limit_ns, COUNT: tl.constexpr):
    """Until COUNT flags equal the epoch, or `limit_ns` have passed."""
    seen = _acquire(flag, epoch, COUNT)
    looks = 0
    while (seen != epoch) & (looks < _LOOKS):
        seen = _acquire(flag, epoch, COUNT)
        looks += 1
    if seen != epoch:
        start = globaltimer()
        late = False
        while (seen != epoch) & (not late):
            seen = _acquire(flag, epoch, COUNT)
            late = globaltimer() - start > limit_ns
        if seen != epoch:
            _end_late(flag, epoch, row, peer, seen, report, op, limit_ns)


@triton.jit
def _set(flag, epoch):
    """Set a flag, by one thread, behind a barrier: whoever acquires it sees what the program stored before."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        @p st.release.sys.global.b32 [$1], $2; mov.b32 $0, t; }""", "=r,l,r", [flag, epoch], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _epoch(state):
    """The epoch of this launch, which stays until every program has called `_leave_epoch`. A plain load: no program has to wait
    for what one thread was told by an atomic."""
    return (tl.load(state, volatile=True) >> 32).to(tl.int32)


@triton.jit
def _count_in(state):
    """Count this program in, by one thread, behind a barrier that all threads reach after `_epoch`: for `_leave_epoch`."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b64 $0, 0;
        @p atom.relaxed.gpu.global.add.u64 $0, [$1], 1; }""",
        "=&l,l", [state], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _leave_epoch(state, counted):
    """Whoever was counted last knows that all programs have read the epoch, and sets the next one. Long after `_count_in`, so
    that nobody waits for its answer."""
    programs = tl.num_programs(0).to(tl.int64)
    tl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .b32 t, n; .reg .b64 next;
        mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        cvt.u32.u64 t, $2; add.u32 t, t, 1; cvt.u32.u64 n, $3; setp.eq.and.u32 q, t, n, p;
        mov.b64 next, 0x100000000; sub.u64 next, next, $3;
        @q red.relaxed.gpu.global.add.u64 [$1], next; mov.b32 $0, 0; }""",
        "=r,l,l,l", [state, counted, programs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _words(state):
    """(the third of the words that is this launch's turn, 16-byte pieces of a rank's place that the launch before it used)."""
    words = tl.load(state + 1, volatile=True)
    return words >> 32, words.to(tl.int32)


@triton.jit
def _leave_words(state, counted, words):
    """What `_words` gives the next such launch; by whoever was counted last, before `_leave_epoch`."""
    programs = tl.num_programs(0).to(tl.int64)
    tl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .b32 t, n;
        mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        cvt.u32.u64 t, $2; add.u32 t, t, 1; cvt.u32.u64 n, $3; setp.eq.and.u32 q, t, n, p;
        @q st.relaxed.gpu.global.b64 [$1], $4; mov.b32 $0, 0; }""",
        "=r,l,l,l,l", [state + 1, counted, programs, words], dtype=tl.int32, is_pure=False, pack=1)


# ---- 16-bit floats, two in a register: one by one, rounding is among the slowest instructions ----


@triton.jit
def _wide(x, MOVABLE: tl.constexpr = True):
    """Any float, as float32. Not MOVABLE: here and now; the compiler would do it where it is used, which may be behind a wait."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
                                         is_pure=MOVABLE, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def _round(x, T: tl.constexpr):
    """float32 to T, bfloat16 or float16: nearest, ties to even."""
    if T == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _plus(a, b):
    """a + b of two 16-bit floats: the bits of a float32 sum that is rounded after it."""
    if a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _scrubbed(x):
    """16-bit floats without the NaN that means that nothing has come, 0xFFFF: it becomes another NaN, and a sum with any is the
    same one."""
    return tl.inline_asm_elementwise("{ .reg .b32 most; mov.b32 most, 0xFFFEFFFE; min.u16x2 $0, $1, most; }", "=r,r", [x],
                                     dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _halves(words, T: tl.constexpr):
    """int32 (n,) as (2 n,) of a 16-bit dtype."""
    low, high = tl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(tl.int16, tl.int16),
                                         is_pure=True, pack=1)
    return tl.reshape(tl.join(low, high), (2 * words.shape[0],)).to(T, bitcast=True)


@triton.jit
def _piece(words, part, PARTS: tl.constexpr):
    """Piece number `part` of int32 (n,), cut into PARTS."""
    N: tl.constexpr = words.shape[0] // PARTS
    mine = tl.where(tl.arange(0, PARTS * N) // N == part, words, 0)
    return tl.sum(tl.reshape(mine, (PARTS, N)), 0)


# ---- quantization: the formulas of formats/, bit for bit ----


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax(x, AXIS: tl.constexpr):
    """The largest magnitude; NaN wins, as in torch's amax."""
    return tl.reduce(tl.abs(x), AXIS, _larger)


@triton.jit
def _row_amax(y):
    """`_amax` of all of y (n,): threads meet as integers, of which a warp finds the largest in one instruction."""
    of_8 = _amax(tl.reshape(y, (y.shape[0] // 8, 8)), 1)
    return _float(tl.max(_bits(of_8), 0))


@triton.jit
def _scale_of(amax):
    """max(amax / 448, 2^-126), infinity or NaN if amax is. `_divide`'s two steps: they give what division does for each float32."""
    q = amax * _448TH
    exact = tl.maximum(tl.fma(tl.fma(q, -448.0, amax), _448TH, q), _TINY)
    odd = tl.where(amax == amax, amax, _float(tl.full(amax.shape, 0x7FC00000, tl.int32)))
    return tl.where(amax < float("inf"), exact, odd)


@triton.jit
def _inverse(x):
    """1 / x, correctly rounded: what division gives, in fewer instructions."""
    return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _inverse_inside(x):
    """`_inverse` of 2^-60 < x < 2^60, all that `_divide` uses, without its branches for other numbers."""
    about = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(tl.fma(-x, about, 1.0), about, about)


@triton.jit
def _signed(x, like):
    """x with the sign of `like`, float32."""
    return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, 0x80000000, 0xD8;", "=r,r,r", [x, like], dtype=tl.float32, is_pure=True,
                                     pack=1)


@triton.jit
def _divide(y, by, inverse, LARGEST: tl.constexpr):
    """y / by, correctly rounded where 2^-20 < |y / by| < 2^20, of the right sign and as small or large elsewhere; `by` is a
    scalar and `inverse` is 1 / by, rounded. LARGEST: `by` is `_scale_of` what no |y| is larger than.

    q = y * (1 / by) is a little off; its error, exact in one fused multiply-add, times 1 / by, makes it right (Markstein).
    That needs no intermediate to overflow or vanish: for unusual `by` the division itself is used. e4m3 rounds what is smaller
    to zero, whose sign the correction would lose, and saturates what is larger, of which there is none if LARGEST.
    """
    if (by > 2.0**-60) & (by < 2.0**60):
        q = y * inverse
        exact = tl.fma(tl.fma(q, -by, y), inverse, q)
        if LARGEST:
            q = _signed(exact, q)
        else:
            q = tl.where((tl.abs(q) > 2.0**-20) & (tl.abs(q) < 2.0**20), exact, q)
    else:
        q = tl.div_rn(y, by)
    return q


@triton.jit
def _divide_blocks(y, by):
    """y (blocks, n) / by (blocks,), for `by` as `_scale_of` gives it of a block: what e4m3 makes of it is what it makes of the
    quotient, correctly rounded.

    `_divide`'s two steps, once powers of two have brought `by` to where no intermediate of a quotient that e4m3 tells from zero
    overflows or vanishes; smaller ones keep their sign alone. An infinite `by` has quotients of zero, and NaN of infinity.
    """
    shift = tl.where(by > 2.0**60, 2.0**-64, tl.where(by < 2.0**-60, 2.0**64, 1.0))
    by = by * shift
    inverse = _inverse(by)[:, None]
    by = tl.where(by == float("inf"), 0.0, by)[:, None]
    y = y * shift[:, None]
    q = y * inverse
    exact = tl.fma(tl.fma(-q, by, y), inverse, q)
    return _signed(exact, q)


def _e2m1_asm() -> str:
    """Eight e2m1 codes from float32 $1..$4 (even elements) and $5..$8 (odd ones), masked, a byte each, by $9..$12.

    Of |x| there are 4 codes up to 2, 2 more up to 4 and 1 more up to 6. Each of these shares, from 0 to 1, is one multiplication
    that saturates; adding it to 2^23 or more, whose lowest bit is 1, rounds it, ties to the even code, as the sum is even before
    each share begins. Four codes are the digits, to base 16, of one such number. All of it is floating-point: integer instructions
    have half the rate.
    """
    elements = [f"${1 + i // 2 + i % 2 * 4}" for i in range(8)]

    def digits(to: str, elements: list[str]) -> str:
        next_digit = f"fma.rn.f32 {to}, {to}, 0f41800000, 0fCCF00000;"  # 16 to - 15 * 2^23
        return f"mov.b32 {to}, 0f4B000000;" + next_digit.join(f"""
            abs.f32 x, {e}; mul.rn.sat.f32 m, x, 0f3F000000; fma.rn.f32 {to}, m, 0f40800000, {to};
            fma.rn.sat.f32 m, x, 0f3F000000, 0fBF800000; fma.rn.f32 {to}, m, 0f40000000, {to};
            fma.rn.sat.f32 m, x, 0f3F000000, 0fC0000000; add.rn.f32 {to}, m, {to};""" for e in reversed(elements))

    sign = "".join(f"shf.l.wrap.b32 signs, {e}, signs, 4; " for e in reversed(elements))
    return ("{ .reg .b32 x, m, codes, high, signs; mov.b32 signs, 0;"
            + digits("codes", elements[:4]) + digits("high", elements[4:]) + sign
            + "prmt.b32 codes, codes, high, 0x5410; and.b32 signs, signs, 0x88888888; or.b32 codes, codes, signs;"
            + "prmt.b32 x, $9, $10, 0x4040; prmt.b32 m, $11, $12, 0x4040; prmt.b32 x, x, m, 0x5410; and.b32 $0, codes, x; }")


_E2M1 = tl.constexpr(_e2m1_asm())


@triton.jit
def _e2m1(x, keep, SIZE: tl.constexpr):
    """float32 (blocks, SIZE) to packed e2m1 codes (blocks * SIZE / 2,), uint8, the even element in the low nibble: nearest, ties
    to the even code, saturated. keep (blocks,), int32, masks them: 0 makes a block's codes 0, -1 keeps them."""
    BLOCKS: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, (BLOCKS, SIZE // 2, 2)))
    keep = tl.broadcast_to(keep[:, None], (BLOCKS, SIZE // 2))
    codes = tl.inline_asm_elementwise(_E2M1, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [even, odd, keep], dtype=tl.uint8, is_pure=True, pack=4)
    return tl.reshape(codes, (BLOCKS * SIZE // 2,))


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
def _quantized(y, param, inverse, FMT: tl.constexpr):
    """(data, scales) of some of a row's elements. y: float32 (n,), zero behind the row's end; param, inverse: the scalar of the
    tensor or of the row, and 1 / it. Scales: one for each block, or param."""
    N: tl.constexpr = y.shape[0]
    if FMT == "fp8_tensor" or FMT == "fp8_token":
        return _divide(y, param, inverse, FMT == "fp8_token").to(tl.float8e4nv), param
    else:
        SIZE: tl.constexpr = 128 if FMT == "fp8_block" else 32 if FMT == "mxfp8" else 16
        blocks = tl.reshape(y, (N // SIZE, SIZE))
        amax = _amax(blocks, 1)
        if FMT == "fp8_block":
            scale = _scale_of(amax)
            return tl.reshape(_divide_blocks(blocks, scale), (N,)).to(tl.float8e4nv), scale
        elif FMT == "mxfp8":
            exponent = _bits(amax) >> 23 & 255
            byte = tl.where(exponent == 255, 255, tl.maximum(exponent - 8, 0))
            # 2^(127 - byte): times it is exactly divided by 2^(byte - 127); byte 255 is NaN
            encode = _float(tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23))
            return tl.reshape(blocks * encode[:, None], (N,)).to(tl.float8e4nv), byte.to(tl.uint8)
        else:
            scale = (amax * (param * _SIXTH)).to(tl.float8e4nv)  # saturates: the formula's clamp
            encode = _inverse(scale.to(tl.float32) * inverse)
            encode = tl.where(encode > _FLT_MAX, _FLT_MAX, encode)  # NaN stays
            scaled = blocks * encode[:, None]
            # For such a param encode may be 0, and infinity times it NaN in a block whose scale is none. A loop of one turn with
            # code that nobody may run in advance, as an `if` would become a select for every element.
            for _ in range(0 if param > 2.0**-100 else 1):
                scaled = tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.nan.f32 p, $1, $1; selp.f32 $0, 0f00000000, $1, p; }", "=r,r", [scaled], dtype=tl.float32,
                    is_pure=False, pack=1)
            return _e2m1(scaled, tl.where(encode == encode, -1, 0), SIZE), scale


@triton.jit
def _store_parts(codes, scale, data, scales, row, first, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, FMT: tl.constexpr,
                 SWIZZLED: tl.constexpr, N: tl.constexpr):
    """Write what `_quantized` made of N elements from `first` on (a multiple of N) to row `row` of the parts. BLOCK: a power of
    two, at least HIDDEN."""
    PER: tl.constexpr = 2 if FMT == "nvfp4" else 1  # elements in a byte
    at = first // PER + tl.arange(0, N // PER)
    # as many at once as a thread holds already: wider stores would first move them through shared memory
    tl.store(tl.max_contiguous(data + row * (HIDDEN // PER) + at, 8 // PER), codes, mask=_below(at, HIDDEN // PER, BLOCK // PER))
    if FMT == "fp8_token":
        tl.store(scales + row, scale)
    elif FMT != "fp8_tensor":
        SIZE: tl.constexpr = 128 if FMT == "fp8_block" else 32 if FMT == "mxfp8" else 16
        # one for each piece of 8 elements, of which the first of a block stores it: a scale stays in the threads that have it
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (N // SIZE, SIZE // 8)), (N // 8,))
        _store_scales(scale, scales, row, first, HIDDEN, BLOCK, SIZE, SWIZZLED, N)


@triton.jit
def _store_scales(scale, scales, row, first, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
                  SWIZZLED: tl.constexpr, N: tl.constexpr):
    """Write scales (N / 8,), each as often as a block has pieces of 8 elements; zero the padding behind a row's last."""
    COLUMNS: tl.constexpr = (HIDDEN + SIZE - 1) // SIZE
    STORED: tl.constexpr = (COLUMNS + 3) // 4 * 4 if SWIZZLED else COLUMNS
    piece = first // 8 + tl.arange(0, N // 8)
    column = piece // (SIZE // 8)
    if STORED > COLUMNS:
        scale = tl.where(column < COLUMNS, scale.to(tl.uint8, bitcast=True), 0).to(scale.dtype, bitcast=True)
    tl.store(scales + _scale_at(row, column, COLUMNS, SWIZZLED), scale,
             mask=(piece % (SIZE // 8) == 0) & _below(column, STORED, BLOCK // SIZE))


@triton.jit
def _pad_scales(scales, rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, FMT: tl.constexpr):
    """Zero the scales of the rows that pad a 128x4 layout to a multiple of 128."""
    zeros = tl.zeros((BLOCK // 8,), tl.uint8).to(scales.dtype.element_ty, bitcast=True)
    for r in range(rows + tl.program_id(0), (rows + 127) // 128 * 128, tl.num_programs(0)):
        _store_scales(zeros, scales, tl.cast(r, tl.int64), 0, HIDDEN, BLOCK, 32 if FMT == "mxfp8" else 16, True, BLOCK)


# ---- rows ----


@triton.jit
def _factor(total, eps, HIDDEN: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of a row (BLOCK,), zero behind its end."""
    y = _wide(total)
    return tl.rsqrt(tl.sum(y * y, 0) * (1.0 / HIDDEN) + eps)


@triton.jit
def _unrounded(total, w, factor, offset, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr):
    """RMSNorm of elements of a row, float32."""
    y = _wide(total) * factor
    if CAST_FIRST:
        return _wide(_round(y, total.dtype)) * _wide(w)
    elif HAS_OFFSET:
        return y * (_wide(w) + offset)
    else:
        return y * _wide(w)


@triton.jit
def _normed(total, w, factor, offset, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr):
    """RMSNorm of elements of a row, in its dtype."""
    return _round(_unrounded(total, w, factor, offset, HAS_OFFSET, CAST_FIRST), total.dtype)


@triton.jit
def _sum_and_larger(a, b, c, d):
    return a + c, tl.maximum(b, d, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _factor_and_largest(total, w, eps, offset, HIDDEN: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
                        FMT: tl.constexpr):
    """`_factor` of a row, and the largest |total * w| for `_token_scale`, if that is wanted and can use it."""
    if CAST_FIRST or FMT != "fp8_token":
        return _factor(total, eps, HIDDEN), 0.0
    else:
        y = _wide(total)
        squares, largest = tl.reduce((y * y, tl.abs(_unrounded(total, w, 1.0, offset, HAS_OFFSET, CAST_FIRST))), 0, _sum_and_larger)
        return tl.rsqrt(squares * (1.0 / HIDDEN) + eps), largest


@triton.jit
def _token_scale(total, w, factor, largest, inside, offset, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_OFFSET: tl.constexpr,
                 CAST_FIRST: tl.constexpr):
    """`_scale_of` the largest magnitude of a row's norm.

    Rounding keeps order, so that is the largest before it, rounded. And that is P * factor, with P the largest |total * w|, to a
    few roundings: at most 2^-22 of it, and 2^-22 for products of what is below 2^-126. As a rule both ends of what is possible
    round to the same number, which then it is; else the row is looked at again. So it is if the norm is rounded in between.
    """
    T: tl.constexpr = total.dtype
    if CAST_FIRST:
        unrounded = _unrounded(total, w, factor, offset, HAS_OFFSET, CAST_FIRST)
        scale = _scale_of(_rounded(_row_amax(_ended(unrounded, inside, HIDDEN, BLOCK)), T))
    else:
        most = largest * factor
        high = _rounded(most * (1 + 2.0**-20) + 2.0**-21, T)
        amax = _rounded(tl.maximum(most * (1 - 2.0**-20) - 2.0**-21, 0.0, propagate_nan=tl.PropagateNan.ALL), T)
        scale = _scale_of(amax)
        if (amax != high) | (high >= float("inf")):
            unrounded = _unrounded(total, w, factor, offset, HAS_OFFSET, CAST_FIRST)
            scale = _scale_of(_rounded(_row_amax(_ended(unrounded, inside, HIDDEN, BLOCK)), T))
    return scale


@triton.jit
def _rounded(x, T: tl.constexpr):
    """A float32 scalar, rounded to T."""
    return x.to(T).to(tl.float32)


@triton.jit
def _ended(normed, inside, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """A norm as float32, zero behind the row's end: a NaN factor made NaN of that too."""
    return _wide(normed) if HIDDEN == BLOCK else tl.where(inside, _wide(normed), 0.0)


@triton.jit
def _parts(normed, param, inverse, inside, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, FMT: tl.constexpr):
    """`_quantized` of a row's norm; of bf16 nothing."""
    if FMT == "bf16":
        return normed, normed
    else:
        y = _ended(normed, inside, HIDDEN, BLOCK)
        if FMT == "fp8_token":
            param = _scale_of(_row_amax(y))
            inverse = _inverse_inside(param)
        return _quantized(y, param, inverse, FMT)


@triton.jit
def _finish(summed, factor, w, total, norm, data, scales, param, inverse, row, at, inside, offset, HIDDEN: tl.constexpr,
            BLOCK: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, KEEP_NORM: tl.constexpr, FMT: tl.constexpr,
            SWIZZLED: tl.constexpr):
    """Write a row's sum, whose `_factor` is given, and what is made of it: (the norm, data, scales) to send."""
    tl.store(total + row * HIDDEN + at, summed, mask=inside)
    normed = _normed(summed, w, factor, offset, HAS_OFFSET, CAST_FIRST)
    if KEEP_NORM:
        tl.store(norm + row * HIDDEN + at, normed, mask=inside)
    codes, scale = _parts(normed, param, inverse, inside, HIDDEN, BLOCK, FMT)
    if FMT != "bf16":
        _store_parts(codes, scale, data, scales, row, 0, HIDDEN, BLOCK, FMT, SWIZZLED, BLOCK)
    return normed, codes, scale


@triton.jit
def _at(address, like):
    """An int64 address, a multiple of 16, as a pointer of the type of `like`."""
    return tl.multiple_of(address.to(like.dtype), 16)


@triton.jit
def _ints(address):
    """An int64 address, a multiple of 16, as a pointer to int32."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)


# ---- all_reduce_norm_quant ----


# data, flags: int64 addresses of half 0 on each rank, in the order rank, rank + 1, ..., as arguments of the kernel: a table in
# device memory would cost a load before the first store. In a half, a row of a source rank has slot `source * rows + row`, SLOT
# elements long, and a flag; in loopback a push to a peer lands where the peer's own would. With WORDS, data are addresses of the
# words, `half` is a third of them and `nbytes` its length, and there are no flags.


@triton.jit
def _store_row(like, mine, row, at, inside, half, data, nbytes, rank, rows, WORLD: tl.constexpr, LOOPBACK: tl.constexpr,
               SLOT: tl.constexpr):
    """Store a row, or a part of one, to every peer."""
    for i in tl.static_range(1, WORLD):
        slot = ((rank + i) % WORLD if LOOPBACK else rank) * rows + row
        tl.store(_at(data[i] + half * nbytes + slot * (SLOT * 2), like) + at, mine, mask=inside)


@triton.jit
def _push(like, mine, row, at, inside, half, epoch, data, flags, nbytes, flag_count, rank, rows,
          WORLD: tl.constexpr, LOOPBACK: tl.constexpr, SLOT: tl.constexpr):
    """Store a row to every peer, then set its flag there."""
    _store_row(like, mine, row, at, inside, half, data, nbytes, rank, rows, WORLD, LOOPBACK, SLOT)
    tl.debug_barrier()  # the stores of all threads come before the release of one
    for i in tl.static_range(1, WORLD):
        slot = ((rank + i) % WORLD if LOOPBACK else rank) * rows + row
        _set(flags[i] + half * flag_count * 4 + slot * 4, epoch)


@triton.jit
def _arrived(row, half, epoch, flags, report, flag_count, rank, op, limit_ns, rows, WORLD: tl.constexpr):
    """Wait until the row of every peer has come."""
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        _wait(flags[0] + half * flag_count * 4 + (peer * rows + row) * 4, epoch, row, peer, report, op, limit_ns, 1)


@triton.jit
def _push_words(like, mine, row, at, half, data, nbytes, rank, rows, SIZE: tl.constexpr, WORLD: tl.constexpr,
                LOOPBACK: tl.constexpr, SLOT: tl.constexpr):
    """Store a row, or a part of one, to every peer, with what fills it up to SLOT. `at` counts to SIZE at most."""
    _store_row(like, _scrubbed(mine), row, at, _below(at, SLOT, SIZE), half, data, nbytes, rank, rows, WORLD, LOOPBACK, SLOT)


@triton.jit
def _look(row, half, data, nbytes, rank, rows, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr,
          SLOT: tl.constexpr):
    """(1 while some word of the row has not come from the peers FIRST to END - 1 behind this rank, else 0, the same in all threads;
    the words of the last of these peers)."""
    at = tl.arange(0, BLOCK // 2)
    largest = tl.zeros(at.shape, tl.uint32)
    for i in tl.static_range(FIRST, END):
        of = data[0] + half * nbytes + ((rank + i) % WORLD * rows + row) * (SLOT * 2)
        words = tl.load(_ints(of) + at, mask=_below(at, SLOT // 2, BLOCK // 2), other=0, volatile=True)
        largest = tl.maximum(largest, words.to(tl.uint32, bitcast=True))
    return (tl.max(largest, 0) == 0xFFFFFFFF).to(tl.int32), words  # that nothing has come is the largest of all words


@triton.jit
def _words_arrived(row, half, epoch, data, nbytes, report, rank, op, limit_ns, rows, BLOCK: tl.constexpr, WORLD: tl.constexpr,
                   SLOT: tl.constexpr):
    """Wait until the row of every peer has come; the words of the last peer. All threads leave together, and what any of them saw,
    all may read."""
    absent, looks = 1, 0
    words = tl.zeros((BLOCK // 2,), tl.int32)
    while (absent != 0) & (looks < _LOOKS):
        absent, words = _look(row, half, data, nbytes, rank, rows, 1, WORLD, BLOCK, WORLD, SLOT)
        looks += 1
    if absent != 0:
        start = globaltimer()
        late = 0
        while (absent != 0) & (late == 0):
            absent, words = _look(row, half, data, nbytes, rank, rows, 1, WORLD, BLOCK, WORLD, SLOT)
            # clocks differ among threads, which must leave as one
            late = tl.max(tl.where(tl.arange(0, BLOCK // 2) == 0, (globaltimer() - start > limit_ns).to(tl.int32), 0), 0)
        if absent != 0:
            for i in tl.static_range(1, WORLD):
                missing, _ = _look(row, half, data, nbytes, rank, rows, i, i + 1, BLOCK, WORLD, SLOT)
                if missing != 0:
                    _end_late(data[0], epoch, row, (rank + i) % WORLD, -1, report, op, limit_ns)
            absent, words = _look(row, half, data, nbytes, rank, rows, 1, WORLD, BLOCK, WORLD, SLOT)  # all came at the last moment
    return words


def _await_asm(pieces: int) -> str:
    """Load `pieces` times 16 bytes for each lane, from the addresses behind the words, until no word of the warp's is 0xFFFFFFFF,
    or 256 times. First come the first words of all pieces, then the second, ..."""
    at = range(pieces)
    loads = "".join(f"ld.relaxed.sys.global.v4.b32 {{{', '.join(f'${k * pieces + i}' for k in range(4))}}}, [${4 * pieces + i}];"
                    for i in at)
    largest = "mov.b32 most, $0;" + "".join(f"max.u32 most, most, ${i};" for i in range(1, 4 * pieces))
    return ("{ .reg .pred absent, p; .reg .b32 looks, most; mov.b32 looks, 0; LOOK: " + loads + largest
            + "setp.eq.u32 p, most, 0xffffffff; vote.sync.any.pred absent, p, 0xffffffff; add.u32 looks, looks, 1;"
            + "setp.lt.and.u32 p, looks, 256, absent; @p bra LOOK; }")


_AWAIT_1, _AWAIT_2, _AWAIT_4 = (tl.constexpr(_await_asm(n)) for n in (1, 2, 4))
_AWAITED_1, _AWAITED_2, _AWAITED_4 = (tl.constexpr(",".join(["=&r"] * 4 * n + ["l"] * n)) for n in (1, 2, 4))


@triton.jit
def _await(row, half, data, nbytes, rank, rows, BLOCK: tl.constexpr, SLOT: tl.constexpr):
    """The words of a row of the only peer: the first of each 16 bytes, (BLOCK / 8,), the second, the third and the fourth.

    Each warp waits for its own, not for those of others, and not for ever: what has not come is left as it is."""
    at = tl.arange(0, BLOCK // 8)
    inside = _below(at, SLOT // 8, BLOCK // 8)
    of = data[0] + half * nbytes + ((1 - rank) * rows + row) * (SLOT * 2)
    address = of + tl.where(inside, at, 0).to(tl.int64) * 16
    # as many as a thread has, so that all are under way at once
    PIECES: tl.constexpr = 4 if BLOCK >= 8192 else 2 if BLOCK >= 512 else 1
    ASM: tl.constexpr = _AWAIT_4 if PIECES == 4 else _AWAIT_2 if PIECES == 2 else _AWAIT_1
    REGISTERS: tl.constexpr = _AWAITED_4 if PIECES == 4 else _AWAITED_2 if PIECES == 2 else _AWAITED_1
    a, b, c, d = tl.inline_asm_elementwise(ASM, REGISTERS, [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                                           is_pure=False, pack=PIECES)
    if SLOT < BLOCK:
        a, b, c, d = tl.where(inside, a, 0), tl.where(inside, b, 0), tl.where(inside, c, 0), tl.where(inside, d, 0)
    return a, b, c, d


@triton.jit
def _joined(a, b, c, d, T: tl.constexpr):
    """What `_await` gives, or the same piece of each, as a row or a part of one: (8 n,) of a 16-bit dtype."""
    return _halves(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0] * 4,)), T)


@triton.jit
def _near(row, half, data, nbytes, rank, rows, LEAD: tl.constexpr, SLOT: tl.constexpr):
    """Wait, not for ever, until a word of the row LEAD before this one has come from the only peer."""
    if row >= LEAD:
        of = data[0] + half * nbytes + ((1 - rank) * rows + row - LEAD) * (SLOT * 2)
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b32 looks, v; mov.b32 looks, 0;
            LOOK: ld.relaxed.sys.global.b32 v, [$1]; shfl.sync.idx.b32 v, v, 0, 31, 0xffffffff; add.u32 looks, looks, 1;
            setp.eq.u32 p, v, 0xffffffff; setp.lt.and.u32 p, looks, 4096, p; @p bra LOOK; mov.b32 $0, looks; }""",
            "=r,l", [of], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _clear_words(half, used, data, nbytes, rank, N: tl.constexpr, WORLD: tl.constexpr):
    """Make every word of the third `half` say that nothing has come: `used` pieces of 16 bytes of each peer's place."""
    _clear_some(half, used, data, nbytes, rank, tl.program_id(0) * N, used * 4, tl.num_programs(0) * N, N, WORLD)


@triton.jit
def _clear_some(half, used, data, nbytes, rank, start, end, step, N: tl.constexpr, WORLD: tl.constexpr):
    """Of each peer's place: N words from `start` on, from `start + step`, ..., that begin before `end`."""
    at = tl.arange(0, N)
    for i in tl.static_range(1, WORLD):
        of = data[0] + half * nbytes + (rank + i) % WORLD * (used * 16)
        for first in range(start, tl.minimum(end, used * 4), step):
            tl.store(_ints(of + first * 4) + at, tl.full((N,), -1, tl.int32), mask=at // 4 < used - first // 4)


@triton.jit
def _sum(own, mine, row, at, inside, half, data, nbytes, rank, rows, WORLD: tl.constexpr, SLOT: tl.constexpr):
    """The sum of the ranks' rows, or of elements of them: float32, in rank order, rounded once. own: this rank's row;
    mine: its elements, for two ranks alone (more read them again: to choose an address takes one instruction, not one each)."""
    if WORLD == 2:  # either order gives the same bits
        theirs = _at(data[0] + half * nbytes + ((1 - rank) * rows + row) * (SLOT * 2), own)
        return _plus(mine, tl.load(theirs + at, mask=inside, other=0.0, cache_modifier=".cg"))
    else:
        acc = tl.zeros(at.shape, tl.float32)
        for p in tl.static_range(WORLD):
            of = tl.where(rank == p, own, _at(data[0] + half * nbytes + (p * rows + row) * (SLOT * 2), own))
            part = _wide(tl.load(of + at, mask=inside, other=0.0, cache_modifier=".cg"))
            acc = part if p == 0 else acc + part  # starting at 0.0 would lose the sign of -0.0
        return _round(acc, own.dtype.element_ty)


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "rows", "eps", "offset"])
def one_shot_few(
    x, residual, weight, parameter, total, norm, data, scales,
    peer_words, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, rows, eps, offset,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, PARTS: tl.constexpr, WAIT: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """`one_shot` for few rows: PARTS programs for each, which push, normalize and quantize a part of it each.

    The rows come in words, without flags: what a program waits for is the whole row, as it needs what a row's parts have in
    common, the sum of its squares (and its amax). Each part computes that from the whole row: that is quicker than to ask the
    others. CLEAR False leaves out that the words of the launch before are cleared: for tests.
    """
    SLOT: tl.constexpr = (HIDDEN + 7) // 8 * 8  # rows start at multiples of 16 bytes
    N: tl.constexpr = BLOCK // PARTS
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    first = part * N
    at = first + tl.arange(0, N)
    inside = _below(at, HIDDEN, BLOCK)
    whole = tl.arange(0, BLOCK)
    whole_inside = _below(whole, HIDDEN, BLOCK)
    # All that needs no epoch is under way before it is asked for.
    epoch = _epoch(state)
    turn, used = _words(state)
    own = x + row * X_STRIDE
    mine = tl.load(own + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * RESIDUAL_STRIDE + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0)
    if PARTS > 1:
        mine_all = tl.load(own + whole, mask=whole_inside, other=0.0)
        if HAS_RESIDUAL:
            before_all = tl.load(residual + row * RESIDUAL_STRIDE + whole, mask=whole_inside, other=0.0)
        if FMT == "fp8_token":
            w_all = _wide(tl.load(weight + whole, mask=whole_inside, other=0.0), False)
    param, inverse = 0.0, 0.0
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
    _push_words(x, mine, row, at, turn, peer_words, nbytes, rank, rows, BLOCK, WORLD, LOOPBACK, SLOT)
    tl.debug_barrier()
    counted = _count_in(state)
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        inverse = _inverse(param)
    if SWIZZLED:
        _pad_scales(scales, rows, HIDDEN, BLOCK, FMT)
    if CLEAR:
        _clear_words((turn + 2) % 3, used, peer_words, nbytes, rank, N // 2, WORLD)
    QUICK: tl.constexpr = WAIT and WORLD == 2  # they come into registers
    row_w = w_all if PARTS > 1 and FMT == "fp8_token" else w
    row_mine = mine_all if PARTS > 1 else mine
    if QUICK:
        a, b, c, d = _await(row, turn, peer_words, nbytes, rank, rows, BLOCK, SLOT)
        row_sum = _plus(row_mine, _joined(a, b, c, d, x.dtype.element_ty))
    else:
        if WAIT:
            _words_arrived(row, turn, epoch, peer_words, nbytes, report, rank, op, limit_ns, rows, BLOCK, WORLD, SLOT)
        row_sum = _sum(own, row_mine, row, whole, whole_inside, turn, peer_words, nbytes, rank, rows, WORLD, SLOT)
    if HAS_RESIDUAL:
        row_sum = _plus(before_all if PARTS > 1 else before, row_sum)
    factor, largest = _factor_and_largest(row_sum, row_w, eps, offset, HIDDEN, HAS_OFFSET, CAST_FIRST, FMT)
    if QUICK and PARTS == 4:
        summed = _plus(mine, _joined(_piece(a, part, PARTS), _piece(b, part, PARTS), _piece(c, part, PARTS), _piece(d, part, PARTS),
                                     x.dtype.element_ty))
    if QUICK and factor != factor:  # NaN, as it is while a word has not come
        _words_arrived(row, turn, epoch, peer_words, nbytes, report, rank, op, limit_ns, rows, BLOCK, WORLD, SLOT)
        row_mine = tl.load(own + whole, mask=whole_inside, other=0.0)
        row_sum = _sum(own, row_mine, row, whole, whole_inside, turn, peer_words, nbytes, rank, rows, WORLD, SLOT)
        if HAS_RESIDUAL:
            row_sum = _plus(tl.load(residual + row * RESIDUAL_STRIDE + whole, mask=whole_inside, other=0.0), row_sum)
        factor, largest = _factor_and_largest(row_sum, row_w, eps, offset, HIDDEN, HAS_OFFSET, CAST_FIRST, FMT)
        if PARTS == 4:
            summed = _sum(own, mine, row, at, inside, turn, peer_words, nbytes, rank, rows, WORLD, SLOT)
    if PARTS == 1:
        summed = row_sum
    else:
        if not QUICK or PARTS == 2:  # of a piece of two, Triton would move words between threads: to load them again is quicker
            summed = _sum(own, mine, row, at, inside, turn, peer_words, nbytes, rank, rows, WORLD, SLOT)
        if HAS_RESIDUAL:
            summed = _plus(before, summed)
    tl.store(total + row * HIDDEN + at, summed, mask=inside)
    normed = _normed(summed, w, factor, offset, HAS_OFFSET, CAST_FIRST)
    if KEEP_NORM:
        tl.store(norm + row * HIDDEN + at, normed, mask=inside)
    if FMT != "bf16":
        y = _ended(normed, inside, HIDDEN, BLOCK)
        if FMT == "fp8_token":
            param = _token_scale(row_sum, row_w, factor, largest, whole_inside, offset, HIDDEN, BLOCK, HAS_OFFSET, CAST_FIRST)
            inverse = _inverse_inside(param)
        codes, scale = _quantized(y, param, inverse, FMT)
        _store_parts(codes, scale, data, scales, row, first, HIDDEN, BLOCK, FMT, SWIZZLED, N)
    _leave_words(state, counted, (turn + 1) % 3 << 32 | rows * (SLOT // 8))
    _leave_epoch(state, counted)


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "rows", "eps", "offset"])
def one_shot(
    x, residual, weight, parameter, total, norm, data, scales,
    peer_data, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, rows, eps, offset,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, WAIT: tl.constexpr,
):
    """Each row goes to every peer whole, and every rank adds the rows of all ranks, in rank order, itself.

    A program pushes the row that it will do next before it waits for one. All programs of a launch fit on the device at once, so
    nobody waits for a program that has not started.

    x, residual  (rows, HIDDEN) of one 16-bit dtype, strides (X_STRIDE, 1) and (RESIDUAL_STRIDE, 1)
    weight       (HIDDEN,) of any float dtype
    total, norm  (rows, HIDDEN) of x's dtype, contiguous
    data, scales the parts of FMT, contiguous; parameter its scalar
    WAIT         False leaves the waits out: for tests
    """
    SLOT: tl.constexpr = (HIDDEN + 7) // 8 * 8
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    pid, step = tl.program_id(0), tl.num_programs(0)
    epoch = _epoch(state)
    half = (epoch & 1).to(tl.int64)
    w = tl.load(weight + at, mask=inside, other=0.0)
    param, inverse = 0.0, 0.0
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
    first = tl.cast(pid, tl.int64)
    mine = tl.load(x + first * X_STRIDE + at, mask=inside & (first < rows), other=0.0)
    if first < rows:
        _push(x, mine, first, at, inside, half, epoch, peer_data, peer_flags, nbytes, flag_count, rank, rows, WORLD, LOOPBACK, SLOT)
    tl.debug_barrier()
    counted = _count_in(state)
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        inverse = _inverse(param)
    if SWIZZLED:
        _pad_scales(scales, rows, HIDDEN, BLOCK, FMT)
    for r in range(pid, rows, step):
        row = tl.cast(r, tl.int64)
        following = row + step
        ahead = tl.load(x + following * X_STRIDE + at, mask=inside & (following < rows), other=0.0)
        mine = tl.load(x + row * X_STRIDE + at, mask=inside, other=0.0)  # again: to keep it in registers takes more than this
        if HAS_RESIDUAL:
            before = tl.load(residual + row * RESIDUAL_STRIDE + at, mask=inside, other=0.0)
        if following < rows:
            _push(x, ahead, following, at, inside, half, epoch, peer_data, peer_flags, nbytes, flag_count, rank, rows,
                  WORLD, LOOPBACK, SLOT)
        if WAIT:
            _arrived(row, half, epoch, peer_flags, report, flag_count, rank, op, limit_ns, rows, WORLD)
        summed = _sum(x + row * X_STRIDE, mine, row, at, inside, half, peer_data, nbytes, rank, rows, WORLD, SLOT)
        if HAS_RESIDUAL:
            summed = _plus(before, summed)
        _finish(summed, _factor(summed, eps, HIDDEN), w, total, norm, data, scales, param, inverse, row, at, inside, offset,
                HIDDEN, BLOCK, HAS_OFFSET, CAST_FIRST, KEEP_NORM, FMT, SWIZZLED)
    _leave_epoch(state, counted)


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "rows", "eps", "offset", "pushers"])
def streamed(
    x, residual, weight, parameter, total, norm, data, scales,
    peer_words, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, rows, eps, offset, pushers,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, WAIT: tl.constexpr, CLEAR: tl.constexpr,
    LEAD: tl.constexpr,
):
    """`one_shot` in words: the first `pushers` programs push all rows, in order, and do nothing else; the others push none.

    So the wire has the next row at once, whatever the others wait for, and rows arrive in the order in which they are waited for.
    CLEAR False leaves out that the words of the launch before are cleared, which goes along with the rows: for tests.
    """
    SLOT: tl.constexpr = (HIDDEN + 7) // 8 * 8
    QUICK: tl.constexpr = WAIT and WORLD == 2  # words come into registers
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    pid, step = tl.program_id(0), tl.num_programs(0) - pushers
    epoch = _epoch(state)
    turn, used = _words(state)
    if SWIZZLED:
        _pad_scales(scales, rows, HIDDEN, BLOCK, FMT)
    if pid < pushers:
        row = tl.cast(pid, tl.int64)
        ahead = tl.load(x + row * X_STRIDE + at, mask=inside & (row < rows), other=0.0)
        while row < rows:
            mine, following = ahead, row + pushers
            ahead = tl.load(x + following * X_STRIDE + at, mask=inside & (following < rows), other=0.0)
            _push_words(x, mine, row, at, turn, peer_words, nbytes, rank, rows, BLOCK, WORLD, LOOPBACK, SLOT)
            row = following
        tl.debug_barrier()
        counted = _count_in(state)
    else:
        w = tl.load(weight + at, mask=inside, other=0.0)
        param, inverse = 0.0, 0.0
        if FMT == "fp8_tensor" or FMT == "nvfp4":
            param = tl.load(parameter)
            inverse = _inverse(param)
        row = tl.cast(pid - pushers, tl.int64)
        if CLEAR:  # what more the launch before used than has a row below
            _clear_some((turn + 2) % 3, used, peer_words, nbytes, rank, (row + rows) * (BLOCK // 2), used * 4, step * (BLOCK // 2),
                        BLOCK // 2, WORLD)
        tl.debug_barrier()
        counted = _count_in(state)
        while row < rows:
            if QUICK and LEAD > 0:
                _near(row, turn, peer_words, nbytes, rank, rows, LEAD, SLOT)
            mine = tl.load(x + row * X_STRIDE + at, mask=inside, other=0.0)
            if HAS_RESIDUAL:
                before = tl.load(residual + row * RESIDUAL_STRIDE + at, mask=inside, other=0.0)
            if CLEAR:
                start = row * (BLOCK // 2)
                _clear_some((turn + 2) % 3, used, peer_words, nbytes, rank, start, start + 1, 1, BLOCK // 2, WORLD)
            if QUICK:
                a, b, c, d = _await(row, turn, peer_words, nbytes, rank, rows, BLOCK, SLOT)
                summed = _plus(mine, _joined(a, b, c, d, x.dtype.element_ty))
            else:
                if WAIT:
                    _words_arrived(row, turn, epoch, peer_words, nbytes, report, rank, op, limit_ns, rows, BLOCK, WORLD, SLOT)
                summed = _sum(x + row * X_STRIDE, mine, row, at, inside, turn, peer_words, nbytes, rank, rows, WORLD, SLOT)
            if HAS_RESIDUAL:
                summed = _plus(before, summed)
            factor = _factor(summed, eps, HIDDEN)
            if QUICK and factor != factor:  # NaN, as it is while a word has not come
                _words_arrived(row, turn, epoch, peer_words, nbytes, report, rank, op, limit_ns, rows, BLOCK, WORLD, SLOT)
                mine = tl.load(x + row * X_STRIDE + at, mask=inside, other=0.0)
                summed = _sum(x + row * X_STRIDE, mine, row, at, inside, turn, peer_words, nbytes, rank, rows, WORLD, SLOT)
                if HAS_RESIDUAL:
                    summed = _plus(tl.load(residual + row * RESIDUAL_STRIDE + at, mask=inside, other=0.0), summed)
                factor = _factor(summed, eps, HIDDEN)
            _finish(summed, factor, w, total, norm, data, scales, param, inverse, row, at, inside, offset,
                    HIDDEN, BLOCK, HAS_OFFSET, CAST_FIRST, KEEP_NORM, FMT, SWIZZLED)
            row += step
    _leave_words(state, counted, (turn + 1) % 3 << 32 | rows * (SLOT // 8))
    _leave_epoch(state, counted)


@triton.jit
def _copy_row(arrived, arrived_scales, data, scales, row, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, FMT: tl.constexpr,
              SWIZZLED: tl.constexpr):
    """A row's parts, linear at `arrived` and `arrived_scales`, to row `row` of the parts."""
    PER: tl.constexpr = 2 if FMT == "nvfp4" else 1
    at = tl.arange(0, BLOCK // PER)
    inside = _below(at, HIDDEN // PER, BLOCK // PER)
    codes = tl.load(tl.max_contiguous(arrived + at, 8), mask=inside, cache_modifier=".cg")
    tl.store(tl.max_contiguous(data + row * (HIDDEN // PER) + at, 8), codes, mask=inside)
    if FMT == "fp8_token":
        tl.store(scales + row, tl.load(arrived_scales, cache_modifier=".cg"))
    elif FMT != "fp8_tensor" and FMT != "bf16":
        SIZE: tl.constexpr = 128 if FMT == "fp8_block" else 32 if FMT == "mxfp8" else 16
        COLUMNS: tl.constexpr = (HIDDEN + SIZE - 1) // SIZE
        STORED: tl.constexpr = (COLUMNS + 3) // 4 * 4 if SWIZZLED else COLUMNS
        column = tl.arange(0, BLOCK // SIZE)
        inside = _below(column, COLUMNS, BLOCK // SIZE)
        scale = tl.load(arrived_scales + column, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(scales + _scale_at(row, column, COLUMNS, SWIZZLED), scale, mask=_below(column, STORED, BLOCK // SIZE))


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "rows", "eps", "offset"])
def two_shot(
    x, residual, weight, parameter, total, norm, data, scales,
    peer_data, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, rows, eps, offset,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, WAIT: tl.constexpr,
    DATA_AT: tl.constexpr, SCALES_AT: tl.constexpr, ROW_BYTES: tl.constexpr,
):
    """Each row goes to one rank, its owner, which sums, normalizes and quantizes it and sends the results to every peer.

    The arguments are `one_shot`'s. A half has the rows of all ranks that this one owns, slot `source * per + row`, then the
    results of all owners, ROW_BYTES each, slot `owner * per + row`: the sum, the norm if it is kept, data from byte DATA_AT on,
    scales from SCALES_AT on. Flags likewise.
    """
    SLOT: tl.constexpr = (HIDDEN + 7) // 8 * 8
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    pid, step = tl.program_id(0), tl.num_programs(0)
    per = (rows + WORLD - 1) // WORLD
    own = tl.maximum(0, tl.minimum(per, rows - rank * per))
    results = (WORLD * per).to(tl.int64) * (SLOT * 2)
    epoch = _epoch(state)
    w = tl.load(weight + at, mask=inside, other=0.0)
    param, inverse = 0.0, 0.0
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
        inverse = _inverse(param)
    parity = (epoch & 1).to(tl.int64)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        source = peer if LOOPBACK else rank
        owner = rank if LOOPBACK else peer  # what the peer would have sent here are this rank's rows
        for r in range(pid, tl.minimum(per, rows - owner * per), step):
            row = tl.cast(r, tl.int64)
            mine = tl.load(x + (owner * per + row) * X_STRIDE + at, mask=inside, other=0.0)
            tl.store(_at(peer_data[i] + parity * nbytes + (source * per + row) * (SLOT * 2), x) + at, mine, mask=inside)
            tl.debug_barrier()
            _set(peer_flags[i] + parity * flag_count * 4 + (source * per + row) * 4, epoch)
    tl.debug_barrier()
    counted = _count_in(state)
    if SWIZZLED:
        _pad_scales(scales, rows, HIDDEN, BLOCK, FMT)
    for r in range(pid, own, step):
        local = tl.cast(r, tl.int64)
        row = rank * per + local
        mine = tl.load(x + row * X_STRIDE + at, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            before = tl.load(residual + row * RESIDUAL_STRIDE + at, mask=inside, other=0.0)
        if WAIT:
            _arrived(local, parity, epoch, peer_flags, report, flag_count, rank, op, limit_ns, per, WORLD)
        summed = _sum(x + row * X_STRIDE, mine, local, at, inside, parity, peer_data, nbytes, rank, per, WORLD, SLOT)
        if HAS_RESIDUAL:
            summed = _plus(before, summed)
        normed, codes, scale = _finish(summed, _factor(summed, eps, HIDDEN), w, total, norm, data, scales, param, inverse, row, at,
                                       inside, offset, HIDDEN, BLOCK, HAS_OFFSET, CAST_FIRST, KEEP_NORM, FMT, SWIZZLED)
        for i in tl.static_range(1, WORLD):
            slot = ((rank + i) % WORLD if LOOPBACK else rank) * per + local
            to = peer_data[i] + parity * nbytes + results + slot * ROW_BYTES
            tl.store(_at(to, x) + at, summed, mask=inside)
            if KEEP_NORM:
                tl.store(_at(to + SLOT * 2, x) + at, normed, mask=inside)
            if FMT != "bf16":
                _store_parts(codes, scale, _at(to + DATA_AT, data), _at(to + SCALES_AT, scales), 0, 0, HIDDEN, BLOCK, FMT, False,
                             BLOCK)
        tl.debug_barrier()
        for i in tl.static_range(1, WORLD):
            slot = ((rank + i) % WORLD if LOOPBACK else rank) * per + local
            _set(peer_flags[i] + parity * flag_count * 4 + (WORLD * per + slot) * 4, epoch)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        for r in range(pid, tl.minimum(per, rows - peer * per), step):
            local = tl.cast(r, tl.int64)
            row = peer * per + local
            if WAIT:
                flag = peer_flags[0] + parity * flag_count * 4 + (WORLD * per + peer * per + local) * 4
                _wait(flag, epoch, row, peer, report, op, limit_ns, 1)
            of = peer_data[0] + parity * nbytes + results + (peer * per + local) * ROW_BYTES
            summed = tl.load(_at(of, x) + at, mask=inside, cache_modifier=".cg")
            tl.store(total + row * HIDDEN + at, summed, mask=inside)
            if KEEP_NORM:
                normed = tl.load(_at(of + SLOT * 2, x) + at, mask=inside, cache_modifier=".cg")
                tl.store(norm + row * HIDDEN + at, normed, mask=inside)
            if FMT != "bf16":
                _copy_row(_at(of + DATA_AT, data), _at(of + SCALES_AT, scales), data, scales, row, HIDDEN, BLOCK, FMT, SWIZZLED)
    _leave_epoch(state, counted)


# ---- norm_quant_all_gather_matmul: all of it but the matmul ----


@triton.jit
def _row(x, residual, r, at, inside, rows, X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
         HINT: tl.constexpr):
    """Row r of x and of the residual (of x again if there is none), if there is such a row."""
    row, there = tl.cast(r, tl.int64), inside & (r < rows)
    mine = tl.load(x + row * X_STRIDE + at, mask=there, other=0.0, eviction_policy=HINT)
    if HAS_RESIDUAL:
        return mine, tl.load(residual + row * RESIDUAL_STRIDE + at, mask=there, other=0.0, eviction_policy=HINT)
    else:
        return mine, mine


@triton.jit
def _fetch(x, residual, r, rows, HIDDEN: tl.constexpr, X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
           HAS_RESIDUAL: tl.constexpr):
    """Send for row r of x and of the residual, if there is such a row, to the L2 cache."""
    if r < rows:
        row = tl.cast(r, tl.int64)
        _fetch_bytes(x + row * X_STRIDE, HIDDEN * 2)
        if HAS_RESIDUAL:
            _fetch_bytes(residual + row * RESIDUAL_STRIDE, HIDDEN * 2)


@triton.jit
def _fetch_bytes(of, BYTES: tl.constexpr):
    """By one thread; in whole 16 bytes, none of them beyond the last byte."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t; .reg .b64 a; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; and.b64 a, $1, -16;
        @p cp.async.bulk.prefetch.L2.global [a], $2; mov.b32 $0, t; }""", "=r,l,n", [of, BYTES // 16 * 16], dtype=tl.int32,
        is_pure=False, pack=1)


@triton.jit(do_not_specialize=["nbytes", "flag_count", "rank", "op", "limit_ns", "rows", "eps", "offset", "scales_at"])
def norm_quant_push(
    x, residual, weight, parameter, total, norm, data, scales, ticket,
    peer_data, peer_flags, state, report, nbytes, flag_count, rank, op, limit_ns, rows, eps, offset, scales_at,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    KEEP_NORM: tl.constexpr, FMT: tl.constexpr, SWIZZLED: tl.constexpr, GATHER: tl.constexpr, WAIT: tl.constexpr,
    FETCH: tl.constexpr, SEND: tl.constexpr,
):
    """Residual add, RMSNorm and quantization of this rank's rows, whose parts also go to every peer if SEND; else this is no
    exchange, and the workspace is left alone.

    x, residual   (rows, HIDDEN) of one 16-bit dtype, strides (X_STRIDE, 1) and (RESIDUAL_STRIDE, 1)
    weight        (HIDDEN,) of any float dtype
    total, norm   (rows, HIDDEN) of x's dtype, contiguous; total only with a residual
    data, scales  the parts of FMT, contiguous: of all ranks' rows if GATHER, else of this rank's. For bf16 the data is the norm
    ticket        int32 (1,): gets the epoch
    FETCH         how a program comes by its next row while it works on one. True: to the L2 cache, at once. False: when it has the
                  norm of one, to the registers that are free by then, and the weight for each row; what is read and the total are
                  what is not needed again

    What a peer pushes lies in the half of the epoch: row r of rank s is row `s * rows + r` of the data, and of the linear scales,
    which begin at byte `scales_at`. Its flag is number `s * programs + r % programs`, set once all rows of that program have come,
    for one fence. With GATHER the kernel waits for them and copies them into data and scales; without, whatever runs next on this
    stream has to wait for every flag before the next exchange may begin. Programs take rows in turn: what all of them read and
    write at a time lies side by side. Nothing is stored before the norm is there, as what warps tell each other for it would wait
    behind that.
    """
    PER: tl.constexpr = 2 if FMT == "nvfp4" else 1
    SIZE: tl.constexpr = 128 if FMT == "fp8_block" else 32 if FMT == "mxfp8" else 16 if FMT == "nvfp4" else HIDDEN
    DATA_ROW: tl.constexpr = HIDDEN // PER
    SCALES_ROW: tl.constexpr = (HIDDEN + SIZE - 1) // SIZE
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    pid, step = tl.program_id(0), tl.num_programs(0)
    base = rank * rows if GATHER else rank * 0
    r = pid
    HINT: tl.constexpr = "" if FETCH else "evict_first"
    if FETCH:
        _fetch(x, residual, r, rows, HIDDEN, X_STRIDE, RESIDUAL_STRIDE, HAS_RESIDUAL)
        w = tl.load(weight + at, mask=inside, other=0.0)
    else:
        next_summed, next_before = _row(x, residual, r, at, inside, rows, X_STRIDE, RESIDUAL_STRIDE, HAS_RESIDUAL, HINT)
    if SEND:
        epoch = _epoch(state)
    param, inverse = 0.0, 0.0
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
        inverse = _inverse(param)
    if SEND:
        parity = (epoch & 1).to(tl.int64)
        half = parity * nbytes
        if pid == 0:
            tl.store(ticket, epoch)
        tl.debug_barrier()
        counted = _count_in(state)
    if SWIZZLED:
        _pad_scales(scales, WORLD * rows if GATHER else rows, HIDDEN, BLOCK, FMT)
    while r < rows:
        row = tl.cast(r, tl.int64)
        if FETCH:
            _fetch(x, residual, r + step, rows, HIDDEN, X_STRIDE, RESIDUAL_STRIDE, HAS_RESIDUAL)
            summed, before = _row(x, residual, r, at, inside, rows, X_STRIDE, RESIDUAL_STRIDE, HAS_RESIDUAL, HINT)
        else:
            summed, before = next_summed, next_before
            w = tl.load(weight + at, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            summed = _plus(before, summed)
        normed = _normed(summed, w, _factor(summed, eps, HIDDEN), offset, HAS_OFFSET, CAST_FIRST)
        if not FETCH:
            next_summed, next_before = _row(x, residual, r + step, at, inside, rows, X_STRIDE, RESIDUAL_STRIDE, HAS_RESIDUAL, HINT)
        if HAS_RESIDUAL:
            tl.store(total + row * HIDDEN + at, summed, mask=inside, cache_modifier="" if FETCH else ".cs")
        if KEEP_NORM:
            tl.store(norm + row * HIDDEN + at, normed, mask=inside)
        if FMT == "bf16":
            tl.store(data + (base + row) * HIDDEN + at, normed, mask=inside)
        else:
            codes, scale = _parts(normed, param, inverse, inside, HIDDEN, BLOCK, FMT)
            _store_parts(codes, scale, data, scales, base + row, 0, HIDDEN, BLOCK, FMT, SWIZZLED, BLOCK)
        for i in tl.static_range(1, WORLD if SEND else 1):
            source = (rank + i) % WORLD if LOOPBACK else rank
            to = _at(peer_data[i] + half, data)
            if FMT == "bf16":
                tl.store(to + (source * rows + row) * HIDDEN + at, normed, mask=inside)
            else:
                _store_parts(codes, scale, to, _at(peer_data[i] + half + scales_at, scales), source * rows + row, 0,
                             HIDDEN, BLOCK, FMT, False, BLOCK)
        r += step
    if SEND:
        tl.debug_barrier()
        for i in tl.static_range(1, WORLD):
            source = (rank + i) % WORLD if LOOPBACK else rank
            _set(peer_flags[i] + parity * flag_count * 4 + (source * step + pid) * 4, epoch)
    if GATHER:
        for i in tl.static_range(1, WORLD):
            peer = (rank + i) % WORLD
            if WAIT:
                _wait(peer_flags[0] + parity * flag_count * 4 + (peer * step + pid) * 4, epoch, pid, peer, report, op, limit_ns, 1)
            for r in range(pid, rows, step):
                row = tl.cast(peer * rows + r, tl.int64)
                of = _at(peer_data[0] + half, data) + row * DATA_ROW
                scales_of = _at(peer_data[0] + half + scales_at, scales) + row * SCALES_ROW
                _copy_row(of, scales_of, data, scales, row, HIDDEN, BLOCK, FMT, SWIZZLED)
    if SEND:
        _leave_epoch(state, counted)
