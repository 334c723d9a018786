"""Other programs made of a graph with experts: bf16 tokens and logits by the collective library, and no dispatch at all."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compat, formats
from .. import group as groups
from ..backends import workspace
from ..backends.triton import expert_parallel as transport
from ..backends.triton import moe as triton
from ..compiler.plan import Plan
from ..errors import FusewireError
from ..op import op_of
from ..ops import moe
from ..ops.collectives import reduce_scatter, world_size
from ..ops.moe import CHOICES, dispatch, expert_parallel, experts, id_dtype, pack, unpack
from .floor import replaced


def records(x: Tensor, scores: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int,
            top_groups: int, scale: float, how: str, fmt: str) -> Tensor:
    """route_quantize_pack of tokens whose logits are known."""
    if x.is_cuda:
        return triton.pack(x, scores, params, weight, bias, k, groups, top_groups, scale, how, fmt)
    ids, weights = CHOICES[how](scores, bias, k, groups, top_groups)
    parts = [x] if fmt == "bf16" else formats.get(fmt).quantize(x, params)
    return pack([*parts, weights * scale, ids.to(id_dtype(weight.shape[0]))])


Came = dict[tuple[int, int], list[Tensor]]  # by router weight and token count: [*parts, ids, weights] of every rank's tokens


def gather_first(gather: Callable[[Tensor], Tensor] | None, came: Came, x: Tensor, params: list[Tensor], *args: Any) -> Tensor:
    """expert_parallel, whose arguments it takes, as it is without Fusewire: tokens and logits travel, what came is routed and
    quantized, and the library adds the shares. The first time it keeps what came. `gather=None`: no tokens travel, as many are
    routed and quantized, and the experts' are those that were kept."""
    routing: Any = args[:7]
    (weight, _, k, *_), (fmt, _, _, group) = routing, args[-4:]
    bring = gather or (lambda t: t.repeat(world_size(group), 1))
    scores = triton.logits(x, weight) if x.is_cuda else moe.logits(x, weight)
    *parts, weights, ids = unpack(records(bring(x), bring(scores), params, *(*routing, fmt)), moe.record_like(x, weight, k, fmt))
    if gather is None:
        *parts, ids, weights = kept(came, weight, x)
    elif (at := (weight.data_ptr(), x.shape[0])) not in came:
        came[at] = [*parts, ids, weights]
    shares = experts(parts, params, ids, weights, *args[7:13], fmt, x.dtype)
    return compat.functional_reduce_scatter(shares, world_size(group), group)


def kept(came: Came, weight: Tensor, x: Tensor) -> list[Tensor]:
    """What came to a layer when tokens travelled: how long the experts take depends on how many are theirs."""
    if (found := came.get((weight.data_ptr(), x.shape[0]))) is None:
        raise FusewireError(f"nothing has come yet to the experts of {x.shape[0]} tokens a rank; run the `library` program first")
    return found


def without_dispatch(loop: str, came: Came, x: Tensor, params: list[Tensor], *args: Any) -> Tensor:
    """expert_parallel whose tokens go no farther than the loopback group `loop`: what it would push, the kernel stores here, and
    the experts' are those that were kept."""
    routing: Any = args[:7]
    fmt, _, _, group = args[-4:]
    if workspace.find(loop) is None:
        dispatch(x, params, *routing, fmt, loop)
    else:
        transport.push(x, triton.logits(x, routing[0]), params, *(*routing, fmt, [], loop))
    *parts, ids, weights = kept(came, routing[0], x)
    shares = experts(parts, params, ids, weights, *args[7:13], fmt, x.dtype)
    return reduce_scatter(shares, group) if workspace.find(group) is None else transport.combine(shares, [], group)


def programs(plan: Plan, tokens: int, device: torch.device) -> dict[str, Plan]:
    """By name: `library`, the fused plan with dispatch and combine as they are without Fusewire; `floor:library`, that without its
    dispatch; `floor`, the fused plan without its own. `library` has to run first, outside a CUDA graph: what came to its experts is
    what the floors' get. On GPUs for at most `tokens` tokens of a rank. FusewireError for a plan without fused experts."""
    calls = [n for n in plan.gm.graph.nodes if op_of(n) is expert_parallel]
    if not calls:
        raise FusewireError(f"the {plan.name} plan has no fused experts whose dispatch could be taken out; choose another --plan")
    group = calls[0].args[-1]
    world = world_size(group)
    loop = groups.loopback_group(world).name
    groups.on_close(group, lambda: groups.close(groups.resolve(loop)))
    if device.type == "cuda":
        x, _, weight, _, k, *_, fmt, _, _, _ = (a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in calls[0].args)
        some = torch.empty(tokens, x.shape[1], dtype=x.dtype, device="meta")
        workspace.open(loop, transport.push_bytes(some, weight, k, fmt, [], loop), device)

    came: Came = {}

    def library(*args: Any) -> Tensor:
        return gather_first(lambda t: compat.functional_all_gather(t, world, group), came, *args)

    def floor_library(*args: Any) -> Tensor:
        return gather_first(None, came, *args)

    def floor(*args: Any) -> Tensor:
        return without_dispatch(loop, came, *args)

    functions = {"library": library, "floor": floor, "floor:library": floor_library}
    return {name: replaced(plan, name, {expert_parallel.name: f}) for name, f in functions.items()}
