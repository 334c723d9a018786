"""bf16 (or any plain float dtype): one part, the tensor itself, kept in its own dtype."""
import torch

from . import Format, Part, register

register(Format(
    name="bf16",
    parts=(Part("data", torch.bfloat16),),
    weight_parts=(Part("data", torch.bfloat16),),
    quantize=lambda x, params: [x.clone()],
    dequantize=lambda parts, params: parts[0].float(),
    quantize_weight=lambda w: [w.clone()],
    dequantize_weight=lambda w: w[0].float(),
))
