"""A thousand steps over a workspace of two ranks that hold random numbers of tokens, each late by turns, and one that dies."""
from __future__ import annotations

import functools
import os
import random
import signal
import time

import dist as ranks
import pytest
import torch
import torch.distributed as dist
from test_launch import run, said  # noqa: F401  (a fixture)
from test_moe_steps import Counted
from test_moe_transport import block, compiled
from test_transfers import connect
from torch import Tensor
from turns import many, sleep

from fusewire.backends import workspace
from fusewire.backends.triton import expert_parallel as transport
from fusewire.ops import moe

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]


def tokens_of(step: int, rank: int) -> int:
    """Mostly a few tokens, often none, sometimes many; the same on every run."""
    return random.Random(2 * step + rank).choice((0, 0, 1, 2, 3, 7, 40, 300))


def take_step(step: int, rank: int, blocks: tuple, name: str) -> tuple[list[int], Tensor]:
    """A step of a layer with experts on two ranks: (tokens of each, what this one gets)."""
    counts = moe.exchange_counts(tokens_of(step, rank), name)
    x, *rest, _, _ = blocks
    given = counts if len(set(counts)) > 1 else []
    return counts, torch.ops.fusewire.expert_parallel.pushed(x[:counts[rank]], *rest, given, name)


def many_steps(rank: int, wait: bool) -> dict:
    """Steps with random counts, ranks delayed at random: outputs that differ from the first of the same counts, and counters."""
    name, counted = connect(), Counted()
    blocks, own, first = block(rank, 2, "fp8_block", [300, 300], name, None), torch.Generator().manual_seed(rank), {}
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        if not wait:
            patch.setattr(transport, "combine", functools.partial(transport.combine, wait=False))
        for step in range(many(2, 60, 1000)):
            counts, out = take_step(step, rank, blocks, name)
            assert counts == [tokens_of(step, r) for r in range(2)]
            bad += (out != first.setdefault(tuple(counts), out)).any()
            sleep(own)
    return {"bad": int(bad), "epoch": workspace.of(name).epoch(), "calls": dict(counted.calls), "counts": len(first)}


def test_a_thousand_steps():
    """Nobody hangs, the same counts give the same bits, and every rank made the same collectives and exchanges."""
    compiled(2)
    zero, one = ranks.run_ranks(many_steps, 2, True, timeout_s=400)
    assert zero == one and zero["bad"] == 0 and zero["counts"] > 20 and sum(zero["calls"].values()) >= 60


def test_steps_that_do_not_wait():
    """That test would not pass by luck: without the wait, what a late peer has not sent is missing."""
    assert sum(r["bad"] for r in ranks.run_ranks(many_steps, 2, False, timeout_s=400)) > 0


def stepping(ctx, folder) -> None:
    """A rank that steps; rank 1 stays in its tenth step, and rank 0 waits for it in a kernel."""
    name = dist.group.WORLD.group_name
    workspace.open(name, 16 << 20)
    blocks = block(ctx.rank, 2, "fp8_block", [300, 300], name, None)
    for step in range(11):
        ctx.phase(f"step {step}")
        take_step(step, ctx.rank, blocks, name)
    said(folder, ctx.rank, "there")
    while ctx.rank == 1:
        time.sleep(0.05)
    torch.ops.fusewire.expert_parallel.pushed(*blocks)
    torch.cuda.synchronize()


def free_memory(rank: int) -> list[int]:
    return [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]


def test_a_rank_that_is_killed_is_named_in_five_seconds(run):  # noqa: F811
    compiled(2)
    [before] = ranks.run_ranks(free_memory, 1)
    r = run(stepping, 2, cuda=None)
    pid = r.pids("there")[1]
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    assert r.end(within=5) == 128 + signal.SIGKILL
    assert f"fusewire: rank 1 (pid {pid}) was killed by SIGKILL while step 10; the other ranks were ended\n" in r.err()
    [after] = ranks.run_ranks(free_memory, 1)
    assert all(b - a < 64 << 20 for a, b in zip(after, before, strict=True)), "memory of the GPUs is not free"
