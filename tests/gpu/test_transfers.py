"""all_gather_matmul and matmul_reduce_scatter over a workspace, by every backend: 2, 4 and 8 ranks, which share GPUs where
there are fewer, and loopback, where one process plays all ranks. Sharing proves numbers and protocols, not speed."""
from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import dist as ranks
import pytest
import torch
import torch.distributed as dist
from test_all_reduce_norm_quant import digest
from torch import Tensor
from turns import by_turns, many

import fusewire.backends  # noqa: F401  (registers them)
from fusewire import formats, group
from fusewire.backends import all_gather_matmul as gathers
from fusewire.backends import device, words, workspace
from fusewire.backends import matmul_reduce_scatter as scatters
from fusewire.backends.cuda import gemm
from fusewire.errors import FusewireError
from fusewire.ops.collectives import reduce_scatter
from fusewire.ops.dense import matmul, quantize
from fusewire.ops.fused import all_gather_matmul, matmul_reduce_scatter

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

WORLDS = (2, 4, 8)
FORMATS = ("bf16", "fp8_tensor", "fp8_token", "fp8_block", "nvfp4")
ONE_KERNEL = FORMATS[:3]  # what the CUDA kernels multiply
# rows of each rank, k, columns of each weight
SHAPES = ((0, 512, (256,)), (1, 512, (256, 264)), (3, 1024, (520,)), (64, 1024, (256, 128, 128)), (127, 2048, (1024,)),
          (128, 256, (96,)), (129, 576, (576, 192)), (300, 2048, (1288,)))
MOST = (4096, 1024, (2560,))  # tokens of all ranks together


def rows(m: int, k: int, *key: object) -> Tensor:
    """The same (m, k) bf16 on whichever rank asks, not contiguous."""
    seed = int.from_bytes(hashlib.sha256(repr((m, k, key)).encode()).digest()[:7], "little")
    return torch.randn(m, k + 32, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()[:, 16:k + 16]


def params_of(fmt: str) -> list[Tensor]:
    make = formats.get(fmt).params_from_amax
    return make(torch.tensor(4.0, device="cuda")) if make else []


def parts(x: Tensor, fmt: str) -> list[Tensor]:
    """x quantized; FP8 codes in rows that are apart, as an activation that is a part of another has them."""
    if fmt == "bf16":
        return [x]
    data, *rest = quantize(x, params_of(fmt), fmt)
    if fmt in ONE_KERNEL:
        data = torch.cat([data, data], 1)[:, :data.shape[1]]
    return [data, *rest]


def weight(n: int, k: int, fmt: str) -> list[Tensor]:
    w = rows(n, k, "weight").contiguous()
    return [w] if fmt == "bf16" else [t.to("cuda") for t in formats.get(fmt).quantize_weight(w)]


def exact(x: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str) -> Tensor:
    f = formats.get(fmt)
    a = x[0].double() if fmt == "bf16" else f.dequantize(x, params_of(fmt)).double()
    b = w[0].double() if fmt == "bf16" else f.dequantize_weight(w).double()
    return a @ b.t() + (0 if bias is None else bias.double())


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm()) if y.numel() else 0.0


def backends(op, args: tuple) -> dict[str, object]:
    """Those that can; `push` in words, where a call is small enough, and without."""
    able = {b.name: b.run for b in op.backends if b.supports(*args) is None}
    return able | {"push:flags": functools.partial(by_flags, able["push"])}


def by_flags(run, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "PIECES", ())
        return run(*args)


def judge(backend: str, y: Tensor, same_chunks: Tensor, unfused: Tensor, truth: Tensor) -> list[str]:
    wrong = []
    if not torch.equal(y, same_chunks):
        wrong.append(f"{backend}: {int((y != same_chunks).sum())} of {y.numel()} differ from the same chunks' reference")
    if not error(y, truth) <= 1.5 * error(unfused, truth):
        wrong.append(f"{backend}: error {error(y, truth):.2e}, unfused {error(unfused, truth):.2e}")
    return wrong


