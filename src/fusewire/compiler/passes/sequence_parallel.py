"""An all_reduce is a reduce_scatter then an all_gather, and an all_gather sinks below any token-local op.

Together these are Megatron's sequence parallelism for every format, and quantize-before-gather falls out, because the
gather sinks below `quantize` too. The graph is right after every single rewrite.
"""
from __future__ import annotations

import torch
from torch import fx

from ... import compat
from ...op import op_of
from ...ops.collectives import all_gather, all_reduce, all_reduce_max, nbytes, reduce_scatter, shard, world_size
from ...ops.dense import amax, linear, quantize, relayout
from ...ops.moe import combine, combine_all
from ..rewrite import Verdict, arg, call, describe, fused, is_aten, missed, outputs, producer, replace, rule, sites_of, users, val
from ..tokens import local_args, same_on_all_ranks, token_args


@rule(all_reduce, combine_all)
def split_all_reduce(ar: fx.Node) -> Verdict | None:
    """all_reduce(x) -> all_gather(reduce_scatter(x)): the same bytes, the same bits. Likewise combine_all and combine."""
    x, group = ar.args[0], ar.args[-1]
    half, rest = (reduce_scatter, (group,)) if op_of(ar) is all_reduce else (combine, (ar.args[1], [], group))
    if val(x).dim() < 2:
        return missed(f"it reduces a tensor of shape {tuple(val(x).shape)}, which has no (tokens, hidden)")
    tokens, w = val(x).shape[0], world_size(group)
    if not compat.known_true(tokens % w == 0):
        return missed(f"{tokens} tokens do not divide over {w} ranks")
    with ar.graph.inserting_before(ar):
        local = call(ar.graph, half, x, *rest, sites=sites_of(ar))
        [full] = call(ar.graph, all_gather, [local], group, sites=sites_of(ar))
    replace(ar, full)
    return fused(half)


def _gather_of(n: fx.Node) -> fx.Node | None:
    """The all_gather of one tensor that made `n`."""
    return producer([n], all_gather)


def _is_sinkable(n: fx.Node, gathered: fx.Node) -> bool:
    return op_of(n) is amax or (n.op == "call_function" and gathered in (token_args(n) or ()))


@rule(amax)
def sink_below_amax(n: fx.Node) -> Verdict | None:
    """The amax of all tokens is the maximum of the ranks' own: four bytes travel. Maximum is exact in any order."""
    gather = _gather_of(n.args[0])
    if gather is None:
        return None
    [x], group = gather.args
    with n.graph.inserting_before(n):
        replace(n, call(n.graph, all_reduce_max, call(n.graph, amax, x), group, sites=sites_of(gather)))
    return fused(all_reduce_max)


