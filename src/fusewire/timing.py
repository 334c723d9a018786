"""How long calls take: candidates in turns, the median of the rounds, the slower rank."""
from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from .group import Group

MOST_CALLS = 100  # in one CUDA graph: so many of a few microseconds that the host's part does not show
# Rounds, and about how long a candidate runs in each if it does not take the most calls. A GPU at its power limit lowers its clock
# for whatever runs next; in many short turns all candidates find the same clock. On an H200 the times of one matmul under six names
# then differed by 1 % at most in two of four sizes and by 3 % in all, in 5 rounds of 20 ms by 2 to 5 %.
ROUNDS, ROUND_S = {"cpu": 5, "cuda": 15}, {"cpu": 0.02, "cuda": 0.004}
MOST_ROUNDS = 101


def measure(candidates: Mapping[str, Callable[[], object]], group: Group, rounds: int | None = None, graph: bool = True,
            device: torch.device | None = None, seconds: float = 0.0, settle_s: float = 0.0) -> dict[str, float]:
    """Candidate -> microseconds a call: of each rank the median of rounds in which the candidates take turns, in other orders, of
    these the largest.

    candidates  functions that every rank calls alike, in the same order; each must have worked once already, or work when first
                called outside a capture. To work on other data in each call, a function counts its calls.
    group       the ranks that measure together
    rounds      None: as many as suit the device
    graph       on a CUDA device: replay CUDA graphs of up to MOST_CALLS calls; else the calls are made one by one
    device      where the calls run; None: the current CUDA device if this process has one in use, else the CPU (wall clock)
    seconds     take more rounds than that, at most MOST_ROUNDS, if all together do not take longer
    settle_s    in each turn a candidate runs over and over for so many seconds before it is timed, and as long again while it is:
                it finds the clock that a GPU at its power limit has for it, not for whoever ran before
    """
    device = device or torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    graph = graph and device.type == "cuda"
    batches: dict[str, tuple[Callable[[], object], int]] = {}
    turn_s = 1e-9  # there may be no candidates
    for name, call in candidates.items():
        call()
        probe = call
        if graph:  # without one a small call takes as long as the host does
            probe = _batch(call, 1, True)
            probe()
        once = slowest([_seconds(probe, device)], group, device)[0]
        calls = max(1, min(MOST_CALLS, math.ceil(ROUND_S[device.type] / max(once, 1e-9))))
        times = max(1, math.ceil(settle_s / max(calls * once, 1e-9)))
        batches[name] = partial(_repeat, _batch(call, calls, graph), times), calls * times
        turn_s += 2 * calls * times * once
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(max(rounds or ROUNDS[device.type], min(MOST_ROUNDS, int(seconds / turn_s)))):
        # in another order each time, on all ranks alike
        for name in random.Random(turn).sample(list(batches), len(batches)):
            batch, calls = batches[name]
            slowest([], group, device)
            batch()  # on the devices, ranks that exchange something start the rest together
            taken[name].append(_seconds(batch, device) / calls)
    medians = slowest([statistics.median(s) for s in taken.values()], group, device)
    return dict(zip(candidates, (1e6 * s for s in medians), strict=True))


def slowest(values: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """The maxima of the ranks' values, the same on all ranks; returns when every rank has come and this one's device is idle."""
    mine = torch.tensor([*values, 0.0], dtype=torch.float64, device=device)
    return group.all_gather(mine.view(torch.uint8)).view(torch.float64).view(group.world_size, -1).amax(0).tolist()[:-1]


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _batch(call: Callable[[], object], calls: int, graph: bool) -> Callable[[], object]:
    """`calls` calls, as a CUDA graph if wanted."""
    run = partial(_repeat, call, calls)
    if not graph:
        return run
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Other threads (NCCL's, a workspace's) may ask the driver things meanwhile.
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        run()
    return captured.replay


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a run takes, on the device's own clock if it is a CUDA one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
