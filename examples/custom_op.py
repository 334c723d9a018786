"""Ops of another library, its quantization and its FP8 matmul, made known to Fusewire with one line each.

    python examples/custom_op.py
"""
import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

import fusewire
from fusewire.compiler.adopt import scalar, transposed
from fusewire.launch import RankContext, launch
from fusewire.ops.dense import matmul, quantize

HIDDEN, INNER, E4M3 = 128, 256, torch.float8_e4m3fn

# --- the other library, which knows nothing of Fusewire


@torch.library.custom_op("mylib::to_fp8", mutates_args=())
def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(E4M3)


@to_fp8.register_fake
def _(x, scale):
    return torch.empty_like(x, dtype=E4M3)


@torch.library.custom_op("mylib::fp8_mm", mutates_args=())
def fp8_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a (m, k) times b (k, n)."""
    return (a.float() * a_scale) @ (b.float() * b_scale)


@fp8_mm.register_fake
def _(a, b, a_scale, b_scale):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


# --- the two lines

fusewire.adopt(torch.ops.mylib.to_fp8.default, quantize, lambda x, scale: (x, [scalar(scale)], "fp8_tensor"))
fusewire.adopt(torch.ops.mylib.fp8_mm.default, matmul, lambda a, b, a_scale, b_scale: (
    [a], [scalar(a_scale)], [transposed(b), scalar(b_scale)], None, "fp8_tensor", torch.float32))

# --- a model that uses the library


class Linear(nn.Module):
    def __init__(self, k: int, n: int):
        super().__init__()
        w = torch.randn(n, k) / k**0.5
        self.x_scale, self.w_scale = torch.tensor(0.02), w.abs().amax() / 448
        self.w = to_fp8(w, self.w_scale)

    def forward(self, x):
        return fp8_mm(to_fp8(x, self.x_scale), self.w.t(), self.x_scale, self.w_scale)


class Block(nn.Module):
    def __init__(self, ranks: int):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.up, self.down = Linear(HIDDEN, INNER // ranks), Linear(INNER // ranks, HIDDEN)

    def forward(self, x):
        return self.norm(funcol.all_reduce(self.down(F.silu(self.up(x))), "sum", dist.group.WORLD))


def main(context: RankContext) -> None:
    torch.manual_seed(context.rank)
    model = nn.Sequential(*(Block(context.world_size) for _ in range(3)))
    torch.manual_seed(0)
    x = torch.randn(32, HIDDEN)

    compiled = fusewire.compile(model, fusewire.Config(plan="sharded"), token_dims={"input": 0})
    y = compiled(x)
    report = fusewire.explain(compiled)
    if context.rank == 0:
        for s in report.sites:
            print(f"{s.module}: {s.verdict}, {s.why}; {s.sent_before} bytes before, {s.sent_after} after")
        with torch.no_grad():
            print(f"largest difference from the library's own ops: {(y - model(x)).abs().max():.1e}")
    else:
        with torch.no_grad():
            model(x)  # its collectives need every rank


if __name__ == "__main__":
    sys.exit(launch(main, 2))
