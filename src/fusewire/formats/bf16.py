"""bf16 (or any plain float dtype): one part, the tensor itself, kept in its own dtype."""
from __future__ import annotations

import torch
from torch import Tensor

from . import Format, Part, register


def _copy(x: Tensor, what: str) -> list[Tensor]:
    FORMAT.check(x, what)
    return [x.detach().clone(memory_format=torch.contiguous_format)]


FORMAT = register(Format(
    name="bf16",
    parts=(Part("data", torch.bfloat16),),
    weight_parts=(Part("data", torch.bfloat16),),
    quantize=lambda x, params: _copy(x, "x"),
    dequantize=lambda parts, params: parts[0].to(torch.float32, copy=True),
    quantize_weight=lambda w: _copy(w, "w"),
    dequantize_weight=lambda w: w[0].to(torch.float32, copy=True),
))
