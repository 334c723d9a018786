"""FP8 with a scale for each 1x128 block of an activation and each 128x128 block of a weight (DeepSeek-V3's recipe).

    scale = max(amax(|block|) / 448, 2^-126)         x is about data * scale
    data  = e4m3(clamp(x / scale, -448, 448))        nearest, ties to even

The last block of a row, and of a weight's column, may be partial: k = 576 has 5 blocks, the last 64 wide. A zero block has
scale 2^-126 and data 0; one with NaN has scale NaN, one with infinity scale infinity, and both dequantize to NaN.
"""
from __future__ import annotations

from torch import Tensor, float32

from . import Format, Part, register
from .codes import E4M3, block_amax, fresh, from_e4m3, scale_blocks_, to_e4m3
from .fp8_tensor import params_from_amax

ROW, TILE = (1, 128), (128, 128)


def quantize(x: Tensor, block: tuple[int, int] = ROW, what: str = "x") -> list[Tensor]:
    """x (rows, k) to [data e4m3 (rows, k), scale float32 (ceil(rows / block[0]), ceil(k / block[1]))]."""
    FORMAT.check(x, what)
    y = fresh(x)
    (scale,) = params_from_amax(block_amax(y, block))
    return [to_e4m3(scale_blocks_(y, scale, block, divide=True)), scale]


def dequantize(parts: list[Tensor], block: tuple[int, int] = ROW) -> Tensor:
    """[data, scale] to data * scale, float32."""
    return scale_blocks_(from_e4m3(parts[0]), parts[1], block)


FORMAT = register(Format(
    name="fp8_block",
    parts=(Part("data", E4M3), Part("scale", float32, ROW)),
    weight_parts=(Part("data", E4M3), Part("scale", float32, TILE)),
    quantize=lambda x, params: quantize(x),
    dequantize=lambda parts, params: dequantize(parts),
    quantize_weight=lambda w: quantize(w, TILE, "w"),
    dequantize_weight=lambda w: dequantize(w, TILE),
))
