"""dispatch and expert_parallel over a workspace: one kernel routes, quantizes and pushes; the experts run; one kernel pushes their
shares and adds them."""
from __future__ import annotations

from torch import Tensor

from ...group import kind
from ...ops import moe
from ...ops.collectives import world_size
from ...ops.moe import dispatch, expert_parallel, experts
from .. import matmul_reduce_scatter, transfer, workspace
from ..workspace import align
from .launch import ROWS_PER_FLAG, counters, launch, processors
from .moe import TOKENS, logits, row_constants, row_shape, why_not_routed

NAME = "dispatch"
WARPS = 20  # on a multiprocessor at once, of as many programs as that makes


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
    rows, world = sum(counts) if counts else world_size(group) * x.shape[0], world_size(group)
    need = rows * sum(_field_bytes(x, weight, k, fmt)) + 4 * 256
    # of the flags, which are as many on each rank, there is one for each 128 rows
    return max(need, world * max(counts) * workspace.BYTES_PER_FLAG) if counts else need


def push(x: Tensor, scores: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
         scale: float, how: str, fmt: str, counts: list[int], group: str, wait: bool = True) -> list[Tensor]:
    """`dispatch` of tokens whose logits (tokens, experts) float32 are known -> [*parts, ids, weights] of every rank's tokens.

    counts  tokens of each rank; empty: all hold as many
    wait    False leaves out the wait for the peers, to show that tests notice
    """
    from . import moe_kernels

    space = workspace.of(group)
    world, rank = space.world_size, space.rank
    counts = counts or [x.shape[0]] * world
    total, most = sum(counts), max(1, -(-max(counts) // ROWS_PER_FLAG))
    like = moe.record_like(x, weight, k, fmt)
    fields = [t.new_empty((total, *t.shape[1:])) for t in like]
    *parts, weights, ids = fields
    if total:
        space.need(NAME, push_bytes(x, weight, k, fmt, counts, group), world * most)
        rows = _field_bytes(x, weight, k, fmt)
        starts = [sum(counts[:r]) for r in range(world)]
        turned = [tuple(16 * n for n in values[rank:] + values[:rank]) for values in (counts, starts)]
        _, warps, _ = row_shape(x.shape[1])
        resident = max(1, WARPS // warps)
        programs = resident * processors(x)
        share = next(n for n in (8, 4, 2, 1) if n == 1 or max(counts) >= n * programs)
        copied = 1 if max(counts) <= programs // 4 else 8
        copiers = min(max(1, -(-max(counts) // copied)), programs // 4)
        senders = max(1, min(-(-max(counts) // TOKENS) + -(-max(counts) // share), programs - copiers))
        scales_at = align(total * rows[0], 256)
        weights_at = scales_at + align(total * rows[1], 256)
        ids_at = weights_at + align(total * rows[2], 256)
        constants = row_constants(x, weight, bias, k, groups, top_groups, how, fmt) | dict(
            WORLD=world, LOOPBACK=space.loopback, DATA_ROW=rows[0], SCALES_ROW=rows[1],
            CHOSEN=1 << (TOKENS * k - 1).bit_length(), WAIT=wait)
        launch(moe_kernels.route_quantize_push, NAME, senders + copiers, warps, resident, space,
               [x, scores, bias, params[0] if params else None, parts[0], parts[-1], weights, ids, counters(NAME, space)],
               (*turned, scale, scales_at, weights_at, ids_at, share, copied, most, senders), constants)
    return [*parts, ids, weights]


def combine(shares: Tensor, counts: list[int], group: str, wait: bool = True) -> Tensor:
    """reduce_scatter_v of the experts' shares; counts as for `push`."""
    return matmul_reduce_scatter.pushed(shares, group, expert_parallel.name, counts or None, wait)


def _why_not_dispatch(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                      scale: float, how: str, fmt: str, group: str) -> str | None:
    return _why_not(x, weight, groups, top_groups, fmt, [], group)


@dispatch.backend("pushed", supports=_why_not_dispatch, seconds=lambda u: transfer.PUSH_S + u.wire_s,
                  nbytes=lambda x, *args: push_bytes(x, args[1], args[3], args[-2], [], args[-1]))
def pushed(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
           scale: float, how: str, fmt: str, group: str) -> list[Tensor]:
    return push(x, logits(x, weight), params, weight, bias, k, groups, top_groups, scale, how, fmt, [], group)


def _why_not_experts(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                     scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
                     mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> str | None:
    return _why_not(x, weight, groups, top_groups, fmt, counts, group)


def _nbytes(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, *args) -> int:
    """As much as dispatch and combine need together; they lie in regions of their own, and sizes may be symbolic."""
    fmt, counts, group = args[-3:]
    rows = max(counts) if counts else x.shape[0]
    return push_bytes(x, weight, k, fmt, counts, group) + world_size(group) * rows * x.shape[1] * x.element_size()


@expert_parallel.backend("pushed", supports=_why_not_experts, nbytes=_nbytes,
                         seconds=lambda u: 2 * transfer.PUSH_S + u.wire_s + u.matmul_s)
def pushed_experts(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                   scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
                   mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> Tensor:
    *parts, ids, weights = push(x, logits(x, weight), params, weight, bias, k, groups, top_groups, scale, how, fmt, counts, group)
    shares = experts(parts, params, ids, weights, first, gate, up, down, mid_params, act, fmt, x.dtype)
    return combine(shares, counts, group)
