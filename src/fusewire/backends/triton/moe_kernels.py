"""Triton kernels of mixture of experts. Only the backend beside this file imports it, when it runs."""
from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _amax, _below, _bits, _inverse, _larger, _quantized, _scale_of, _wide
from .transfer import _begin, _signal, _wait_all


@triton.jit(do_not_specialize=["rows"])
def router_logits(x, w, out, rows, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, X_STRIDE: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr):
    """out (rows, EXPERTS) float32 = x (rows, HIDDEN) times w (EXPERTS, HIDDEN), both of one 16-bit dtype; if SPLIT, out
    (PARTS, rows, EXPERTS), whose sum that is.

    HIDDEN is cut into PARTS, each added up by itself, and then one after the other: a row's bits depend neither on the others nor
    on how the work is shared, as long as COLUMNS, the width of a tensor core's instruction, stays the same.
    """
    PART: tl.constexpr = (HIDDEN + PARTS * DEPTH - 1) // (PARTS * DEPTH) * DEPTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, DEPTH)
    from_x = x + row[:, None].to(tl.int64) * X_STRIDE + at[None, :]
    from_w = w + column[None, :] * HIDDEN + at[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(1 if SPLIT else PARTS):
        first = (tl.program_id(2) + i) * PART
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(first, tl.minimum(first + PART, HIDDEN), DEPTH):
            inside = _below(at + k, HIDDEN, (HIDDEN + DEPTH - 1) // DEPTH * DEPTH)
            a = tl.load(from_x + k, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            b = tl.load(from_w + k, mask=(column < EXPERTS)[None, :] & inside[:, None], other=0.0)
            part = tl.dot(a, b, part)
        total += part
    to = out + (tl.program_id(2) * rows + row)[:, None].to(tl.int64) * EXPERTS + column[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < EXPERTS)[None, :])


@triton.jit(do_not_specialize=["n"])
def add_parts(parts, out, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out (n,) = the sum of parts (PARTS, n), one after the other."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts + i * n + at, mask=at < n, other=0.0)
    tl.store(out + at, total, mask=at < n)


@triton.jit
def _two_best(a, after_a, b, after_b):
    """The two largest of (a, after_a) and (b, after_b), the larger first in each."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(after_a, after_b))


@triton.jit
def _ordered(x):
    """float32 as int32 in the same order, NaN the largest: a warp finds the largest integer in one instruction."""
    bits = _bits(x)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


@triton.jit
def _choose(logits, bias, first, rows, scale, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
            SIGMOID: tl.constexpr, RENORMALIZED: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
            TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """(ids int32, weights float32), each (TOKENS, SLOTS), of the tokens from `first` on, see `ops.moe.CHOICES`: K of them are set.

    A token's logits lie in one warp; its weights are made of those that are chosen, which are loaded once more.
    """
    LOWEST: tl.constexpr = -(1 << 31)
    token = first + tl.arange(0, TOKENS)
    expert = tl.arange(0, BLOCK)
    there = expert < EXPERTS
    minus = float("-inf")
    from_logits = logits + token[:, None].to(tl.int64) * EXPERTS
    if BLOCK == 256:  # 128 are as many as a warp loads at once: of more, Triton would give each row to two
        half = from_logits + tl.arange(0, 128)[None, :]
        low = tl.load(half, mask=(token < rows)[:, None] & (tl.arange(0, 128) < EXPERTS)[None, :], other=minus)
        high = tl.load(half + 128, mask=(token < rows)[:, None] & (tl.arange(128, 256) < EXPERTS)[None, :], other=minus)
        x = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (TOKENS, BLOCK))
    else:
        x = tl.load(from_logits + expert[None, :], mask=(token < rows)[:, None] & there[None, :], other=minus)
    slot = tl.arange(0, SLOTS)
    if SIGMOID:
        c = 1.0 / (1.0 + tl.exp(-x))
        if HAS_BIAS:
            c += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)[None, :]
        if TOP_GROUPS < GROUPS:  # EXPERTS == BLOCK then
            grouped = tl.reshape(c, (TOKENS, GROUPS, BLOCK // GROUPS))
            best, second = tl.reduce((grouped, tl.full(grouped.shape, minus, tl.float32)), 2, _two_best)
            value = best + second
            group = tl.arange(0, GROUPS)
            of, other = value[:, :, None], value[:, None, :]
            better = (other > of) | ((other == of) & (group[None, None, :] < group[None, :, None]))
            kept = tl.sum(better.to(tl.int32), 2) < TOP_GROUPS
            c = tl.reshape(tl.where(kept[:, :, None], grouped, minus), (TOKENS, BLOCK))
    else:
        largest = tl.max(x, 1)
        total = tl.sum(tl.exp(x - largest[:, None]), 1)
        c = tl.exp(x - largest[:, None]) / total[:, None]
    key = tl.where(there[None, :], _ordered(c), LOWEST)
    ids = tl.zeros((TOKENS, SLOTS), tl.int32)
    for i in tl.static_range(K):
        first_best = tl.min(tl.where(key == tl.max(key, 1)[:, None], expert[None, :], BLOCK), 1)[:, None]
        ids = tl.where(slot[None, :] == i, first_best, ids)
        key = tl.where(expert[None, :] == first_best, LOWEST, key)
    y = tl.load(from_logits + ids, mask=(token < rows)[:, None], other=0.0)
    if SIGMOID:
        p = 1.0 / (1.0 + tl.exp(-y))
    else:
        p = tl.exp(y - largest[:, None]) / total[:, None]
    if RENORMALIZED:
        of_all = tl.sum(tl.where(slot[None, :] < K, p, 0.0), 1)[:, None]
        p = p / (of_all + 1e-20 if SIGMOID else of_all)
    return ids, p * scale


# ---- rows, in pieces of PIECE elements, a power of two: small ones keep a thread's registers few and its loads apart ----


@triton.jit
def _load_row(x, row, HIDDEN: tl.constexpr, PIECE: tl.constexpr, X_STRIDE: tl.constexpr):
    """The pieces of row number `row`, int64, all of them on their way at once."""
    PIECES: tl.constexpr = (HIDDEN + PIECE - 1) // PIECE
    pieces = ()
    for i in tl.static_range(PIECES):
        at = i * PIECE + tl.arange(0, PIECE)
        piece = tl.load(x + row * X_STRIDE + at, mask=_below(at, HIDDEN, PIECES * PIECE), other=0.0)
        pieces = pieces + (piece,)  # type: ignore[assignment]  # noqa: RUF005  (Triton's tuples)
    return pieces


@triton.jit
def _given(parameter, FMT: tl.constexpr):
    """(the scalar of all rows, 1 / it), of formats that have one."""
    if FMT == "fp8_tensor" or FMT == "nvfp4":
        param = tl.load(parameter)
        return param, _inverse(param)
    else:
        return 1.0, 1.0


@triton.jit
def _own(pieces, param, inverse, FMT: tl.constexpr):
    """(the scalar of a row, 1 / it): the given one's, but for per-token FP8."""
    if FMT == "fp8_token":
        largest = tl.abs(_wide(pieces[0]))
        for i in tl.static_range(1, len(pieces)):
            largest = _larger(largest, tl.abs(_wide(pieces[i])))
        param = _scale_of(_amax(largest, 0))
        return param, _inverse(param)
    else:
        return param, inverse


@triton.jit
def _quantized_piece(mine, param, inverse, FMT: tl.constexpr):
    """(codes, scales) of a piece; of bf16 its elements, twice."""
    if FMT == "bf16":
        return mine, mine
    else:
        return _quantized(_wide(mine), param, inverse, FMT)


@triton.jit
def _store_codes(codes, data, row, I: tl.constexpr, HIDDEN: tl.constexpr, PIECE: tl.constexpr, FMT: tl.constexpr):
    """Write the codes of the I-th piece to row `row`."""
    PER: tl.constexpr = 2 if FMT == "nvfp4" else 1  # elements in a byte
    ALL: tl.constexpr = (HIDDEN + PIECE - 1) // PIECE * PIECE
    at = I * (PIECE // PER) + tl.arange(0, PIECE // PER)
    # as many at once as a thread holds already: wider stores would first move them through shared memory
    tl.store(tl.max_contiguous(data + row * (HIDDEN // PER) + at, 8 // PER), codes, mask=_below(at, HIDDEN // PER, ALL // PER))


@triton.jit
def _joined(parts):
    """Tensors (n,) one after the other, the last of them more than once if they are not a power of two."""
    for _ in tl.static_range(7):
        if len(parts) > 1:
            pairs = ()
            for i in tl.static_range(0, len(parts), 2):
                pair = tl.join(parts[i], parts[i + 1 if i + 1 < len(parts) else i])
                pairs = pairs + (tl.reshape(tl.permute(pair, (1, 0)), (2 * pair.shape[0],)),)  # type: ignore[assignment]  # noqa: RUF005
            parts = pairs
    return parts[0]


@triton.jit
def _store_factors(factors, scales, row, HIDDEN: tl.constexpr, FMT: tl.constexpr):
    """Write a row's scales, of all its pieces, at once: a wire takes whole lines, or several times the time."""
    if FMT == "fp8_token":
        tl.store(scales + row, factors[0])
    elif FMT != "fp8_tensor" and FMT != "bf16":
        SIZE: tl.constexpr = 128 if FMT == "fp8_block" else 32 if FMT == "mxfp8" else 16
        COLUMNS: tl.constexpr = (HIDDEN + SIZE - 1) // SIZE
        whole = _joined(factors)
        at = tl.arange(0, whole.shape[0])
        tl.store(scales + row * COLUMNS + at, whole, mask=_below(at, COLUMNS, whole.shape[0]))


@triton.jit(do_not_specialize=["rows", "scale", "share"])
def route_quantize_pack(
    x, logits, bias, parameter, records, rows, scale, share, HIDDEN: tl.constexpr, PIECE: tl.constexpr, X_STRIDE: tl.constexpr,
    FMT: tl.constexpr, RECORD: tl.constexpr, SCALES_AT: tl.constexpr, WEIGHTS_AT: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):
    """Records (rows, RECORD) of x (rows, HIDDEN) and its logits (rows, EXPERTS).

    Of 1 + TOKENS // share programs the first chooses experts for TOKENS tokens, each of the others packs `share` of their rows: all
    along, those that compute run beside those that wait for memory.
    """
    each = 1 + TOKENS // share
    program = tl.program_id(0)
    start = program // each * TOKENS
    if program % each == 0:
        WIDTH: tl.constexpr = 1 if EXPERTS <= 256 else 2
        to_ids = (records + WEIGHTS_AT + 4 * K).to(tl.pointer_type(tl.uint8 if WIDTH == 1 else tl.int16))
        to_weights = (records + WEIGHTS_AT).to(tl.pointer_type(tl.float32))
        ids, weights = _choose(logits, bias, start, rows, scale, K, GROUPS, TOP_GROUPS, SIGMOID, RENORMALIZED, HAS_BIAS, EXPERTS,
                               EXPERTS_BLOCK, TOKENS, SLOTS)
        token, slot = start + tl.arange(0, TOKENS)[:, None], tl.arange(0, SLOTS)[None, :]
        tl.store(to_ids + token.to(tl.int64) * (RECORD // WIDTH) + slot, ids, mask=(token < rows) & (slot < K))
        tl.store(to_weights + token.to(tl.int64) * (RECORD // 4) + slot, weights, mask=(token < rows) & (slot < K))
    else:
        param, inverse = _given(parameter, FMT)
        start += (program % each - 1) * share
        for r in range(start, tl.minimum(start + share, rows)):
            row = tl.cast(r, tl.int64)
            pieces = _load_row(x, row, HIDDEN, PIECE, X_STRIDE)
            param, inverse = _own(pieces, param, inverse, FMT)
            record = records + row * RECORD
            factors = ()
            for i in tl.static_range(len(pieces)):
                codes, factor = _quantized_piece(pieces[i], param, inverse, FMT)
                _store_codes(codes, record.to(tl.pointer_type(codes.dtype)), 0, i, HIDDEN, PIECE, FMT)
                factors = factors + (factor,)  # type: ignore[assignment]  # noqa: RUF005
            like: tl.constexpr = factors[0].dtype  # type: ignore[misc]
            _store_factors(factors, (record + SCALES_AT).to(tl.pointer_type(like)), 0, HIDDEN, FMT)


# ---- dispatch ----


@triton.jit
def _typed(address, T: tl.constexpr):
    """An int64 address, a multiple of 16, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(T)), 16)


@triton.jit
def _task(task, rows, TOKENS: tl.constexpr):
    """(the first token that a task chooses for, the row that it sends): -1 if it does not. Of the first tasks every TOKENS-th
    chooses, and none of the last, which nobody should wait for."""
    chooses = (task % TOKENS == 0) & (task < rows)
    row = task - tl.minimum(task // TOKENS + 1, tl.cdiv(rows, TOKENS))
    return tl.where(chooses, task, -1), tl.where(chooses | (row >= rows), -1, row).to(tl.int64)


@triton.jit(do_not_specialize=["half", "rank", "op", "limit_ns", "scale", "scales_at", "weights_at", "ids_at"])
def route_quantize_push(
    data, flags, entered, state, last, report, half, rank, op, limit_ns,
    x, logits, bias, parameter, counts, starts, scale, scales_at, weights_at, ids_at,
    WORLD: tl.constexpr, LOOPBACK: tl.constexpr, HIDDEN: tl.constexpr, PIECE: tl.constexpr, X_STRIDE: tl.constexpr,
    FMT: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZED: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, WAIT: tl.constexpr,
):
    """What `route_quantize_pack` makes, of every rank's rows, part by part instead of record by record, in every rank's half.

    x, logits      of this rank's rows, which need not be as many on each rank
    counts, starts 16 times the rows of each rank, and those before them, in the order rank, rank + 1, ... (Triton compiles a
                   kernel for each set of numbers in a tuple that are 1 or divisible by 16: these all are the latter)
    SLOTS          a power of two, at least K

    A half has the parts of FMT, weights (rows of all ranks, K) and ids, each of all ranks' rows in rank order and contiguous, from
    bytes 0, scales_at, weights_at and ids_at on. A task is to choose for TOKENS tokens or to send one. A program signals once, when
    it has sent all, as a fence waits until the wire has taken it; nobody copies, so nobody need be told earlier: what runs next on
    this stream reads the half.
    """
    rows = counts[0] // 16
    param, inverse = _given(parameter, FMT)
    epoch = _begin(entered, state, last, report, half, rank, op, limit_ns, WORLD, LOOPBACK)
    IDS: tl.constexpr = tl.uint8 if EXPERTS <= 256 else tl.int16
    for task in range(tl.program_id(0), tl.cdiv(rows, TOKENS) * (1 + TOKENS), tl.num_programs(0)):
        first, row = _task(task, rows, TOKENS)
        if first >= 0:
            ids, weights = _choose(logits, bias, first, rows, scale, K, GROUPS, TOP_GROUPS, SIGMOID, RENORMALIZED, HAS_BIAS,
                                   EXPERTS, EXPERTS_BLOCK, TOKENS, SLOTS)
            # in a row, so that one warp stores whole lines of them
            ids, weights = tl.reshape(ids.to(IDS), (TOKENS * SLOTS,)), tl.reshape(weights, (TOKENS * SLOTS,))
            at = tl.arange(0, TOKENS * SLOTS)
            token, slot = first + at // SLOTS, at % SLOTS
            for i in tl.static_range(0, WORLD):
                to = ((starts[i] // 16 if LOOPBACK else starts[0] // 16) + token).to(tl.int64) * K + slot
                tl.store(_typed(data[i] + ids_at, IDS) + to, ids, mask=(token < rows) & (slot < K))
                tl.store(_typed(data[i] + weights_at, tl.float32) + to, weights, mask=(token < rows) & (slot < K))
        elif row >= 0:
            pieces = _load_row(x, row, HIDDEN, PIECE, X_STRIDE)
            own, own_inverse = _own(pieces, param, inverse, FMT)
            factors = ()
            for p in tl.static_range(len(pieces)):
                codes, factor = _quantized_piece(pieces[p], own, own_inverse, FMT)
                for i in tl.static_range(0, WORLD):
                    to = (starts[i] // 16 if LOOPBACK else starts[0] // 16).to(tl.int64) + row
                    _store_codes(codes, _typed(data[i], codes.dtype), to, p, HIDDEN, PIECE, FMT)
                factors = factors + (factor,)  # type: ignore[assignment]  # noqa: RUF005
            for i in tl.static_range(0, WORLD):
                to = (starts[i] // 16 if LOOPBACK else starts[0] // 16).to(tl.int64) + row
                _store_factors(factors, _typed(data[i] + scales_at, factors[0].dtype), to, HIDDEN, FMT)  # type: ignore[misc]
    _signal(epoch, flags, rank, WORLD, LOOPBACK)
    if WAIT:
        _wait_all(epoch, flags, rank, report, op, limit_ns, WORLD)


@triton.jit
def _tile(tile, listed, starts, ends, tiles, until, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(expert, first row, first column, end of the expert's rows) of a tile in the list of all experts' tiles."""
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    this = listed == expert
    own = tile - tl.sum(tl.where(this, until - tiles, 0), 0)
    first_row = tl.sum(tl.where(this, starts, 0), 0) + own // columns * ROWS
    return expert, first_row, own % columns * COLUMNS, tl.sum(tl.where(this, ends, 0), 0)


@triton.jit(do_not_specialize=["rows"])
def grouped_matmul(
    x, x_scale, w, w_scale, ends, out, rows, n, x_parameter, w_parameter, EACH: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, K: tl.constexpr, FMT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out (rows, n) = each expert's rows of x (rows, K) times its own w (n, K); zero behind the last expert's. For few rows: a
    tile is turned, so that the tensor cores take w's columns by 64 and rows by as few as 16.

    x and w are descriptors, w's of (EXPERTS * n, K), by which the copy engine of a multiprocessor brings (ROWS, DEPTH) and
    (COLUMNS, DEPTH): what is behind an expert's last row or column is another's, or zero, and is not stored.
    Persistent: programs walk the same list of (expert, tile) pairs, each taking every num_programs-th, so no expert is padded
    to another's rows.
    FMT "bf16"; "fp8_token": x_scale (rows,), w_scale (EXPERTS, n); "fp8_block", with DEPTH 128 and COLUMNS a divisor of it: x_scale
    (rows, K / 128), w_scale (EXPERTS, ceil(n / 128), K / 128), by which each 128 of K are multiplied before they are added;
    "fp8_tensor" and "nvfp4", whose x and w are bf16 codes times scales: x_parameter, one or (if EACH) one for each expert, times
    w_parameter (EXPERTS,).
    """
    columns = tl.cdiv(n, COLUMNS)
    listed = tl.arange(0, EXPERTS_BLOCK)
    all_ends = tl.load(ends + listed, mask=listed < EXPERTS, other=0).to(tl.int32)
    all_starts = tl.load(ends + listed - 1, mask=(listed > 0) & (listed < EXPERTS), other=0).to(tl.int32)
    tiles = tl.where(listed < EXPERTS, tl.cdiv(all_ends - all_starts, ROWS), 0) * columns
    until = tl.cumsum(tiles, 0)  # tiles of experts up to this one
    BLOCKS: tl.constexpr = (K + 127) // 128
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        expert, first_row, first_column, end = _tile(tile, listed, all_starts, all_ends, tiles, until, columns, ROWS, COLUMNS)
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
        x_scales = x_scale + row.to(tl.int64) * BLOCKS
        w_scales = w_scale + (expert.to(tl.int64) * tl.cdiv(n, 128) + first_column // 128) * BLOCKS
        for k in range(0, K, DEPTH):
            a = w.load([expert * n + first_column, k])
            b = x.load([first_row, k]).T
            if FMT == "fp8_block":
                sx = tl.load(x_scales + k // 128, mask=row < end, other=0.0)
                total += tl.dot(a, b) * (sx * tl.load(w_scales + k // 128))[None, :]
            else:
                total = tl.dot(a, b, total)
        if FMT == "fp8_token":
            sx = tl.load(x_scale + row, mask=row < end, other=0.0)
            sw = tl.load(w_scale + expert.to(tl.int64) * n + column, mask=column < n, other=0.0)
            total = total * sx[None, :] * sw[:, None]
        elif FMT == "fp8_tensor" or FMT == "nvfp4":
            total = total * tl.load(x_parameter + (expert if EACH else 0)) * tl.load(w_parameter + expert)
        to = out + row[None, :].to(tl.int64) * n + column[:, None]
        tl.store(to, total.to(out.dtype.element_ty), mask=(row < end)[None, :] & (column < n)[:, None])
    start = tl.max(all_ends, 0)
    zeros = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    for own in range(tl.program_id(0), tl.cdiv(rows - start, ROWS) * columns, tl.num_programs(0)):
        row = start + own // columns * ROWS + tl.arange(0, ROWS)
        column = own % columns * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + row[:, None].to(tl.int64) * n + column[None, :], zeros, mask=(row < rows)[:, None] & (column < n)[None, :])
