"""Which nodes work token by token, and how a graph is brought to two dimensions, (tokens, hidden).

A node is token-local when cutting its token arguments and then running it equals running it and then cutting its result.
Our ops declare it; for aten it is one rule: pointwise ops by their tag, reductions and slices along other dims, casts, and
views that keep the token dim. Tokens are dim 0.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import compat
from ..op import op_of
from ..ops.collectives import all_gather, all_reduce, all_reduce_max
from ..ops.dense import amax, params_from_amax, relayout
from ..ops.moe import combine_all
from .rewrite import Verdict, call, is_aten, outputs, replace, rule, sites_of, val

aten = torch.ops.aten

VIEWS = ("view", "reshape", "_unsafe_view")
CASTS = ("_to_copy", "convert_element_type", "clone")
REDUCTIONS = ("mean", "sum", "amax", "amin")


def _is_view(n: Any) -> bool:
    """Another shape of the same elements. `view.dtype`, the same bytes as other elements, is none of these."""
    return is_aten(n, *VIEWS) and n.target is not aten.view.dtype


def _tensors(n: fx.Node) -> list[fx.Node]:
    return [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]


def _pointwise(n: fx.Node) -> bool:
    return (isinstance(n.target, torch._ops.OpOverload) and n.target.namespace in ("aten", "prims")
            and (torch.Tag.pointwise in n.target.tags or n.target._opname in CASTS) and not n.target._schema.is_mutable
            and isinstance(n.meta.get("val"), torch.Tensor))


def _reduces_other_dims(n: fx.Node, first_kept: int) -> bool:
    """A reduction that leaves dims 0..first_kept - 1 alone and keeps the number of dims."""
    if not is_aten(n, *REDUCTIONS) or len(n.args) < 3 or n.args[2] is not True or not isinstance(n.args[1], (list, tuple)):
        return False
    rank = val(n.args[0]).dim()
    return bool(n.args[1]) and all(d % rank >= first_kept for d in n.args[1])


def token_args(n: fx.Node) -> list[fx.Node] | None:
    """The argument nodes whose dim 0 is cut when `n`'s tokens are cut; None if `n` is not token-local."""
    if (o := op_of(n)) is not None:
        return [a for t in o.tokens if isinstance(a := n.args[o.params.index(t)], fx.Node)] if o.tokens else None
    out = n.meta.get("val")
    if not isinstance(out, torch.Tensor) or out.dim() == 0:
        return None
    if _pointwise(n):
        cut = []
        for a in _tensors(n):
            v = val(a)
            if v.dim() != out.dim():
                continue  # broadcast from the right: it has no token dim
            if compat.known_true(v.shape[0] == out.shape[0]):
                cut.append(a)
            elif not compat.known_true(v.shape[0] == 1):
                return None
        return cut
    if _reduces_other_dims(n, 1):
        return [n.args[0]]
    if n.target is aten.view.dtype and out.dim() > 1:
        return [n.args[0]]
    if is_aten(n, "slice") and len(n.args) > 1 and n.args[1] % val(n.args[0]).dim() != 0:
        return [n.args[0]]
    if _is_view(n) and val(n.args[0]).dim() > 0 and compat.known_true(val(n.args[0]).shape[0] == out.shape[0]) \
            and sum(d == -1 for d in n.args[1][1:]) == 0 and all(compat.known_true(d != 0) for d in out.shape[1:]):
        return [n.args[0]]
    return None


def local_args(n: fx.Node, swap: dict[fx.Node, fx.Node]) -> tuple:
    """`n`'s arguments for this rank's tokens: token arguments swapped, the token count in a view left to torch."""
    args = fx.map_arg(n.args, lambda a: swap.get(a, a))
    if _is_view(n):
        args = (args[0], [-1, *args[1][1:]])
    return args


# Of several tensors, but of no weight that ranks hold different parts of, unless an all_reduce or all_gather follows.
_JOINS = ("embedding", "cat", "stack", "index", "index_select")


def same_on_all_ranks(n: fx.Node, group: str) -> bool:
    """Is `n` known to be equal on the ranks of `group`?

    It is if it is made of graph inputs and of results of that group's all_reduce and all_gather, and not by a matmul (or by
    anything else that may read a sharded weight). Graph inputs that meet a replicated tensor are taken to be replicated.
    """
    seen, stack = set(), [n]
    while stack:
        m = stack.pop()
        if m in seen or m.op in ("placeholder", "get_attr"):
            continue
        seen.add(m)
        o = op_of(m)
        if o in (all_reduce, combine_all, all_gather, all_reduce_max):
            if m.args[-1] != group:
                return False
        elif o is not None:
            if not o.tokens and o not in (amax, params_from_amax, relayout):
                return False
            stack += m.all_input_nodes
        elif isinstance(m.target, torch._ops.OpOverload):
            one = len(_tensors(m)) <= 1 or _pointwise(m) or is_aten(m, *_JOINS)
            if not one or m.target.namespace not in ("aten", "prims") or torch.Tag.nondeterministic_seeded in m.target.tags:
                return False
            stack += m.all_input_nodes
        else:
            stack += m.all_input_nodes  # getitem and arithmetic on sizes
    return True


