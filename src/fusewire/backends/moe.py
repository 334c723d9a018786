"""How experts run where the references do not: the all-to-all transport, by which a token goes only to the ranks whose experts
it chose; and, on GPUs, experts that never ask the device how many rows each of them has."""
from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FusewireError
from ..group import resolve
from ..op import seconds_of_program
from ..ops import moe
from ..ops.moe import (
    ACTIVATIONS,
    expert_parallel,
    experts,
    grouped_matmul,
    quantize_rows,
    route_quantize_pack,
    sort_by_expert,
    unpack,
)


def _why_not(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
             scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
             mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> str | None:
    return "one rank has nobody to send to" if resolve(group).world_size == 1 else None


def _wire(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
          scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
          mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> tuple[int, int]:
    world = resolve(group).world_size
    tokens = sum(counts) if counts else world * x.shape[0]
    return moe.transports(x, weight, k, gate[0].shape[0], fmt, tokens, world, home)["all_to_all"]


@expert_parallel.backend("all_to_all", supports=_why_not, seconds=seconds_of_program, wire=_wire, asks=True)
def all_to_all(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
               scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
               mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> Tensor:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise FusewireError(f"expert_parallel: its backend all_to_all, chosen for {x.shape[0]} tokens, asks the device how many go "
                            "to each rank, which a CUDA graph cannot hold; run this size without one, or give a tuning in which "
                            "another backend is faster")
    g, n = resolve(group), gate[0].shape[0]
    records = route_quantize_pack(x, params, weight, bias, k, groups, top_groups, scale, how, fmt)
    like = moe.record_like(x, weight, k, fmt)
    holder = torch.div(unpack(records, like)[-1].long() - (first - g.rank() * n), n, rounding_mode="floor")
    rows = [(holder == r).any(1).nonzero().squeeze(1) for r in range(g.world_size)]
    sent = torch.tensor([len(r) for r in rows], device=x.device)
    received = g.all_to_all(sent.view(torch.uint8)).view(torch.int64)
    width = records.shape[1]
    got = g.exchange(torch.cat([records[r] for r in rows]).view(-1), (sent * width).tolist(), (received * width).tolist())
    *parts, weights, ids = unpack(got.view(-1, width), like)
    shares = experts(parts, params, ids, weights, first, gate, up, down, mid_params, act, fmt, x.dtype)

    def added(form: str) -> Tensor:
        packed = moe.packed_shares(shares, form)
        width = packed.shape[1]
        back = g.exchange(packed.view(-1), (received * width).tolist(), (sent * width).tolist()).view(-1, width)
        total = x.new_zeros((x.shape[0], shares.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
        for r, share in zip(rows, back.split(sent.tolist()), strict=True):  # in rank order, as the reduce_scatter adds
            total[r] += moe.unpacked_shares(share, shares, form)
        return total

    return moe.brought_home(added, home, group).to(x.dtype)


def _why_not_static(x: list[Tensor], params: list[Tensor], ids: Tensor, weights: Tensor, first: Tensor, gate: list[Tensor],
                    up: list[Tensor], down: list[Tensor], mid_params: list[Tensor], act: str, fmt: str,
                    dtype: torch.dtype) -> str | None:
    return None if x[0].device.type == "cuda" else f"the reference can ask {x[0].device.type} how many rows an expert has"


@experts.backend("static", supports=_why_not_static)
def static(x: list[Tensor], params: list[Tensor], ids: Tensor, weights: Tensor, first: Tensor, gate: list[Tensor],
           up: list[Tensor], down: list[Tensor], mid_params: list[Tensor], act: str, fmt: str, dtype: torch.dtype) -> Tensor:
    """The reference's bits with shapes that depend on no choice, so that a CUDA graph can hold it: every pair of a token and an
    expert has a row, and those of other ranks' experts, behind the last of ours, are zeros that no tile is multiplied for."""
    (tokens, k), n = ids.shape, gate[0].shape[0]
    order, ends = sort_by_expert(ids, first, n)
    token = torch.div(order, k, rounding_mode="floor")
    rows = [p.view(torch.uint8)[token].view(p.dtype) if p.element_size() == 1 else p[token] for p in x]
    mid = ACTIVATIONS[act](grouped_matmul(rows, params, gate, ends, fmt, dtype))
    mid = mid * grouped_matmul(rows, params, up, ends, fmt, dtype)
    parts, used = quantize_rows(mid, mid_params, ends, fmt)
    y = grouped_matmul(parts, used, down, ends, fmt, dtype)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=ids.device)).view(tokens, k)
    mine = (ids.long() >= first) & (ids.long() < first + n)
    total = y.new_zeros((tokens, y.shape[1]), dtype=torch.promote_types(dtype, torch.float32))
    for slot in range(k):
        total += y[row[:, slot]] * torch.where(mine[:, slot], weights[:, slot], 0.0).unsqueeze(1)
    return total.to(dtype)
