"""Foreign spellings become our ops, once, before anything else looks at the graph.

Every adoption keeps the meaning; where it keeps the bits too is said at the rule. New spellings are registered by their
owner with one line: `adopt(target, op, args)`.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .. import compat
from ..op import Op, op_of
from ..ops.collectives import all_gather, all_reduce, reduce_scatter
from ..ops.dense import matmul
from ..ops.norm import add_rms_norm, rms_norm
from .rewrite import Verdict, call, hoist, is_aten, missed, outputs, replace, rule, val

aten = torch.ops.aten

_spellings: dict[Any, tuple[Op, Callable[..., tuple | None]]] = {}


def adopt(target: torch._ops.OpOverload, op: Op, args: Callable[..., tuple | None]) -> None:
    """From now on a call of `target` is captured as a call of `op`.

    args  called with `target`'s own arguments (graph nodes and constants) -> `op`'s arguments, or None to leave the call
          alone. If `op` has several outputs, `target` must return the same ones in the same order.

    Example, a library's FP8 matmul whose weight is held as (k, n):
        adopt(torch.ops.mylib.fp8_mm.default, matmul, lambda a, b, a_scale, b_scale, dtype:
              ([a], [a_scale], [b.t, b_scale], None, "fp8_tensor", dtype))   # with `transposed(b)` for b.t
    """
    _spellings[target] = (op, args)


def transposed(w: fx.Node) -> fx.Node:
    """w.T as a node: the tensor under a transpose, or a new transpose right behind `w`."""
    if is_aten(w, "t") or (is_aten(w, "permute") and list(w.args[1]) == [1, 0]) or (
            is_aten(w, "transpose") and sorted(d % 2 for d in w.args[1:]) == [0, 1]):
        return w.args[0]
    with w.graph.inserting_after(w):
        return call(w.graph, aten.t.default, w)


def _is_spelling(n: fx.Node) -> bool:
    return n.target in _spellings


@rule(_is_spelling)
def adopt_registered(n: fx.Node) -> Verdict | None:
    op, args = _spellings[n.target]
    schema = n.target._schema.arguments
    bound = {a.name: (n.args[i] if i < len(n.args) else n.kwargs.get(a.name, a.default_value)) for i, a in enumerate(schema)}
    if (ours := args(**bound)) is None:
        return None
    with n.graph.inserting_before(n):
        new = call(n.graph, op, *ours)
    if isinstance(new, list):
        single = not isinstance(n.meta["val"], (list, tuple))
        if single and len(new) != 1:
            return missed(f"{n.target} returns one tensor where {op.name} returns {len(new)}: its registration is wrong")
        for i, old in {0: n}.items() if single else outputs(n).items():
            replace(old, new[i])
    else:
        replace(n, new)
    return None


def _functional(n: fx.Node, name: str) -> bool:
    return (isinstance(n.target, torch._ops.OpOverload) and n.target.namespace in ("_c10d_functional", "c10d_functional")
            and n.target._opname == name)


@rule(lambda n: any(_functional(n, name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")))
def adopt_functional_collective(n: fx.Node) -> Verdict | None:
    """torch.distributed._functional_collectives (which DTensor ends in as well) and the wait after each.

    The bits of a reduction are those of our own (float32 in rank order), with and without fusion.
    """
    x = n.args[0]
    if x.meta["val"].dim() == 0:
        return missed(f"{n.name} moves a single number")
    group = compat.group_name(n.args[-1])
    reduces = not _functional(n, "all_gather_into_tensor")
    if reduces and n.args[1] != "sum":
        return missed(f"{n.name} reduces by {n.args[1]!r}, not by 'sum'")
    with n.graph.inserting_before(n):
        if not reduces:
            [new] = call(n.graph, all_gather, [x], group)
        else:
            new = call(n.graph, all_reduce if _functional(n, "all_reduce") else reduce_scatter, x, group)
    for wait in [u for u in n.users if _functional(u, "wait_tensor")]:
        replace(wait, new)
        n.graph.erase_node(wait)
    replace(n, new)
    return None


@rule(lambda n: is_aten(n, "copy"))
def drop_copy(n: fx.Node) -> Verdict | None:
    """The functional `copy(dst, src)` that an in-place collective leaves behind is `src`, if nothing is converted."""
    dst, src = n.args[:2]
    a, b = val(dst), val(src)
    if a.dtype == b.dtype and a.device == b.device and compat.same_shape(a, b):
        replace(n, src)
    return None


@rule(lambda n: is_aten(n, "mm", "addmm"))
def adopt_matmul(n: fx.Node) -> Verdict | None:
    """x @ w.T and x @ w.T + bias, bit for bit the same aten call."""
    bias, x, wt = (None, *n.args) if is_aten(n, "mm") else n.args[:3]
    if any(n.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or (bias is not None and val(bias).dim() != 1):
        return None
    if not val(x).dtype.is_floating_point or val(x).dtype.itemsize == 1 or val(n).dtype != val(x).dtype:
        return None
    w = transposed(wt)
    with n.graph.inserting_before(n):
        replace(n, call(n.graph, matmul, [x], [], [w], bias, "bf16", val(x).dtype))
    return None


def _scaled_mm(self, mat2, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum) -> tuple | None:
    """aten._scaled_mm with one scale a tensor, or one a row of each side. mat2 is (k, n), scale_b (1, n) or scalar."""
    if scale_result is not None or val(self).dtype != torch.float8_e4m3fn or val(mat2).dtype != torch.float8_e4m3fn:
        return None
    a, b = val(scale_a), val(scale_b)
    dtype = out_dtype or torch.bfloat16
    if a.numel() == 1 and b.numel() == 1 and a.dim() == b.dim() == 0:
        return [self], [scale_a], [transposed(mat2), scale_b], bias, "fp8_tensor", dtype
    if a.dim() == 2 and b.dim() == 2 and a.shape[1] == 1 and b.shape[0] == 1 and compat.known_true(a.shape[0] == val(self).shape[0]):
        return [self, scale_a], [], [transposed(mat2), transposed(scale_b)], bias, "fp8_token", dtype
    return None


adopt(aten._scaled_mm.default, matmul, _scaled_mm)


# --- RMSNorm by hand


def _uncast(n: Any, dtype: torch.dtype) -> Any:
    """What a cast to `dtype` was made from, or the node itself."""
    return n.args[0] if is_aten(n, "_to_copy", "convert_element_type") and val(n).dtype == dtype else n


def _only_user(n: fx.Node) -> fx.Node | None:
    return next(iter(n.users)) if len(n.users) == 1 else None


def _other(n: fx.Node, known: fx.Node) -> Any:
    """The factor or summand of a binary node that is not `known`."""
    return n.args[1] if n.args[0] is known else n.args[0]


@rule(lambda n: is_aten(n, "rsqrt"))
def adopt_rms_norm(n: fx.Node) -> Verdict | None:
    """x * rsqrt(mean(x^2, -1) + eps) * weight in float32, with the weight in any of its spellings: F.rms_norm, Llama's
    (rounded before the weight), Gemma's (1 + weight). Bit for bit the same: the reference is the same aten calls."""
    total = n.args[0]
    if not is_aten(total, "add") or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args[0], total.args[1]
    if not is_aten(mean, "mean") or not mean.args[2:] or mean.args[2] is not True:
        return None
    square = mean.args[0]
    if is_aten(square, "pow") and square.args[1] == 2:
        wide = square.args[0]
    elif is_aten(square, "mul") and square.args[0] is square.args[1]:
        wide = square.args[0]
    else:
        return None
    if [d % val(wide).dim() for d in mean.args[1]] != [val(wide).dim() - 1] or val(wide).dtype != torch.float32:
        return None
    x = _uncast(wide, torch.float32)
    dtype = val(x).dtype
    normed = _only_user(n)
    if normed is None or not is_aten(normed, "mul") or {*normed.args} != {wide, n}:
        return None
    if (found := _weight(normed, dtype)) is None:
        return None
    end, weight, offset, cast_first = found
    if val(weight).dim() != 1 or not compat.known_true(val(weight).shape[0] == val(x).shape[-1]):
        return None
    with n.graph.inserting_before(end):
        replace(end, call(n.graph, rms_norm, x, weight, eps, offset, cast_first))
    return None


