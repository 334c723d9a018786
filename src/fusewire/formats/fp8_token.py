"""FP8 with a scale for each token of an activation and for each output channel of a weight: a row either way.

    scale = max(amax(|row|) / 448, 2^-126)           x is about data * scale
    data  = e4m3(clamp(x / scale, -448, 448))        nearest, ties to even

A zero row has scale 2^-126 and data 0. A row with NaN has scale NaN, one with infinity scale infinity and data 0 (0x7F where
x is infinite): both dequantize to NaN as a whole.
"""
from __future__ import annotations

from torch import Tensor, float32

from . import WHOLE, Format, Part, register
from .codes import E4M3, fresh, from_e4m3, to_e4m3
from .fp8_tensor import params_from_amax


def quantize(x: Tensor, what: str = "x") -> list[Tensor]:
    """x (rows, k) to [data e4m3 (rows, k), scale float32 (rows, 1)]."""
    FORMAT.check(x, what)
    y = fresh(x)
    (scale,) = params_from_amax(y.abs().amax(1, keepdim=True))
    return [to_e4m3(y.div_(scale)), scale]


def dequantize(parts: list[Tensor]) -> Tensor:
    """[data, scale] to data * scale, float32."""
    return from_e4m3(parts[0]).mul_(parts[1])


PARTS = (Part("data", E4M3), Part("scale", float32, (1, WHOLE)))

FORMAT = register(Format(
    name="fp8_token",
    parts=PARTS,
    weight_parts=PARTS,
    quantize=lambda x, params: quantize(x),
    dequantize=lambda parts, params: dequantize(parts),
    quantize_weight=lambda w: quantize(w, "w"),
    dequantize_weight=dequantize,
))
