"""Experts over a workspace with 2, 4 and 8 ranks, and in loopback: the reference's bits, whatever ranks hold."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator

import dist as ranks
import pytest
import torch
from test_all_reduce_norm_quant import compile_ahead, compiling, group_of_one, with_kernels
from test_transfers import connect, late, rows
from torch import Tensor

from fusewire import formats, group
from fusewire.backends import workspace
from fusewire.backends.triton import expert_parallel as transport
from fusewire.backends.triton import moe as triton
from fusewire.errors import FusewireError
from fusewire.ops import moe
from fusewire.ops.collectives import reduce_scatter
from fusewire.ops.moe import dispatch, expert_parallel

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

WORLDS = (2, 4, 8)
FORMATS = [name for name, f in formats.FORMATS.items() if f.layout == "linear"]
COUNTS = ((5, 5), (0, 9), (1, 0), (130, 3), (128, 257), (1, 1), (700, 700))  # by turns over the ranks
WHOLE = ("bf16", "fp8_block", "nvfp4")
HOW = "grouped_sigmoid_renormalized"


def counts_of(pattern: tuple[int, ...], world: int) -> list[int]:
    return [pattern[r % len(pattern)] for r in range(world)]


def routing(hidden: int, n: int = 64, favour: int | None = None) -> tuple:
    """The arguments of `route` behind x; all tokens choose expert `favour` and its neighbours, if one is given."""
    bias = rows(1, n, "bias")[0].float() / 10
    if favour is not None:
        bias[favour:favour + 8] += 100.0
    return rows(n, hidden, "router").contiguous(), bias, 8, 8, 4, 2.5, HOW


def params_of(fmt: str) -> list[Tensor]:
    make = formats.get(fmt).params_from_amax
    return [p.to("cuda") for p in make(torch.tensor(5.0))] if make else []


def differing(got: list[Tensor], want: list[Tensor]) -> list[int]:
    """Which of the tensors differ by a bit."""
    def same(a: Tensor, b: Tensor) -> bool:
        flat = [t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)

    return [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not same(a, b)]


def everything(counts: list[int], hidden: int, route: tuple, fmt: str) -> list[Tensor]:
    """What `dispatch` gives, of all ranks' tokens, which every rank knows here."""
    records = [moe.route_quantize_pack(rows(c, hidden, r), params_of(fmt), *route, fmt) for r, c in enumerate(counts)]
    *parts, weights, ids = moe.unpack(torch.cat(records), moe.record_like(rows(1, hidden), route[0], route[2], fmt))
    return [*parts, ids, weights]


def pushed(x: Tensor, route: tuple, fmt: str, counts: list[int], name: str, wait: bool = True) -> list[Tensor]:
    return transport.push(x, triton.logits(x, route[0]), params_of(fmt), *route, fmt, counts, name, keep=True, wait=wait)


def sizes(world: int) -> Iterator[tuple[int, str]]:
    """(hidden, format)"""
    yield from ((1024, fmt) for fmt in FORMATS)
    yield from ((7168, "nvfp4"), (7168, "fp8_block"), (640, "fp8_block"))
    if world == 2:
        yield from ((640, "fp8_token"), (16384, "bf16"))


def launches(world: int) -> Iterable[Callable]:
    """A call for each kernel of `numbers` and of `whole`."""
    name = group_of_one(world, 32 << 20)
    for hidden, fmt in sizes(world):
        yield functools.partial(pushed, rows(3, hidden), routing(hidden), fmt, [3] * world, name)
        yield functools.partial(everything, [3], hidden, routing(hidden), fmt)
    for fmt in WHOLE:
        args = block(0, world, fmt, [3] * world, name, None)
        yield functools.partial(torch.ops.fusewire.expert_parallel.pushed, *args)
        yield functools.partial(torch.ops.fusewire.expert_parallel.pushed, rows(200, 512), *args[1:])
    for counts in (counts_of((1, 3), world), counts_of((128, 257), world)):  # a block for each program, and several
        yield functools.partial(transport.combine, rows(sum(counts), 7168).contiguous(), counts, name)


@functools.cache
def compiled(world: int) -> None:
    ranks.run_ranks(compile_ahead, compiling(), compiling(), launches, world, timeout_s=300)


