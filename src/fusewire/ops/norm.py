"""RMSNorm, alone and after a residual add."""
from __future__ import annotations

import torch
from torch import Tensor

from ..op import op


def _normed(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op(tokens=("x",), fake=_normed)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dim, in float32, rounded to x's dtype.

    x           (..., hidden), weight (hidden,) of any float dtype
    offset      1.0 for Gemma, whose weights are stored around zero; 0.0 for everyone else
    cast_first  round the normalized value to x's dtype before the weight multiplies it (Llama's spelling in
                transformers); the product is then of the promoted dtype and rounded again
    """
    y = x.float().contiguous()  # like the fake: the result does not inherit the strides of x
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        return (weight * y.to(x.dtype)).to(x.dtype)
    w = weight.float()
    return (y * (w + offset if offset else w)).to(x.dtype)


@op(tokens=("x", "residual"), fake=lambda x, residual, *_: (_normed(x), _normed(x)))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(x + residual), x + residual): the sum is rounded to its dtype first, as the unfused program does."""
    total = (residual + x).contiguous()
    return rms_norm.reference(total, weight, eps, offset, cast_first), total
