"""A thousand steps of ranks that hold random numbers of tokens, some slow, and one that dies."""
from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from test_launch import run, said  # noqa: F401  (a fixture)

import fusewire.backends  # noqa: F401  (registers the all-to-all)
from fusewire import formats, tuning
from fusewire.config import Link
from fusewire.group import of_process_group
from fusewire.ops.moe import exchange_counts, expert_parallel

torch.set_num_threads(1)
pytestmark = [pytest.mark.dist, pytest.mark.timeout(280)]
WORLD, EXPERTS, HIDDEN, MID = 4, 8, 64, 32


class Counted:
    """Counts what goes through torch's collectives on this rank, by name."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        for name in ("all_to_all_single", "all_gather_into_tensor", "all_gather_single"):
            if (f := getattr(dist, name, None)) is not None:
                setattr(dist, name, self.counting(name.replace("_into_tensor", "_single"), f))

    def counting(self, name: str, f):
        def call(*args, **kwargs):
            self.calls[name] += 1
            return f(*args, **kwargs)

        return call


class Layer:
    """One layer of experts, every rank its own; and what every rank should get, from all ranks' tokens at once."""

    def __init__(self, rank: int, fmt: str = "fp8_block"):
        g, f = torch.Generator().manual_seed(0), formats.get(fmt)
        self.fmt, self.rank = fmt, rank
        self.router = torch.randn(EXPERTS, HIDDEN, generator=g).bfloat16()
        per = EXPERTS // WORLD
        self.weights = []
        for shape in ((MID, HIDDEN), (MID, HIDDEN), (HIDDEN, MID)):
            whole = [f.quantize_weight(torch.randn(shape, generator=g).bfloat16() / shape[1]**0.5) for _ in range(EXPERTS)]
            self.weights.append([torch.stack(p) for p in zip(*whole[rank * per:(rank + 1) * per], strict=True)])
        self.first = torch.tensor(rank * per)

    def step(self, x: torch.Tensor, counts: list[int], group: str) -> torch.Tensor:
        return expert_parallel(x, [], self.router, None, 2, 1, 1, 1.0, "softmax_renormalized", self.first, *self.weights, [],
                               "silu", self.fmt, "bf16", counts, group)


def tokens_of(step: int, rank: int) -> int:
    """Mostly a few tokens, often none, sometimes many; the same on every run."""
    return random.Random(step * WORLD + rank).choice((0, 0, 1, 2, 3, 7, 40))


def many_steps(rank: int, steps: int) -> dict:
    counted, group = Counted(), dist.group.WORLD
    # so that both transports are taken, by the number of tokens
    tuning.use(of_process_group(group), None, Link(2e-7, 1e9))
    layer, seen, total = Layer(rank), Counter(), torch.zeros(HIDDEN, dtype=torch.float64)
    lag = random.Random(rank)
    for step in range(steps):
        n = tokens_of(step, rank)
        if lag.random() < 0.02:  # somebody is late
            time.sleep(0.01)
        counts = exchange_counts(n, group.group_name)
        assert counts == [tokens_of(step, r) for r in range(WORLD)]
        x = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(step * WORLD + rank)).bfloat16()
        before = counted.calls["all_to_all_single"]
        y = layer.step(x, counts, group.group_name)
        seen[counted.calls["all_to_all_single"] - before] += 1
        assert y.shape == x.shape and y.isfinite().all()
        total += y.double().sum(0)
    return {"calls": dict(counted.calls), "seen": {str(k): v for k, v in seen.items()}, "total": total}


def test_a_thousand_steps():
    """Nobody hangs, and every rank made the same collectives: 2 a layer with the all-gather, 3 with the all-to-all."""
    ranks = run_ranks(many_steps, WORLD, 1000, timeout_s=250)
    assert all(r["calls"] == ranks[0]["calls"] and r["seen"] == ranks[0]["seen"] for r in ranks)
    assert set(ranks[0]["seen"]) == {"2", "3"} and min(ranks[0]["seen"].values()) > 20 and sum(ranks[0]["seen"].values()) == 1000
    assert all(r["total"].abs().max() > 0 for r in ranks)


def stepping(ctx, folder) -> None:
    """A rank of a model that steps; rank 2 stays in its tenth step, and the others wait for it in a collective."""
    layer, group = Layer(ctx.rank), dist.group.WORLD.group_name
    for step in range(1000):
        ctx.phase(f"step {step}")
        if step == 10:
            said(folder, ctx.rank, "there")
            while ctx.rank == 2:
                time.sleep(0.05)
        counts = exchange_counts(tokens_of(step, ctx.rank), group)
        layer.step(torch.zeros(counts[ctx.rank], HIDDEN).bfloat16(), counts, group)


def test_a_rank_that_is_killed_is_named_in_five_seconds(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # made by torch, not left behind by us
    r = run(stepping, WORLD)
    pid = r.pids("there")[2]
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    assert r.end(within=5) == 128 + signal.SIGKILL
    assert r.err() == f"fusewire: rank 2 (pid {pid}) was killed by SIGKILL while step 10; the other ranks were ended\n"
