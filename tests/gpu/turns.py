"""Calls by random turns: what waits for nobody, or takes memory before its turn, gives other bits sooner or later."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def many(world: int, shared: int, own: int = 10_000) -> int:
    """How many turns: `own` where each rank has a GPU, fewer where they share one, as each then waits for time slices."""
    return own if torch.cuda.device_count() >= world else shared


def sleep(own: torch.Generator) -> None:
    """Now and then, keep this rank's GPU busy for a while."""
    if int(torch.randint(4, (), generator=own)) == 0:
        torch.cuda._sleep(int(torch.randint(300_000, (), generator=own)))


def by_turns(calls: list[Callable[[], list[Tensor]]], turns: int, rank: int | None = None) -> tuple[int, list[list[Tensor]]]:
    """Make each call once, then `turns` calls at random, the same on every rank, every other one replayed from a CUDA graph.

    rank  this rank's number, for ranks to sleep at random, each otherwise; None: nobody sleeps
    -> how many outputs differ from those of their first call; the outputs of each first call, as bytes
    """
    runs = []
    for call in calls:
        want = [t.view(torch.uint8).clone() for t in call()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = call()
        runs.append((call, want, graph, captured))
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed((rank or 0) + 2)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    for i, turn in enumerate(torch.randint(len(runs), (turns,), generator=shared).tolist()):
        call, want, graph, out = runs[turn]
        if rank is not None:
            sleep(own)
        if i % 2:
            graph.replay()
        else:
            out = call()
        for got, expected in zip(out, want, strict=True):
            bad += (got.view(torch.uint8) != expected).any()
    return int(bad), [want for _, want, _, _ in runs]
