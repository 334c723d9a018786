"""What PyTorch itself runs on any device: FP8 matmuls by torch._scaled_mm."""
from __future__ import annotations

import os

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.dense import matmul

ON_CPU = False
"""Also use torch._scaled_mm on a CPU. It gives an adopted `_scaled_mm` its own bits there, but it is slow: with n = 1536 and
k = 576 it takes 15 to 30 times as long as the reference for one token, and 1.2 to 1.5 times as long for 512. To be set before the
first call, as ops remember what they chose."""


ACCUMULATION = os.environ.get("FUSEWIRE_FP8_ACCUMULATION", "fast")
if ACCUMULATION not in ("fast", "float32"):
    raise InputError(f"FUSEWIRE_FP8_ACCUMULATION is {ACCUMULATION!r}; it may be fast or float32")
FAST_ACCUMULATION = ACCUMULATION == "fast"
"""How FP8 products are added on the tensor cores of a CUDA device, by every backend: "fast" keeps their own sum, which has about
14 bits; "float32" adds sums of 128 products in float32, and takes longer."""


def _why_not(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str,
             dtype: torch.dtype) -> str | None:
    if fmt not in ("fp8_tensor", "fp8_token"):
        return f"torch._scaled_mm does not take {fmt}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not make {dtype}"
    if bias is not None and bias.dtype != dtype:
        return f"its bias must be of the output's dtype {dtype}, not {bias.dtype}"
    device = x[0].device
    if device.type == "cpu":
        return None if ON_CPU else "torch._scaled_mm is slower on a CPU than the reference"
    if device.type != "cuda":
        return f"torch._scaled_mm does not run on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"FP8 needs compute capability 8.9, and this device has {major}.{minor}"
    n, k = w[0].shape
    if n % 16 or k % 16:
        return f"n = {n} and k = {k} must be multiples of 16"
    if w[0].stride(1) != 1:
        return "the weight must be contiguous along k"
    if bias is not None and dtype == torch.float32:
        return "it adds no bias to a float32 output"
    if fmt == "fp8_token" and dtype != torch.bfloat16:
        return f"with a scale per row it makes bfloat16 only, not {dtype}"
    return None


@matmul.backend("aten", supports=_why_not)
def scaled_mm(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(x[0], w[0].t(), *scales(x, params, w, fmt), bias=bias, out_dtype=dtype, use_fast_accum=_fast(x[0]))


def matmul_into(out: Tensor, x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str) -> None:
    """The matmul op, with its result in `out`; without a copy where torch can."""
    if matmul.select(x, params, w, bias, fmt, out.dtype).backend.name == "aten":
        torch._scaled_mm(x[0], w[0].t(), *scales(x, params, w, fmt), bias=bias, out_dtype=out.dtype, use_fast_accum=_fast(x[0]),
                         out=out)
    elif fmt == "bf16" and out.dtype == x[0].dtype:
        torch.mm(x[0], w[0].t(), out=out) if bias is None else torch.addmm(bias, x[0], w[0].t(), out=out)
    else:
        out.copy_(matmul(x, params, w, bias, fmt, out.dtype))


def _fast(x: Tensor) -> bool:
    return FAST_ACCUMULATION and x.device.type == "cuda"


def scales(x: list[Tensor], params: list[Tensor], w: list[Tensor], fmt: str) -> tuple[Tensor, Tensor]:
    """What torch's scaled matmuls take as `scale_a` and `scale_b`, for fp8_tensor and fp8_token."""
    a, b = (params[0], w[1]) if fmt == "fp8_tensor" else (x[1], w[1])
    if x[0].device.type == "cuda":  # cuBLAS refuses scales that are not aligned, as those of one expert among others
        a, b = (s if s.data_ptr() % 16 == 0 else s.clone() for s in (a, b))
    return a, b if fmt == "fp8_tensor" else b.t()
