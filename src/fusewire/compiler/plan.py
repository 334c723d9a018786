"""Plans: the same captured model rewritten for a replicated or for a sharded residual, and the choice between them."""
from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import compat
from ..config import GLOO, NVLINK, Config, Link
from ..op import op_of
from ..ops.collectives import all_gather, all_reduce, reduce_scatter, world_size
from ..ops.moe import combine, combine_all
from . import adopt, cost, tokens
from .lower import choice, lower
from .passes import PLANS
from .rewrite import Verdict, arg, merge_equal_calls, outputs, run, val

REDUCTIONS = (all_reduce, reduce_scatter, combine, combine_all)
COLLECTIVES = (*REDUCTIONS, all_gather)
MIN_LOCAL_TOKENS = 2  # a size of 1 is special to torch (strides, broadcasting), so sharded graphs are made for two or more


@dataclass(frozen=True)
class Site:
    """One collective of the model as it was captured; `module` is who called it, "" if that is not known."""

    index: int
    module: str
    what: str


@dataclass
class Plan:
    """One rewritten graph.

    name      "unfused" (foreign spellings adopted, the spec of the others), "replicated" or "sharded" (the residual between layers)
    symbol    the symbol in the fake values' sizes that varies with the tokens, None if every size is a number
    multiple  what it is multiplied by to give the captured one
    refused   why the byte gate took the passes back, "" if it did not
    """

    name: str
    gm: fx.GraphModule
    verdicts: list[Verdict] = field(default_factory=list)
    symbol: Any = None
    multiple: int = 1
    refused: str = ""
    call: Callable[[list], Any] | None = None
    _wire: list[tuple[fx.Node, Any, int]] | None = None

    def wire(self, size: int) -> list[tuple[fx.Node, int, int]]:
        """(node, bytes, messages) of every node that sends, where the captured token symbol is `size`."""
        if self._wire is None:
            known: dict[Any, tuple[Any, int]] = {}
            found = [(n, *cost.wire(n, known)) for n in self.gm.graph.nodes if n.op == "call_function"]
            self._wire = [w for w in found if w[2]]
        at = self.at(size)
        return [(n, *(_wire_of_choice(n, at) or (at(b), m))) for n, b, m in self._wire]

    def at(self, size: int) -> Callable[[Any], int]:
        """How to read a size of this graph's fake values, where the captured token symbol is `size`."""
        return lambda n: cost.at(n, self.symbol, size // self.multiple)

    def calls(self) -> list[fx.Node]:
        """The calls of ops that exchange something."""
        return [n for n in self.gm.graph.nodes if (o := op_of(n)) is not None and "group" in o.params]

    def sent(self, size: int) -> tuple[int, int]:
        """(bytes, messages) that a rank sends in one run."""
        found = self.wire(size)
        return sum(b for _, b, _ in found), sum(m for _, _, m in found)


def _wire_of_choice(n: fx.Node, at: Callable[[Any], int]) -> tuple[int, int] | None:
    """(bytes, messages) of a call whose backend does not send what the unfused program sends."""
    if not any(b.wire for b in op_of(n).backends) or (own := choice(n, at).backend.wire) is None:
        return None
    nbytes, messages = own(*val(n.args))
    return at(nbytes), messages


@dataclass
class Range:
    """The plans for a range of token counts in which the same rules are allowed."""

    first: int
    plans: dict[str, Plan] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # plan name -> why it was not built


@dataclass
class Capture:
    """One captured graph with its plans.

    sites    its collectives before any rewriting
    unfused  the graph with foreign spellings adopted and nothing fused
    ranges   by token count, ascending
    tokens   (token symbol's value) -> tokens of the activations
    size_of  (inputs) -> the token symbol's value; 1 if every size is a number
    """

    sites: list[Site]
    unfused: Plan
    ranges: list[Range]
    tokens: Callable[[int], int]
    size_of: Callable[[list], int]
    timings: dict[str, float]
    new_guards: list[str]
    config: Config
    device: torch.device
    link: Link
    others: dict[str, Plan] = field(default_factory=dict)  # by name, for whoever runs a program of their own on the same inputs
    _chosen: dict[tuple[int, str], Plan] = field(default_factory=dict)

    def plans(self) -> list[Plan]:
        return [self.unfused, *(p for r in self.ranges for p in r.plans.values())]

    def workspace_bytes(self, tokens: int) -> dict[str, int]:
        """Group -> the most of its workspace that a call needs in a run of so many tokens; 0 if none needs any."""
        needs: dict[str, int] = {}
        size, times = max(1, tokens // max(1, self.tokens(1))), 1
        if self.unfused.symbol is None:  # there may be other captures, with more tokens
            size, times = 1, size
        for plan in self.plans():
            for n in plan.calls():
                o, args = op_of(n), val(n.args)
                able = [b.nbytes for b in o.backends if b.nbytes and b.supports(*args) is None]
                needs[o.group(*args)] = max([needs.get(o.group(*args), 0), *(times * plan.at(size)(f(*args)) for f in able)])
        return needs

    def lower(self) -> None:
        """Every call gets its backend, once it is known by what its ops choose and what workspaces there are."""
        for plan in self.plans():
            timed(self.timings, "lower", lower, plan.gm.graph)
            plan.gm.recompile()

    def size_at(self, tokens: int | None) -> int | None:
        """The token symbol's value for so many tokens, None if this graph cannot run them; for None any that it can."""
        if self.unfused.symbol is None:
            return 1 if tokens in (None, self.tokens(1)) else None
        per = self.tokens(1)
        if tokens is None:
            return max([MIN_LOCAL_TOKENS, *(p.multiple * MIN_LOCAL_TOKENS for p in self.ranges[-1].plans.values())])
        return tokens // per if tokens % per == 0 and tokens // per >= MIN_LOCAL_TOKENS else None

    def range_of(self, size: int) -> Range:
        tokens = self.tokens(size)
        return [r for r in self.ranges if r.first <= tokens or r is self.ranges[0]][-1]

    def choose(self, size: int, wanted: str) -> Plan:
        """The plan for a run, where `wanted` is one of config.PLANS or of `others`. It depends on these alone, so every rank
        chooses the same."""
        if (plan := self._chosen.get((size, wanted))) is None:
            plan = self._chosen[size, wanted] = self._choose(size, wanted)
        return plan

    def why_not_sharded(self, size: int) -> str | None:
        """Why the sharded plan cannot run at this size, None if it can."""
        r = self.range_of(size)
        if (sharded := r.plans.get("sharded")) is None:
            return r.missing["sharded"]
        if sharded.symbol is not None and (size % sharded.multiple or size // sharded.multiple < MIN_LOCAL_TOKENS):
            return (f"{self.tokens(size)} tokens: the sharded plan takes multiples of {self.tokens(sharded.multiple)} "
                    f"from {self.tokens(sharded.multiple * MIN_LOCAL_TOKENS)} on")
        return None

    def _choose(self, size: int, wanted: str) -> Plan:
        if wanted in self.others:
            return self.others[wanted]
        plans = self.range_of(size).plans
        if wanted == "unfused":
            return self.unfused
        if wanted == "replicated" or self.why_not_sharded(size):
            return plans["replicated"]
        if wanted == "sharded":
            return plans["sharded"]
        return min(plans.values(), key=lambda p: cost.seconds(*p.sent(size), self.link))


def capture(gm: fx.GraphModule, inputs: list, config: Config, device: torch.device | None = None) -> Capture:
    """Adopt an aten graph and build its plans. `inputs` are the fake values of its placeholders; `device` is where a graph that
    was captured on the meta device would run."""
    timings: dict[str, float] = {}
    shapes, base = timed(timings, "carry", carry, gm, {}, device)
    guards = len(shapes.guards())
    verdicts = run(base.graph, adopt.rules, timings)
    sites = number_sites(base.graph)
    verdicts += run(base.graph, tokens.rules, timings)
    timed(timings, "merge_equal_calls", merge_equal_calls, base.graph)
    verdicts += run(base.graph, [tokens.cancel_views], timings)

    reduced = [n for n in base.graph.nodes if op_of(n) in REDUCTIONS]
    sending = reduced or [n for n in base.graph.nodes if op_of(n) is all_gather]  # its sizes are needed to count bytes
    sent = [val(n.args[0] if isinstance(n.args[0], fx.Node) else n.args[0][0]) for n in sending]
    counts = {compat.expression(math.prod(v.shape[:-1])) for v in sent if v.dim() > 1} or {0}
    count = max(counts, key=str)
    symbols = {s for c in counts for s in getattr(c, "free_symbols", ())}
    symbol = min(symbols, key=str, default=None)
    readers = [reader(inputs, old) for old, new in shapes.symbols.items() if new in symbols]
    w = math.lcm(*(world_size(arg(n, "group")) for n in reduced))
    missing = ""
    if not reduced:
        missing = "the model has no reduction to split"
    elif len(symbols) > 1:
        missing = f"the token count depends on {len(symbols)} sizes that vary; let one dimension be dynamic, not several"
    elif symbol is None and (odd := [c for c in counts if c % w]):
        missing = f"{odd[0]} tokens do not divide over {w} ranks"
    multiple = 1 if symbol is None else w // math.gcd(w, *(cost.at(c, symbol, 1) for c in counts))

    where = device or device_of(inputs)
    link = config.link or (GLOO if where.type == "cpu" and device is None else NVLINK)
    found = Capture(sites, Plan("unfused", base, verdicts, symbol), [], lambda size: cost.at(count, symbol, size),
                    lambda args: math.prod(read(args) for read in readers),
                    timings, [], config, where, link)
    for first, off in ranges(config, None if symbol is not None else int(count)):
        r = Range(first)
        found.ranges.append(r)
        copied = compat.graph_module(base, copy.deepcopy(base.graph))
        r.plans["replicated"] = build(Plan("replicated", copied, [], symbol), found, off)
        if missing or "split_all_reduce" in off:
            r.missing["sharded"] = missing or f"the rule split_all_reduce is switched off from {first} tokens on"
            continue
        own, copied = timed(timings, "carry", carry, base, {symbol: multiple}, None)
        mine = len(own.guards())
        r.plans["sharded"] = build(Plan("sharded", copied, [], own.symbols.get(symbol), multiple), found, off)
        found.new_guards += own.guards()[mine:]
    found.new_guards += shapes.guards()[guards:]
    base.recompile()
    return found


def timed(timings: dict[str, float], name: str, f: Callable, *args: Any) -> Any:
    start = time.perf_counter()
    result = f(*args)
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
    return result


def carry(gm: fx.GraphModule, multiples: dict, device: torch.device | None) -> tuple[compat.Shapes, fx.GraphModule]:
    """A copy of the graph whose fake values are carried over into shapes of their own, see `compat.Shapes`."""
    shapes = compat.Shapes(multiples, device)
    new = compat.graph_module(gm, copy.deepcopy(gm.graph))
    for n in new.graph.nodes:
        value = getattr(new, n.target) if n.op == "get_attr" else n.meta.get("val")
        n.meta["val"] = shapes.carry(value) if isinstance(value, torch.Tensor) else compat.tree_map(shapes.carry, value)
    return shapes, new


def number_sites(graph: fx.Graph) -> list[Site]:
    """Number the collectives in order and write the numbers into the graph."""
    found: list[Site] = []
    for n in graph.nodes:
        if (o := op_of(n)) in COLLECTIVES:
            found.append(Site(len(found), module_of(n), o.name))
            for m in (n, *outputs(n).values()):
                m.meta["sites"] = (found[-1].index,)
    return found


def module_of(n: fx.Node) -> str:
    """The qualified name of the innermost module whose forward made a node."""
    stack = n.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return compat.module_name(names[-1]) if names else ""


def device_of(inputs: list) -> torch.device:
    """Where a graph with such inputs runs: a CUDA device if one of them lies there."""
    found = [v.device for v in inputs if isinstance(v, torch.Tensor)] or [torch.device("cpu")]
    return next((d for d in found if d.type == "cuda"), found[0])


def reader(inputs: list, symbol: Any) -> Callable[[list], int]:
    """How to read a symbol's value off the real inputs."""
    for i, v in enumerate(inputs):
        if isinstance(v, torch.SymInt) and v.node.expr == symbol:
            return lambda args, i=i: args[i]
        if isinstance(v, torch.Tensor):
            for d, s in enumerate(v.shape):
                if isinstance(s, torch.SymInt) and s.node.expr == symbol:
                    return lambda args, i=i, d=d: args[i].shape[d]
    raise AssertionError(f"no input has the size {symbol}")


def ranges(config: Config, tokens: int | None) -> list[tuple[int, frozenset[str]]]:
    """(first token count, rules that are off from there on), ascending; just one if the token count is known."""
    edges = {0}
    for b in config.rules.values():
        edges |= {b.minimum} | ({b.maximum + 1} if b.maximum is not None else set())
    found = [(e, frozenset(name for name in config.rules if not config.allows(name, e))) for e in sorted(edges)]
    return found if tokens is None else [[r for r in found if r[0] <= tokens][-1]]


def build(plan: Plan, found: Capture, off: frozenset[str]) -> Plan:
    """Run the plan's passes; keep them only if the wire bytes do not grow."""
    # of few tokens and of many: bytes grow with them by a straight line, which need not begin at 0
    sizes = (1,) if plan.symbol is None else (2 * plan.multiple, 4096 * plan.multiple)
    allowed = [found.unfused.sent(size)[0] for size in sizes]
    for rules in PLANS[plan.name]:
        plan.verdicts += run(plan.gm.graph, [r for r in rules if r.name not in off], found.timings)
        timed(found.timings, "merge_equal_calls", merge_equal_calls, plan.gm.graph)
    sent = [plan.sent(size)[0] for size in sizes]
    if grown := [(now, most, found.tokens(n)) for n, now, most in zip(sizes, sent, allowed, strict=True) if now > most]:
        plan.refused = "its passes would send {} bytes instead of {} for {} tokens".format(*grown[-1])
        plan.gm = compat.graph_module(found.unfused.gm, copy.deepcopy(found.unfused.gm.graph))
        plan.symbol, plan.multiple, plan._wire, plan.verdicts = found.unfused.symbol, 1, None, []
    plan.gm.recompile()
    return plan


__all__ = ["Capture", "Plan", "Range", "Site", "capture"]
