"""The boundary of the sharded plan with 2, 4 and 8 ranks: numbers, graphs, and mixed with other exchanges."""
from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable

import dist as ranks
import pytest
import torch
import torch.distributed as dist
from test_all_reduce_norm_quant import (
    FORMATS,
    VARIANTS,
    WAYS,
    Found,
    connect,
    differ,
    digest,
    group_of_one,
    norm_problems,
    params_of,
    rows,
    run_numbers,
    said,
    same,
)
from turns import by_turns, many

from fusewire import formats, group
from fusewire.backends import workspace
from fusewire.backends.triton import norm_quant_all_gather_matmul as nq
from fusewire.ops.dense import quantize
from fusewire.ops.fused import all_reduce_norm_quant, norm_quant_all_gather_matmul

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

HIDDEN = (64, 576, 5120, 7168, 8192, 16384)
TOKENS = (0, 1, 3, 127, 128, 129, 640)  # of one rank


def pushed(x, residual, weight, variant, params, fmt, name, gather=True, wait=True, send=True):
    from fusewire.backends.triton.norm_quant_all_gather_matmul import push

    _, offset, cast_first, _, eps = variant
    return push(x, residual, weight, eps, offset, cast_first, True, params, fmt, name, gather, wait, send)


def gathered(*args, **given):
    return pushed(*args, **given).parts


def arguments(rank: int, tokens: int, hidden: int, variant: tuple, special: bool) -> tuple:
    has_residual, _, _, dtype, _ = variant
    x = rows(tokens, hidden, rank, special=special)
    weight = (torch.rand(hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(hidden)) + 0.5).to(dtype)
    return x, rows(tokens, hidden, rank, "residual") if has_residual else None, weight


def problems(p, rank: int, world: int, tokens: int, hidden: int, variant: tuple, special: bool, params: list, fmt: str,
             everyone: torch.Tensor) -> Found:
    """What is wrong with what `push` made; `everyone` is the norms of all ranks."""
    x, residual, weight = arguments(rank, tokens, hidden, variant, special)
    _, offset, cast_first, _, eps = variant
    total = x if residual is None else residual + x
    found = [] if p.total is None else differ("the sum", [p.total], [total])
    found += norm_problems(p.norm, total, weight, eps, offset, cast_first)
    return found + differ("its parts", p.parts, [everyone] if fmt == "bf16" else formats.get(fmt).quantize(everyone, params))


def variant_of(hidden: int, fmt: str) -> tuple:
    """With each format every hidden size has another: one kernel for all of its token counts."""
    return VARIANTS[(HIDDEN.index(hidden) + FORMATS.index(fmt)) % len(VARIANTS)]


def numbers(rank: int, world: int) -> dict[str, list]:
    """Per format: [what was wrong, hash of all parts]."""
    name, results = connect(), {}
    for fmt in FORMATS:
        seen, seal = [], ""
        for i, (hidden, tokens) in enumerate((h, t) for h in HIDDEN for t in TOKENS):
            if world == 8 and i % 3:
                continue
            variant, special, params = variant_of(hidden, fmt), i % 2 == 1, params_of(fmt)
            args = (*arguments(rank, tokens, hidden, variant, special), variant, params, fmt, name)
            p = pushed(*args)
            norms = [torch.empty_like(p.norm, device="cpu") for _ in range(world)]
            dist.all_gather(norms, p.norm.cpu())
            found = problems(p, rank, world, tokens, hidden, variant, special, params, fmt, torch.cat(norms).cuda())
            if tokens in (3, 640):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    captured = pushed(*args)
                for _ in range(3):
                    for t in (captured.norm, *captured.parts):
                        t.view(torch.uint8).fill_(0xA5)
                    graph.replay()
                    found += differ("a replay", [captured.norm, *captured.parts], [p.norm, *p.parts])
            seal = hashlib.sha256((seal + digest(p.parts)).encode()).hexdigest()[:16]
            seen += [f"hidden {hidden}, tokens {tokens}, {variant}, special {special}: {f}" for f in said(found)]
        results[fmt] = [seen, seal]
    return results


def launches(world: int) -> Iterable[Callable]:
    """A call for each kernel of `numbers`."""
    name = group_of_one(world)
    for fmt, hidden in itertools.product(FORMATS, HIDDEN):
        variant = variant_of(hidden, fmt)
        for tokens in (3, 640) if 640 * hidden > nq._FEW else (3,):
            yield functools.partial(pushed, *arguments(0, tokens, hidden, variant, False), variant, params_of(fmt), fmt, name)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("world", (2, 4, 8))
