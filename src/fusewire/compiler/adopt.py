"""Foreign spellings become our ops, once, before anything else looks at the graph.

Every adoption keeps the meaning; where it keeps the bits too is said at the rule. New spellings are registered by their
owner with one line: `adopt(target, op, args)`.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

    args  called with `target`'s own arguments by name (graph nodes and constants) -> `op`'s arguments, or None to leave
          the call alone. It may make small nodes: `transposed`, `scalar`, `matrix`, `from_alpha`, `insert`.

    `op`'s outputs are, in order, what `target` returns and then the arguments it writes to (`out!`, `residual!`); of those
    `args` sees the value before. An output may be spelled in another way than ours: the same bytes as integers, or with a
    leading dim of 1. Anything else is a miss, and the call stays.

    Example, a library's FP8 matmul whose weight is held as (k, n):
        adopt(torch.ops.mylib.fp8_mm.default, matmul, lambda a, b, a_scale, b_scale, dtype:
              ([a], [scalar(a_scale)], [transposed(b), scalar(b_scale)], None, "fp8_tensor", dtype))
    """
    _spellings[target] = (op, args)


def insert(target: Callable, like: fx.Node, *args: Any) -> Any:
    """A call of an aten op, in the graph of `like`, right before the call that is being adopted."""
    return call(like.graph, target, *args)


def transposed(w: fx.Node) -> fx.Node:
    """w.T as a node: the tensor under a transpose, or a new transpose."""
    if is_aten(w, "t") or (is_aten(w, "permute") and list(w.args[1]) == [1, 0]) or (
            is_aten(w, "transpose") and sorted(d % 2 for d in w.args[1:]) == [0, 1]):
        return w.args[0]
    return insert(aten.t.default, w, w)


def scalar(scale: fx.Node) -> fx.Node:
    """A tensor of one element as a scalar, shape (), which is what params are."""
    return scale if val(scale).dim() == 0 else insert(aten.reshape.default, scale, scale, [])


def matrix(x: fx.Node) -> fx.Node:
    """A batch of one matrix, (1, m, k), as the matrix."""
    if is_aten(x, "unsqueeze") and x.args[1] in (0, -3):
        return x.args[0]
    return insert(aten.select.int, x, x, 0, 0)


