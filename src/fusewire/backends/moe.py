"""The all-to-all transport of experts: a token goes only to the ranks whose experts it chose."""
from __future__ import annotations

import torch
from torch import Tensor

from ..group import resolve
from ..op import seconds_of_program
from ..ops import moe
from ..ops.moe import expert_parallel, experts, pack, route_quantize_pack, unpack


def _why_not(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
             scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
             mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> str | None:
    return "one rank has nobody to send to" if resolve(group).world_size == 1 else None


def _wire(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
          scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
          mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> tuple[int, int]:
    world = resolve(group).world_size
    tokens = sum(counts) // world if counts else x.shape[0]  # the same on every rank, for all must choose the same
    return moe.transports(x, weight, k, gate[0].shape[0], fmt, tokens, world)["all_to_all"]


@expert_parallel.backend("all_to_all", supports=_why_not, seconds=seconds_of_program, wire=_wire)
def all_to_all(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
               scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
               mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> Tensor:
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
    shares = pack([experts(parts, params, ids, weights, first, gate, up, down, mid_params, act, fmt, x.dtype)])
    width = shares.shape[1]
    back = g.exchange(shares.view(-1), (received * width).tolist(), (sent * width).tolist()).view(-1, width).view(x.dtype)
    total = x.new_zeros((x.shape[0], back.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    for r, share in zip(rows, back.split(sent.tolist()), strict=True):  # in rank order, as the reduce_scatter adds
        total[r] += share
    return total.to(x.dtype)