def numbers(rank: int, world: int) -> list[str]:
    name, wrong = connect(128 << 20), []
    for i, (hidden, fmt) in enumerate(sizes(world)):
        for j, pattern in enumerate(COUNTS if hidden < 16384 else COUNTS[:5]):
            counts = counts_of(pattern, world)
            route = routing(hidden, favour=8 * (i % 8) if j % 3 == 0 else None)
            got = pushed(rows(counts[rank], hidden, rank), route, fmt, counts, name)
            if bad := differing(got, everything(counts, hidden, route, fmt)):
                wrong.append(f"{fmt}, hidden {hidden}, {counts}: fields {bad} differ")
            if len(set(counts)) == 1:
                got = dispatch(rows(counts[rank], hidden, rank), params_of(fmt), *route, fmt, name)
                if bad := differing(got, everything(counts, hidden, route, fmt)):
                    wrong.append(f"dispatch {fmt}, hidden {hidden}, {counts}: fields {bad} differ")
    for hidden in (640, 7168):
        for pattern in COUNTS:
            counts = counts_of(pattern, world)
            shares = [rows(sum(counts), hidden, "share", r).contiguous() for r in range(world)]
            mine = slice(sum(counts[:rank]), sum(counts[:rank + 1]))
            want = functools.reduce(torch.add, [s[mine].float() for s in shares]).bfloat16()
            if differing([transport.combine(shares[rank], counts, name)], [want]):
                wrong.append(f"combine, hidden {hidden}, {counts}")
    return wrong


@pytest.mark.parametrize("world", WORLDS)
def test_numbers(world):
    """Bit for bit, from a workspace full of NaN."""
    compiled(world)
    assert ranks.run_ranks(with_kernels, world, numbers, launches, world, timeout_s=400) == [[] for _ in range(world)]


def block(rank: int, world: int, fmt: str, counts: list[int], name: str, favour: int | None) -> tuple:
    """The arguments of expert_parallel on one rank: 64 experts, hidden 512, intermediate 256."""
    n, f = 64 // world, formats.get(fmt)
    stacks = []
    for what, (out, k) in (("gate", (256, 512)), ("up", (256, 512)), ("down", (512, 256))):
        ws = [f.quantize_weight(rows(out, k, what, rank * n + e).contiguous() / k**0.5) for e in range(n)]
        stacks.append([torch.stack(p).cuda() for p in zip(*ws, strict=True)])
    first = torch.tensor(rank * n, device="cuda")
    return (rows(counts[rank], 512, rank), params_of(fmt), *routing(512, favour=favour), first, *stacks, [], "silu", fmt, "bf16",
            counts if len(set(counts)) > 1 else [], name)


def whole(rank: int, world: int) -> list[str]:
    name, wrong = connect(), []
    for fmt in WHOLE:
        for j, pattern in enumerate(((5, 5), (0, 9), (1, 0), (130, 3))):
            args = block(rank, world, fmt, counts_of(pattern, world), name, favour=0 if j == 1 else None)
            backends = {b.name: b for b in expert_parallel.candidates(*args)[0]}
            if differing([backends["pushed"].run(*args)], [expert_parallel.reference(*args)]):
                wrong.append(f"{fmt} {pattern}")
    return wrong


@pytest.mark.parametrize("world", WORLDS)
def test_all_of_it_has_the_reference_s_bits(world):
    compiled(world)
    assert ranks.run_ranks(with_kernels, world, whole, launches, world, timeout_s=300) == [[] for _ in range(world)]


def unguarded(rank: int, what: str, wait: bool) -> bool:
    """Does rank 0, whose peer comes late, get the right numbers?"""
    name, counts, hidden = connect(), [512, 300], 1024
    route = routing(hidden)
    shares = [rows(sum(counts), hidden, "share", r).contiguous() for r in range(2)]

    def run(factor: float, wait: bool) -> list[Tensor]:
        if what == "dispatch":
            return pushed(rows(counts[rank], hidden, rank) * factor, route, "fp8_block", counts, name, wait)
        return [transport.combine(shares[rank] * factor, counts, name, wait)]

    for _ in range(2):  # every kernel is built, both halves have been used
        run(3.0, True)
    want = everything(counts, hidden, route, "fp8_block") if what == "dispatch" else [
        (shares[0].float() + shares[1].float()).bfloat16()[:counts[0]]]
    out = late(rank, wait, lambda: run(1.0, wait))
    return rank == 1 or not differing(out, want)


