"""One op for all_reduce, residual add, RMSNorm and quantize: the plan for small batches."""
from __future__ import annotations

from torch import fx

from ...op import op_of
from ...ops.collectives import all_reduce
from ...ops.dense import quantize
from ...ops.fused import all_reduce_norm_quant
from ...ops.moe import combine_all
from ...ops.norm import add_rms_norm, rms_norm
from ..rewrite import Verdict, arg, call, describe, fused, hoist, missed, outputs, replace, rule, sites_of


@rule(all_reduce, combine_all)
def fuse_all_reduce_norm_quant(ar: fx.Node) -> Verdict | None:
    if op_of(ar) is combine_all:
        return missed(f"its shares travel in {arg(ar, 'fmt')}, as was asked for, and no other op adds such", avoidable=False)
    x, group = ar.args
    readers = sorted(ar.users)
    adds = [u for u in readers if op_of(u) is add_rms_norm]
    norms = [u for u in readers if op_of(u) is rms_norm and arg(u, "x") is ar]
    if len(readers) == 1 and adds:
        [norm] = adds
        a, b = arg(norm, "x"), arg(norm, "residual")
        if a is b:
            return missed("it is added to itself")
        residual = b if a is ar else a
        normed, total = (outputs(norm).get(i) for i in (0, 1))
    elif len(norms) == 1:
        [norm], residual, normed, total = norms, None, norms[0], ar
    else:
        return missed(f"it feeds {describe(readers)}, not one RMSNorm")
    quants = [u for u in normed.users if op_of(u) is quantize] if normed is not None else []
    fmt, params = "bf16", []
    if len(quants) == 1 and hoist(arg(quants[0], "params"), norm) is None:
        fmt, params = arg(quants[0], "fmt"), arg(quants[0], "params")
    rest = norm.args[op_of(norm).params.index("weight"):]
    at = min(readers)
    if late := hoist([a for a in (*rest, *params, residual) if isinstance(a, fx.Node)], at):
        return missed(f"{late.name}, an operand of its norm, is computed after its first use")
    keep_norm = fmt == "bf16" or len(normed.users) > 1
    with ar.graph.inserting_before(at):
        summed, *made = call(ar.graph, all_reduce_norm_quant, x, residual, *rest, params, fmt, keep_norm, group,
                             sites=sites_of(ar, norm))
    if fmt != "bf16":
        for i, old in outputs(quants[0]).items():
            replace(old, made[i + keep_norm])
    if normed is not None and keep_norm:
        replace(normed, made[0])
    if total is not None:
        total.replace_all_uses_with(summed)
    if fmt == "bf16" and quants:
        why = f"{len(quants)} quantizes read it" if len(quants) > 1 else "its scale needs the whole tensor's amax first"
        return fused(f"{all_reduce_norm_quant.name}, quantize after it: {why}")
    return fused(all_reduce_norm_quant)


rules = [fuse_all_reduce_norm_quant]
