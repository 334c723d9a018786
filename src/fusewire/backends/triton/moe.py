"""Mixture of experts on one GPU: route, quantize and pack by one kernel; a grouped matmul that pads no expert."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import formats
from ...ops import moe
from .. import device
from .launch import HIDDEN, block_of

TOKENS = 4  # that one program chooses experts for: one for each warp
TILE = {"bf16": (256, 1, 4), "fp8_token": (256, 1, 4), "fp8_tensor": (256, 1, 4), "fp8_block": (64, 4, 3), "nvfp4": (256, 1, 4)}
"""Format -> (columns of a part, parts, stages) of the grouped matmul's tiles, where experts have more than FEW rows."""
SOME = 512  # rows of an expert up to which tiles of 16 bits are narrower: of wide ones there are too few where experts are uneven
SOME_TILE = (128, 1, 6)
LOGIT_PARTS = 8  # of a logit, added one after the other
LOGIT_COLUMNS, FEW_LOGITS = 128, 2048  # columns of the router's tiles; rows up to which each program has one of the parts
FEW = 48  # rows of an expert, for which narrow tiles bring the weights by all multiprocessors
FEW_TILE = (64, 128, 4, 2)  # their (columns, depth, stages, programs of a multiprocessor)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def why_not_routed(x: Tensor, weight: Tensor, groups: int, top_groups: int, fmt: str) -> str | None:
    """Why tokens x (tokens, hidden) cannot be routed by a router's weight and quantized here; None if they can."""
    if (why := device.why_not(x.device)) is not None:
        return why
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"tokens and router must be of one 16-bit dtype, not {x.dtype} and {weight.dtype}"
    if x.stride(1) != 1 or not weight.is_contiguous():
        return "x and the router must be contiguous along hidden"
    if (hidden := x.shape[1]) not in HIDDEN:
        return f"hidden = {hidden} is not in {HIDDEN.start} to {HIDDEN.stop - 1}"
    if formats.get(fmt).layout != "linear":
        return f"{fmt} does not travel: its scales are swizzled"
    n = weight.shape[0]
    if n > 1024:
        return f"{n} experts are more than 1024"
    if top_groups < groups and not (_power_of_two(n) and _power_of_two(groups) and n // groups > 1):
        return f"{groups} groups of {n} experts are not powers of two"
    return None


def _why_not_pack(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                  scale: float, how: str, fmt: str) -> str | None:
    if (why := why_not_routed(x, weight, groups, top_groups, fmt)) is not None:
        return why
    at, fields = 0, moe.record_like(x, weight, k, fmt)
    record = moe.record_bytes(x, weight, k, fmt)
    for field in fields:
        if at % field.element_size() or record % field.element_size():
            return f"a record of {record} bytes, with {field.dtype} at byte {at}, is not aligned"
        at += field.shape[1] * field.element_size()
    return None


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """`ops.moe.logits` on the tensor cores: a row's bits do not depend on the others, but are not the reference's."""
    from . import moe_kernels

    rows, n = x.shape[0], weight.shape[0]
    out = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    if rows:
        split = rows <= FEW_LOGITS  # too few tiles for all multiprocessors
        columns, each = -(-n // LOGIT_COLUMNS), LOGIT_PARTS if split else 1
        height = 64 if -(-rows // 64) * columns * each <= device.processors(x.device) else 128
        parts = out.new_empty(LOGIT_PARTS, rows, n) if split else out
        moe_kernels.router_logits[-(-rows // height), columns, each](
            x, weight, parts, rows, HIDDEN=x.shape[1], EXPERTS=n, X_STRIDE=x.stride(0), ROWS=height, COLUMNS=LOGIT_COLUMNS,
            DEPTH=64, PARTS=LOGIT_PARTS, SPLIT=split, num_warps=height // 16, num_stages=4)
        if split:
            moe_kernels.add_parts[-(-out.numel() // 1024),](parts, out, out.numel(), PARTS=LOGIT_PARTS, BLOCK=1024, num_warps=4)
    return out


@moe.route_quantize_pack.backend("triton", supports=_why_not_pack)
def route_quantize_pack(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int,
                        top_groups: int, scale: float, how: str, fmt: str) -> Tensor:
    return pack(x, logits(x, weight), params, weight, bias, k, groups, top_groups, scale, how, fmt)


def pack(x: Tensor, scores: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
         scale: float, how: str, fmt: str) -> Tensor:
    """The op's second half: records of tokens whose logits (tokens, experts) float32 are known."""
    from . import moe_kernels

    rows, hidden = x.shape
    widths = [t.shape[1] * t.element_size() for t in moe.record_like(x, weight, k, fmt)]
    out = torch.empty(rows, sum(widths), dtype=torch.uint8, device=x.device)
    if rows:
        _, warps, registers = row_shape(hidden)
        share = 1 if rows <= 16 * device.processors(x.device) else 2
        moe_kernels.route_quantize_pack[-(-rows // TOKENS) * (1 + TOKENS // share),](
            x, scores, scores if bias is None else bias, params[0] if params else scores, out, rows, scale, share,
            **row_constants(x, weight, bias, k, groups, top_groups, how, fmt), RECORD=sum(widths), SCALES_AT=widths[0],
            WEIGHTS_AT=sum(widths[:-2]), num_warps=warps, maxnreg=registers)
    return out


def row_shape(hidden: int) -> tuple[int, int, int]:
    """(elements of a piece, warps, registers of a thread) of a program that quantizes rows. A piece has 8 elements, 16 bytes, for
    each thread, if rows have no rest then; else it is a whole row."""
    warps = 4 if hidden <= 8192 else 8
    if hidden % (256 * warps) == 0:
        return 256 * warps, warps, 64
    return block_of(hidden), max(4, block_of(hidden) // 1024), 128


def row_constants(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int, how: str,
                  fmt: str) -> dict[str, Any]:
    """The constants of kernels that route and quantize rows."""
    n, hidden = weight.shape
    return dict(
        HIDDEN=hidden, PIECE=row_shape(hidden)[0], X_STRIDE=x.stride(0), FMT=fmt, K=k, GROUPS=groups, TOP_GROUPS=top_groups,
        SIGMOID="sigmoid" in how, RENORMALIZED=how.endswith("renormalized"), HAS_BIAS=bias is not None, EXPERTS=n,
        EXPERTS_BLOCK=1 << (n - 1).bit_length(), TOKENS=TOKENS, SLOTS=1 << (k - 1).bit_length())


def _why_not_grouped(x: list[Tensor], params: list[Tensor], w: list[Tensor], ends: Tensor, fmt: str,
                     dtype: torch.dtype) -> str | None:
    if (why := device.why_not(x[0].device)) is not None:
        return why
    if fmt not in TILE:
        return f"it does not take {fmt}"
    if fmt == "bf16" and (x[0].dtype not in (torch.bfloat16, torch.float16) or w[0].dtype != x[0].dtype):
        return f"tokens and weights must be of one 16-bit dtype, not {x[0].dtype} and {w[0].dtype}"
    if (k := x[0].shape[1]) % 16:
        return f"k = {k} is not a multiple of 16"
    return None


def _note(x: list[Tensor], params: list[Tensor], w: list[Tensor], ends: Tensor, fmt: str, dtype: torch.dtype) -> str:
    return "nvfp4 is expanded to bf16 first, exactly" if fmt == "nvfp4" else ""


@moe.grouped_matmul.backend("triton", supports=_why_not_grouped, note=_note)
def grouped_matmul(x: list[Tensor], params: list[Tensor], w: list[Tensor], ends: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    (rows, k), (experts, n) = x[0].shape, w[0].shape[:2]
    out = torch.empty(rows, n, dtype=dtype, device=x[0].device)
    if rows:
        each = bool(params) and params[0].dim() > 0
        of_x, of_w = (params[0], w[-1]) if params else (ends, ends)
        if fmt == "nvfp4":  # a code times its scale is exact in bf16
            x, w = [_without_global_scale(x)], [_without_global_scale([p.flatten(0, 1) for p in w[:2]]).view(experts, n, -1)]
            of_x, of_w, k = of_x.reciprocal(), of_w.reciprocal(), x[0].shape[1]
        x, w = [t.contiguous() for t in x], [t.contiguous() for t in w]
        scales = [t[1] if len(t) > 1 else ends for t in (x, w)]
        few = rows <= FEW * experts or n * out.element_size() % 16  # or rows of the output that no descriptor takes
        launch = _few if few else _many
        launch(x[0], scales[0], w[0].flatten(0, 1), scales[1], ends, out, of_x, of_w, EACH=each, EXPERTS=experts, K=k, FMT=fmt)
    return out


def _few(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out: Tensor, *params: Tensor, EXPERTS: int,
         **constants: Any) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import moe_kernels

    rows, n = out.shape
    height = min(64, max(16, 1 << (-(-rows // EXPERTS) - 1).bit_length()))
    columns, depth, stages, resident = FEW_TILE
    programs = min(resident * device.processors(x.device), (-(-rows // height) + EXPERTS) * -(-n // columns))
    by_x, by_w = (TensorDescriptor.from_tensor(t, [size, depth]) for t, size in ((x, height), (w, columns)))
    moe_kernels.grouped_matmul[programs,](
        by_x, x_scale, by_w, w_scale, ends, out, rows, n, *params, EXPERTS=EXPERTS, EXPERTS_BLOCK=1 << (EXPERTS - 1).bit_length(),
        ROWS=height, COLUMNS=columns, DEPTH=depth, num_warps=4, num_stages=stages, **constants)


def _many(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out: Tensor, *params: Tensor, EXPERTS: int,
          FMT: str, **constants: Any) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import grouped

    rows, n = out.shape
    width, parts, stages = SOME_TILE if x.element_size() == 2 and rows <= SOME * EXPERTS else TILE[FMT]
    programs = min(device.processors(x.device), (-(-rows // 128) + EXPERTS) * -(-n // (width * parts)))
    by_x, by_w, by_out = (
        TensorDescriptor.from_tensor(t, [size, 128 // t.element_size()], NVMMASharedLayout(
            swizzle_byte_width=128, element_bitwidth=8 * t.element_size(), rank=2)) for t, size in ((x, 64), (w, width), (out, 64)))
    grouped.grouped_matmul[programs,](by_x, x_scale, by_w, w_scale, ends, out, by_out, rows, n, *params, EXPERTS=EXPERTS, FMT=FMT,
                                      PARTS=parts, STAGES=stages, num_warps=4, **constants)


def _without_global_scale(parts: list[Tensor]) -> Tensor:
    """NVFP4's codes times their blocks' scales, in bf16, exactly: they have six bits at most."""
    return formats.get("nvfp4").dequantize(parts, [torch.ones((), device=parts[0].device)]).bfloat16()