@rule(lambda n: any(_gather_of(a) for a in token_args(n) or ()))
def sink_all_gather(n: fx.Node) -> Verdict | None:
    """f(all_gather(x)) -> all_gather(f(x)) for a token-local f; its other token arguments are cut to this rank's rows."""
    o, graph = op_of(n), n.graph
    cut = token_args(n) or []
    gathers = {a: g for a in cut if (g := _gather_of(a))}
    groups = {g.args[1] for g in gathers.values()}
    if len(groups) > 1:
        return missed(f"its arguments were gathered over {len(groups)} groups")
    [group] = groups
    if own := [a for a in n.all_input_nodes if a not in gathers and not same_on_all_ranks(a, group)]:
        return missed(f"{own[0].name}, its other operand, may be another one on every rank: cutting it would mix ranks")
    w = world_size(group)
    values = n.meta["val"] if isinstance(n.meta["val"], (list, tuple)) else [n.meta["val"]]
    travels = linear(arg(n, "fmt")) if o is quantize else None
    swizzled = o is quantize and travels != arg(n, "fmt")
    if not swizzled and not all(v.dim() and compat.known_true(v.shape[0] == val(cut[0]).shape[0]) for v in values):
        return missed("not every output of it has the tokens as its first dim")
    stays = {a: [u for u in users(g) if not _is_sinkable(u, a)] for a, g in gathers.items()}
    freed = sum(nbytes([val(a)]) for a in gathers if not stays[a])
    olds = outputs(n) if isinstance(n.meta["val"], (list, tuple)) else {0: n}
    # what nobody reads costs nothing, and what only ops read that the gather sinks below as well does not stay: a residual
    here = [v for i, v in enumerate(values) if i in olds and not all(_is_sinkable(u, olds[i]) for u in olds[i].users)]
    if swizzled:  # scales travel linear, so their padding does not count
        here = quantize.fake(val(arg(n, "x")), [], travels)
    if not compat.known_true(freed >= nbytes(here)):
        whole = [u for blockers in stays.values() for u in blockers]
        return missed(f"gathering {n.name} as well would add {w - 1}/{w} of {nbytes(here)} bytes, since "
                      f"{describe(whole) if whole else 'a later op'} needs the whole tensor")
    sites = sites_of(*gathers.values())[-1:]  # the newest: an older one is the residual's, accounted for where it was read
    with graph.inserting_before(n):
        swap = {a: gathers[a].args[0][0] if a in gathers else call(graph, shard, a, group) for a in cut}
        args = local_args(n, swap)
        if swizzled:  # scales travel linear: swizzled shards side by side are not a swizzled whole
            args = (*args[:-1], travels)
        if o is not None:
            local = call(graph, o, *args, sites=sites)
        else:
            local = graph.call_function(n.target, args, n.kwargs)
            local.meta["val"] = n.target(*val(args), **val(n.kwargs))
            local.meta["sites"] = sites
        if o is not None and len(o.target._schema.returns) == 1 and isinstance(local, list):
            full = call(graph, all_gather, local, group, sites=sites)  # the parts of one value travel together
        else:
            full = [call(graph, all_gather, [y], group, sites=sites)[0] for y in (local if isinstance(local, list) else [local])]
        if swizzled:
            full = call(graph, relayout, full, travels, arg(n, "fmt"), val(cut[0]).shape[1], sites=sites)
    for i, old in olds.items():
        replace(old, full[i])
    return fused(o.name if o else n.target._opname)


TO_THE_END = 2**63 - 1  # as aten says it


@rule(lambda n: is_aten(n, "slice"))
def sink_below_last_tokens(n: fx.Node) -> Verdict | None:
    """The last k of all tokens are the last rank's own last k: each rank sends its own, where only a prompt's end is read."""
    x, dim, start, end, step = *n.args, *(0, None, None, 1)[len(n.args) - 1:]
    one_sequence = is_aten(x, "view", "reshape", "_unsafe_view") and compat.known_true(val(x).shape[0] == 1)
    rows = x.args[0] if one_sequence else x
    gather = _gather_of(rows)
    if gather is None or dim != int(one_sequence) or not isinstance(start, int) or start >= 0 or (end, step) != (TO_THE_END, 1):
        return None
    [local], group = gather.args
    if val(n).shape[1 + dim:] != val(local).shape[1:] or not compat.known_true(val(local).shape[0] >= -start):
        return None
    if len(rows.users) > 1 or len(x.users) > 1:
        return None  # all tokens are gathered for somebody else anyway
    graph, last = n.graph, torch.ops.aten.slice.Tensor
    with graph.inserting_before(n):
        [full] = call(graph, all_gather, [call(graph, last, local, 0, start, TO_THE_END)], group, sites=sites_of(gather))
        mine = call(graph, last, full, 0, start, TO_THE_END)
        replace(n, call(graph, torch.ops.aten.reshape.default, mine, list(val(n).shape)))
    return fused(all_gather)


rules = [split_all_reduce, sink_all_gather, sink_below_amax, sink_below_last_tokens]
