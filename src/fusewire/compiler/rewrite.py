"""A rule looks at one node and says what it did: fused, missed (and why), or nothing to say."""
from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from ..op import Op, op_of


class Verdict(NamedTuple):
    """What a rule did at a node.

    kind       "fused" or "missed"
    why        into which op; or a sentence
    avoidable  a miss that another choice of the user could have prevented; False: there is no matmul to fuse with
    sites      the collectives of the original graph that it concerns
    """

    kind: str
    why: str
    avoidable: bool = False
    rule: str = ""
    sites: tuple[int, ...] = ()


def fused(into: Op | str) -> Verdict:
    return Verdict("fused", into if isinstance(into, str) else into.name)


def missed(why: str, avoidable: bool = True) -> Verdict:
    return Verdict("missed", why, avoidable)


class Rule(NamedTuple):
    """`apply(node)` is called for every node that `anchor` accepts."""

    name: str
    anchor: Callable[[fx.Node], bool]
    apply: Callable[[fx.Node], Verdict | None]


def rule(*anchors: Op | Callable[[fx.Node], bool]) -> Callable[[Callable], Rule]:
    """Declare a rule that looks at calls of the given ops, or at nodes that the given predicates accept."""
    ops = [a for a in anchors if isinstance(a, Op)]
    predicates = [a for a in anchors if not isinstance(a, Op)]

    def declare(apply: Callable[[fx.Node], Verdict | None]) -> Rule:
        return Rule(apply.__name__, lambda n: op_of(n) in ops or any(p(n) for p in predicates), apply)

    return declare


def run(graph: fx.Graph, rules: Iterable[Rule], timings: dict[str, float] | None = None) -> list[Verdict]:
    """Apply each rule once over the graph, top down; the graph is valid after each. -> every verdict."""
    verdicts = []
    for r in rules:
        start = time.perf_counter()
        for node in graph.nodes:  # a live walk: nodes that a rule inserts further down are visited too
            if node.op != "call_function" or not node.users or not r.anchor(node):
                continue
            sites = sites_of(node)
            if v := r.apply(node):
                verdicts.append(v._replace(rule=r.name, sites=sites or sites_of(*node.all_input_nodes)))
        eliminate_dead_code(graph)
        graph.lint()
        if timings is not None:
            timings[r.name] = timings.get(r.name, 0.0) + time.perf_counter() - start
    return verdicts


# --- reading a graph


def is_aten(n: Any, *names: str) -> bool:
    """Is `n` a call of one of these aten packets ("add", "view")?"""
    return (isinstance(n, fx.Node) and isinstance(n.target, torch._ops.OpOverload) and n.target.namespace in ("aten", "prims")
            and n.target._opname in names)


def val(a: Any) -> Any:
    """The fake value of a node, or of every node inside an argument."""
    return fx.map_arg(a, lambda n: n.meta["val"])


def arg(n: fx.Node, name: str) -> Any:
    """The argument `name` of a call of one of our ops."""
    return n.args[op_of(n).params.index(name)]


def outputs(n: fx.Node) -> dict[int, fx.Node]:
    """Output index -> its getitem node, for a node with several outputs (one getitem each: see `dedupe_getitems`)."""
    return {u.args[1]: u for u in n.users if u.target is operator.getitem}


def users(n: fx.Node) -> list[fx.Node]:
    """Who uses a node or any of its outputs, in graph order."""
    found = {v for u in n.users for v in (u.users if u.target is operator.getitem else [u])}
    return sorted(found)


def producer(a: Any, o: Op) -> fx.Node | None:
    """The `o` node whose outputs are exactly `a`, in order: a node, or the list of all parts of one value."""
    nodes = a if isinstance(a, (list, tuple)) else [a]
    if not nodes or not all(isinstance(n, fx.Node) for n in nodes):
        return None
    sources = {n.args[0] if n.target is operator.getitem else n for n in nodes}
    n = sources.pop()
    if sources or op_of(n) is not o:
        return None
    if isinstance(n.meta["val"], (list, tuple)):
        in_order = [m.target is operator.getitem and m.args[1] == i for i, m in enumerate(nodes)]
        return n if all(in_order) and len(nodes) == len(n.meta["val"]) else None
    return n


def sites_of(*nodes: fx.Node) -> tuple[int, ...]:
    return tuple(sorted({s for n in nodes for s in n.meta.get("sites", ())}))