def gathered(rank: int, world: int, shape: tuple, fmt: str, name: str) -> tuple[list[str], list[str]]:
    (m, k, ns), p = shape, params_of(fmt)
    shards = [parts(rows(m, k, r), fmt) for r in range(world)]
    full = [torch.cat(part) for part in zip(*shards, strict=True)]
    weights = [weight(n, k, fmt) for n in ns]
    biases = [rows(1, n, "bias")[0].contiguous() if i % 2 else None for i, n in enumerate(ns)]
    args = (shards[rank], p, [t for w in weights for t in w], biases, fmt, torch.bfloat16, name)
    wrong, ran = [], backends(all_gather_matmul, args)
    for backend, run in ran.items():
        for w, bias, y in zip(weights, biases, run(*args), strict=True):
            unfused = matmul(full, p, w, bias, fmt, torch.bfloat16)
            if backend == "copy_engine":
                same = torch.cat([matmul(s, p, w, bias, fmt, torch.bfloat16) for s in shards])
            else:
                same = gemm.product(full, p, w, bias, fmt) if backend == "gated" else unfused
            wrong += judge(backend, y, same, unfused, exact(full, w, bias, fmt))
    return wrong, list(ran)


def scattered(rank: int, world: int, shape: tuple, fmt: str, name: str) -> tuple[list[str], list[str]]:
    (m, k, ns), p = shape, params_of(fmt)
    xs = [parts(rows(m * world, k, r), fmt) for r in range(world)]
    mine = slice(rank * m, (rank + 1) * m)
    wrong, ran = [], {}
    for i, n in enumerate(ns):
        w, bias = weight(n, k, fmt), rows(1, n, "bias")[0].contiguous() if i % 2 else None
        args = (xs[rank], p, w, bias, fmt, torch.bfloat16, name)
        ran = backends(matmul_reduce_scatter, args)

        def whole(x: list[Tensor], w=w, bias=bias) -> Tensor:
            return matmul(x, p, w, bias, fmt, torch.bfloat16)

        def chunks(x: list[Tensor], w=w, bias=bias) -> Tensor:
            return torch.cat([matmul([t[c * m:(c + 1) * m] for t in x], p, w, bias, fmt, torch.bfloat16) for c in range(world)])

        def kernel(x: list[Tensor], w=w, bias=bias) -> Tensor:
            return gemm.product(x, p, w, bias, fmt)

        y = whole(xs[rank])
        if not torch.equal(torch.ops.fusewire.reduce_scatter.push(y, name), reduce_scatter.reference(y, name)):
            wrong.append("a reduce_scatter alone is not its reference")
        truth = sum(exact([t[mine] for t in x], w, bias, fmt) for x in xs)
        for backend, run in ran.items():
            same = {"push": whole, "push:flags": whole, "copy_engine": chunks, "epilogue": kernel}[backend]
            sums = [functools.reduce(torch.add, [f(x)[mine].float() for x in xs]).bfloat16() for f in (same, whole)]
            wrong += judge(backend, run(*args), *sums, truth)
    return wrong, list(ran)


def connect(nbytes: int = 64 << 20, limit_s: float = 60.0) -> str:
    ranks.use_device()
    name = dist.group.WORLD.group_name
    space = workspace.open(name, nbytes, limit_s=limit_s)
    space.memory[workspace.regions(space.nbytes, space.flag_count)[3]:].fill_(0xFF)  # NaN in every format
    torch.cuda.synchronize()
    dist.barrier()
    return name


