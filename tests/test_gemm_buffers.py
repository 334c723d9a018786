"""The buffers of gemm.cu where partial sums come and go: who waits for whom, by random schedules, without the arithmetic.

A model of what its warps do, for there is no GPU here and a wait without end is rare there.
"""
from __future__ import annotations

import itertools
import random

import pytest

QUIET = 3000  # rounds in which nobody gets on: then nobody will


class Barrier:
    """An mbarrier for one arrival: who waits knows a phase by its parity alone."""

    arrivals = 0

    def __init__(self) -> None:
        self.phases = 0

    def arrive(self) -> None:
        self.phases += 1
        Barrier.arrivals += 1

    def wait(self, parity: int):
        while self.phases & 1 == parity:
            yield


class Turn:
    """The place in a ring of buffers, and the parity of its round."""

    def __init__(self, ring: int) -> None:
        self.ring, self.at, self.parity = ring, 0, 0

    def next(self) -> None:
        self.at += 1
        if self.at == self.ring:
            self.at, self.parity = 0, self.parity ^ 1


def tiles_of(rank: int, world: int, cluster: int, step: int, each: int, ahead: int, run: bool) -> list[tuple[int, int]]:
    """(shard, tile) of a cluster of programs, as `tile_at` orders them; tests/test_gemm.py looks at that itself."""
    peers = world - 1
    first, length = min(ahead * step // peers + 1, each), max(step // peers, 1) if run else 1
    others = [((rank + 1 + u % peers) % world, u // peers) for u in range(peers * each)]
    order = others[:first * peers]
    for g in range(0, each - first, length):
        end = min(g + length, each - first)
        order += [(rank, k) for k in range(g, end)] + others[(first + g) * peers:(first + end) * peers]
    return [*order, *((rank, k) for k in range(each - first, each))][cluster::step]


def program(me: int, rank: int, world: int, tiles: list, turns: bool, pieces: int, ring: int, skips: bool, flags: set,
            rnd: random.Random, wrong: list, began: list[list[int]]) -> list:
    """The warps of one of the two programs of a cluster, as generators. began: tiles that each program's warpgroups have begun;
    none ends one that the other program has not begun, because stages of the pipeline are filled for both at once. skips: warp 3
    does not tell of a buffer into which it brings nothing, and the warpgroup, which counts what it brings by itself, asks whether
    the buffer is free: the plant."""
    free, came, made = ([[Barrier() for _ in range(ring)] for _ in range(2)] for _ in range(3))
    holds: list[list] = [[None] * ring for _ in range(2)]
    blocks, multiplied = 2 if turns else 1, [0, 0]
    peers = [r for r in range(world) if r != rank]

    def of(wg: int):
        return ((j, *tile) for j, tile in enumerate(tiles) if not turns or j % 2 == wg)

    def multiplies(wg: int):
        turn, brought = Turn(ring), [0] * ring
        for j, shard, _ in of(wg):
            while (sum(multiplied) < j) if turns else (multiplied[1 - wg] < j):  # the stages of a tile before
                yield
            began[me][wg] += 1
            while min(map(sum if turns else min, began)) <= j:
                yield
            for _ in range(rnd.randrange(8)):
                yield
            multiplied[wg] += 1
            for piece in range(blocks * pieces):
                for n, source in enumerate(peers if shard == rank else [None]):
                    if n:
                        made[wg][turn.at].arrive()
                        turn.next()
                    if source is None and skips:
                        yield from free[wg][turn.at].wait(turn.parity ^ 1)
                    else:
                        yield from came[wg][turn.at].wait(brought[turn.at] if skips else turn.parity)
                        brought[turn.at] ^= 1
                    if holds[wg][turn.at] != (None if source is None else (j, piece, source)):
                        wrong.append(("adds", rank, j, piece, source, holds[wg][turn.at]))
                holds[wg][turn.at] = ("sum", j, piece)
                made[wg][turn.at].arrive()
                turn.next()

    def stores(wg: int):
        turn = Turn(ring)
        for j, shard, tile in of(wg):
            for piece in range(blocks * pieces):
                for last in [False] * (world - 2 if shard == rank else 0) + [True]:
                    yield from made[wg][turn.at].wait(turn.parity)
                    if last and holds[wg][turn.at] != ("sum", j, piece):
                        wrong.append(("stores", rank, j, piece, holds[wg][turn.at]))
                    for _ in range(rnd.randrange(6)):
                        yield
                    holds[wg][turn.at] = None
                    free[wg][turn.at].arrive()
                    turn.next()
            if shard != rank:
                flags.add((shard, rank, me, tile, 0 if turns else wg))

    def brings():
        turn = [Turn(ring), Turn(ring)]
        for j, (shard, tile) in enumerate(tiles):
            for piece, source in itertools.product(range(blocks * pieces), peers if shard == rank else [None]):
                for wg in [j % 2] if turns else [0, 1]:
                    at = turn[wg].at
                    yield from free[wg][at].wait(turn[wg].parity ^ 1)
                    if source is not None:
                        while piece == 0 and (rank, source, me, tile, 0 if turns else wg) not in flags:
                            yield
                        holds[wg][at] = (j, piece, source)
                    if source is not None or not skips:
                        came[wg][at].arrive()
                    turn[wg].next()

    return [multiplies(0), multiplies(1), stores(0), stores(1), brings()]


def simulate(seed: int, world: int, turns: bool, pieces: int, ring: int, skips: bool = False) -> str:
    rnd, flags, wrong, warps = random.Random(seed), set(), [], []
    step, each, ahead, run = rnd.choice([2, 3]), rnd.choice([3, 7, 12]), rnd.choice([1, 2, 99]), rnd.random() < 0.5
    for rank, cluster in itertools.product(range(world), range(step)):
        tiles, began = tiles_of(rank, world, cluster, step, each, ahead, run), [[0, 0], [0, 0]]
        for me in range(2):
            warps += [(rnd.choice([1, 1, 4, 30]), warp) for warp in program(
                me, rank, world, tiles, turns, pieces, ring, skips, flags, rnd, wrong, began)]
    seen, quiet = -1, 0
    while warps and not wrong and quiet < QUIET:
        rnd.shuffle(warps)
        warps = [w for w in warps if rnd.randrange(w[0]) or next(w[1], "ended") is None]
        seen, quiet = Barrier.arrivals, quiet + 1 if seen == Barrier.arrivals else 0
    return f"wrong: {wrong[0]}" if wrong else "stuck" if warps else "done"


@pytest.mark.parametrize(("turns", "pieces", "ring", "world"), [
    (False, 4, 5, 2), (False, 2, 6, 3), (False, 1, 6, 8), (True, 2, 4, 2), (True, 1, 6, 4), (True, 2, 4, 8), (True, 2, 2, 3)])
def test_nobody_waits_for_ever(turns, pieces, ring, world):
    assert {simulate(seed, world, turns, pieces, ring) for seed in range(4 if world == 8 else 12)} == {"done"}


@pytest.mark.parametrize("turns", [False, True])
def test_whoever_skips_a_use_waits_for_ever(turns):
    assert "stuck" in {simulate(seed, 2, turns, 2, 4, skips=True) for seed in range(30)}
