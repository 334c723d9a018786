"""A deep stack of equal layers, of which three are compiled: the one in the middle runs again with the others' tensors."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import compat
from ..compiler.capture import Compiled
from ..compiler.plan import Capture, Plan
from ..config import Config
from ..errors import FusewireError

COPY = torch.ops.aten.copy_.default
KEPT = 3  # layers that are captured: the first, one of all those between, the last
SHALLOW = 4  # layers: in more, FP8 and random weights make so much of a rounding that logits could not be compared


class Part(NamedTuple):
    """Some nodes of a graph as a graph of their own, from the values that they take (inputs of the graph, other parts' nodes) to
    those that others take."""

    gm: fx.GraphModule
    takes: list[fx.Node]
    gives: list[fx.Node]


@dataclass
class Repeating(Compiled):
    """A compiled stack that is `layers` deep, though `model` has but the first, the second and the last of them.

    shallow  run no more than SHALLOW of them
    """

    layers: list[nn.Module] = field(default_factory=list)
    shallow: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = [self.layers[0], self.layers[1], self.layers[-1]] if len(self.layers) > KEPT else []
        found = [(t.data_ptr(), (i, name)) for i, layer in enumerate(kept) for name, t in _tensors(layer).items()]
        seen = Counter(at for at, _ in found)
        self._owners = {at: owner for at, owner in found if seen[at] == 1}  # what layers share is nobody's
        self._tensors = [_tensors(layer) for layer in self.layers[1:-1]]

    def _dispatch(self, found: Capture, index: int, inputs: list) -> Any:
        self._inputs = inputs
        return super()._dispatch(found, index, inputs)

    def _code(self, plan: Plan, size_of: Callable[[list], int]) -> Callable[[list], Any]:
        if len(self.layers) <= KEPT:
            return super()._code(plan, size_of)
        placeholders = [n for n in plan.gm.graph.nodes if n.op == "placeholder"]
        owned = {n: self._owners[t.data_ptr()] for n, t in zip(placeholders, self._inputs, strict=True)
                 if isinstance(t, torch.Tensor) and t.data_ptr() in self._owners}
        regions = cut(plan.gm.graph, {n: i for n, (i, _) in owned.items()})
        parts = [part(plan.gm, region) for region in regions]
        carried = carries(regions[1], regions[2], {n: name for n, (_, name) in owned.items()})
        size = [0]
        plans = [Plan(plan.name, p.gm, [], plan.symbol, plan.multiple) for p in parts]
        first, middle, last = (super(Repeating, self)._code(p, lambda _: size[0]) for p in plans)

        def run(inputs: list) -> Any:
            size[0] = size_of(inputs)
            values = dict(zip(placeholders, inputs, strict=True))
            values |= zip(parts[0].gives, first([values[n] for n in parts[0].takes]), strict=True)
            for tensors in self._tensors[:SHALLOW - 2 if self.shallow else None]:
                given = [tensors[owned[n][1]] if n in owned else values[n] for n in parts[1].takes]
                made = dict(zip(parts[1].gives, middle(given), strict=True))
                values |= made | {before: made[after] for before, after in carried.items()}
            return last([values[n] for n in parts[2].takes])

        return run


def repeating(model: Any, config: Config, token_dims: dict[str, int]) -> Repeating:
    """A stack from `stack.stack`, compiled; the stack itself loses the layers that are not captured, if there are such."""
    layers = list(model.model.layers)
    if len(layers) > KEPT:
        model.model.layers = nn.ModuleList([layers[0], layers[1], layers[-1]])
    return Repeating(model, config, token_dims, layers=layers)


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in (*layer.named_parameters(), *layer.named_buffers()) if t.numel()}


def cut(graph: fx.Graph, owners: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """The nodes before, of and behind the layer in the middle; a layer begins where one of its tensors is read first. What is
    written to a tensor of a layer is written in it.

    owners  placeholder -> the layer whose tensor it is, of 0, 1, 2
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    writes = [n for n in nodes if n.target is COPY and n.args[0] in owners]
    regions: list[list[fx.Node]] = [[], [], []]
    region_of: dict[fx.Node, int] = {}
    at = 0
    for n in nodes:
        if n not in writes:
            at = max([at, *(owners[a] for a in n.all_input_nodes if a in owners)])
            regions[at].append(n)
            region_of[n] = at
    for n in writes:
        regions[region_of[n.args[1]]].append(n)
    [output] = [n for n in graph.nodes if n.op == "output"]
    regions[2].append(output)
    return regions


def part(gm: fx.GraphModule, nodes: list[fx.Node]) -> Part:
    """These nodes as a graph; with the graph's output among them it gives that."""
    graph, inside = fx.Graph(), set(nodes)
    takes = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    copies: dict[fx.Node, fx.Node] = {}
    for n in takes:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta = dict(n.meta)
    for n in nodes:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    gives = [n for n in nodes if any(u not in inside for u in n.users)]
    if nodes[-1].op != "output":
        graph.output(tuple(copies[n] for n in gives))
    return Part(compat.graph_module(gm, graph), takes, gives)


def carries(middle: list[fx.Node], last: list[fx.Node], names: dict[fx.Node, str]) -> dict[fx.Node, fx.Node]:
    """What the layer in the middle takes from the one before it -> what the last one takes in its place, which is the same program.

    names  placeholder -> the name of the tensor in its layer
    """
    found: dict[fx.Node, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    middle = [n for n in middle if n.target is not COPY]

    def agree(a: fx.Node, b: fx.Node) -> bool:
        if a in names:
            return names[a] == names.get(b)
        if a in inside:
            return same[a] is b
        return a is b or (b in inside and found.setdefault(a, b) is b)

    inside = set(middle)
    for n, m in zip(middle, last, strict=False):
        same[n] = m
        mine, theirs = n.all_input_nodes, m.all_input_nodes
        if n.target != m.target or len(mine) != len(theirs) or not all(map(agree, mine, theirs)):
            raise FusewireError(f"the second layer is another program than the last: {n.format_node()} is where the last one has "
                                f"{m.format_node()}; give --layers {KEPT} or fewer")
    return found