def from_alpha(alpha: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(the activation's global scale, the weight's) for a block-scaled matmul that takes alpha = 1 / (g_x * g_w): (1, 1 / alpha).

    The activation's is the same node for every matmul, so that those which read one activation can still share its gather.
    """
    alpha = scalar(alpha)
    one = alpha.graph.call_function(aten.full.default, ([], 1.0), {"dtype": torch.float32, "device": val(alpha).device})
    one.meta["val"] = val(alpha).new_ones(())
    return one, insert(aten.reciprocal.default, alpha, alpha)


class _Call(NamedTuple):
    """A call of a registered spelling: its arguments by name, and (node, fake value) of what it returns and writes."""

    target: torch._ops.OpOverload
    args: dict[str, Any]
    made: list[tuple[fx.Node | None, Any]]


def _spelled(n: fx.Node) -> _Call | None:
    """The registered call that `n` is, or that it wraps if it is one with mutated arguments."""
    if (wrapped := compat.functionalized(n)) is not None:
        target, args, at = wrapped
        made = [(outputs(n).get(i), n.meta["val"][i]) for i in at]
    elif isinstance(n.target, torch._ops.OpOverload):
        target, schema = n.target, n.target._schema.arguments
        args = {a.name: (n.args[i] if i < len(n.args) else n.kwargs.get(a.name, a.default_value)) for i, a in enumerate(schema)}
        value = n.meta.get("val")
        made = [(outputs(n).get(i), v) for i, v in enumerate(value)] if isinstance(value, (list, tuple)) else [(n, value)]
    else:
        return None
    return _Call(target, args, made) if target in _spellings else None


@rule(lambda n: _spelled(n) is not None)
def adopt_registered(n: fx.Node) -> Verdict | None:
    found = _spelled(n)
    op, args = _spellings[found.target]
    with n.graph.inserting_before(n):
        if (ours := args(**found.args)) is None:
            return None
        new = call(n.graph, op, *ours)
        new = new if isinstance(new, list) else [new]
        if len(new) != len(found.made):
            return missed(f"{found.target} makes {len(found.made)} tensors where {op.name} makes {len(new)}: "
                          "its registration is wrong")
        new = [_spelled_as(y, like) for y, (_, like) in zip(new, found.made, strict=True)]
    for y, (_, like) in zip(new, found.made, strict=True):
        if val(y).dtype != like.dtype or not compat.same_shape(val(y), like):
            return missed(f"{found.target} makes {like.dtype} {tuple(like.shape)} where {op.name} makes {val(y).dtype} "
                          f"{tuple(val(y).shape)}: its registration is wrong")
    for y, (old, _) in zip(new, found.made, strict=True):
        if old is not None:
            replace(old, y)
    return None


def _spelled_as(y: fx.Node, like: torch.Tensor) -> fx.Node:
    """`y` in the other spellings that an output may have, see `adopt`."""
    if val(y).dtype != like.dtype and not like.dtype.is_floating_point:
        y = insert(aten.view.dtype, y, y, like.dtype)
    if val(y).dim() == 2 and like.dim() == 3 and compat.known_true(like.shape[0] == 1):
        y = insert(aten.reshape.default, y, y, [1, -1, val(y).shape[1]])
    return y


@rule(lambda n: is_aten(n, "detach", "alias"))
def drop_aliases(n: fx.Node) -> Verdict | None:
    """AOT leaves a detach beside every view of another dtype and an alias of some outputs; no gradient is recorded here."""
    if not any(u.op == "output" for u in n.users):
        replace(n, n.args[0])
    return None


@rule(lambda n: n.target is aten.view.dtype)
def cancel_dtype_views(n: fx.Node) -> Verdict | None:
    """Bytes seen as another dtype (gloo refuses FP8, some ops call e4m3 uint8 or int32) and back are the tensor itself."""
    x = n.args[0]
    while x.target is aten.view.dtype:
        x = x.args[0]
    if val(x).dtype == val(n).dtype and compat.same_shape(val(x), val(n)):
        replace(n, x)
    return None


@rule(lambda n: is_aten(n, "slice"))
def drop_whole_slices(n: fx.Node) -> Verdict | None:
    """DTensor cuts what it gathered to the size it knows, which is all of it where the shards are even."""
    if len(n.args) < 5 and compat.same_shape(val(n), val(n.args[0])):
        replace(n, n.args[0])
    return None


# --- collectives

_ADOPTED = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def _functional(n: fx.Node) -> str:
    """The name of a functional collective, "" for anything else."""
    known = isinstance(n.target, torch._ops.OpOverload) and n.target.namespace in (
        "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
    return n.target._opname if known else ""


@rule(lambda n: _functional(n) not in ("", "wait_tensor"))
def adopt_functional_collective(n: fx.Node) -> Verdict | None:
    """torch.distributed._functional_collectives (which DTensor and in-place calls end in as well) and the wait after each.

    The bits of a reduction are those of our own (float32 in rank order), with and without fusion.
    """
    name, x = _functional(n), n.args[0]
    if name not in _ADOPTED or n.target.namespace == "c10d_functional":  # the last was PyTorch 2.1's, with other arguments
        return missed(f"{n.target} is not one of {', '.join(_ADOPTED)} of _c10d_functional", avoidable=False)
    if val(x).dim() == 0:
        return missed(f"{n.name} moves a single number", avoidable=False)
    group = compat.group_name(n.args[-1])
    reduces = name != "all_gather_into_tensor"
    if reduces and n.args[1] != "sum":
        return missed(f"{n.name} reduces by {n.args[1]!r}, not by 'sum'")
    if reduces and not val(x).dtype.is_floating_point:
        return missed(f"{n.name} sums {val(x).dtype}, and sums are made in float32", avoidable=False)
    with n.graph.inserting_before(n):
        if not reduces:
            [new] = call(n.graph, all_gather, [x], group)
        else:
            new = call(n.graph, all_reduce if name == "all_reduce" else reduce_scatter, x, group)
    for wait in [u for u in n.users if _functional(u) == "wait_tensor"]:
        replace(wait, new)
        n.graph.erase_node(wait)
    replace(n, new)
    return None


@rule(lambda n: is_aten(n, "copy"))
def drop_copy(n: fx.Node) -> Verdict | None:
    """The functional `copy(dst, src)` that an in-place collective leaves behind is `src`, if nothing is converted."""
    a, b = (val(x) for x in n.args[:2])
    strides = all(compat.known_true(i == j) for i, j in zip(a.stride(), b.stride(), strict=False))
    if a.dtype == b.dtype and a.device == b.device and compat.same_shape(a, b) and strides:
        replace(n, n.args[1])
    return None


# --- matmuls


@rule(lambda n: is_aten(n, "mm", "addmm"))
def adopt_matmul(n: fx.Node) -> Verdict | None:
    """x @ w.T and x @ w.T + bias, bit for bit the same aten call."""
    bias, x, wt = (None, *n.args) if is_aten(n, "mm") else n.args[:3]
    if any(n.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or (bias is not None and val(bias).dim() != 1):
        return None
    if not val(x).dtype.is_floating_point or val(x).dtype.itemsize == 1 or val(n).dtype != val(x).dtype:
        return None
    with n.graph.inserting_before(n):
        replace(n, call(n.graph, matmul, [x], [], [transposed(wt)], bias, "bf16", val(x).dtype))
    return None


def _scaled_mm(self, mat2, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum) -> tuple | None:
    """aten._scaled_mm with one scale a tensor, or one a row of each side; mat2 is (k, n).

    Where the backend `aten` runs, the bits are those of the call, but for use_fast_accum, which we never use.
    """
    if {val(self).dtype, val(mat2).dtype} != {torch.float8_e4m3fn} or scale_result is not None:
        return None
    if out_dtype is None or out_dtype.itemsize < 2:  # None is the dtype of `self`
        return None
    a, b = val(scale_a), val(scale_b)
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        return None
    if compat.known_true(a.numel() == 1) and compat.known_true(b.numel() == 1):
        return [self], [scalar(scale_a)], [transposed(mat2), scalar(scale_b)], bias, "fp8_tensor", out_dtype
    rows, columns = (val(self).shape[0], 1), (1, val(mat2).shape[1])
    if all(t.dim() == 2 and all(compat.known_true(i == j) for i, j in zip(t.shape, shape, strict=True))
           for t, shape in ((a, rows), (b, columns))):
        return [self, scale_a], [], [transposed(mat2), transposed(scale_b)], bias, "fp8_token", out_dtype
    return None


def _scaled_mm_v2(self, mat2, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias, out_dtype, contraction_dim,
                  use_fast_accum) -> tuple | None:
    """F.scaled_mm: TensorWise and RowWise are `_scaled_mm`'s two cases, and shapes tell them apart."""
    if list(recipe_a) != list(recipe_b) or list(recipe_a) not in ([0], [1]) or any([*swizzle_a, *swizzle_b, *contraction_dim]):
        return None
    return _scaled_mm(self, mat2, scale_a[0], scale_b[0], bias, None, out_dtype, use_fast_accum)


adopt(aten._scaled_mm.default, matmul, _scaled_mm)
adopt(aten._scaled_mm_v2.default, matmul, _scaled_mm_v2)


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
    (rounded before the weight), Gemma's (1 + weight). Bit for bit the same for a contiguous x: the
    reference is the same aten calls on contiguous rows."""
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


rules = [adopt_functional_collective, drop_copy, drop_whole_slices, drop_aliases, adopt_registered, cancel_dtype_views,
         adopt_matmul, adopt_rms_norm, adopt_add_rms_norm]
