"""dispatch and expert_parallel over a workspace: one kernel routes, quantizes and pushes; the experts read what has come where it
lies; one kernel pushes their shares and adds them."""
from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...group import kind
from ...ops import moe
from ...ops.collectives import world_size
from ...ops.moe import dispatch, expert_parallel, experts
from .. import matmul_reduce_scatter, transfer, workspace
from ..device import processors
from ..workspace import align
from .moe import TOKENS, logits, row_constants, row_shape, why_not_routed

NAME = "dispatch"


def _why_not(x: Tensor, weight: Tensor, groups: int, top_groups: int, fmt: str, counts: list[int], group: str) -> str | None:
    if world_size(group) == 1:
        return "one rank has nothing to exchange"
    if kind(group) == "loopback" and len(set(counts)) > 1:
        return "a rank that plays all others has as many tokens as they"
    return why_not_routed(x, weight, groups, top_groups, fmt)


def _field_bytes(x: Tensor, weight: Tensor, k: int, fmt: str) -> list[int]:
    """Bytes of a row of each tensor that travels: data, scales (0: none that differ by row), weights, ids."""
    widths = [t.shape[1] * t.element_size() for t in moe.record_like(x, weight, k, fmt)]
    return widths if len(widths) == 4 else [widths[0], 0, *widths[1:]]


def push_bytes(x: Tensor, weight: Tensor, k: int, fmt: str, counts: list[int], group: str) -> int:
    """Bytes of the workspace that `push` needs: the same on every rank."""
    world = world_size(group)
    need = (sum(counts) if counts else world * x.shape[0]) * sum(_field_bytes(x, weight, k, fmt)) + 4 * 256
    # of the flags, which are as many on each rank, there is at most one for each task
    return max(need, world * _tasks(max(counts)) * workspace.BYTES_PER_FLAG) if counts else need


def _tasks(rows: int) -> int:
    return -(-rows // TOKENS) * (1 + TOKENS)


def push(x: Tensor, scores: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
         scale: float, how: str, fmt: str, counts: list[int], group: str, keep: bool = False, wait: bool = True) -> list[Tensor]:
    """`dispatch` of tokens whose logits (tokens, experts) float32 are known -> [*parts, ids, weights] of every rank's tokens.

    They lie in the workspace, where peers have written them, until this rank begins its next exchange: what reads them must
    have been started before, on the same stream.

    counts  tokens of each rank; empty: all hold as many
    keep    copies them to memory of their own
    wait    False leaves out the wait for the peers, to show that tests notice
    """
    from . import moe_kernels

    space = workspace.of(group)
    world, rank = space.world_size, space.rank
    counts = counts or [x.shape[0]] * world
    like, total = moe.record_like(x, weight, k, fmt), sum(counts)
    if total == 0:
        *parts, weights, ids = like
        return [*parts, ids, weights]
    _, warps, registers = row_shape(x.shape[1])
    # Fewer programs than `pack` has: 5 on a multiprocessor send 4096 and 8192 tokens in NVFP4 faster than 6, 7 and 8 do, by 1 to
    # 3 %, and in FP8 as fast (hidden = 7168, two H200).
    registers = max(registers, 96)
    # all are on the device at once, as they wait for those of the peers
    programs = min(65536 // (32 * warps * registers) * processors(x.device), _tasks(max(counts)))
    t = transfer.prepare(space, NAME, push_bytes(x, weight, k, fmt, counts, group), world * programs)
    starts = [sum(counts[:r]) for r in range(world)]
    turned = [tuple(16 * n for n in values[rank:] + values[:rank]) for values in (counts, starts)]
    widths = _field_bytes(x, weight, k, fmt)
    places = list(itertools.accumulate((align(total * n, 256) for n in widths), initial=0))
    transfer.start(
        moe_kernels.route_quantize_push, programs, t, x, scores, scores if bias is None else bias, params[0] if params else scores,
        *turned, scale, *places[1:4], num_warps=warps, registers=registers, WORLD=world,
        LOOPBACK=space.loopback, WAIT=wait, **row_constants(x, weight, bias, k, groups, top_groups, how, fmt))
    half = t.view(rank, 0, (places[-1],), torch.uint8)
    half = half.clone() if keep else half
    fields = [(p, n) for p, n in zip(places, widths, strict=False) if n]
    *parts, weights, ids = (half[p:p + total * n].view(f.dtype).view(total, -1) for (p, n), f in zip(fields, like, strict=True))
    return [*parts, ids, weights]


def combine(shares: Tensor, counts: list[int], group: str, wait: bool = True) -> Tensor:
    """reduce_scatter_v of the experts' shares; counts as for `push`. A small one of equal counts goes in words."""
    return matmul_reduce_scatter.pushed(shares, group, expert_parallel.name, counts if len(set(counts)) > 1 else None, wait)


def _why_not_dispatch(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                      scale: float, how: str, fmt: str, group: str) -> str | None:
    return _why_not(x, weight, groups, top_groups, fmt, [], group)


@dispatch.backend("pushed", supports=_why_not_dispatch, seconds=lambda u: transfer.PUSH_S + u.wire_s,
                  nbytes=lambda x, *args: push_bytes(x, args[1], args[3], args[-2], [], args[-1]))
def pushed(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
           scale: float, how: str, fmt: str, group: str) -> list[Tensor]:
    return push(x, logits(x, weight), params, weight, bias, k, groups, top_groups, scale, how, fmt, [], group, keep=True)


def _why_not_experts(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                     scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
                     mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> str | None:
    if home != "bf16":
        return f"its kernel adds shares as they are, and they are to travel in {home}"
    return _why_not(x, weight, groups, top_groups, fmt, counts, group)


def _nbytes(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, *args) -> int:
    """As much as dispatch and combine need together: they have a half each, but symbolic sizes have no larger one."""
    fmt, _, counts, group = args[-4:]
    rows = max(counts) if counts else x.shape[0]
    return push_bytes(x, weight, k, fmt, counts, group) + world_size(group) * rows * x.shape[1] * x.element_size()


@expert_parallel.backend("pushed", supports=_why_not_experts, nbytes=_nbytes,
                         seconds=lambda u: 2 * transfer.PUSH_S + u.wire_s + u.matmul_s)
def pushed_experts(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                   scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
                   mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> Tensor:
    *parts, ids, weights = push(x, logits(x, weight), params, weight, bias, k, groups, top_groups, scale, how, fmt, counts, group)
    shares = experts(parts, params, ids, weights, first, gate, up, down, mid_params, act, fmt, x.dtype)
    return combine(shares, counts, group)
