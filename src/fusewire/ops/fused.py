"""Fused ops. Each reference is the unfused program it replaces, so it needs no fake and no wire cost of its own."""
from __future__ import annotations

import torch
from torch import Tensor

from ..op import op
from .collectives import all_gather, all_reduce, reduce_scatter
from .dense import linear, matmul, matmuls_of_linear, quantize
from .norm import add_rms_norm, rms_norm


@op(rows=("x",))
def all_gather_matmul(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                      dtype: torch.dtype, group: str) -> list[Tensor]:
    """One all_gather of x's parts for several matmuls.

    x       the parts of this rank's tokens (tokens / world_size, k), scales linear: a swizzled `fmt` is made after the gather
    ws      the weights one after the other, each `weight_len` tensors of `fmt`
    biases  one for each weight, or None
    -> for each weight (tokens, n_i) of `dtype`
    """
    return matmuls_of_linear(all_gather(x, group), params, ws, biases, fmt, dtype)


@op(rows=("x",))
def matmul_reduce_scatter(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str,
                          dtype: torch.dtype, group: str) -> Tensor:
    """`matmul` (see there), then `reduce_scatter`: (tokens / world_size, n)."""
    return reduce_scatter(matmul(x, params, w, bias, fmt, dtype), group)


@op(rows=("x", "residual"))
def all_reduce_norm_quant(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
                          params: list[Tensor], fmt: str, keep_norm: bool, group: str) -> list[Tensor]:
    """all_reduce, residual add (if there is one), RMSNorm, quantize (unless fmt is bf16).

    -> [the sum (the new residual), the norm if keep_norm, the parts of `fmt` unless it is bf16]
    """
    total = all_reduce(x, group)
    if residual is None:
        y = rms_norm(total, weight, eps, offset, cast_first)
    else:
        y, total = add_rms_norm(total, residual, weight, eps, offset, cast_first)
    return [total, *([y] if keep_norm else []), *([] if fmt == "bf16" else quantize(y, params, fmt))]


@op(rows=("x", "residual"))
def norm_quant_all_gather_matmul(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool,
                                 keep_norm: bool, params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                                 dtype: torch.dtype, group: str) -> list[Tensor]:
    """What stands between two matmuls where each rank has its own tokens: residual add (if there is a residual), RMSNorm and
    quantize (unless fmt is bf16) of this rank's x (tokens / world_size, k), then all_gather_matmul (see there).

    -> [the sum (the new residual) if there is a residual, the norm if keep_norm, for each weight (tokens, n_i) of `dtype`]
    """
    total: list[Tensor] = []
    if residual is None:
        y = rms_norm(x, weight, eps, offset, cast_first)
    else:
        y, new = add_rms_norm(x, residual, weight, eps, offset, cast_first)
        total = [new]
    parts = [y] if fmt == "bf16" else quantize(y, params, linear(fmt))
    return [*total, *([y] if keep_norm else []), *all_gather_matmul(parts, params, ws, biases, fmt, dtype, group)]