def numbers(rank: int, world: int) -> dict[str, list]:
    """Per format: [cases, what was wrong]."""
    name, results = connect(), {}
    for fmt in FORMATS:
        cases, wrong = 0, []
        shapes = SHAPES if world == 2 else SHAPES[:5:2] + SHAPES[6:7]
        for shape in (*shapes, (MOST[0] // world, *MOST[1:])) if fmt in ONE_KERNEL else shapes:
            for f in (gathered, scattered):
                seen, ran = f(rank, world, shape, fmt, name)
                wrong += [f"{f.__name__} {shape}: {s}" for s in seen]
                if len(ran) != (4 if fmt in ONE_KERNEL else 3):
                    wrong.append(f"{f.__name__} {shape}: only {ran} ran")
                cases += len(ran)
        results[fmt] = [cases, wrong]
    return results


@functools.cache
def run_numbers(world: int) -> list[dict[str, list]] | Exception:
    try:
        return ranks.run_ranks(numbers, world, world, timeout_s=300)
    except Exception as e:  # once for all formats
        return e


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("world", WORLDS)
def test_numbers(world, fmt):
    if isinstance(ran := run_numbers(world), Exception):
        raise ran
    assert [r[fmt][1] for r in ran] == [[] for _ in range(world)]
    assert ran[0][fmt][0] >= 16
    print(f"\n{world} ranks, {fmt}: {ran[0][fmt][0]} cases")


def every_tile(rank: int, world: int) -> tuple[int, list[str]]:
    """(how many tiles ran, whose outputs differ): both kernels, with each tile that they can have."""
    name, wrong = connect(), []
    (m, k, n), fmt = MANY_TILES, "fp8_tensor"
    xs, p, w = [parts(rows(m * world, k, r), fmt) for r in range(world)], params_of(fmt), weight(n, k, fmt)
    shards = [[t[:m] for t in x] for x in xs]
    whole = [torch.cat(part) for part in zip(*shards, strict=True)]
    mine = slice(rank * m, (rank + 1) * m)
    want = {"gather": gemm.product(whole, p, w, None, fmt),
            "reduce": functools.reduce(torch.add, [gemm.product(x, p, w, None, fmt)[mine].float() for x in xs]).bfloat16()}
    for config in TILES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemm, "configure", lambda *_, config=config: config)
            if config.mode == "gather":
                got = gathers.gated(shards[rank], p, w, [None], fmt, torch.bfloat16, name)[0]
            else:
                got = scatters.epilogue(xs[rank], p, w, None, fmt, torch.bfloat16, name)
        if differ := int((got != want[config.mode]).sum()):
            wrong.append(f"{config}: {differ} of {got.numel()} differ")
    return len(TILES), wrong


MANY_TILES = (600, 1024, 1288)  # rows of each rank, k, columns
TILES = [config for mode in ("gather", "reduce") for columns in gemm.COLUMNS for turns in (False, True)
         if (config := gemm.Config(True, columns, 2, mode, turns=turns)).possible()]


@pytest.mark.parametrize("world", WORLDS)
def test_every_tile(world):
    """Whichever tile a call takes, the sum along k has the same order."""
    with ThreadPoolExecutor() as some:  # once for all ranks
        list(some.map(gemm.build, TILES))
    ran = ranks.run_ranks(every_tile, world, world, timeout_s=200)
    assert [wrong for _, wrong in ran] == [[] for _ in range(world)]
    assert {count for count, _ in ran} == {len(TILES)} == {18}


WITHOUT_WAIT = {"push": gathers.pushed, "gated": gathers.in_one_kernel}


def late(rank: int, wait: bool, call):
    """What `call` gives on this rank, of which rank 1 comes once rank 0 has called; without a wait, once rank 0 has finished."""
    torch.cuda.synchronize()
    if rank == 1:
        dist.barrier()
    out = call()
    if rank == 0:
        if not wait:
            torch.cuda.synchronize()
        dist.barrier()
    torch.cuda.synchronize()
    dist.barrier()
    return out


def unguarded(rank: int, backend: str, wait: bool) -> bool:
    """Does rank 0, whose peer comes late, get the right rows?"""
    name, (m, k, n) = connect(), (512, 1024, 256)
    xs, w = [rows(m, k, r) for r in range(2)], weight(n, k, "bf16")
    run = functools.partial(WITHOUT_WAIT[backend], params=[], ws=w, biases=[None], fmt="bf16", dtype=torch.bfloat16, group=name)
    for _ in range(2):  # every kernel is built, both halves have been used
        run([xs[rank] * 3])
    out = late(rank, wait, lambda: run([xs[rank]], wait=wait)[0])
    full = [torch.cat(xs)]
    return bool(torch.equal(out, gemm.product(full, [], w, None, "bf16") if backend == "gated" else full[0] @ w[0].t()))


@pytest.mark.parametrize("backend", WITHOUT_WAIT)
def test_the_wait_is_needed(backend):
    """The numbers above are not right by luck: with the wait left out, and a peer that is late, they are wrong."""
    assert ranks.run_ranks(unguarded, 2, backend, True) == [True, True]
    assert ranks.run_ranks(unguarded, 2, backend, False)[0] is False


def alone(rank: int, op: str, backend: str) -> None:
    name = connect(16 << 20, limit_s=3.0)
    x, w = parts(rows(256, 512), "fp8_tensor"), weight(256, 512, "fp8_tensor")
    gemm.product(x, params_of("fp8_tensor"), w, None, "fp8_tensor")
    if rank == 0:
        run = getattr(getattr(torch.ops.fusewire, op), backend)
        args = (x, params_of("fp8_tensor"), w)
        run(*args, *([[None]] if op == "all_gather_matmul" else [None]), "fp8_tensor", torch.bfloat16, name)
        torch.cuda.synchronize()
    time.sleep(30)  # it is ended before


@pytest.mark.parametrize(("op", "backend"), [("all_gather_matmul", "push"), ("all_gather_matmul", "copy_engine"),
                                             ("all_gather_matmul", "gated"), ("matmul_reduce_scatter", "push"),
                                             ("matmul_reduce_scatter", "copy_engine"), ("matmul_reduce_scatter", "epilogue")])
def test_a_wait_ends_and_says_for_whom(capfd, op, backend):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank 0: died by exit code {workspace.EXIT_CODE}"):
        ranks.run_ranks(alone, 2, op, backend, timeout_s=60)
    said = capfd.readouterr().err
    assert "rank 0 of group" in said and f"waited 3 s in {op}, epoch " in said and "for rank 1" in said
    assert time.monotonic() - start < 60


def calls(name: str, seed: int, m: int, k: int, n: int, fmt: str) -> list[tuple]:
    """(op, args) of both ops, for loopback: the peers' rows are this rank's."""
    x, w, p = parts(rows(m, k, seed), fmt), weight(n, k, fmt), params_of(fmt)
    twice = [torch.cat([t, t]) for t in x]
    return [(all_gather_matmul, (x, p, w, [None], fmt, torch.bfloat16, name)),
            (matmul_reduce_scatter, (twice, p, w, None, fmt, torch.bfloat16, name))]


def first(out: Tensor | list[Tensor]) -> Tensor:
    return out[0] if isinstance(out, list) else out


KINDS = ((1, "bf16"), (129, "fp8_tensor"), (300, "fp8_token"), (640, "fp8_tensor"))  # rows of each rank, format


def every_kind(name: str, seed: int) -> list[Callable[[], list[Tensor]]]:
    """Both ops by every backend, sizes and formats."""
    def call(run: Callable, args: tuple) -> Callable[[], list[Tensor]]:
        return lambda: [first(run(*args))]

    return [call(run, args) for i, (m, fmt) in enumerate(KINDS) for op, args in calls(name, seed + i, m, 512, 384, fmt)
            for run in backends(op, args).values()]


def test_ten_thousand_transfers():
    """Eager and replayed by turns, both ops, every backend, sizes and formats by turns, NaN in the workspace: the same bits."""
    g = group.loopback_group(2)
    space = workspace.open(g.name, 4 << 20)
    space.memory[workspace.regions(space.nbytes, space.flag_count)[3]:].fill_(0xFF)
    kinds = every_kind(g.name, 0)
    assert len(kinds) == 32
    before = space.epoch()
    assert by_turns(kinds, 10_000)[0] == 0
    assert space.epoch() == before + len(kinds) + 10_000
    group.close(g)


def skewed(rank: int) -> list:
    """The same with two ranks, delayed at random: [outputs that differ from the first, the last epoch, hash of gathered ones]."""
    name = connect(4 << 20)
    bad, outputs = by_turns(every_kind(name, 10 * rank), many(2, 300), rank)
    return [bad, workspace.of(name).epoch(), digest([out[0] for i, out in enumerate(outputs) if i // 4 % 2 == 0])]


def test_ranks_out_of_step():
    (zero, *seal), (one, *other) = ranks.run_ranks(skewed, 2, timeout_s=400)
    assert (zero, one) == (0, 0) and seal == other


def skewed_without_waits(rank: int) -> int:
    name, kinds = connect(4 << 20), []
    for i, (m, fmt) in enumerate(KINDS):
        (_, (x, p, w, biases, *rest)), _ = calls(name, 10 * rank + i, m, 512, 384, fmt)
        kinds += [functools.partial(run, x, p, w, biases, *rest, wait=False) for run in WITHOUT_WAIT.values()]
        product = rows(2 * m, 384, rank).contiguous()
        kinds.append(lambda y=product: [scatters.pushed(y, name, wait=False)])
    return by_turns(kinds, 300, rank)[0]


def test_ranks_out_of_step_that_do_not_wait():
    """That test would not pass by luck: without waits, what a late peer has not sent is missing."""
    assert sum(ranks.run_ranks(skewed_without_waits, 2, timeout_s=400)) > 0


def test_a_thousand_replays_with_new_inputs():
    """Two graphs on one workspace, x and then -x: nothing of an earlier replay is left."""
    g = group.loopback_group(2)
    workspace.open(g.name, 4 << 20)
    for fmt in ("bf16", "fp8_tensor"):
        for op, args in calls(g.name, 7, 256, 512, 384, fmt):
            for name, run in backends(op, args).items():
                x = args[0][0]
                graphs, outs = [], []
                run(*args)
                torch.cuda.synchronize()
                for _ in range(2):
                    graphs.append(torch.cuda.CUDAGraph())
                    with torch.cuda.graph(graphs[-1]):
                        outs.append(first(run(*args)))
                bad = torch.zeros((), dtype=torch.int64, device="cuda")
                last = None
                for i in range(1000 // 12):
                    x.copy_((-x.float() if i % 2 else rows(*x.shape, i).float()).to(x.dtype))
                    for graph, out in zip(graphs, outs, strict=True):
                        out.fill_(float("nan"))
                        graph.replay()
                    bad += (outs[0] != outs[1]).any()
                    if i % 2:
                        bad += (outs[0] != -last).any()
                    last = outs[0].clone()
                assert int(bad) == 0, (fmt, op.name, name)
    group.close(g)


def test_a_workspace_is_large_enough_or_refuses():
    m, k = 64, 512
    need = 2 * m * k * 2
    for nbytes, fits in ((need - 256, False), (need, True), (need + 256, True)):
        g = group.loopback_group(2)
        workspace.open(g.name, nbytes)
        args = calls(g.name, 0, m, k, 128, "bf16")[0][1]
        for name, run in backends(all_gather_matmul, args).items():
            if fits:
                assert torch.isfinite(run(*args)[0]).all(), name
            else:
                with pytest.raises(FusewireError, match=f"it needs {need} bytes .* has {nbytes}"):
                    run(*args)
        group.close(g)


def test_a_kernel_first_met_in_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(gemm, "_loaded", {})
    monkeypatch.setattr(device, "_warm", set())
    g = group.loopback_group(2)
    workspace.open(g.name, 1 << 20)
    x, w, unseen = [rows(40, 512)], [rows(160, 512).contiguous()], [rows(7, 96)]
    with pytest.raises(FusewireError, match="while a CUDA graph is captured; run the model once before the capture"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ops.fusewire.all_gather_matmul.gated(x, [], w, [None], "bf16", torch.bfloat16, g.name)
    with pytest.raises(FusewireError, match="kernel gather would be compiled while a CUDA graph is captured"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ops.fusewire.all_gather_matmul.push(unseen, [], w, [None], "bf16", torch.bfloat16, g.name)
    group.close(g)