@pytest.mark.parametrize("what", ["dispatch", "combine"])
def test_the_wait_is_needed(what):
    """The numbers above are not right by luck: with the wait left out, and a peer that is late, they are wrong."""
    assert ranks.run_ranks(unguarded, 2, what, True) == [True, True]
    assert ranks.run_ranks(unguarded, 2, what, False)[0] is False


def alone(rank: int, what: str) -> None:
    name = connect(16 << 20, limit_s=3.0)
    x, route = rows(256, 512), routing(512)
    if rank == 0:
        pushed(x, route, "nvfp4", [256, 0], name) if what == "dispatch" else transport.combine(x.contiguous(), [256, 0], name)
        torch.cuda.synchronize()
    time.sleep(30)  # it is ended before


@pytest.mark.parametrize(("what", "op"), [("dispatch", "dispatch"), ("combine", "expert_parallel")])
def test_a_wait_ends_and_says_for_whom(capfd, what, op):
    """Even for a peer that has no tokens: it has to say so."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank 0: died by exit code {workspace.EXIT_CODE}"):
        ranks.run_ranks(alone, 2, what, timeout_s=60)
    said = capfd.readouterr().err
    assert "rank 0 of group" in said and f"waited 3 s in {op}, epoch " in said and "for rank 1" in said
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("fmt", ["bf16", "fp8_block", "nvfp4"])
def test_replays_with_new_inputs(fmt):
    """A graph with dispatch and combine, replayed in turn with eager calls of other sizes."""
    g = group.loopback_group(2)
    space = workspace.open(g.name, 16 << 20)
    space.memory[workspace.regions(space.nbytes, space.flag_count)[3]:].fill_(0xFF)
    route, hidden, params = routing(1024), 1024, params_of(fmt)
    x, shares = rows(100, hidden, 0), rows(200, hidden, 1).contiguous()

    def run() -> list[Tensor]:
        return [*torch.ops.fusewire.dispatch.pushed(x, params, *route, fmt, g.name), transport.combine(shares, [], g.name)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    before = space.epoch()
    for i in range(200):
        x.copy_(rows(100, hidden, "x", i % 7))
        shares.copy_(rows(200, hidden, "share", i % 5))
        graph.replay()
        want = dispatch.reference(x, params, *route, fmt, g.name)
        chunks = shares.view(2, 100, hidden).float()
        assert not differing(captured, [*want, (chunks[0] + chunks[1]).bfloat16()]), i
        if i % 3 == 0:
            other = rows(1 + i, hidden, "other")
            assert not differing(dispatch(other, params, *route, fmt, g.name),
                                 dispatch.reference(other, params, *route, fmt, g.name)), i
    assert space.epoch() == before + 2 * 200 + 67
    group.close(g)


def test_refusals():
    g = group.loopback_group(2)
    x, route = rows(4, 512), routing(512)
    args = (x, [], *route, "fp8_block", g.name)
    assert any("has no workspace" in why for why in dispatch.candidates(*args)[1])
    workspace.open(g.name, 4096)
    assert dispatch.select(*args).backend.name == "reference"
    need = transport.push_bytes(x, route[0], 8, "fp8_block", [], g.name)
    with pytest.raises(FusewireError, match=f"dispatch: it needs {need} bytes .* has 4096"):
        torch.ops.fusewire.dispatch.pushed(*args)
    group.close(g)
    g = group.loopback_group(2)
    workspace.open(g.name, 1 << 20)
    assert dispatch.select(*args[:-1], g.name).backend.name == "pushed"
    block_args = block(0, 2, "bf16", [4, 5], g.name, None)
    assert "pushed: a rank that plays all others has as many tokens as they" in expert_parallel.candidates(*block_args)[1]
    dispatch(*args[:-1], g.name)
    with pytest.raises(FusewireError, match="would be compiled while a CUDA graph is captured"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        transport.push(x, torch.zeros(4, 64, device="cuda"), [], *route[:-1], "softmax", "fp8_block", [], g.name)
    group.close(g)


def test_a_graph_s_reduce_scatter_is_the_combine_s():
    """The reference in loopback says that a peer sent what this rank keeps; the kernel that it sent what this rank sent to it."""
    g = group.loopback_group(2)
    workspace.open(g.name, 1 << 20)
    half = rows(30, 512).contiguous()
    twice = torch.cat([half, half])
    assert torch.equal(transport.combine(twice, [], g.name), reduce_scatter(twice, g.name))
    group.close(g)
