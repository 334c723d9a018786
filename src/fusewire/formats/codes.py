"""The number formats under the formats: float32 to and from e4m3 and e2m1 codes, and one scale for each block.

e4m3   1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448 = 0x7E, smallest 2^-9, no infinity, NaN = 0x7F and 0xFF.
e2m1   1 sign, 2 exponent (bias 1), 1 mantissa bit: codes 0..7 are 0 .5 1 1.5 2 3 4 6, codes 8..15 the same negated.

Both round to nearest, ties to the even code, and saturate (OCP 8-bit floating point 1.0; OCP microscaling formats 1.0).
"""
from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import Parameter

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1_MAX = 6.0
TINY = 2.0**-126  # the smallest normal float32: the least scale that also survives where subnormals are flushed to zero


def fresh(x: Tensor) -> Tensor:
    """A contiguous float32 copy that may be written to."""
    return x.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def one_nan(x: Tensor) -> Tensor:
    """x with every NaN made the positive quiet one.

    Which NaN an instruction returns differs between the vector body and the scalar tail of the same loop, so without this
    a row's bytes would depend on the rows beside it.
    """
    return torch.nan_to_num(x, nan=math.nan, posinf=math.inf, neginf=-math.inf)


def divide(a: Tensor, b: float) -> Tensor:
    """a / b, correctly rounded: torch multiplies a CUDA tensor by the reciprocal of a Python number."""
    return a / a.new_full((), b)


def to_e4m3(x: Tensor) -> Tensor:
    """float32 to e4m3: clamped to +-448, then nearest, ties to even; every NaN becomes 0x7F.

    The clamp is explicit as torch 2.11 casts what is too large to NaN where 2.13 saturates.
    """
    return one_nan(x.clamp(-E4M3_MAX, E4M3_MAX)).to(E4M3)


def amax_of(x: Tensor) -> Tensor:
    """The largest magnitude of a (rows, k) tensor, shape (), float32; 0 without rows, NaN if any element is."""
    return torch.cat((x.detach().abs().amax(1), x.new_zeros(1))).amax().float()


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitudes (ceil(rows / block[0]), ceil(k / block[1])) of a contiguous tensor; a last block may be partial."""
    for dim in (1, 0):
        width, size = block[dim], x.shape[dim]
        if width == 1:  # every row of an activation; only static sizes are divided below
            continue
        x, whole = x.abs(), size // width
        pieces = []  # no padding: `pad` on fake tensors fixes the number of rows
        if whole:
            pieces.append(x.narrow(dim, 0, whole * width).unflatten(dim, (whole, width)).amax(dim + 1))
        if size % width:
            pieces.append(x.narrow(dim, whole * width, size % width).amax(dim, keepdim=True))
        x = torch.cat(pieces, dim) if pieces else x
    return x


def scale_blocks_(x: Tensor, scale: Tensor, block: tuple[int, int], divide: bool = False) -> Tensor:
    """Multiply (or divide) x (rows, k), in place, by scale (ceil(rows / block[0]), ceil(k / block[1]))."""
    rows, k = x.shape
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], 0)[:rows]
    whole = k // block[1]
    pairs = []
    if whole:
        pairs.append((x[:, : whole * block[1]].unflatten(1, (whole, block[1])), scale[:, :whole].unsqueeze(-1)))
    if k % block[1]:
        pairs.append((x[:, whole * block[1]:], scale[:, whole:]))
    for part, by in pairs:
        part.div_(by) if divide else part.mul_(by)
    return x


def to_e2m1(x: Tensor) -> Tensor:
    """float32 (rows, k) to packed codes uint8 (rows, k / 2), the even column in the low nibble.

    Nearest, ties to the even code, larger magnitudes to 6. The sign bit is kept: -0.0 and negatives that round to zero give
    code 8, as the hardware's conversion does. NaN gives code 0: its block's scale has to say so.
    """
    x = one_nan(x)
    a = x.abs()
    code = torch.signbit(x).to(torch.uint8).mul_(8)
    # a midpoint goes to the even code: up (>=) if that is the upper one, else down (>)
    for more in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        code += more
    return code[:, 0::2] | code[:, 1::2] << 4


def _e2m1_values(packed: Tensor) -> Tensor:
    """Packed codes (rows, k / 2) to float32 (rows, k), by arithmetic that needs no constant tensor: halves, then x 0.5."""
    code = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
    mantissa, exponent = code & 1, (code >> 1) & 3
    halves = torch.where(exponent == 0, mantissa, (2 + mantissa) << (exponent - 1).clamp(min=0))
    return halves.float() * torch.where(code >= 8, -0.5, 0.5)


# What one load decodes on a CPU: a byte is two e2m1 values, two bytes are two e4m3 values. A table's row is two float32
# held as one int64, since index_select copies single elements several times faster than rows of two.
_BYTES = torch.arange(256, dtype=torch.uint8, device="cpu").reshape(-1, 1)
_E2M1_PAIRS = _e2m1_values(_BYTES).view(torch.int64).reshape(-1)


@functools.cache
def _e4m3_pairs() -> Tensor:
    """Not when this is imported: so much work starts threads, and a process that is forked then, as ranks are, waits for them."""
    return torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.uint16).view(E4M3).float().view(torch.int64)


def _lookup(codes: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, codes.reshape(-1).int()).view(torch.float32)


def _on_cpu(x: Tensor) -> bool:
    """True if x is real memory on a CPU; fake and other wrapped tensors must not meet a table."""
    return type(x) in (Tensor, Parameter) and x.device.type == "cpu"


def from_e2m1(packed: Tensor) -> Tensor:
    """Packed codes uint8 (rows, k / 2) to float32 (rows, k), exactly."""
    if _on_cpu(packed):
        return _lookup(packed, _E2M1_PAIRS).view(packed.shape[0], packed.shape[1] * 2)
    return _e2m1_values(packed)


def from_e4m3(x: Tensor) -> Tensor:
    """e4m3 to float32, exactly; a new tensor, contiguous if x is. On a CPU ten times as fast as `.float()`."""
    if _on_cpu(x) and x.is_contiguous() and x.numel() % 2 == 0 and x.storage_offset() % 2 == 0:
        return _lookup(x.detach().view(-1).view(torch.uint16), _e4m3_pairs()).view(x.shape)
    return x.float()
