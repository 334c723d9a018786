"""Overlap a collective with the matmul beside it."""
from __future__ import annotations

import operator

from torch import fx

from ... import formats
from ...op import op_of
from ...ops.collectives import all_gather, reduce_scatter
from ...ops.dense import matmul, relayout
from ...ops.fused import all_gather_matmul, matmul_reduce_scatter
from ..rewrite import Verdict, arg, call, describe, fused, hoist, missed, outputs, producer, replace, rule, sites_of, users


def _gather_under(part: fx.Node) -> fx.Node | None:
    n = part.args[0] if part.target is operator.getitem else part
    return n if op_of(n) is all_gather else None


@rule(matmul)
def merge_all_gathers(m: fx.Node) -> Verdict | None:
    """Parts that were gathered one by one (a quantization spelled out in aten) travel in one message instead."""
    parts = arg(m, "x")
    gathers = [_gather_under(p) for p in parts]
    if len(parts) < 2 or not all(gathers) or producer(parts, all_gather):
        return None
    if len({g.args[1] for g in gathers}) > 1:
        return missed("its parts were gathered over several groups")
    sources = [g.args[0][p.args[1]] for g, p in zip(gathers, parts, strict=True)]
    last = max(gathers)
    if same := [u for u in sources[0].users if op_of(u) is all_gather and list(u.args[0]) == sources and u < m]:
        full = [outputs(same[0])[i] for i in range(len(parts))]
    else:
        with m.graph.inserting_before(last.next):
            full = call(m.graph, all_gather, sources, last.args[1], sites=sites_of(*gathers))
    m.args = (full, *m.args[1:])
    return fused(all_gather)


@rule(all_gather)
def fuse_all_gather_matmul(ag: fx.Node) -> Verdict | None:
    """One gather and all matmuls that read it."""
    parts, group = ag.args
    source, readers = ag, users(ag)
    if len(readers) == 1 and op_of(readers[0]) is relayout:  # linear on the wire, swizzled by the fused op at its end
        source, readers = readers[0], users(readers[0])
    made = set(outputs(source).values())
    if others := [u for u in readers if op_of(u) is not matmul or producer(arg(u, "x"), op_of(source)) is not source
                  or made & {*arg(u, "w"), *arg(u, "params"), arg(u, "bias")}]:
        beside = any(op_of(u) is matmul for u in readers)
        return missed(f"it feeds {describe(others)}, {'not only matmuls' if beside else 'not a matmul'}", avoidable=beside)
    kinds = {(arg(m, "fmt"), arg(m, "dtype"), *arg(m, "params")) for m in readers}
    if len(kinds) > 1:
        return missed(f"its {len(readers)} matmuls differ in format, dtype or params: " + "; ".join(
            sorted(f"{k[0]} to {str(k[1]).removeprefix('torch.')} with params {[p.name for p in k[2:]]}" for k in kinds)))
    first, n = readers[0], formats.get(arg(readers[0], "fmt")).weight_len
    needed = [a for m in readers for a in (*arg(m, "params"), *arg(m, "w"), arg(m, "bias")) if isinstance(a, fx.Node)]
    if late := hoist(needed, first):
        return missed(f"{late.name}, an operand of one of its matmuls, is computed after the first of them")
    ws = [p for m in readers for p in arg(m, "w")]
    assert len(ws) == n * len(readers)
    with ag.graph.inserting_before(first):
        ys = call(ag.graph, all_gather_matmul, list(parts), arg(first, "params"), ws, [arg(m, "bias") for m in readers],
                  arg(first, "fmt"), arg(first, "dtype"), group, sites=sites_of(ag, *readers))
    for m, y in zip(readers, ys, strict=True):
        replace(m, y)
    return fused(all_gather_matmul)


@rule(reduce_scatter)
def fuse_matmul_reduce_scatter(rs: fx.Node) -> Verdict | None:
    """A matmul and the reduce_scatter of its result."""
    x, group = rs.args
    if (m := producer(x, matmul)) is None:
        return missed(f"its input is {describe([x])}, not a matmul: there is nothing to hide it behind", avoidable=False)
    if len(m.users) > 1:
        return missed(f"the matmul also feeds {describe([u for u in m.users if u is not rs])}")
    with rs.graph.inserting_before(rs):
        replace(rs, call(rs.graph, matmul_reduce_scatter, *m.args, group, sites=sites_of(rs, m)))
    return fused(matmul_reduce_scatter)


rules = [merge_all_gathers, fuse_all_gather_matmul, fuse_matmul_reduce_scatter]