def _weight(normed: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node, float, bool] | None:
    """From the normalized float32 value down: (last node of the norm, weight, offset, cast_first)."""
    step = _only_user(normed)
    if step is None:
        return None
    if dtype != torch.float32 and is_aten(step, "_to_copy", "convert_element_type") and val(step).dtype == dtype:
        product = _only_user(step)
        if product is None or not is_aten(product, "mul") or val(product).dtype != dtype:
            return None
        weight = _other(product, step)
        return (product, weight, 0.0, True) if isinstance(weight, fx.Node) else None
    if not is_aten(step, "mul") or val(step).dtype != torch.float32:
        return None
    weight, offset = _other(step, normed), 0.0
    if not isinstance(weight, fx.Node):
        return None
    if is_aten(weight, "add") and isinstance(weight.args[1], (int, float)):
        weight, offset = weight.args[0], float(weight.args[1])
    weight = _uncast(weight, torch.float32)
    if dtype == torch.float32:
        return step, weight, offset, False
    end = _only_user(step)
    if end is None or not is_aten(end, "_to_copy", "convert_element_type") or val(end).dtype != dtype:
        return None
    return end, weight, offset, False


@rule(lambda n: is_aten(n, "add"))
def adopt_add_rms_norm(n: fx.Node) -> Verdict | None:
    """A residual add whose sum is normalized: one op, the sum its second output."""
    a, b = n.args[:2]
    if n.kwargs.get("alpha", 1) != 1 or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    norms = [u for u in n.users if op_of(u) is rms_norm and u.args[0] is n]
    if len(norms) != 1:
        return None
    if not isinstance(val(b), torch.Tensor) or val(a).dtype != val(b).dtype or not compat.same_shape(val(a), val(b)):
        return None
    [norm] = norms
    first = min(n.users)
    if hoist([norm.args[1]], first):
        return None
    with n.graph.inserting_before(first):
        y, total = call(n.graph, add_rms_norm, b, a, *norm.args[1:])
    replace(norm, y)
    n.replace_all_uses_with(total)
    return None


rules = [adopt_functional_collective, drop_copy, adopt_registered, adopt_matmul, adopt_rms_norm, adopt_add_rms_norm]
