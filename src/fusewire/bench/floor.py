"""Other programs made of a captured graph: without its collectives, and with the collective library's own."""
from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import torch
from torch import fx

from .. import compat
from ..compiler.plan import Capture, Plan
from ..op import op_of
from ..ops.collectives import all_gather, all_reduce, all_reduce_max, world_size

Rewrite = Callable[[fx.Graph, fx.Node], fx.Node | list[fx.Node]]
"""(graph, a collective's call) -> the node, or the list of nodes, that take its place."""


def floor(found: Capture) -> Plan:
    """The unfused graph with its collectives replaced by the identity: what no plan can beat by hiding them. A gather, which has
    to give more than it gets, repeats its input."""
    def identity(graph: fx.Graph, n: fx.Node) -> fx.Node:
        return n.args[0]

    def repeated(graph: fx.Graph, n: fx.Node) -> list[fx.Node]:
        return [graph.call_function(torch.ops.aten.cat.default, ([x] * world_size(n.args[1]),)) for x in n.args[0]]

    return _rewritten("floor", found, {all_reduce.name: identity, all_reduce_max.name: identity, all_gather.name: repeated})


def library(found: Capture) -> Plan:
    """The unfused graph with the process group's own collectives, whose sums are not in rank order: what a model without Fusewire
    would run."""
    c10d = torch.ops._c10d_functional

    def reduced(graph: fx.Graph, n: fx.Node) -> fx.Node:
        started = graph.call_function(c10d.all_reduce.default, (n.args[0], "sum", n.args[1]))
        return graph.call_function(c10d.wait_tensor.default, (started,))

    def gathered(graph: fx.Graph, n: fx.Node) -> list[fx.Node]:
        started = [graph.call_function(c10d.all_gather_into_tensor.default, (x, world_size(n.args[1]), n.args[1]))
                   for x in n.args[0]]
        return [graph.call_function(c10d.wait_tensor.default, (s,)) for s in started]

    return _rewritten("library", found, {all_reduce.name: reduced, all_gather.name: gathered})


def _rewritten(name: str, found: Capture, rewrites: dict[str, Rewrite]) -> Plan:
    old = found.unfused
    graph = copy.deepcopy(old.gm.graph)
    for n in list(graph.nodes):
        if (o := op_of(n)) is None or o.name not in rewrites:
            continue
        with graph.inserting_before(n):
            new = rewrites[o.name](graph, n)
        if isinstance(new, list):
            for getitem in [u for u in n.users if u.target is operator.getitem]:
                getitem.replace_all_uses_with(new[getitem.args[1]])
                graph.erase_node(getitem)
        else:
            n.replace_all_uses_with(new)
        graph.erase_node(n)
    graph.lint()
    return Plan(name, compat.graph_module(old.gm, graph), [], old.symbol, old.multiple)
