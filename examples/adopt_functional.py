"""A tensor-parallel model of gated MLPs, written by hand with PyTorch's functional collectives, compiled as it is.

    python examples/adopt_functional.py
"""
import sys
from collections import Counter

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn

import fusewire
from fusewire.launch import RankContext, launch

HIDDEN, INNER, VOCAB = 128, 512, 256


class Embedding(nn.Module):
    """This rank's rows of the vocabulary; all others give zeros, and the sum over the ranks is the embedding."""

    def __init__(self, rank: int, ranks: int):
        super().__init__()
        self.rows = VOCAB // ranks
        self.first = rank * self.rows
        self.table = nn.Embedding(self.rows, HIDDEN)

    def forward(self, ids):
        local = ids - self.first
        mine = (local >= 0) & (local < self.rows)
        y = self.table(local.clamp(0, self.rows - 1)) * mine[:, None]
        return funcol.all_reduce(y, "sum", dist.group.WORLD)


class Block(nn.Module):
    """This rank's part of a gated MLP, with its norm and residual."""

    def __init__(self, ranks: int):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.gate, self.up = (nn.Linear(HIDDEN, INNER // ranks, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER // ranks, HIDDEN, bias=False)

    def forward(self, x):
        y = self.norm(x)
        y = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + funcol.all_reduce(y, "sum", dist.group.WORLD)


def main(context: RankContext) -> None:
    torch.manual_seed(context.rank)  # every rank has weights of its own
    ranks = context.world_size
    model = nn.Sequential(Embedding(context.rank, ranks), *(Block(ranks) for _ in range(4)), nn.RMSNorm(HIDDEN, eps=1e-6))
    torch.manual_seed(0)  # and the same tokens
    ids = torch.randint(VOCAB, (32,))

    compiled = fusewire.compile(model, fusewire.Config(plan="sharded"), token_dims={"input": 0})
    y = compiled(ids)
    report = fusewire.explain(compiled)

    with torch.no_grad():
        same = torch.allclose(y, model(ids), rtol=1e-4, atol=1e-5)
    if context.rank == 0:
        for why, count in Counter(s.why for s in report.sites).items():
            print(f"{count} x {why}")
        print(f"{report.fused} of {len(report.sites)} collectives fused, {report.plan} plan")
        print("close to the model as it was written:", same)


if __name__ == "__main__":
    sys.exit(launch(main, 2))
