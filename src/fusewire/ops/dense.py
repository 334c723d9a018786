"""Ops of one rank around a matmul: quantize and multiply."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import formats
from ..errors import FormatError
from ..op import op


def _parts(fmt: str, tokens: int, k: int, like: Tensor) -> list[Tensor]:
    f = formats.get(fmt)
    return [like.new_empty(p.shape(tokens, k), dtype=like.dtype if f.name == "bf16" else p.dtype) for p in f.parts]


def _quantized(x: Tensor, params: list[Tensor], fmt: str) -> list[Tensor]:
    formats.get(fmt).check(x)
    return _parts(fmt, x.shape[0], x.shape[1], x)


def _relaid(x: list[Tensor], fmt: str, to: str, k: int) -> list[Tensor]:
    return _parts(to, x[0].shape[0], k, x[0])


def _product(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    block = formats.get(fmt).parts[0].block[1]
    if x[0].shape[1] != w[0].shape[1]:
        ks = x[0].shape[1] * block, w[0].shape[1] * block
        raise FormatError(f"matmul: x has k = {ks[0]} and the weight has {ks[1]}; they must be equal")
    return x[0].new_empty((x[0].shape[0], w[0].shape[0]), dtype=dtype)


# The fakes below only save time: a test compares each with its reference.


@op(fake=lambda x: x.new_empty((), dtype=torch.float32))
def amax(x: Tensor) -> Tensor:
    """max |x| over all elements, a float32 scalar; 0 for an empty tensor, NaN if x has one."""
    return torch.cat([x.abs().amax(-1).reshape(-1).float(), x.new_zeros(1, dtype=torch.float32)]).amax()


@op(fake=lambda amax, fmt: [amax.new_empty((), dtype=torch.float32) for _ in formats.get(fmt).params])
def params_from_amax(amax: Tensor, fmt: str) -> list[Tensor]:
    """The params (float32 scalars) with which a tensor of that amax is quantized: how dynamic scales are made."""
    make = formats.get(fmt).params_from_amax
    return [p.clone() for p in make(amax)] if make else []


@op(tokens=("x",), fake=_quantized)
def quantize(x: Tensor, params: list[Tensor], fmt: str) -> list[Tensor]:
    """x (tokens, k) -> the parts of `fmt`. Token by token: the params are given, not computed here."""
    return formats.get(fmt).quantize(x, params)


def linear(fmt: str) -> str:
    """The format in which `fmt` travels: itself, its scales in the linear layout."""
    return fmt.partition(":")[0]


@op(fake=_relaid)
def relayout(x: list[Tensor], fmt: str, to: str, k: int) -> list[Tensor]:
    """The parts of a (tokens, k) activation of `fmt` as those of `to`, the same format in the other scale layout.

    Not token-local: swizzled shards side by side are not the swizzled whole.
    """
    return formats.layout.relayout(x, fmt, to, x[0].shape[0], k)


@op(fake=_product, flops=lambda x, params, w, *_: 2 * x[0].numel() * w[0].shape[0] * x[0].element_size())
def matmul(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """y = x @ w.T + bias.

    x       the parts of an activation (tokens, k), with its params
    w       the weight (n, k) as `[*weight_parts, *weight_params]` of the same format
    bias    (n,) or None
    -> (tokens, n) of `dtype`. Plain tensors multiply as aten does; quantized ones in float32, rounded once.
    """
    if fmt == "bf16":
        y = torch.mm(x[0], w[0].t()) if bias is None else torch.addmm(bias, x[0], w[0].t())
        return y.to(dtype)
    f = formats.get(fmt)
    y = f.dequantize(x, params) @ f.dequantize_weight(w).t()
    return (y if bias is None else y + bias.float()).to(dtype)


def split_weights(ws: list[Tensor], fmt: str) -> list[list[Tensor]]:
    """Weights that lie one after the other in one list, each as `matmul` takes it."""
    n = formats.get(fmt).weight_len
    return [ws[i:i + n] for i in range(0, len(ws), n)]


def matmuls(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
            dtype: torch.dtype) -> list[Tensor]:
    """`matmul` with each of several weights: `ws` one after the other, a bias or None for each."""
    return [matmul(x, params, w, b, fmt, dtype) for w, b in zip(split_weights(ws, fmt), biases, strict=True)]


def matmuls_of_linear(x: list[Tensor], params: list[Tensor], ws: list[Tensor], biases: list[Tensor | None], fmt: str,
                      dtype: torch.dtype) -> list[Tensor]:
    """The same where the scales of x are linear, as what was gathered: a swizzled `fmt` is made first."""
    f = formats.get(fmt)
    if f.layout != "linear":
        x = relayout(x, linear(fmt), fmt, x[0].shape[1] * f.parts[0].block[1])
    return matmuls(x, params, ws, biases, fmt, dtype)