def test_numbers(world, fmt):
    if isinstance(ran := run_numbers(numbers, launches, world), Exception):
        raise ran
    results = [r[fmt] for r in ran]
    assert [r[0] for r in results] == [[]] * world
    assert len({r[1] for r in results}) == 1, "the ranks gathered different parts"


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_pushed_without_a_gather(fmt):
    """In loopback this rank's rows come from every peer: read from the workspace, in both halves, where a consumer would.

    The data of exchanges does not begin behind their own flags: those of transfers lie between (`workspace.regions`).
    """
    for world, hidden, tokens in ((2, 8192, 4100), (4, 576, 300), (8, 5120, 129), (2, 64, 1)):  # 4100: 16 rows of a program
        g = group.loopback_group(world)
        space = workspace.open(g.name, world * tokens * hidden * 2 + 4096)
        flags_at, _, _, data_at, _ = workspace.regions(space.nbytes, space.flag_count)
        memory = space.memory
        assert [flags_at, data_at] == [a[0] - memory.data_ptr() for a in space.from_here[1::-1]]
        args = arguments(0, tokens, hidden, VARIANTS[0], True)
        for gather in (False, True, False, False):
            memory[data_at:data_at + 2 * space.nbytes].fill_(0xA5)
            before = space.epoch()
            p = pushed(*args, VARIANTS[0], params_of(fmt), fmt, g.name, gather)
            epoch = int(p.ticket)
            assert (epoch, space.epoch()) == (before, before + 1)
            flags = memory[flags_at + epoch % 2 * 4 * space.flag_count:][:4 * world * p.programs].view(torch.int32)
            assert bool((flags[p.programs:] == epoch).all())
            everyone = torch.cat([p.norm] * (world if gather else 1))
            made = fmt if gather else fmt.partition(":")[0]
            assert not said(problems(p, 0, world, tokens, hidden, VARIANTS[0], True, params_of(fmt), made, everyone))
            for part, start in () if gather else zip(p.parts, (0, p.scales_at), strict=False):  # data alone has no scales
                mine = part.view(torch.uint8).reshape(-1)
                came = memory[data_at + epoch % 2 * space.nbytes + start:][:world * mine.numel()].view(world, -1)
                assert bool((came[1:] == mine).all()), f"{world} ranks, hidden {hidden}, tokens {tokens}, part at {start}"
        before, own = space.epoch(), pushed(*args, VARIANTS[0], params_of(fmt), fmt, g.name, False, send=False)
        assert not said(differ("what is made and not sent", [own.total, own.norm, *own.parts], [p.total, p.norm, *p.parts]))
        assert space.epoch() == before, "what sends nothing is an exchange"
        group.close(g)


@pytest.mark.parametrize("hidden", (64, 576))
def test_rows_that_are_fetched_are_the_same(hidden, monkeypatch):
    """Many rows come through the cache: the same bits, also of rows that begin anywhere."""
    g, variant = group.loopback_group(2), VARIANTS[0]
    workspace.open(g.name, 2 * 700 * hidden + 4096)
    for tokens, apart in ((1, 0), (700, 0), (700, 3), (699, 8)):
        x, residual, weight = arguments(0, tokens, hidden, variant, True)
        wide = torch.full((tokens, hidden + apart), float("nan"), dtype=x.dtype, device="cuda")
        wide[:, :hidden] = x
        made = []
        for few in (1 << 40, 0):
            monkeypatch.setattr(nq, "_FEW", few)
            p = pushed(wide[:, :hidden], residual, weight, variant, params_of("fp8_tensor"), "fp8_tensor", g.name)
            made.append([p.total, p.norm, *p.parts])
        assert not said(differ(f"{tokens} rows, {apart} apart", made[1], made[0]))
    group.close(g)


def unguarded(rank: int, wait: bool) -> bool:
    """Has rank 0, whose peer comes late, that peer's rows?"""
    name, variant = connect(), VARIANTS[0]
    first, second = (arguments(rank, 300, 576, variant, special) for special in (True, False))
    for _ in range(2):  # both halves
        pushed(*first, variant, params_of("fp8_token"), "fp8_token", name)
    torch.cuda.synchronize()
    if rank == 1:
        dist.barrier()
    p = pushed(*second, variant, [], "fp8_token", name, wait=wait)
    if rank == 0:
        if not wait:
            torch.cuda.synchronize()
        dist.barrier()
    torch.cuda.synchronize()
    everyone = [torch.empty_like(p.norm, device="cpu") for _ in range(2)]
    dist.all_gather(everyone, p.norm.cpu())
    return same(p.parts[0], formats.get("fp8_token").quantize(torch.cat(everyone).cuda(), [])[0])


