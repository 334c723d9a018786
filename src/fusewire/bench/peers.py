"""Who is measured: our backends, and what else does the same. A peer gives its call, or a sentence why it cannot take part."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import compat, formats
from .. import group as groups
from ..backends import aten
from ..backends.aten import scales
from ..backends.cuda import gemm
from ..backends.triton import norm_quant_all_gather_matmul as pushing
from ..backends.triton.launch import row_bytes, why_not
from ..errors import InputError
from ..ops.fused import all_gather_matmul
from .cases import BOUNDARY, GATHER, NORM, SCATTER, Case
from .checks import after, cublas, fast_sums, operands, tail, whole

COPIED_BYTES = 256 << 20  # at once
FOREIGN = ("torch", "flashinfer")  # whatever these raise is their refusal


class Candidate(NamedTuple):
    """One way to do it.

    run   version of the inputs -> the outputs
    does  "op"; "gemm" or "norm": that part alone, on data that is there; "copy": as many bytes as the op moves, and nothing else
    """

    name: str
    run: Callable[[int], list[Tensor]]
    does: str = "op"


def candidates(case: Case, sets: list[tuple], device: torch.device,
               tiles: Sequence[tuple[int, bool]] = ()) -> tuple[list[Candidate], list[str]]:
    """(who takes part, why the others do not). `sets` are the op's arguments, version by version; `tiles` those with which our
    kernels take part besides."""
    tried = [(peer.__name__, c) for peer in (fusewire, collectives, torch_symm_mem, flashinfer, alone, copy)
             for c in peer(case, sets, device)]
    found = [c for _, c in tried if isinstance(c, Candidate)]
    tried += [("tiles", c) for tile in tiles for c in tiled(found, case.fmt, *tile)]
    return [c for _, c in tried if isinstance(c, Candidate)], [f"{name}: {c}" for name, c in tried if isinstance(c, str)]


def turning(c: Candidate, versions: int) -> Callable[[], object]:
    """A call that works on the next version of the inputs each time."""
    calls = count()
    return lambda: c.run(next(calls) % versions)


def _list(y: Any) -> list[Tensor]:
    return list(y) if isinstance(y, (list, tuple)) else [y]


def _call(run: Callable, sets: list[tuple]) -> Callable[[int], list[Tensor]]:
    return lambda i: _list(run(*sets[i]))


def _process_group(case: Case) -> dist.ProcessGroup | None:
    return None if case.group.name in groups._made else compat.process_group(case.group.name)


# --- ours


def fusewire(case: Case, sets: list[tuple], device: torch.device) -> Iterator[Candidate | str]:
    """What the op chooses by itself, and each backend."""
    yield Candidate("fusewire", _call(case.op.target, sets))
    able, refused = case.op.candidates(*sets[0])
    yield from refused
    yield from (Candidate(f"fusewire:{b.name}", _call(b.run, sets)) for b in able)


MODES = {"fusewire:gated": "gather", "fusewire:epilogue": "reduce", "gemm:fusewire": "plain"}  # of our CUDA kernel


def check_tiles(tiles: Sequence[tuple[int, bool]]) -> None:
    """InputError if no kernel has one of them."""
    if unknown := [columns for columns, _ in tiles if columns not in gemm.COLUMNS]:
        raise InputError(f"no tile has {unknown[0]} columns; known: {', '.join(map(str, gemm.COLUMNS))}")


def named(columns: int, turns: bool) -> str:
    """A tile as --tiles has it."""
    return f"{columns}{'t' * turns}"


def tiled(found: list[Candidate], fmt: str, columns: int, turns: bool) -> Iterator[Candidate | str]:
    """Of those who run our CUDA kernel, the same with tiles of so many columns, in turns or not: `fusewire:gated:160t`."""
    fp8 = fmt != "bf16"
    for c in found:
        if (mode := MODES.get(c.name)) is not None:
            possible = gemm.Config(fp8, columns, 2, mode, fp8 and not aten.FAST_ACCUMULATION, turns).possible()
            yield c._replace(name=f"{c.name}:{named(columns, turns)}", run=gemm.tile(columns, turns)(c.run)) if possible else (
                f"{c.name} has no tiles of {columns} columns{' in turns' * turns}")


# --- the unfused program


@functools.lru_cache(maxsize=1)
def _compiled(fmt: str, device: str) -> Callable[[Tensor, tuple], list[Tensor]]:
    torch.compiler.reset()  # torch compiles a function only so many times: the token counts of one format fit
    return torch.compile(after) if device == "cuda" else after


def collectives(case: Case, sets: list[tuple], device: torch.device) -> Iterator[Candidate | str]:
    """`nccl` (or `gloo`): the collective library's own collective, and a cuBLAS matmul or a compiled norm beside it."""
    if (pg := _process_group(case)) is None:
        yield "a loopback group has no collectives"
        return
    fast = fast_sums(case.fmt, device)
    name, then = "nccl" if device.type == "cuda" else "gloo", _compiled(case.fmt, device.type)

    def gather_of(x: list[Tensor], params: list[Tensor], w: list[Tensor]) -> Tensor:
        full = [t.new_empty((t.shape[0] * pg.size(), *t.shape[1:])) for t in x]
        for t, out in zip(x, full, strict=True):
            compat.all_gather_into(out.view(-1).view(torch.uint8), t.view(-1).view(torch.uint8), pg)
        return cublas(full, params, w, case.fmt, fast)

    def gather(i: int) -> list[Tensor]:
        return [gather_of(*sets[i][:3])]

    def boundary(i: int) -> list[Tensor]:
        total, *x = then(sets[i][0], tail(sets[i]))
        return [total, gather_of(x, sets[i][7], sets[i][8])]

    def scatter(i: int) -> list[Tensor]:
        x, params, w, _, fmt, *_ = sets[i]
        y = cublas(x, params, w, fmt, fast)
        out = y.new_empty(y.shape[0] // pg.size(), y.shape[1])
        compat.reduce_scatter_into(out, y, pg)
        return [out]

    def reduce(i: int) -> list[Tensor]:
        total = sets[i][0].clone()  # in place it would grow from call to call
        dist.all_reduce(total, group=pg)
        return then(total, sets[i])

    yield Candidate(name, {GATHER: gather, SCATTER: scatter, NORM: reduce, BOUNDARY: boundary}[case.op.name])


# --- other libraries


def torch_symm_mem(case: Case, sets: list[tuple], device: torch.device) -> Iterator[Candidate | str]:
    """`torch`: PyTorch's own fused ops on symmetric memory."""
    if device.type != "cuda" or _process_group(case) is None:
        yield "PyTorch's symmetric memory needs CUDA devices and a process group"
        return
    if case.op.name != NORM and case.fmt not in ("bf16", "fp8_tensor", "fp8_token"):
        yield f"its fused matmuls do not take {case.fmt}"
        return
    ops, name, bf16, fast = compat.symm_mem_ops(), case.group.name, torch.bfloat16, fast_sums(case.fmt, device)
    then = _compiled(case.fmt, device.type)

    def gather_of(x: list[Tensor], params: list[Tensor], w: list[Tensor]) -> list[Tensor]:
        if case.fmt == "bf16":
            return ops.fused_all_gather_matmul(x[0], [w[0].t()], 0, name, return_A=False)[1]
        a, b = scales(x, params, w, case.fmt)
        return ops.fused_all_gather_scaled_matmul(x[0], [w[0].t()], a, [b], 0, name, [None], [None], [bf16], [fast])[1]

    def gather(i: int) -> list[Tensor]:
        return gather_of(*sets[i][:3])

    def boundary(i: int) -> list[Tensor]:
        total, *x = then(sets[i][0], tail(sets[i]))
        return [total, *gather_of(x, sets[i][7], sets[i][8])]

    def scatter(i: int) -> list[Tensor]:
        x, params, w, _, fmt, *_ = sets[i]
        if fmt == "bf16":
            return [ops.fused_matmul_reduce_scatter(x[0], w[0].t(), "sum", 0, name)]
        return [ops.fused_scaled_matmul_reduce_scatter(x[0], w[0].t(), *scales(x, params, w, fmt), "sum", 0, 0, name,
                                                       [case.M, case.N], out_dtype=bf16, use_fast_accum=fast)]

    if case.op.name != NORM:
        yield Candidate("torch", {GATHER: gather, SCATTER: scatter, BOUNDARY: boundary}[case.op.name])
        return
    rows = len(sets)
    memory = compat.symmetric_memory(rows * case.M * case.N * 2, name, device)[case.group.rank()]
    xs = memory.view(bf16).view(rows, case.M, case.N)  # where a producer that knows of it could have written
    for x, args in zip(xs, sets, strict=True):
        x.copy_(args[0])
    yield Candidate("torch", lambda i: then(ops.one_shot_all_reduce(xs[i], "sum", name), sets[i]))


def flashinfer(case: Case, sets: list[tuple], device: torch.device) -> Iterator[Candidate | str]:
    """`flashinfer`: its fused all-reduce, by the backend "trtllm" alone: the others use NVLink multicast."""
    if case.op.name != NORM:
        return
    pg = _process_group(case)
    if device.type != "cuda" or pg is None or find_spec("flashinfer") is None:
        yield "FlashInfer is not installed, or there are no CUDA devices and process group"
        return
    if case.fmt not in ("bf16", "fp8_tensor"):
        yield f"it has no {case.fmt} for this GPU"
        return
    from flashinfer import comm

    space = _flashinfer_workspace(pg, case.N)
    if case.M > space.most_tokens:
        yield f"its workspace was made for {space.most_tokens} tokens"
        return
    pattern = comm.AllReduceFusionPattern

    def run(i: int) -> list[Tensor]:
        x, residual, weight, eps, _, _, params, fmt, _, _ = sets[i]
        total, y = torch.empty_like(x), torch.empty_like(x)
        if fmt == "bf16":
            comm.allreduce_fusion(x, space.memory, pattern.kARResidualRMSNorm, residual_in=residual, residual_out=total, norm_out=y,
                                  rms_gamma=weight, rms_eps=eps, fp32_acc=True)
            return [total, y]
        q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        comm.allreduce_fusion(x, space.memory, pattern.kARResidualRMSNormFP8Quant, residual_in=residual, residual_out=total,
                              quant_out=q, rms_gamma=weight, rms_eps=eps, scale_factor=params[0], fp32_acc=True)
        return [total, q]

    yield Candidate("flashinfer", run)


class _Space(NamedTuple):
    memory: Any
    most_tokens: int


@functools.cache
def _flashinfer_workspace(pg: dist.ProcessGroup, hidden: int) -> _Space:
    from flashinfer import comm

    most = 4096
    return _Space(comm.create_allreduce_fusion_workspace(
        backend="trtllm", world_size=pg.size(), rank=pg.rank(), max_token_num=most, hidden_dim=hidden, dtype=torch.bfloat16,
        group=pg), most)


# --- bounds


def alone(case: Case, sets: list[tuple], device: torch.device) -> Iterator[Candidate | str]:
    """`gemm`, `gemm:fast`, `gemm:fusewire`: the matmul on data that is gathered already, by cuBLAS with precise and with fast
    sums, and by our kernel; `norm`: what follows the sum. Of a boundary `all_gather_matmul`, on rows that are quantized already."""
    if case.op.name in (NORM, BOUNDARY):
        then = _compiled(case.fmt, device.type)
        rest = tail if case.op.name == BOUNDARY else tuple
        yield Candidate("norm", lambda i: then(sets[i][0], rest(sets[i])), "norm")
    if case.op.name == NORM:
        return
    fmt, own = case.fmt, [operands(case, args) for args in sets]
    calls = [(whole(case, x), params, w) for x, params, w in own]
    yield Candidate("gemm", lambda i: [cublas(*calls[i], fmt)], "gemm")
    if fast_sums(fmt, device):
        yield Candidate("gemm:fast", lambda i: [cublas(*calls[i], fmt, True)], "gemm")
    why = gemm.why_not(calls[0][0], calls[0][2], None, fmt, torch.bfloat16)
    yield why or Candidate("gemm:fusewire", lambda i: [gemm.product(*calls[i], None, fmt)], "gemm")
    if case.op.name == BOUNDARY:
        name = case.group.name
        yield Candidate("all_gather_matmul", lambda i: all_gather_matmul(*own[i], [None], fmt, torch.bfloat16, name), "gemm")
        yield from boundary_kernel(case, sets)


def boundary_kernel(case: Case, sets: list[tuple]) -> Iterator[Candidate | str]:
    """`norm:fusewire`: our kernel between two matmuls, which sends nothing; in loopback `push:fusewire`, the same if it sends.
    `copy:norm`, `copy:push`: as many bytes as they read and write, halved, since a copy reads and writes."""
    rows, residual, weight, *_ = sets[0]
    both = rows.numel() * 2 * 3  # two are read, their sum is written
    parts = rows.shape[0] * sum(row_bytes(rows, case.fmt))
    why = why_not(rows, residual, weight, case.fmt, case.group.name)

    def call(sends: bool) -> Callable[[int], list[Tensor]]:
        def run(i: int) -> list[Tensor]:
            x, residual, weight, eps, offset, cast_first, _, params, *_ = sets[i]
            made = pushing.push(x, residual, weight, eps, offset, cast_first, False, params, case.fmt, case.group.name, False,
                                send=sends)
            return [*([] if made.total is None else [made.total]), *made.parts]
        return run

    yield _copy("copy:norm", (both + parts) // 2, sets)
    yield why or Candidate("norm:fusewire", call(False), "norm")
    if _process_group(case) is None:  # between ranks nobody may send again before the others have read
        yield _copy("copy:push", (both + parts * case.group.world_size) // 2, sets)
        yield why or Candidate("push:fusewire", call(True), "norm")


def moved(case: Case) -> int:
    """Bytes that the op must move: what travels; of all_reduce_norm_quant in loopback, all that it reads and writes, halved,
    since a copy reads and writes."""
    if case.op.name != NORM or _process_group(case) is not None:
        return case.wire
    parts = 0 if case.fmt == "bf16" else formats.nbytes(formats.get(case.fmt), case.M, case.N)
    return (case.M * case.N * 2 * (3 + 2 * (case.group.world_size - 1)) + parts) // 2


def copy(case: Case, sets: list[tuple], device: torch.device) -> Iterator[Candidate | str]:
    """`copy`: as many bytes, read from the peers' memory where there is a wire."""
    n = moved(case)
    pg = _process_group(case)
    if pg is None or device.type != "cuda":
        yield _copy("copy", n, sets)
        return
    pull = puller(case.group.name, n, device)
    yield Candidate("copy", lambda i: [pull()], "copy")


def _copy(name: str, nbytes: int, sets: list[tuple]) -> Candidate:
    """A copy of so many bytes on this device, others for each version; in pieces, as one of 512 MiB took 1.7 times as long a byte
    as one of 448 MiB on an H200."""
    first = sets[0][0]
    device = first.device if isinstance(first, Tensor) else first[0].device
    sources = [torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device) for _ in sets]
    targets = [torch.empty_like(s) for s in sources]

    def run(i: int) -> list[Tensor]:
        return [t.copy_(s) for t, s in zip(targets[i].split(COPIED_BYTES), sources[i].split(COPIED_BYTES), strict=True)]

    return Candidate(name, run, "copy")


_buffers: dict[str, list[Tensor]] = {}


def puller(group: str, nbytes: int, device: torch.device) -> Callable[[], Tensor]:
    """() -> reads so many bytes, shared among the peers, from their memory into this rank's, all at once."""
    pg = compat.process_group(group)
    each = math.ceil(nbytes / (pg.size() - 1))
    if group not in _buffers or _buffers[group][0].numel() < each:
        _buffers[group] = compat.symmetric_memory(max(each, 64 << 20), group, device)
    peers = [b for r, b in enumerate(_buffers[group]) if r != pg.rank()]
    out = torch.empty(len(peers), each, dtype=torch.uint8, device=device)

    def pull() -> Tensor:
        for to, peer in zip(out, peers, strict=True):
            to.copy_(peer[:each])
        return out

    return pull