def describe(nodes: list[fx.Node]) -> str:
    """What the nodes are, in a reader's words; a view is what it feeds."""
    what: list[str] = []
    queue, seen = list(nodes), set()
    while queue:
        n = queue.pop(0)
        if n in seen:
            continue
        seen.add(n)
        if n.target is operator.getitem or is_aten(n, "view", "reshape", "_unsafe_view"):
            queue.extend(sorted(n.users))
        elif n.op == "output":
            what.append("the model's output")
        elif n.op == "placeholder":
            what.append("an input of the model")
        elif op_of(n):
            what.append(op_of(n).name)
        else:
            v = n.meta.get("val")
            shape = f" of shape ({', '.join(str(s) for s in v.shape)})" if isinstance(v, torch.Tensor) else ""
            what.append(f"{getattr(n.target, '_opname', n.target)}{shape}")
    return ", ".join(dict.fromkeys(what)) or "nothing"


def depends_only_on_inputs(n: fx.Node) -> list[fx.Node] | None:
    """The nodes that make `n` out of graph inputs, in order; None if more than a handful (an activation, say)."""
    made: dict[fx.Node, None] = {}
    stack = [n]
    while stack:
        m = stack.pop()
        if m.op in ("placeholder", "get_attr") or m in made:
            continue
        if len(made) == 8 or m.op != "call_function":
            return None
        made[m] = None
        stack.extend(m.all_input_nodes)
    return sorted(made)


def hoist(nodes: Iterable[fx.Node], before: fx.Node) -> fx.Node | None:
    """Move what makes `nodes` up, so that they exist at `before`; -> the first node that cannot be moved, if any.

    What `before` itself makes cannot, and nothing moves past a mutation, which it may have to see, or is random."""
    for n in nodes:
        if n < before:
            continue
        chain = depends_only_on_inputs(n)
        if chain is None or before in chain:
            return n
        late = [m for m in chain if not m < before]
        if not all(is_pure_call(m) or m.target in vars(operator).values() for m in late) or _mutates_between(before, n):
            return n
        for m in late:
            before.prepend(m)
    return None


def _mutates_between(first: fx.Node, last: fx.Node) -> bool:
    n = first
    while n is not last:
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable:
            return True
        n = n.next
    return False


# --- writing a graph


def call(graph: fx.Graph, target: Op | Callable, *args: Any, sites: tuple[int, ...] = ()) -> Any:
    """Insert a call with its fake value: one node, or for several outputs the list of their getitem nodes."""
    o = target if isinstance(target, Op) else None
    overload = o.target if o else target
    n = graph.create_node("call_function", overload, args, name=o.name if o else None)
    n.meta["val"] = overload(*val(args))
    n.meta["sites"] = sites
    if not isinstance(n.meta["val"], (list, tuple)):
        return n
    parts = [graph.call_function(operator.getitem, (n, i)) for i in range(len(n.meta["val"]))]
    for p, v in zip(parts, n.meta["val"], strict=True):
        p.meta["val"] = v
        p.meta["sites"] = sites
    return parts


def replace(old: fx.Node, new: fx.Node) -> None:
    """Use `new` wherever `old` was, and keep what is known of `old`'s place in the model."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """fx's own keeps a dead collective (it counts as a side effect); ours are functional and may go."""
    def impure(n: fx.Node) -> bool:
        return n.is_impure() and op_of(n) is None

    for n in reversed(graph.nodes):
        if n.op == "call_function" and not n.users and not impure(n):
            graph.erase_node(n)


def is_pure_call(n: fx.Node) -> bool:
    """A call that can be merged with an equal one: no mutation, no randomness."""
    if n.op != "call_function":
        return False
    if n.target is operator.getitem:
        return True
    t = n.target
    if not isinstance(t, torch._ops.OpOverload) or t._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in t.tags and t.namespace in ("aten", "prims", "fusewire")


def merge_equal_calls(graph: fx.Graph) -> None:
    """Common subexpressions become one node: q, k and v each quantize the same activation. Mutating ops end the reach of
    a value, so a read of a tensor that is written in between is never merged."""
    seen: dict[Any, fx.Node] = {}
    for n in graph.nodes:
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable:
            seen.clear()
        if not is_pure_call(n):
            continue
        key = (n.target, _hashable(n.args), _hashable(n.kwargs))
        if (first := seen.setdefault(key, n)) is not n:
            n.replace_all_uses_with(first)
            first.meta["sites"] = sites_of(first, n)
            graph.erase_node(n)


def _hashable(a: Any) -> Any:
    if isinstance(a, (list, tuple)):
        return (type(a).__name__, *map(_hashable, a))
    if isinstance(a, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(a.items()))
    return (type(a), a)
