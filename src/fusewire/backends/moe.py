"""The all-to-all transport of experts: a token goes only to the ranks whose experts it chose."""
from __future__ import annotations

import torch
from torch import Tensor

from ..config import GLOO, NVLINK
from ..group import resolve
from ..ops import moe
from ..ops.moe import expert_parallel, experts, pack, route_quantize_pack, unpack

TOKENS_IF_UNKNOWN = 4096
"""Of a rank, for the choice between the transports in a graph that is made for any number of tokens."""


def costs(x: Tensor, weight: Tensor, k: int, n: int, fmt: str, tokens: int, world: int) -> dict[str, tuple[int, int]]:
    """Transport -> (bytes, messages) that a rank sends, dispatch and combine, for `tokens` of its own.

    The bytes of the all-to-all are those that are expected if every set of k experts is as likely.
    """
    a_token = moe.record_bytes(x, weight, k, fmt) + x.shape[1] * x.element_size()
    reached = round(moe.ranks_reached(weight.shape[0], n, k) * 2**20)
    return {"all_gather": ((world - 1) * tokens * a_token, 2),
            "all_to_all": ((world - 1) * (tokens * a_token * reached // 2**20 + 8), 3)}


def _why_not(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
             scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
             mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> str | None:
    world = resolve(group).world_size
    if world == 1:
        return "one rank has nobody to send to"
    known = max(counts) if counts else x.shape[0] if isinstance(x.shape[0], int) else None
    tokens = TOKENS_IF_UNKNOWN if known is None else known  # the same on every rank
    link = GLOO if x.device.type == "cpu" else NVLINK
    found = costs(x, weight, k, gate[0].shape[0], fmt, tokens, world)
    seconds = {name: messages * link.latency_s + sent / link.bytes_per_s for name, (sent, messages) in found.items()}
    if seconds["all_to_all"] < seconds["all_gather"]:
        return None
    return (f"for {tokens} tokens a rank it would send about {found['all_to_all'][0]} bytes in {found['all_to_all'][1]} messages, "
            f"and the all-gather sends {found['all_gather'][0]} in {found['all_gather'][1]}")


def _wire(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
          scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
          mid_params: list[Tensor], act: str, fmt: str, counts: list[int], group: str) -> tuple[int, int]:
    return costs(x, weight, k, gate[0].shape[0], fmt, x.shape[0], resolve(group).world_size)["all_to_all"]


@expert_parallel.backend("all_to_all", supports=_why_not, wire=_wire)
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
