"""The 128x4 layout that block-scaled tensor cores read scales in, and the formats that hold scales so.

Scale (row m, column j) lies, with Kb = ceil(columns / 4), at element

    ((m / 128) * Kb + j / 4) * 512 + (m % 32) * 16 + ((m % 128) / 32) * 4 + j % 4        (integer divisions)

of an array whose rows are padded to 128 and columns to 4, the padding zero (NVIDIA TensorRT-LLM,
`quantization_utils.cuh`; the same in TransformerEngine, cuBLAS and vLLM). 128 rows are one contiguous piece, so such scales
can be cut and joined between multiples of 128 tokens, and nowhere else: scales travel linear and are swizzled where they are used.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import FormatError, InputError
from . import Format, Part, cdiv, get

MULTIPLE = (128, 4)


def offsets(m: int, kb: int, device: torch.device) -> Tensor:
    """Where each of (m, kb) linear scales lies in the swizzled array, int64 (m, kb): the formula above.

    Reshaping to (m / 128, Kb, 32, 4, 4) is quicker, but on fake tensors a dimension of m / 128 puts a guard on m.
    """
    i, j = torch.arange(m, device=device).unsqueeze(1), torch.arange(kb, device=device)
    return (i // 128 * cdiv(kb, 4) + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4


def swizzle(scale: Tensor) -> Tensor:
    """Linear scales (m, kb) of a one-byte dtype to (ceil(m / 128) * 128, ceil(kb / 4) * 4), same dtype, padding zero."""
    m, kb = scale.shape
    codes = scale.view(torch.uint8)  # many kernels lack float8, so bytes are moved
    out = codes.new_zeros(cdiv(m, 128) * 128, cdiv(kb, 4) * 4)
    out.view(-1).scatter_(0, offsets(m, kb, scale.device).view(-1), codes.reshape(-1))
    return out.view(scale.dtype)


def unswizzle(swizzled: Tensor, m: int, kb: int) -> Tensor:
    """What `swizzle` was given, (m, kb); FormatError if the shape is not what m and kb give."""
    expected = (cdiv(m, 128) * 128, cdiv(kb, 4) * 4)
    if swizzled.shape != expected:
        raise FormatError(
            f"128x4: swizzled scales have shape {tuple(swizzled.shape)}, but m = {m} and kb = {kb} give {expected}; "
            "shards can be joined while swizzled only if each has a multiple of 128 rows"
        )
    at = offsets(m, kb, swizzled.device)
    return swizzled.view(torch.uint8).reshape(-1).index_select(0, at.view(-1)).view(m, kb).view(swizzled.dtype)


def _scale_index(parts: tuple[Part, ...]) -> int:
    return [p.name for p in parts].index("scale")


def _with_scale(f, parts: list[Tensor], spec: tuple[Part, ...]) -> list[Tensor]:
    """parts with the scale replaced by f of it; what follows them (a weight's params) stays."""
    i = _scale_index(spec)
    return [*parts[:i], f(parts[i]), *parts[i + 1:]]


def _linear(parts: list[Tensor], spec: tuple[Part, ...]) -> list[Tensor]:
    """Parts whose scale is swizzled, with the scale linear; the data says how many rows and columns it has."""
    rows, k = parts[0].shape[0], parts[0].shape[1] * spec[0].block[1]
    m, kb = replace(spec[_scale_index(spec)], multiple=(1, 1)).shape(rows, k)
    return _with_scale(lambda s: unswizzle(s, m, kb), parts, spec)


def swizzled(fmt: Format) -> Format:
    """The format "NAME:128x4": `fmt` with the scale parts of activations and weights in the 128x4 layout."""

    def spec(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(replace(p, multiple=MULTIPLE) if p.name == "scale" else p for p in parts)

    return replace(
        fmt,
        name=f"{fmt.name}:128x4",
        parts=spec(fmt.parts),
        weight_parts=spec(fmt.weight_parts),
        quantize=lambda x, params: _with_scale(swizzle, fmt.quantize(x, params), fmt.parts),
        dequantize=lambda parts, params: fmt.dequantize(_linear(parts, fmt.parts), params),
        quantize_weight=lambda w: _with_scale(swizzle, fmt.quantize_weight(w), fmt.weight_parts),
        dequantize_weight=lambda w: fmt.dequantize_weight(_linear(w, fmt.weight_parts)),
        layout="128x4",
        token_multiple=MULTIPLE[0],
    )


def relayout(parts: list[Tensor], from_fmt: Format | str, to_fmt: Format | str, rows: int, k: int) -> list[Tensor]:
    """Parts of a (rows, k) activation of one format as parts of the same format in the other layout; all new tensors.

    A weight's flat list works too, its params are copied. InputError if the formats differ in more than the layout.
    """
    a, b = (get(f) if isinstance(f, str) else f for f in (from_fmt, to_fmt))
    if a.name.split(":")[0] != b.name.split(":")[0]:
        raise InputError(f"relayout: {a.name} and {b.name} differ in more than the layout; dequantize and quantize again")
    parts = [t.clone() for t in parts]
    if a.layout == b.layout:
        return parts
    m, kb = replace(a.parts[_scale_index(a.parts)], multiple=(1, 1)).shape(rows, k)
    return _with_scale(swizzle if b.layout == "128x4" else lambda s: unswizzle(s, m, kb), parts, a.parts)