# --- from (batch, sequence, hidden) to (tokens, hidden)


def _unflattened(n: Any) -> fx.Node | None:
    """The (tokens, hidden) tensor of which `n` is a (batch, sequence, hidden) view."""
    if not _is_view(n):
        return None
    x, out = val(n.args[0]), val(n)
    return n.args[0] if x.dim() == 2 and out.dim() > 2 and compat.known_true(x.shape[-1] == out.shape[-1]) else None


def _flat(n: fx.Node) -> fx.Node:
    """`n` (..., h) as (tokens, h), made right behind it."""
    if (x := _unflattened(n)) is not None:
        return x
    with n.graph.inserting_after(n):
        return call(n.graph, aten.reshape.default, n, [-1, val(n).shape[-1]], sites=sites_of(n))


def _lead(n: fx.Node) -> list:
    """The leading sizes of an unflattening view, as it was given them."""
    return list(n.args[1][:-1])


@rule(lambda n: op_of(n) is not None or _pointwise(n) or is_aten(n, *REDUCTIONS))
def flatten_tokens(n: fx.Node) -> Verdict | None:
    """A token-local op on (batch, sequence, hidden) views of (tokens, hidden) tensors runs on those, its result viewed."""
    o = op_of(n)
    if o is not None and not o.tokens:
        return None
    values = n.meta["val"] if isinstance(n.meta["val"], (list, tuple)) else [n.meta["val"]]
    if not all(isinstance(v, torch.Tensor) and v.dim() > 2 for v in values):
        return None
    view = next((a for a in n.all_input_nodes if _unflattened(a) is not None), None)
    if view is None:
        return None
    lead = val(view).shape[:-1]

    def same_lead(v: torch.Tensor) -> bool:
        return v.dim() == len(lead) + 1 and all(compat.known_true(i == j) for i, j in zip(v.shape, lead, strict=False))

    if not all(same_lead(v) for v in values):
        return None
    if o is None and not _pointwise(n) and not _reduces_other_dims(n, len(lead)):
        return None
    swap: dict[fx.Node, fx.Node] = {}
    for a in _tensors(n):
        if same_lead(val(a)):
            swap[a] = a
        elif val(a).dim() > 1:  # only what has no token dim may stay: scalars and (hidden,) weights
            return None
    flat = {a: _flat(a) for a in swap}
    args = list(fx.map_arg(n.args, lambda a: flat.get(a, a)))
    if _reduces_other_dims(n, len(lead)):
        args[1] = [1]
    with n.graph.inserting_before(n):
        new = _like(n, args)
        for i, y in enumerate(new if isinstance(new, list) else [new]):
            wide = call(n.graph, aten.reshape.default, y, [*_lead(view), val(y).shape[-1]], sites=sites_of(n))
            old = outputs(n).get(i) if isinstance(new, list) else n
            if old is not None:
                replace(old, wide)
    return None


def _like(n: fx.Node, args: list) -> Any:
    """The call `n` with other arguments (and its own keywords), inserted with its fake value."""
    if op_of(n) is not None:
        return call(n.graph, op_of(n), *args, sites=sites_of(n))
    new = n.graph.call_function(n.target, tuple(args), n.kwargs)
    new.meta["val"] = n.target(*val(tuple(args)), **val(n.kwargs))
    new.meta["sites"] = sites_of(n)
    return new


@rule(all_reduce)
def flatten_all_reduce(n: fx.Node) -> Verdict | None:
    """An all_reduce of (batch, sequence, hidden) moves the same bytes as one of (tokens, hidden)."""
    x, group = n.args
    if val(x).dim() <= 2:
        return None
    flat = _flat(x)
    with n.graph.inserting_before(n):
        y = call(n.graph, all_reduce, flat, group, sites=sites_of(n))
        # the sizes as nodes or constants: a symbol has to come from somewhere at run time
        lead = _lead(x) if _unflattened(x) is not None else [_size(n.graph, x, d) for d in range(val(x).dim() - 1)]
        replace(n, call(n.graph, aten.reshape.default, y, [*lead, val(x).shape[-1]], sites=sites_of(n)))
    return None


def _size(graph: fx.Graph, x: fx.Node, dim: int) -> Any:
    size = val(x).shape[dim]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, x, dim)


@rule(lambda n: _is_view(n))
def cancel_views(n: fx.Node) -> Verdict | None:
    """(tokens, h) viewed as (batch, sequence, h) and back is the tensor itself; so is a view to its own shape."""
    x = n.args[0]
    while _is_view(x):
        x = x.args[0]
    if compat.same_shape(val(x), val(n)) and val(x).is_contiguous():
        replace(n, x)
    elif x is not n.args[0] and val(x).is_contiguous():
        n.args = (x, n.args[1])
    return None


rules = [flatten_all_reduce, flatten_tokens, cancel_views]