def test_the_wait_is_needed():
    assert ranks.run_ranks(unguarded, 2, True) == [True, True]
    assert ranks.run_ranks(unguarded, 2, False)[0] is False


def skewed(rank: int, world: int, wait: bool) -> list:
    """Exchanges of every kind by turns, ranks delayed at random: [outputs that differ from the first, hash of the first]."""
    from fusewire.backends.triton.all_reduce_norm_quant import exchange

    name, calls = connect(), []
    for i, (tokens, hidden) in enumerate(((1, 8192), (5, 576), (128, 1024), (300, 1024), (9, 7168), (140, 2048))):
        fmt, variant = FORMATS[i], VARIANTS[i % len(VARIANTS)]
        x, residual, weight = arguments(rank, tokens, hidden, variant, True)
        same_residual = None if residual is None else rows(tokens, hidden, "residual")
        _, offset, cast_first, _, eps = variant
        args = (weight, eps, offset, cast_first, params_of(fmt), fmt, True, name)
        calls += [functools.partial(exchange, x, same_residual, *args, way, wait) for way in WAYS]
        calls.append(functools.partial(gathered, x, residual, weight, variant, args[4], fmt, name, wait=wait))
    bad, first = by_turns(calls, many(world, 300) if wait else 300, rank)
    return [bad, digest([t for out in first for t in out])]


def test_ranks_out_of_step():
    (zero, seal), (one, other) = ranks.run_ranks(skewed, 2, 2, True, timeout_s=400)
    assert (zero, one) == (0, 0) and seal == other


def test_ranks_out_of_step_that_do_not_wait():
    """That test would not pass by luck: without waits, what a late peer has not sent is missing."""
    assert sum(bad for bad, _ in ranks.run_ranks(skewed, 2, 2, False, timeout_s=400)) > 0


def test_ten_thousand_exchanges_in_loopback():
    """Kinds, sizes and formats by turns, eager and replayed: always the same bits."""
    g = group.loopback_group(2)
    workspace.open(g.name, 64 << 20)
    calls, variant = [], (True, 0.0, False, torch.float32, 1e-6)
    for i, tokens in enumerate((1, 5, 128, 300, 9, 700)):
        x, residual = rows(tokens, 1024, i, special=True), rows(tokens, 1024, i, "residual")
        args = (torch.ones(1024, device="cuda"), 1e-6, 0.0, False, params_of(FORMATS[i]), FORMATS[i], True, g.name)
        ops = all_reduce_norm_quant.target.overloadpacket
        calls += [functools.partial(getattr(ops, way), x, residual, *args) for way in WAYS]
        calls.append(functools.partial(gathered, x, residual, args[0], variant, *args[4:6], g.name))
    before = workspace.of(g.name).epoch()
    assert by_turns(calls, 10_000)[0] == 0
    assert workspace.of(g.name).epoch() == before + len(calls) + 10_000
    group.close(g)


def test_the_op_is_its_reference():
    """With the matmuls behind it, in loopback."""
    g = group.loopback_group(2)
    workspace.open(g.name, 64 << 20)
    for fmt in ("bf16", "fp8_tensor", "nvfp4:128x4"):
        f = formats.get(fmt)
        x, residual = rows(130, 512, fmt), rows(130, 512, "residual")
        ws = [*f.quantize_weight(rows(256, 512, "w") / 100), *f.quantize_weight(rows(64, 512, "v") / 100)]
        args = (x, residual, torch.ones(512, device="cuda"), 1e-6, 0.0, False, True, params_of(fmt), ws, [None, None], fmt,
                torch.bfloat16, g.name)
        ops = norm_quant_all_gather_matmul.target.overloadpacket
        got, want = ops.pushed(*args), ops.reference(*args)
        assert same(got[0], want[0]) and not said(norm_problems(got[1], want[0], args[2], 1e-6, 0.0, False))
        parts = [got[1]] if fmt == "bf16" else quantize(got[1].repeat(2, 1), args[7], fmt)
        assert [y.shape for y in got[2:]] == [(260, 256), (260, 64)] and len(parts) == len(f.parts)
        for way in [got] if fmt == "nvfp4:128x4" else [got, ops.apart(*args)]:
            assert all(map(same, way[:2], got[:2]))
            for y, z in zip(way[2:], want[2:], strict=True):
                torch.testing.assert_close(y.float(), z.float(), rtol=0.05, atol=0.05 * float(z.float().abs().max()))
    group.close(g)
