"""Experts behind a gather: one message, route and quantize folded into it, and the choice of who gets a token."""
from __future__ import annotations

import operator

from torch import fx

from ...op import op_of
from ...ops.collectives import all_gather, reduce_scatter, world_size
from ...ops.dense import quantize
from ...ops.moe import combine, dispatch, expert_parallel, experts, place, record_bytes, route, transports
from ..rewrite import Verdict, arg, call, describe, fused, is_aten, missed, outputs, producer, replace, rule, sites_of, users, val


def _sources(n: fx.Node) -> list[fx.Node]:
    """What an experts node gets of each token: parts, ids, weights."""
    return [*arg(n, "x"), arg(n, "ids"), arg(n, "weights")]


def _gather_of(part: fx.Node) -> fx.Node | None:
    n = part.args[0] if part.target is operator.getitem else None
    return n if op_of(n) is all_gather else None


@rule(experts)
def merge_expert_gathers(n: fx.Node) -> Verdict | None:
    """What was gathered one by one for the experts, or in another order, travels in one message."""
    parts = _sources(n)
    gathers = [_gather_of(p) for p in parts]
    if not all(gathers) or producer(parts, all_gather):
        return None
    if len({g.args[1] for g in gathers}) > 1:
        return missed("its parts were gathered over several groups")
    own = [g.args[0][p.args[1]] for g, p in zip(gathers, parts, strict=True)]
    rest = [(g, i) for g in dict.fromkeys(gathers) for i in outputs(g) if g.args[0][i] not in own]
    sources = [*own, *(g.args[0][i] for g, i in rest)]
    at = max(sources)
    if early := [u for g in gathers for u in users(g) if u < at]:
        return missed(f"{describe(early[:1])} reads a part before {at.name} is known, so they cannot travel in one message")
    with n.graph.inserting_before(at.next):
        full = call(n.graph, all_gather, sources, gathers[0].args[1], sites=sites_of(*gathers))
    for p, new in zip([*parts, *(outputs(g)[i] for g, i in rest)], full, strict=True):
        replace(p, new)
    return fused(all_gather)


@rule(all_gather)
def fuse_dispatch(ag: fx.Node) -> Verdict | None:
    """Route, quantize and the gather of what they give: one op, which a backend may run as one kernel."""
    readers = [u for u in users(ag) if op_of(u) is experts]
    if not readers:
        return None
    [*parts, ids, weights], group = (ag.args[0], ag.args[1]) if len(ag.args[0]) > 2 else ([None, None, None], ag.args[1])
    r = producer([ids, weights], route) if ids is not None else None
    if r is None:
        return _why_not_routed(ag, readers[0])
    x, fmt = arg(r, "x"), arg(readers[0], "fmt")
    q = None if fmt == "bf16" else producer(parts, quantize)
    if (fmt == "bf16" and parts != [x]) or (fmt != "bf16" and (q is None or arg(q, "x") is not x)):
        return missed(f"its parts are {_made_by(parts)}, not one quantization of what was routed")
    with ag.graph.inserting_before(ag):
        got = call(ag.graph, dispatch, x, arg(q, "params") if q else [], *r.args[1:], fmt, group, sites=sites_of(ag))
    for i, old in outputs(ag).items():
        replace(old, got[i])
    a_token = record_bytes(val(x), val(arg(r, "weight")), arg(r, "k"), fmt)
    return fused(f"{dispatch.name}: {a_token} bytes a token in one message")


def _why_not_routed(ag: fx.Node, reader: fx.Node) -> Verdict:
    """Tokens that are routed behind their gather: what it would cost to route them before."""
    after = [u for u in users(ag) if op_of(u) is route]
    if not after:
        return missed(f"what the experts get with it is {_made_by([arg(reader, 'ids')])}, not a route of its tokens")
    w = world_size(ag.args[1])
    x, r = val(ag.args[0][0]), after[0]
    now, then = x.shape[1] * x.element_size(), record_bytes(x, val(arg(r, "weight")), arg(r, "k"), arg(reader, "fmt"))
    return missed(f"routing before it would send {then} bytes a token to each of {w - 1} ranks instead of {now}", avoidable=False)


@rule(reduce_scatter, combine)
def fuse_expert_parallel(rs: fx.Node) -> Verdict | None:
    """dispatch, experts and the reduction of their shares: one op, which a backend may run by another transport."""
    shares, group = rs.args[0], rs.args[-1]
    home, counts = rs.args[1:3] if op_of(rs) is combine else ("bf16", [])
    if (e := producer(shares, experts)) is None or counts:
        return None
    if len(e.users) > 1:
        return missed(f"the experts' result also feeds {describe([u for u in e.users if u is not rs])}")
    d = producer(_sources(e), dispatch)
    if d is None or d.args[-1] != group:
        return missed(f"the experts' tokens come from {_made_by(_sources(e))}, not from a dispatch over the same ranks",
                      avoidable=False)
    if others := [u for u in users(d) if u is not e]:
        return missed(f"the dispatched tokens also feed {describe(others)}", avoidable=False)
    n = val(arg(e, "gate")[0]).shape[0]
    if not _by_place(arg(e, "first"), n, group):
        return missed(f"which experts the other ranks hold is not known: `first` is not place({n}, group)", avoidable=False)
    x = arg(d, "x")
    if arg(e, "dtype") != val(x).dtype:
        return missed(f"the experts' shares are {arg(e, 'dtype')} and their tokens {val(x).dtype}")
    with rs.graph.inserting_before(rs):
        made = call(rs.graph, expert_parallel, *d.args[:-2], *e.args[op_of(e).params.index("first"):-1], home, [], group,
                    sites=sites_of(d, rs))
    replace(rs, made)
    found = transports(val(x), val(arg(d, "weight")), arg(d, "k"), n, arg(e, "fmt"), world_size(group), world_size(group), home)
    (gather, messages), (direct, more) = found["all_gather"], found["all_to_all"]
    return fused(f"{expert_parallel.name}: a rank sends {gather} bytes for each of its tokens by all_gather, in {messages} "
                 f"messages, or about {direct} by all_to_all, in {more}")


def _by_place(first: fx.Node, n: int, group: str) -> bool:
    """Is `first` place(n, group), or that and the place in another group?"""
    terms = list(first.args[:2]) if is_aten(first, "add") else [first]
    own = [t for t in terms if op_of(t) is place and t.args[:2] == (n, group)]
    return len(own) == 1 and all(op_of(t) is place for t in terms)


def _made_by(parts: list[fx.Node]) -> str:
    """What made the parts, in a reader's words."""
    made = [p.args[0] if p.target is operator.getitem else p for p in parts]
    return ", ".join(dict.fromkeys(op_of(m).name if op_of(m) else m.name for m in made))


rules = [merge_expert_gathers, fuse_dispatch, fuse_expert_parallel]
