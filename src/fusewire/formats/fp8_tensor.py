"""FP8 with one static scale for the whole tensor.

    scale = max(amax / 448, 2^-126)                  x is about data * scale
    data  = e4m3(clamp(x / scale, -448, 448))        nearest, ties to even

A zero tensor has scale 2^-126 and data 0. NaN elements stay NaN (0x7F), infinite ones become +-448. Where the amax itself
is infinite or NaN so is the scale, and everything dequantizes to NaN.
"""
from __future__ import annotations

from torch import Tensor, float32

from . import Format, Part, register
from .codes import E4M3, E4M3_MAX, TINY, amax_of, divide, fresh, from_e4m3, one_nan, to_e4m3


def params_from_amax(amax: Tensor) -> list[Tensor]:
    """amax (), float32, to [scale (), float32]."""
    return [one_nan(divide(amax.to(float32), E4M3_MAX)).clamp(min=TINY)]


def quantize(x: Tensor, params: list[Tensor], what: str = "x") -> list[Tensor]:
    """x (tokens, k), [scale ()] to [data e4m3 (tokens, k)]."""
    FORMAT.check(x, what)
    return [to_e4m3(fresh(x).div_(params[0]))]


def dequantize(parts: list[Tensor], params: list[Tensor]) -> Tensor:
    """[data], [scale] to data * scale, float32."""
    return from_e4m3(parts[0]).mul_(params[0])


def quantize_weight(w: Tensor) -> list[Tensor]:
    """w (n, k) to [data e4m3 (n, k), scale ()], the scale from w's amax."""
    FORMAT.check(w, "w")
    params = params_from_amax(amax_of(w))
    return [*quantize(w, params, "w"), *params]


FORMAT = register(Format(
    name="fp8_tensor",
    parts=(Part("data", E4M3),),
    weight_parts=(Part("data", E4M3),),
    quantize=quantize,
    dequantize=dequantize,
    quantize_weight=quantize_weight,
    dequantize_weight=lambda w: dequantize(w[:1], w[1:]),
    params=("scale",),
    weight_params=("scale",),
    params_from_amax=params_from_amax,
))
