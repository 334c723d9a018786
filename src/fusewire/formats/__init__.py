"""A format says how a tensor becomes plain tensors. One file for each format.

An activation (tokens, k) becomes *parts*, which travel over the wire together and are all cut by tokens, and *params*,
static float32 scalars that never travel. A weight (n, k) becomes one flat list, `[*weight_parts, *weight_params]`.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError, InputError

FORMATS: dict[str, Format] = {}
WHOLE = 0  # in Part.block: one element stands for the whole dimension


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Divides no more than needed: a symbolic `a` keeps its own expression when b is 1."""
    return a if b == 1 else (a + b - 1) // b


def _pad(a: int, multiple: int) -> int:
    return a if multiple == 1 else cdiv(a, multiple) * multiple


@dataclass(frozen=True)
class Part:
    """One plain tensor of a quantized (rows, columns) tensor.

    `block` is how many (rows, columns) one element of the part stands for: the data of an FP8 tensor has (1, 1), two
    NVFP4 codes in a byte (1, 2), NVFP4's scales (1, 16), a 128x128 block scale (128, 128), a scale per row (1, WHOLE).
    `multiple` is what the part's own (rows, columns) are then padded to: (128, 4) when swizzled.
    """

    name: str
    dtype: torch.dtype
    block: tuple[int, int] = (1, 1)
    multiple: tuple[int, int] = (1, 1)

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The part's shape for a (rows, columns) tensor; a last block may be partial."""
        (r, c), (mr, mc) = self.block, self.multiple
        return (_pad(1 if r == WHOLE else cdiv(rows, r), mr), _pad(1 if c == WHOLE else cdiv(columns, c), mc))


@dataclass(frozen=True)
class Format:
    """How activations and weights of one kind are held.

    Inputs are 2-D, float32, bfloat16 or float16, of any strides, with any number of rows (0 too) and k >= 1; anything else
    is a FormatError. Parts come back contiguous, and nothing returned aliases an input. Every function also runs on fake
    tensors whose rows are symbolic, without a guard that fixes them. All arithmetic is IEEE float32, each operation rounded.

    name              unique; the `fmt` argument of every op
    parts             of an activation (tokens, k); part i has shape `parts[i].shape(tokens, k)`
    weight_parts      of a weight (n, k)
    quantize          (x (tokens, k) of float dtype, params) -> parts; row-local: quantizing a slice of rows gives that
                      slice of the parts, bit for bit
    dequantize        (parts, params) -> (tokens, k) float32
    quantize_weight   (w (n, k)) -> [*weight_parts, *weight_params]
    dequantize_weight ([*weight_parts, *weight_params]) -> (n, k) float32
    params            names of the activation's params, each a float32 scalar tensor of shape ()
    weight_params     names of the weight's params, likewise
    params_from_amax  (amax, a float32 scalar) -> params: how a dynamic scale is made; None = the format has no params
    k_multiple        k must be a multiple of this
    layout            how the scale part lies in memory: "linear", or "128x4" (swizzled for tensor cores, see `layout.py`)
    token_multiple    a tensor can only be cut between tokens that are a multiple of this apart (128 when swizzled)
    """

    name: str
    parts: tuple[Part, ...]
    weight_parts: tuple[Part, ...]
    quantize: Callable[[Tensor, list[Tensor]], list[Tensor]]
    dequantize: Callable[[list[Tensor], list[Tensor]], Tensor]
    quantize_weight: Callable[[Tensor], list[Tensor]]
    dequantize_weight: Callable[[list[Tensor]], Tensor]
    params: tuple[str, ...] = ()
    weight_params: tuple[str, ...] = ()
    params_from_amax: Callable[[Tensor], list[Tensor]] | None = None
    k_multiple: int = 1
    layout: str = "linear"
    token_multiple: int = 1

    @property
    def weight_len(self) -> int:
        return len(self.weight_parts) + len(self.weight_params)

    def check(self, x: Tensor, what: str = "x") -> None:
        """Raise FormatError, naming the dimension, if a (rows, k) tensor cannot be held."""
        if x.dim() != 2:
            raise FormatError(f"{self.name}: {what} has {x.dim()} dimensions, shape {tuple(x.shape)}; flatten it to (rows, k)")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise FormatError(f"{self.name}: {what} is {x.dtype}; give float32, bfloat16 or float16")
        k = x.shape[1]
        if k == 0:
            raise FormatError(f"{self.name}: k = 0 of {what}; there is nothing to hold")
        if k % self.k_multiple:
            raise FormatError(
                f"{self.name}: k = {k} of {what} is not a multiple of {self.k_multiple}; pad k or choose another format"
            )


def register(fmt: Format) -> Format:
    FORMATS[fmt.name] = fmt
    return fmt


def get(name: str) -> Format:
    """The format called `name`; InputError lists the known ones."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def nbytes(fmt: Format, tokens: int, k: int) -> int:
    """Bytes of all parts of a (tokens, k) activation: what travels."""
    return sum(math.prod(p.shape(tokens, k)) * p.dtype.itemsize for p in fmt.parts)


from . import bf16, fp8_block, fp8_tensor, fp8_token, layout, mxfp8, nvfp4  # noqa: E402,F401  (each registers itself)

__all__ = ["FORMATS", "WHOLE", "Format", "Part", "cdiv", "get", "nbytes", "register"]
