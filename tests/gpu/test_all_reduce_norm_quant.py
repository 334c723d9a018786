"""all_reduce_norm_quant's kernels with 2, 4 and 8 ranks: numbers, graphs, and a rank that stays away.

Ranks share GPUs where there are fewer. That proves numbers and protocols, not speed: they wait for each other's time slices.
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable

import dist as ranks
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from turns import by_turns

import fusewire.backends  # noqa: F401  (registers them)
from fusewire import formats, group
from fusewire.backends import workspace
from fusewire.errors import FusewireError
from fusewire.ops.fused import all_reduce_norm_quant
from fusewire.ops.norm import rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

WORLDS = (2, 4, 8)
ops = all_reduce_norm_quant.target.overloadpacket  # a backend by its name
WAYS = ("one_shot", "streamed", "two_shot")
FORMATS = ("bf16", "fp8_tensor", "fp8_token", "fp8_block", "nvfp4", "mxfp8", "nvfp4:128x4", "mxfp8:128x4")
TOKENS = {2: (0, 1, 3, 127, 128, 129), 4: (0, 1, 3, 127, 128, 129), 8: (0, 3, 129)}
# for each format the next of these, in turns: a kernel is compiled for each
HIDDEN = {2: ((64, 7168, 8192), (576, 5120, 16384)), 4: ((576, 8192), (7168,)), 8: ((8192,), (576,))}
MOST = 4096  # tokens, at the last hidden size of a format
# residual, offset, cast_first, weight's dtype, eps
VARIANTS = ((True, 0.0, False, torch.bfloat16, 1e-5), (False, 1.0, False, torch.float32, 1e-6),
            (True, 0.0, True, torch.bfloat16, 1e-6), (True, 1.0, False, torch.bfloat16, 0.0),
            (False, 0.0, True, torch.float32, 1e-3))
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 3.3e38, -3.3e38, 1e-38)


def rows(tokens: int, hidden: int, *key: object, special: bool = False) -> Tensor:
    """The same (tokens, hidden) bf16 on whichever rank asks; with `special`, odd values in every third row."""
    seed = int.from_bytes(hashlib.sha256(repr((tokens, hidden, key)).encode()).digest()[:7], "little")
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, hidden, device="cuda", generator=g) * torch.logspace(-3, 2, tokens, device="cuda")[:, None]
    x = x.bfloat16()
    if special:
        values = special_values()
        for i in range(0, tokens, 3):
            x[i, i % 7::(11, 101, hidden)[i // 3 % 3]] = values[i // 3 % len(values)]
    return x


@functools.cache
def special_values() -> Tensor:
    return torch.tensor(SPECIAL, device="cuda").bfloat16()


# What checks found: what is wrong, and how much of it, 0 if nothing is. It stays on the device until all is checked: a rank that
# waits for a shared device waits for the time slices of those that wait for it.
Found = list[tuple[str, Tensor]]


def said(found: Found) -> list[str]:
    numbers = torch.stack([n.long() for _, n in found]).tolist()
    return [f"{what}: {n}" for (what, _), n in zip(found, numbers, strict=True) if n]


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """The largest distance of two bf16 tensors in representable numbers; NaNs are equal, and far from others."""
    def order(t: Tensor) -> Tensor:
        i = t.view(torch.int16).int()
        return torch.where(i < 0, -(i & 0x7FFF), i)

    if not a.numel():
        return torch.zeros((), device=a.device)
    distance = torch.where(a.isnan() != b.isnan(), 1 << 16, (order(a) - order(b)).abs())
    return torch.where(a.isnan() & b.isnan(), 0, distance).max()


def differing(a: Tensor, b: Tensor) -> Tensor:
    """How many bytes differ, but for which NaN a float32 or bf16 NaN is; 1 of tensors that are not of one shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return torch.ones((), device=a.device)
    if a.dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.where(t.isnan(), torch.nan, t) for t in (a, b))
    return (a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum()


def same(a: Tensor, b: Tensor) -> bool:
    return not differing(a, b)


def differ(what: str, got: Iterable[Tensor], want: Iterable[Tensor]) -> Found:
    return [(f"{what}: bytes of output {i} that differ", differing(*t)) for i, t in enumerate(zip(got, want, strict=True))]


def digest(out: list[Tensor]) -> str:
    joined = torch.cat([t.reshape(-1).view(torch.uint8) for t in out])
    return hashlib.sha256(joined.cpu().numpy()).hexdigest()[:16]


def expected_total(xs: list[Tensor], residual: Tensor | None) -> Tensor:
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x
    total = total.bfloat16()
    return total if residual is None else residual + total


def norm_problems(norm: Tensor, total: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Found:
    """Is the norm at most 1 ULP from the formula's?

    With cast_first the formula rounds twice, and two values that are 1 ULP apart after the first rounding may be 2 apart after
    the product. So it is what is rounded first that may be 1 ULP off: the norm has to lie between the products of the weight
    with that value's neighbours.
    """
    want = rms_norm.reference(total, weight, eps, offset, cast_first)
    if not cast_first:
        far = ulps(norm, want)
        return [("ULP of the norm", torch.where(far > 1, far, 0))]
    first = rms_norm.reference(total, torch.ones_like(weight), eps, 0.0, False)
    low, high = ((weight.float() * torch.nextafter(first, torch.full_like(first, end)).float()).to(norm.dtype)
                 for end in (-float("inf"), float("inf")))
    lower, upper = torch.minimum(low, high), torch.maximum(low, high)
    outside = ~((norm >= lower) & (norm <= upper)) & ~(norm.isnan() & want.isnan())
    return [("elements of the norm that are more than 1 ULP away before the weight", outside.sum())]


def problems(out: list[Tensor], xs: list[Tensor], residual: Tensor | None, weight: Tensor, eps: float, offset: float,
             cast_first: bool, params: list[Tensor], fmt: str) -> Found:
    """What is wrong with an op's outputs, of which the norm was kept."""
    total, norm, *parts = out
    found = [("bytes of the sum", differing(total, expected_total(xs, residual)))]
    found += norm_problems(norm, total, weight, eps, offset, cast_first)
    return found + ([] if fmt == "bf16" else differ("its parts", parts, formats.get(fmt).quantize(norm, params)))


def params_of(fmt: str) -> list[Tensor]:
    make = formats.get(fmt).params_from_amax
    return make(torch.full((), 9.0, device="cuda")) if make else []


def connect(nbytes: int = 0, limit_s: float = 60.0) -> str:
    """Rank side: the default group's name, its workspace open."""
    ranks.use_device()
    name = dist.group.WORLD.group_name
    workspace.open(name, nbytes or max(4, dist.get_world_size()) * MOST * 16384 * 2, limit_s=limit_s)
    return name


def cases(world: int):
    """(format, hidden, tokens, variant, special, captured?) of every format and token count; hidden sizes and variants by turns."""
    variants = itertools.cycle(VARIANTS)
    for fmt, sizes in zip(FORMATS, itertools.cycle(HIDDEN[world])):
        for hidden in sizes:
            variant = next(variants)
            for i, tokens in enumerate(TOKENS[world]):
                yield fmt, hidden, tokens, variant, i % 2 == 1, hidden == sizes[0] and tokens in (3, 129)
        if world == 2 or fmt in ("fp8_tensor", "nvfp4"):
            yield fmt, hidden, MOST, variant, False, False


def numbers(rank: int, world: int) -> dict[str, list]:
    """Per format: [cases, exchanges, what was wrong, hash of all outputs]."""
    name = connect()
    results: dict[str, list] = {fmt: [0, 0, [], ""] for fmt in FORMATS}
    for fmt, hidden, tokens, (has_residual, offset, cast_first, dtype, eps), special, captured in cases(world):
        xs = [rows(tokens, hidden, fmt, r, special=special) for r in range(world)]
        residual = rows(tokens, hidden, fmt, "residual") if has_residual else None
        weight = (torch.rand(hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(hidden)) + 0.5).to(dtype)
        params = params_of(fmt)
        result, found = results[fmt], []
        # eager, then captured with other inputs and replayed with these
        given = dict(weight=weight, eps=eps, offset=offset, cast_first=cast_first,
                                                                       params=params, fmt=fmt, group=name)
        call, streamed, two_shot = (functools.partial(getattr(ops, way), **given) for way in WAYS)
        kept = call(xs[rank], residual, keep_norm=True)
        for other in (streamed, two_shot):
            found += differ("another way than one shot", other(xs[rank], residual, keep_norm=True), kept)
        result[1] += 2
        found += problems(kept, xs, residual, weight, eps, offset, cast_first, params, fmt)
        if tokens <= 3:
            for f in (call, streamed, two_shot):
                found += differ("without the norm", f(xs[rank], residual, keep_norm=False), [kept[0], *kept[2:]])
            result[1] += 3
        result[1] += 1
        if captured:
            static = torch.ones_like(xs[rank])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                first = call(static, residual, keep_norm=True)
                second = two_shot(static + 1, residual, keep_norm=True)
                third = streamed(static, residual, keep_norm=True)
            for _ in range(3):
                static.copy_(xs[rank])
                for t in (*first, *second, *third):
                    t.view(torch.uint8).fill_(0xA5)
                graph.replay()
                plus_one = call(xs[rank] + 1, residual, keep_norm=True)
                found += differ("a replay", [*first, *second, *third], [*kept, *plus_one, *kept])
                found += differ("eager after a replay", call(xs[rank], residual, keep_norm=True), kept)
                result[1] += 5
        seal, seen = digest(kept), said(found)
        if seen and rank == 0:
            print(fmt, hidden, tokens, has_residual, offset, cast_first, dtype, eps, special, seen, file=sys.stderr, flush=True)
        result[0] += 1
        result[2] += [f"hidden {hidden}, tokens {tokens}, residual {has_residual}, offset {offset}, cast_first {cast_first}, "
                      f"special {special}: {s}" for s in seen]
        result[3] = hashlib.sha256((result[3] + seal).encode()).hexdigest()[:16]
    return results


def compile_ahead(rank: int, count: int, calls: Callable[..., Iterable[Callable]], *args) -> None:
    """Compile every count-th kernel that `calls(*args)` launch, without running it.

    Ranks compile one kernel after the other, each for itself, and that took most of a test's time. So processes that need no peers
    do it first, into the cache that Triton keeps on disk; and a rank loads all that it will run, before peers wait in kernels.
    """
    from triton.runtime.jit import JITFunction

    def ahead(kernel: JITFunction, grid: tuple) -> Callable:
        return lambda *args, **options: kernel.warmup(*args, grid=grid, **options).run  # `run`: the C code that launches it, too

    ranks.use_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", ahead)
        for call in itertools.islice(calls(*args), rank, None, count):
            call()


def with_kernels(rank: int, numbers: Callable[[int, int], object], launches: Callable, world: int) -> object:
    compile_ahead(0, 1, launches, world)
    return numbers(rank, world)


def group_of_one(world: int, nbytes: int = 0) -> str:
    """The name of a group in whose workspace kernels are those of `world` processes; none may run. It has `nbytes` bytes, which
    calls may make views of, or says that it has enough for every call."""
    name = group.loopback_group(world).name
    space = workspace.open(name, nbytes or 1 << 20)
    space.loopback, space.nbytes, space.word_bytes = False, nbytes or 1 << 30, workspace.WORD_BYTES
    return name


def launches(world: int) -> Iterable[Callable]:
    """A call for each kernel of `numbers`."""
    from fusewire.backends.triton import all_reduce_norm_quant as ar

    name, seen = group_of_one(world), set()
    for fmt, hidden, tokens, (has_residual, offset, cast_first, dtype, eps), *_ in cases(world):
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        for way, keep in itertools.product(WAYS, (True, False)):
            few = ar._few(tokens, hidden, ar.processors(x.device)) if way == "one_shot" else ()
            key = fmt, hidden, has_residual, offset, cast_first, dtype, way, keep, few
            if tokens and (keep or tokens <= 3) and key not in seen:
                seen.add(key)
                yield functools.partial(ar.exchange, x, x if has_residual else None, x[0].to(dtype), eps, offset, cast_first,
                                        params_of(fmt), fmt, keep, name, way)


def compiling() -> int:
    """Processes that compile at the same time."""
    return min(32, os.cpu_count() or 1)


@functools.cache
def run_numbers(numbers: Callable, launches: Callable, world: int) -> list[dict[str, list]] | Exception:
    """What `numbers` gives on each rank, once for all formats, after the kernels of `launches` have been compiled."""
    start = time.monotonic()
    try:
        ranks.run_ranks(compile_ahead, compiling(), compiling(), launches, world, timeout_s=300)
        compiled = time.monotonic()
        results = ranks.run_ranks(with_kernels, world, numbers, launches, world, timeout_s=500)
    except Exception as e:
        return e
    print(f"{world} ranks: compiled in {compiled - start:.0f} s, compared in {time.monotonic() - compiled:.0f} s")
    return results


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("world", WORLDS)
def test_numbers(world, fmt):
    if isinstance(ran := run_numbers(numbers, launches, world), Exception):
        raise ran
    results = [r[fmt] for r in ran]
    assert results[0][0] >= len(TOKENS[world])
    assert [r[2] for r in results] == [[] for _ in range(world)]
    assert len({r[3] for r in results}) == 1, "the ranks' outputs differ"
    print(f"\n{world} ranks, {fmt}: {results[0][0]} cases, {results[0][1]} exchanges")


def unguarded(rank: int, cases: list[tuple[int, str, bool, bool]]) -> list[bool]:
    """Does rank 0, whose peer comes late, get the right sum? For each (tokens, way, wait, clear)."""
    from fusewire.backends.triton.all_reduce_norm_quant import exchange

    name, right = connect(), []
    weight = torch.ones(576, device="cuda")
    for tokens, way, wait, clear in cases:
        xs = [rows(tokens, 576, r) for r in range(2)]
        rest = (None, weight, 1e-6, 0.0, False, [], "bf16", True, name, way)
        for _ in range(3):  # it is compiled, both have met, and each half and each third has been used
            exchange(xs[rank] * 3, *rest, clear=clear)
        torch.cuda.synchronize()
        if rank == 1:
            dist.barrier()
        out = exchange(xs[rank], *rest, wait=wait, clear=clear)
        if rank == 0:
            if not (wait and clear):
                torch.cuda.synchronize()
            dist.barrier()
        torch.cuda.synchronize()
        dist.barrier()
        right.append(not said(problems(out, xs, None, weight, 1e-6, 0.0, False, [], "bf16")))
    return right


def test_the_wait_is_needed():
    """The numbers above would not be right by luck: with the wait left out, and a peer that is late, they are wrong."""
    ways = ((5, "one_shot"), *((300, way) for way in WAYS))  # a program for each row; several rows for each
    zero, one = ranks.run_ranks(unguarded, 2, [(*way, wait, True) for way in ways for wait in (True, False)])
    assert zero == [True, False] * len(ways) and one[::2] == [True] * len(ways)


def test_words_must_be_cleared():
    """Else a rank whose peer is late takes the words of three exchanges ago for this one's."""
    for way in ((5, "one_shot"), (300, "streamed")):  # words that stay would be taken by what comes next, too
        assert ranks.run_ranks(unguarded, 2, [(*way, True, False)])[0] == [False]


def test_what_a_longer_exchange_left_is_cleared():
    """Words that the next exchange has no rows for, in loopback: none is left after it, whichever way it goes."""
    g = group.loopback_group(2)
    space = workspace.open(g.name, 2 * 700 * 8192 * 2)
    words = space.memory[space.from_here[2][0] - space.memory.data_ptr():].view(torch.int32).view(3, -1)
    rest = (None, torch.ones(8192, device="cuda"), 1e-6, 0.0, False, [], "bf16", True, g.name)
    for long, short in itertools.product((ops.streamed, ops.one_shot), repeat=2):
        for tokens in (700 if long is ops.streamed else 264, 3):
            (long if tokens > 3 else short)(rows(tokens, 8192), *rest)
        torch.cuda.synchronize()
        assert int((words != -1).any(1).sum()) == 1, "more than the third that was used last holds something"
    group.close(g)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("world", (2, 4))
def test_every_16_bits_travel(world, dtype):
    """In words, of which one says that nothing has come: each value alone, twice in a word, and beside others."""
    g = group.loopback_group(world)
    every = torch.arange(65536, device="cuda").to(torch.int32).to(torch.int16).view(dtype)
    x = torch.cat([every, every.repeat_interleave(2), every[torch.randperm(65536, device="cuda")]]).view(-1, 8192)
    workspace.open(g.name, world * 2 * x.numel() * 2)
    nan, rest = torch.tensor(0x7FFF, dtype=torch.int16, device="cuda"), (1e-6, 0.0, False, [], "bf16", True, g.name)
    for some, call in ((torch.cat([x, x]), ops.one_shot), (x, ops.one_shot), (x[-1:], ops.one_shot), (x, ops.streamed)):
        want = some.float()
        for _ in range(world - 1):
            want = want + some.float()
        want = torch.where(want.isnan(), nan, want.to(dtype).view(torch.int16))
        for turn in range(4):
            total = call(some, None, torch.ones(8192, device="cuda"), *rest)[0]
            assert torch.equal(total.view(torch.int16), want), f"{len(some)} rows, exchange {turn}"
    group.close(g)


def alone(rank: int, tokens: int, way: str) -> None:
    name = connect(1 << 20, limit_s=3.0)
    if rank == 0:
        call = getattr(all_reduce_norm_quant.target.overloadpacket, way)
        call(rows(tokens, 576), None, torch.ones(576, device="cuda"), 1e-6, 0.0, False, [], "bf16", True, name)
        torch.cuda.synchronize()
    time.sleep(30)  # it is ended before


@pytest.mark.parametrize("tokens,way", [(3, "one_shot"), (300, "streamed"), (300, "one_shot")])  # for words, for words, for flags
def test_a_wait_ends_and_says_for_whom(capfd, tokens, way):
    with pytest.raises(RuntimeError, match=f"rank 0: died by exit code {workspace.EXIT_CODE}"):
        ranks.run_ranks(alone, 2, tokens, way, timeout_s=60)
    said = capfd.readouterr().err
    assert "rank 0 of group" in said and "waited 3 s in all_reduce_norm_quant, epoch 1, row " in said and "for rank 1" in said
    assert ("of whose row words are missing" if (tokens, way) != (300, "one_shot") else "whose flag held 0") in said


def test_a_kernel_first_met_in_a_capture_is_refused():
    g = group.loopback_group(2)
    x, w = rows(3, 640), torch.ones(640, device="cuda")
    args = (x, None, w, 1e-6, 0.0, False, [], "bf16", True, g.name)
    for sentence in ("has no workspace; call workspace.open", "would be compiled while a CUDA graph is captured"):
        with pytest.raises(FusewireError, match=sentence), torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.one_shot(*args)
        workspace.open(g.name, 1 << 20)
    with pytest.raises(FusewireError, match="cannot be made while"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        workspace.open(group.loopback_group(4).name, 1 << 20)
    group.close(g)
    assert workspace.find(g.name) is None


def test_a_workspace_does_not_grow():
    g = group.loopback_group(4)
    space = workspace.open(g.name, 4 * 8 * 640 * 2)
    args = (None, torch.ones(640, device="cuda"), 1e-6, 0.0, False, [], "bf16", True, g.name)
    all_reduce_norm_quant(rows(8, 640), *args)
    with pytest.raises(FusewireError, match=r"it needs 46080 bytes .* has 40960; open it with workspace.open"):
        ops.one_shot(rows(9, 640), *args)
    assert workspace.open(g.name, 10) is space
    with pytest.raises(FusewireError, match="cannot grow to 50000"):
        workspace.open(g.name, 50000)
    group.close(g)


def mixed() -> Iterable[tuple]:
    """Arguments of calls in three loopback groups by turns, which it opens."""
    groups = [group.loopback_group(w) for w in (2, 4, 8)]
    for g in groups:
        workspace.open(g.name, 8 * 130 * 5120 * 2)
    for i in range(60):
        g, tokens, hidden = groups[i % 3], (1, 130, 7)[i // 3 % 3], (5120, 576)[i % 2]
        fmt = FORMATS[i % len(FORMATS)]
        yield (rows(tokens, hidden, i), rows(tokens, hidden, i, "residual"), torch.ones(hidden, device="cuda"), 1e-6, 0.0, False,
               params_of(fmt), fmt, True, g.name)
    for g in groups:
        group.close(g)


def mixed_launches() -> Iterable[Callable]:
    return (functools.partial(ops.one_shot, *args) for args in mixed())


def two_groups(rank: int) -> list[str]:
    ranks.use_device()
    found: Found = []
    for args in mixed():
        x, residual, *rest, _, name = args
        found += problems(ops.one_shot(*args), [x] * group.resolve(name).world_size, residual, *rest)
    return said(found)


def test_two_groups_and_sizes_in_one_process():
    """Loopback: each peer is taken to have pushed what this rank pushed."""
    ranks.run_ranks(compile_ahead, compiling(), compiling(), mixed_launches, timeout_s=120)
    assert ranks.run_ranks(two_groups, 1) == [[]]


def test_ten_thousand_exchanges():
    """Eager and replayed by turns, sizes and formats by turns, odd values in the data: always the same bits."""
    g = group.loopback_group(2)
    workspace.open(g.name, 2 * 700 * 2048 * 2)
    calls = []
    for i, tokens in enumerate((1, 5, 128, 300, 9, 700)):
        hidden = (1024, 576, 2048)[i % 3]
        x, residual = rows(tokens, hidden, i, special=True), rows(tokens, hidden, i, "residual")
        args = (torch.ones(hidden, device="cuda"), 1e-6, 0.0, False, params_of(FORMATS[i]), FORMATS[i], True, g.name)
        calls.append(functools.partial(all_reduce_norm_quant, x, residual if i % 2 else None, *args))
    before = workspace.of(g.name).epoch()
    assert by_turns(calls, 10_000)[0] == 0
    assert workspace.of(g.name).epoch() == before + len(calls) + 10_000
    group.close(g)


@pytest.mark.parametrize("fmt", FORMATS[1:])
def test_every_bf16_is_quantized_by_the_formula(fmt):
    """65,536 bf16 values, each as a block's own amax and beside others: 0 differences."""
    g = group.loopback_group(2)
    hidden, every = 4096, torch.arange(65536, device="cuda").to(torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([every.view(-1, hidden), every[torch.randperm(65536, device="cuda")].view(-1, hidden),
                   torch.stack([every, *[torch.zeros_like(every)] * 15], 1).view(-1, hidden)])
    workspace.open(g.name, 2 * x.numel() * 2)
    # eps so large that norm = x * weight, with weights that are powers of two: the norm is any bf16 then
    args = (torch.full((hidden,), 2.0**60, device="cuda"), 2.0**120, 0.0, False, params_of(fmt), fmt)
    out = all_reduce_norm_quant(x, torch.zeros_like(x), *args, True, g.name)
    assert not said(problems(out, [x, x], torch.zeros_like(x), *args))
    assert int(out[1].view(torch.int16).unique().numel()) > 30000
    group.close(g)
