"""NVFP4: e2m1 codes, an e4m3 scale for each 16 of them in a row, and one float32 global scale g that encodes.

With A the tensor's amax, b a block's amax, every operation in float32 and rounded on its own (TransformerEngine,
`transformer_engine/pytorch/custom_recipes/reference_nvfp4.py`, the 1x16 case):

    g     = min(2688 / A, FLT_MAX), and 1 where that is 0          2688 = 448 * 6
    scale = e4m3(clamp(b * (g * (1/6)), -448, 448))
    data  = e2m1(clamp(x * min(1 / (scale * (1/g)), FLT_MAX), -6, 6))
    x is about code * (scale / g)

g is compressed-tensors' `weight_global_scale`, a divisor (its reciprocal is ModelOpt's `weight_scale_2`), and the last line
in this order is compressed-tensors' own dequantization, bit for bit.

A = 0: g = FLT_MAX, all scales and codes 0. A infinite: g = 1. A NaN: g NaN, all scales NaN.
A zero block: scale 0, codes 0 and 8. The sign bit is kept as e2m1 conversion instructions keep it: -0.0 is 8, also where x
underflows to it, for which that Python reference, comparing with 0, gives 0. The values are the same.
A block so small that its scale rounds to 0: codes of x * FLT_MAX, so +-6 for normal x; it dequantizes to 0.
NaN in a block: its scale is NaN (0x7F) and its codes 0; it dequantizes to NaN. Infinity: scale 448, code +-6 (saturated).
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import Format, Part, register
from . import codes as c
from .layout import swizzled

BLOCK = (1, 16)
FLT_MAX = torch.finfo(torch.float32).max


def params_from_amax(amax: Tensor) -> list[Tensor]:
    """amax (), float32, to [g (), float32]."""
    amax = amax.float()
    g = amax.new_full((), c.E4M3_MAX * c.E2M1_MAX) / amax  # not `2688 / amax`: torch makes that 2688 * reciprocal(amax)
    g = c.one_nan(g).clamp(max=FLT_MAX)
    return [torch.where(g == 0, 1.0, g)]


def quantize(x: Tensor, params: list[Tensor], what: str = "x") -> list[Tensor]:
    """x (tokens, k), [g ()] to [data uint8 (tokens, k / 2), even column in the low nibble; scale e4m3 (tokens, k / 16)]."""
    FORMAT.check(x, what)
    (g,) = params
    y = c.fresh(x)
    scale = c.to_e4m3(c.block_amax(y, BLOCK) * (g * (1 / 6)))
    encode = (scale.float() * g.reciprocal()).reciprocal().clamp(max=FLT_MAX)
    return [c.to_e2m1(c.scale_blocks_(y, encode, BLOCK)), scale]  # to_e2m1 saturates: the formula's clamp


def dequantize(parts: list[Tensor], params: list[Tensor]) -> Tensor:
    """[data, scale], [g] to code * (scale / g), float32 (tokens, k)."""
    return c.scale_blocks_(c.from_e2m1(parts[0]), c.from_e4m3(parts[1]).div_(params[0]), BLOCK)


def quantize_weight(w: Tensor) -> list[Tensor]:
    """w (n, k) to [data uint8 (n, k / 2), scale e4m3 (n, k / 16), g ()], g from w's amax."""
    FORMAT.check(w, "w")
    params = params_from_amax(c.amax_of(w))
    return [*quantize(w, params, "w"), *params]


PARTS = (Part("data", torch.uint8, (1, 2)), Part("scale", c.E4M3, BLOCK))

FORMAT = register(Format(
    name="nvfp4",
    parts=PARTS,
    weight_parts=PARTS,
    quantize=quantize,
    dequantize=dequantize,
    quantize_weight=quantize_weight,
    dequantize_weight=lambda w: dequantize(w[:2], w[2:]),
    params=("global_scale",),
    weight_params=("global_scale",),
    params_from_amax=params_from_amax,
    k_multiple=16,
))
register(swizzled(FORMAT))
