"""MXFP8: e4m3 data and a power of two for each 32 of them in a row, held as its biased exponent (e8m0).

    exponent = floor(log2(amax(|block|))) - 8                       8: the exponent of 448, e4m3's largest
    scale    = max(exponent + 127, 0), a byte                       x is about data * 2^(scale - 127)
    data     = e4m3(clamp(x / 2^(scale - 127), -448, 448))          nearest, ties to even

(OCP microscaling formats 1.0, section 6.3.) floor(log2) is the float32 exponent field, so nothing rounds. Blocks whose amax
is below 2^-118, zero and subnormal ones too, have scale 0 = 2^-127. The largest of a block may saturate at 448 times the
scale, which is the formula's known loss. A block with NaN or infinity has scale 255 (NaN) and data 0x7F.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import Format, Part, register
from .codes import E4M3, block_amax, fresh, from_e4m3, scale_blocks_, to_e4m3
from .layout import swizzled

BLOCK = (1, 32)


def _powers(scale: Tensor) -> Tensor:
    """Bytes to float32 2^(byte - 127); 255 to NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def quantize(x: Tensor, what: str = "x") -> list[Tensor]:
    """x (rows, k) to [data e4m3 (rows, k), scale uint8 (rows, k / 32)]."""
    FORMAT.check(x, what)
    y = fresh(x)
    exponent = block_amax(y, BLOCK).view(torch.int32) >> 23 & 255
    scale = torch.where(exponent == 255, 255, (exponent - 8).clamp(min=0)).to(torch.uint8)
    return [to_e4m3(scale_blocks_(y, _powers(scale), BLOCK, divide=True)), scale]


def dequantize(parts: list[Tensor]) -> Tensor:
    """[data, scale] to data * 2^(scale - 127), float32."""
    return scale_blocks_(from_e4m3(parts[0]), _powers(parts[1]), BLOCK)


PARTS = (Part("data", E4M3), Part("scale", torch.uint8, BLOCK))

FORMAT = register(Format(
    name="mxfp8",
    parts=PARTS,
    weight_parts=PARTS,
    quantize=lambda x, params: quantize(x),
    dequantize=lambda parts, params: dequantize(parts),
    quantize_weight=lambda w: quantize(w, "w"),
    dequantize_weight=dequantize,
    k_multiple=32,
))
register(swizzled(FORMAT))
