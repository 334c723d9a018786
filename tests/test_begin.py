"""How a transfer begins (triton/transfer.py): who waits for whom, and whose half is written, by random schedules of warps.

A model of what ranks, programs and warps do, for there is no GPU here and what goes wrong goes wrong rarely there.
"""
from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

QUIET = 8000  # rounds in which no launch ends: then none will
WARPS = 4


class Rank:
    def __init__(self, number: int) -> None:
        self.number, self.epoch, self.count, self.last = number, 1, 0, [0, 0]
        self.entered: dict[int, int] = {}
        self.flags: dict[tuple, int] = {}
        self.half: dict[tuple, int] = {}
        self.ended = 0  # launches


class Program:
    """What its warps share. A barrier holds a warp until all have come as often as it has."""

    def __init__(self, number: int) -> None:
        self.number, self.came, self.old = number, [0] * WARPS, (0, 0)

    def barrier(self, warp: int) -> Iterator[None]:
        self.came[warp] += 1
        while min(self.came) < self.came[warp]:
            yield


def warp_of(rank: Rank, ranks: list[Rank], program: Program, warp: int, half: int, programs: int, plant: str,
            rnd: random.Random) -> Iterator[None]:
    """One warp of a launch that begins a transfer, pushes to each peer and waits for what they push."""
    peers = [r for r in ranks if r is not rank]
    for _ in range(rnd.choice([0, 0, 1, 40])):  # loads of a row that it has asked for hold it up
        yield
    epoch = rank.epoch
    yield
    before = rank.last[half]
    if plant != "no barrier":
        yield from program.barrier(warp)
    yield
    if warp == 0:
        program.old, rank.count = (epoch, rank.count), rank.count + 1
    if warp == 0 and program.number == 0:
        for peer in peers:
            peer.entered[rank.number] = epoch
            yield
    for peer in peers:
        while plant != "no wait" and rank.entered.get(peer.number, 0) <= before:
            yield
    if warp == 0 and program.old[1] == programs - 1:
        rank.last[half] = epoch
        yield
        rank.epoch, rank.count = epoch + 1, 0
    for peer in peers:
        peer.half[half, rank.number, program.number, warp] = epoch
        yield
    yield from program.barrier(warp)
    if warp == 0:
        for peer in peers:
            peer.flags[half, rank.number, program.number] = epoch
            yield
    for peer in peers:
        while rank.flags.get((half, peer.number, program.number)) != epoch:
            yield


def stream(rank: Rank, ranks: list[Rank], launches: list[tuple[int, int]], plant: str, rnd: random.Random,
           wrong: list) -> Iterator[None]:
    """A rank's launches, one after the other, (half, programs) each, and after each a kernel that reads what has come."""
    for half, programs in launches:
        epoch = rank.epoch
        warps = [(rnd.choice([1, 1, 3, 20]), warp_of(rank, ranks, p, w, half, programs, plant, rnd))
                 for p in map(Program, range(programs)) for w in range(WARPS)]
        while warps:
            rnd.shuffle(warps)
            warps = [w for w in warps if rnd.randrange(w[0]) or next(w[1], "ended") is None]
            yield
        rank.ended += 1
        for _ in range(rnd.choice([0, 3, 60])):
            yield
        for source in ranks:
            for p in range(programs):
                if source is not rank and {rank.half[half, source.number, p, w] for w in range(WARPS)} != {epoch}:
                    wrong.append((rank.number, epoch, source.number))


def simulate(seed: int, world: int, plant: str = "") -> str:
    rnd = random.Random(seed)
    launches = [(rnd.randrange(2) if seed % 3 else i % 2, rnd.choice([1, 3, 5])) for i in range(8)]
    ranks, wrong = [Rank(r) for r in range(world)], []
    streams = [(rnd.choice([1, 1, 4]), stream(r, ranks, launches, plant, rnd, wrong)) for r in ranks]
    seen, quiet = -1, 0
    while streams and not wrong and quiet < QUIET:
        streams = [s for s in streams if rnd.randrange(s[0]) or next(s[1], "ended") is None]
        ended = sum(r.ended for r in ranks)
        seen, quiet = ended, quiet + 1 if seen == ended else 0
    return f"wrong: {wrong[0]}" if wrong else "stuck" if streams else "done"


@pytest.mark.parametrize("world", [2, 3])
def test_everybody_gets_on_and_reads_what_was_sent(world):
    assert {simulate(seed, world) for seed in range(20)} == {"done"}


def test_a_warp_that_reads_too_late_waits_for_ever():
    """Its program is counted in by another, and the half's last epoch is this one when it comes to read it."""
    assert "stuck" in {simulate(seed, 2, "no barrier") for seed in range(10)}


def test_whoever_does_not_wait_writes_what_is_being_read():
    assert any(simulate(seed, 2, "no wait").startswith("wrong") for seed in range(40))
