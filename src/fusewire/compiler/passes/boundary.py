"""What stands between two matmuls of the sharded plan as one op: its norm and quantize work on the rows that the gather sends."""
from __future__ import annotations

import operator

from torch import fx

from ...op import op_of
from ...ops.dense import linear, quantize
from ...ops.fused import all_gather_matmul, norm_quant_all_gather_matmul
from ...ops.norm import add_rms_norm, rms_norm
from ..rewrite import Verdict, arg, call, describe, fused, hoist, missed, outputs, producer, replace, rule, sites_of, users


@rule(all_gather_matmul)
def fuse_norm_quant_all_gather_matmul(agm: fx.Node) -> Verdict | None:
    """A norm, the quantize of it, and the gather and matmuls that read that."""
    parts, fmt = arg(agm, "x"), arg(agm, "fmt")
    normed = parts[0]
    if fmt != "bf16":
        if (q := producer(parts, quantize)) is None:
            return missed(f"it gathers {describe(parts)}, not what one quantize made", avoidable=False)
        if others := [u for u in users(q) if u is not agm]:
            return missed(f"what it gathers also feeds {describe(others)}", avoidable=False)
        if arg(q, "fmt") != linear(fmt) or arg(q, "params") != arg(agm, "params"):
            return missed("its rows are quantized otherwise than its matmuls read them", avoidable=False)
        normed = arg(q, "x")
    norm = normed.args[0] if normed.target is operator.getitem else normed
    if op_of(norm) not in (rms_norm, add_rms_norm) or (norm is not normed and normed.args[1] != 0):
        return missed(f"its rows are made by {describe([norm])}, not by a norm", avoidable=False)
    first = [*arg(agm, "params"), *arg(agm, "ws"), *arg(agm, "biases")]
    if late := hoist([a for a in first if isinstance(a, fx.Node)], norm):
        return missed(f"{late.name}, an operand of its quantize or of its matmuls, is computed after its norm", avoidable=False)
    residual = arg(norm, "residual") if op_of(norm) is add_rms_norm else None
    keep_norm = len(normed.users) > 1
    rest = norm.args[op_of(norm).params.index("weight"):]
    with agm.graph.inserting_before(norm):
        made = call(agm.graph, norm_quant_all_gather_matmul, arg(norm, "x"), residual, *rest, keep_norm,
                    *agm.args[1:], sites=sites_of(norm, agm))
    if residual is not None:
        total = made.pop(0)
        if (old := outputs(norm).get(1)) is not None:
            replace(old, total)
    if keep_norm:
        replace(normed, made.pop(0))
    for i, old in outputs(agm).items():
        replace(old, made[i])
    return fused(norm_quant_all_gather_matmul)


rules = [fuse_norm_quant_all_gather_matmul]
