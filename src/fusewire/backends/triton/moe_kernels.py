"""Triton kernels of mixture of experts. Only the backend beside this file imports it, when it runs."""
from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _amax, _below, _inverse, _quantized, _scale_of, _store_parts, _wide


@triton.jit
def router_logits(x, w, out, rows, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, X_STRIDE: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """out (rows, EXPERTS) float32 = x (rows, HIDDEN) times w (EXPERTS, HIDDEN), both of one 16-bit dtype.

    The tile is the same for any number of rows, so a row's bits do not depend on the others.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, DEPTH)
    from_x = x + row[:, None].to(tl.int64) * X_STRIDE + at[None, :]
    from_w = w + column[None, :] * HIDDEN + at[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, HIDDEN, DEPTH):
        inside = at < HIDDEN - k
        a = tl.load(from_x + k, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(from_w + k, mask=(column < EXPERTS)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
    to = out + row[:, None].to(tl.int64) * EXPERTS + column[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < EXPERTS)[None, :])


@triton.jit
def _choose(logits, bias, records, first, rows, scale, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
            SIGMOID: tl.constexpr, RENORMALIZED: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
            SLOTS: tl.constexpr, TOKENS: tl.constexpr, RECORD: tl.constexpr, WEIGHTS_AT: tl.constexpr):
    """Weights and ids of TOKENS tokens from `first` on, into their records: `ops.moe.CHOICES`."""
    token = first + tl.arange(0, TOKENS)
    expert = tl.arange(0, BLOCK)
    there = expert < EXPERTS
    at = token[:, None].to(tl.int64) * EXPERTS + expert[None, :]
    minus = float("-inf")
    x = tl.load(logits + at, mask=(token < rows)[:, None] & there[None, :], other=minus)
    if SIGMOID:
        p = 1.0 / (1.0 + tl.exp(-x))
        c = p
        if HAS_BIAS:
            c = p + tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)[None, :]
        c = tl.where(there[None, :], c, minus)
        if TOP_GROUPS < GROUPS:  # EXPERTS == BLOCK then
            SIZE: tl.constexpr = BLOCK // GROUPS
            grouped = tl.reshape(c, (TOKENS, GROUPS, SIZE))
            inner = tl.arange(0, SIZE)
            best = tl.max(grouped, 2)
            where = tl.argmax(grouped, 2, tie_break_left=True)
            second = tl.max(tl.where(inner[None, None, :] == where[:, :, None], minus, grouped), 2)
            value = best + second
            group = tl.arange(0, GROUPS)
            for _ in tl.static_range(TOP_GROUPS):
                top = tl.argmax(value, 1, tie_break_left=True)
                value = tl.where(group[None, :] == top[:, None], minus, value)
            c = tl.reshape(tl.where((value == minus)[:, :, None], grouped, minus), (TOKENS, BLOCK))
    else:
        e = tl.exp(x - tl.max(x, 1)[:, None])
        p = e / tl.sum(e, 1)[:, None]
        c = tl.where(there[None, :], p, minus)
    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((TOKENS, SLOTS), tl.int32)
    weights = tl.zeros((TOKENS, SLOTS), tl.float32)
    for i in tl.static_range(K):
        top = tl.argmax(c, 1, tie_break_left=True)
        chosen = expert[None, :] == top[:, None]
        value = tl.sum(tl.where(chosen, p, 0.0), 1)
        ids = tl.where(slot[None, :] == i, top[:, None], ids)
        weights = tl.where(slot[None, :] == i, value[:, None], weights)
        c = tl.where(chosen, minus, c)
    if RENORMALIZED:
        total = tl.sum(weights, 1)
        if SIGMOID:
            total += 1e-20
        weights = weights / total[:, None]
    record = records + token[:, None].to(tl.int64) * RECORD
    inside = (token < rows)[:, None] & (slot < K)[None, :]
    tl.store((record + WEIGHTS_AT).to(tl.pointer_type(tl.float32)) + slot[None, :], weights * scale, mask=inside)
    ids_at = record + WEIGHTS_AT + 4 * K
    if EXPERTS <= 256:
        tl.store(ids_at + slot[None, :], ids.to(tl.uint8), mask=inside)
    else:
        tl.store(ids_at.to(tl.pointer_type(tl.int16)) + slot[None, :], ids.to(tl.int16), mask=inside)


@triton.jit
def _pack_row(x, parameter, records, row, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr, FMT: tl.constexpr,
              RECORD: tl.constexpr, SCALES_AT: tl.constexpr):
    """The parts of one row, into its record."""
    at = tl.arange(0, BLOCK)
    inside = _below(at, HIDDEN, BLOCK)
    mine = tl.load(x + row * X_STRIDE + at, mask=inside, other=0.0)
    record = records + row * RECORD
    if FMT == "bf16":
        tl.store(record.to(tl.pointer_type(mine.dtype)) + at, mine, mask=inside)
    else:
        y = _wide(mine)
        if FMT == "fp8_token":
            param = _scale_of(_amax(y, 0))
        elif FMT == "fp8_tensor" or FMT == "nvfp4":
            param = tl.load(parameter)
        else:
            param = 1.0
        codes, scale = _quantized(y, param, _inverse(param) if FMT != "fp8_block" and FMT != "mxfp8" else param, FMT)
        if FMT == "nvfp4":
            data = record
        else:
            data = record.to(tl.pointer_type(tl.float8e4nv))
        if FMT == "nvfp4":
            scales = (record + SCALES_AT).to(tl.pointer_type(tl.float8e4nv))
        elif FMT == "mxfp8":
            scales = record + SCALES_AT
        else:
            scales = (record + SCALES_AT).to(tl.pointer_type(tl.float32))
        _store_parts(codes, scale, data, scales, 0, 0, HIDDEN, BLOCK, FMT, False, BLOCK)


@triton.jit(do_not_specialize=["rows", "scale"])
def route_quantize_pack(
    x, logits, bias, parameter, records, rows, scale, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
    FMT: tl.constexpr, RECORD: tl.constexpr, SCALES_AT: tl.constexpr, WEIGHTS_AT: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):
    """Records (rows, RECORD) of x (rows, HIDDEN) and its logits (rows, EXPERTS).

    The first ceil(rows / TOKENS) programs choose experts, TOKENS tokens each, so that most of a reduction stays within a warp;
    each of the others packs one row, and memory hides the choice.
    """
    choosers = tl.cdiv(rows, TOKENS)
    program = tl.program_id(0)
    if program < choosers:
        _choose(logits, bias, records, program * TOKENS, rows, scale, K, GROUPS, TOP_GROUPS, SIGMOID, RENORMALIZED, HAS_BIAS,
                EXPERTS, EXPERTS_BLOCK, SLOTS, TOKENS, RECORD, WEIGHTS_AT)
    else:
        _pack_row(x, parameter, records, (program - choosers).to(tl.int64), HIDDEN, BLOCK, X_STRIDE, FMT, RECORD, SCALES_AT)


@triton.jit(do_not_specialize=["rows"])
def grouped_matmul(
    x, x_scale, w, w_scale, ends, out, rows, n, x_parameter, w_parameter, EACH: tl.constexpr, EXPERTS: tl.constexpr,
    K: tl.constexpr, FMT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):
    """out (rows, n) = each expert's rows of x (rows, K) times its own w (n, K); zero behind the last expert's.

    Persistent: programs walk the same list of (expert, tile) pairs, each taking every num_programs-th, so no expert is padded
    to another's rows. FMT "bf16"; "fp8_token": x_scale (rows,), w_scale (EXPERTS, n); "fp8_block": x_scale (rows, K / 128),
    w_scale (EXPERTS, ceil(n / 128), K / 128), and DEPTH is 128; "fp8_tensor" and "nvfp4", whose x and w are bf16 codes times
    scales: x_parameter, one or (if EACH) one for each expert, times w_parameter (EXPERTS,).
    """
    tile = tl.program_id(0)
    before = 0  # tiles of earlier experts
    start = 0
    columns = tl.cdiv(n, COLUMNS)
    at = tl.arange(0, DEPTH)
    BLOCKS: tl.constexpr = (K + 127) // 128
    for expert in range(EXPERTS + 1):  # the last turn writes the zeros
        if expert < EXPERTS:
            end = tl.load(ends + expert).to(tl.int32)
        else:
            end = rows
        tiles = tl.cdiv(end - start, ROWS) * columns
        while tile < before + tiles:
            own = tile - before
            row = start + own // columns * ROWS + tl.arange(0, ROWS)
            column = own % columns * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            if expert < EXPERTS:
                from_x = x + row[:, None].to(tl.int64) * K + at[None, :]
                weight = tl.cast(expert, tl.int64) * n
                from_w = w + (weight + column)[None, :] * K + at[:, None]
                if FMT == "fp8_block":
                    x_scales = x_scale + row.to(tl.int64) * BLOCKS
                    w_scales = w_scale + (tl.cast(expert, tl.int64) * tl.cdiv(n, 128) + column // 128) * BLOCKS
                for k in range(0, K, DEPTH):
                    a = tl.load(from_x + k, mask=(row < end)[:, None] & (at < K - k)[None, :], other=0.0)
                    b = tl.load(from_w + k, mask=(column < n)[None, :] & (at < K - k)[:, None], other=0.0)
                    if FMT == "fp8_block":
                        sx = tl.load(x_scales + k // 128, mask=row < end, other=0.0)
                        sw = tl.load(w_scales + k // 128, mask=column < n, other=0.0)
                        total += tl.dot(a, b) * (sx[:, None] * sw[None, :])
                    else:
                        total = tl.dot(a, b, total)
                if FMT == "fp8_token":
                    sx = tl.load(x_scale + row, mask=row < end, other=0.0)
                    sw = tl.load(w_scale + weight + column, mask=column < n, other=0.0)
                    total = total * sx[:, None] * sw[None, :]
                elif FMT == "fp8_tensor" or FMT == "nvfp4":
                    total = total * tl.load(x_parameter + (expert if EACH else 0)) * tl.load(w_parameter + expert)
            to = out + row[:, None].to(tl.int64) * n + column[None, :]
            tl.store(to, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < n)[None, :])
            tile += tl.num_programs(0)
        before += tiles
        start = end
