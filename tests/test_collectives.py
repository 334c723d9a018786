"""Collectives between real processes: every rank gets the sum of all ranks in rank order, to the bit."""
import os
import random

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from torch import Tensor

from fusewire.group import simulate
from fusewire.ops.collectives import all_gather, all_reduce, all_reduce_max, reduce_scatter, shard

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

CASES = {2: 60, 4: 20, 8: 8}


def cases(world: int) -> list[tuple[torch.dtype, tuple[int, ...], float]]:
    """(dtype, shape, spread); the first one has no rows."""
    rng = random.Random(world)
    made = []
    for i in range(CASES[world]):
        rows = 0 if i == 0 else world * rng.choice((0, 1, 1, 2, 3, 5, 16, 33))
        tail = rng.choice(((1,), (7,), (16,), (33,), (64, 3), (5, 2, 3)))
        made.append((rng.choice((torch.bfloat16, torch.float32)), (rows, *tail), rng.choice((1e-3, 1.0, 1e4))))
    return made


def data(case: int, rank: int, dtype: torch.dtype, shape: tuple[int, ...], spread: float) -> Tensor:
    """What a rank contributes: of another size than the others', so that the order of a sum shows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * case + rank)) * spread * 4.0 ** (rank % 3)
    return x.to(dtype)


def ordered_sum(xs: list[Tensor]) -> Tensor:
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x.flatten()


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def ranks_of(rank: int, world: int) -> dict:
    """One rank's run of all cases: what is wrong, and its results for comparison with the other ranks'."""
    group, wrong, results = dist.group.WORLD.group_name, [], []
    for i, (dtype, shape, spread) in enumerate(cases(world)):
        every = [data(i, r, dtype, shape, spread) for r in range(world)]
        x = every[rank]
        reduced, scattered = all_reduce(x, group), reduce_scatter(x, group)
        [gathered] = all_gather([scattered], group)
        expected = ordered_sum(every)
        checks = {
            "all_reduce is not the sum in rank order": equal(reduced, expected),
            "all_gather(reduce_scatter) is not all_reduce": equal(gathered, reduced),
            "reduce_scatter is not this rank's rows": equal(scattered, expected.chunk(world)[rank] if shape[0] else expected),
            "shard is not reduce_scatter of the sum": equal(shard(reduced, group), scattered),
            "all_gather does not keep rank order": equal(all_gather([x], group)[0], torch.cat(every)),
            "all_reduce_max is not the maximum": equal(all_reduce_max(x, group), torch.stack(every).amax(0)),
            "an input was written to": equal(x, data(i, rank, dtype, shape, spread)),
        }
        wrong += [f"case {i}, {dtype} {shape}: {text}" for text, right in checks.items() if not right]
        results.append(reduced)
    return {"wrong": wrong, "results": results}


@pytest.mark.parametrize("world", CASES)
def test_reductions_are_ordered_sums_on_every_rank(world):
    ranks = run_ranks(ranks_of, world, world)
    assert [w for r in ranks for w in r["wrong"]] == []
    assert [len(r["results"]) for r in ranks] == [CASES[world]] * world
    for r in ranks[1:]:
        assert all(equal(a, b) for a, b in zip(r["results"], ranks[0]["results"], strict=True))


def test_the_order_of_a_sum_shows_in_these_cases():
    """Negative control: were the data so tame that any order gives the same bits, the test above would prove nothing."""
    for world in (4, 8):  # two terms have one order
        differ = 0
        for i, case in enumerate(cases(world)):
            xs = [data(i, r, *case) for r in range(world)]
            differ += case[0] is torch.float32 and not equal(ordered_sum(xs), ordered_sum(xs[::-1]))
        assert differ >= 1


def test_simulated_ranks_are_gone_when_processes_are_forked(ranks):
    """A thread that is about to end may hold a lock of MKL, for which a process that is forked then waits forever."""
    before, group, w = os.listdir("/proc/self/task"), ranks(8), torch.randn(64, 64)
    for _ in range(100):
        simulate(group, lambda rank: w @ w)
        assert os.listdir("/proc/self/task") == before
