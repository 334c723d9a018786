"""Bugs are planted into the real code, one at a time, and a check that the other tests rely on must turn red.

A mutant that survives is a hole in the tests. A mutant whose text is no longer in the code fails too, so the list stays true.
"""
from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import test_random_graphs
import torch
from test_random_graphs import sent_by
from torch import Tensor, fx

from fusewire import group
from fusewire import op as op_module
from fusewire.compiler import adopt, capture, cost, lower, plan, rewrite, tokens
from fusewire.compiler.passes import PLANS, all_reduce_norm, async_tp, boundary, sequence_parallel
from fusewire.compiler.rewrite import Rule
from fusewire.config import Bounds, Config
from fusewire.group import Group
from fusewire.op import OPS, Backend, Op, op_of
from fusewire.ops import collectives, dense, fused
from fusewire.ops.collectives import all_gather, reduce_scatter
from fusewire.ops.dense import amax
from fusewire.ops.norm import rms_norm

aten = torch.ops.aten
SEEDS = range(250)  # of the random programs, all of which are green in test_random_graphs


# --- planting


@contextmanager
def planted(module: ModuleType, name: str, *changes: tuple[str, str]) -> Iterator[None]:
    """A function, method, op or rule of `module`, for a while with its source text changed."""
    owner, _, attribute = name.rpartition(".")
    owner = getattr(module, owner) if owner else module
    old = getattr(owner, attribute)
    function = old.reference if isinstance(old, Op) else old.apply if isinstance(old, Rule) else old
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index(f"def {attribute}"):]
    for before, after in changes:
        assert before in source, f"{name} has no {before!r} any more: plant another bug"
        source = source.replace(before, after)
    scope: dict = {}
    exec(compile(f"from __future__ import annotations\n{source}", f"mutant of {name}", "exec"), vars(module), scope)
    new = scope[attribute]
    if isinstance(old, Op):
        with op_runs(old, new):
            yield
    elif isinstance(old, Rule):
        with rule_is(old, old._replace(apply=new)):
            yield
    else:
        holders = [m for m in (module, *MODULES) if getattr(m, attribute, None) is old] if owner is module else [owner]
        for holder in holders:  # whoever imported it by name has it too
            setattr(holder, attribute, new)
        try:
            yield
        finally:
            for holder in holders:
                setattr(holder, attribute, old)


@contextmanager
def op_runs(o: Op, run: Callable) -> Iterator[None]:
    reference, backend = o.reference, o._reference
    o.reference, o._reference = run, replace(backend, run=run)
    o._remembered.clear()  # what runs a call of a shape that was seen
    try:
        yield
    finally:
        o.reference, o._reference = reference, backend
        o._remembered.clear()


@contextmanager
def rule_is(old: Rule, new: Rule) -> Iterator[None]:
    lists = [rules for rules in (adopt.rules, tokens.rules, *(r for passes in PLANS.values() for r in passes)) if old in rules]
    assert lists
    lists = list({id(rules): rules for rules in lists}.values())
    for rules in lists:
        rules[rules.index(old)] = new
    try:
        yield
    finally:
        for rules in lists:
            rules[rules.index(new)] = old


MODULES = (adopt, capture, cost, lower, plan, rewrite, tokens, all_reduce_norm, async_tp, boundary, sequence_parallel, collectives,
           dense, fused, test_random_graphs)


BYTE_GATE = ("if not compat.known_true(freed >= nbytes(here)):", "if False:")


# --- checks: each returns what is wrong, "" if nothing


def programs(seeds: range = SEEDS) -> str:
    """The first crafted or random program that goes wrong on some rank, as test_random_graphs checks them."""
    graphs = test_random_graphs.graphs
    for p in itertools.chain(graphs.CRAFTED, seeds):
        try:
            wrong = test_random_graphs.wrong_in(graphs.crafted(p) if isinstance(p, str) else graphs.program(p), Counter())
        except Exception as e:
            wrong = [f"{type(e).__name__}: {e}"]
        if wrong:
            return f"program {p}: {wrong[0]}"
    return ""


def reads_apart() -> str:
    """Two equal reads with a write in between stay two."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.mul.Tensor, (x, 2.0))
    graph.call_function(aten.add_.Tensor, (x, 1.0))
    second = graph.call_function(aten.mul.Tensor, (x, 2.0))
    graph.output((first, second))
    rewrite.merge_equal_calls(graph)
    a, b = fx.GraphModule({}, graph)(torch.ones(2))
    return "" if a.tolist() == [2.0, 2.0] and b.tolist() == [4.0, 4.0] else f"merged: {a} and {b}"


def late_operand_stays() -> str:
    """A value that is read after a write is not moved in front of it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.mul.Tensor, (x, 3.0))
    graph.call_function(aten.add_.Tensor, (x, 1.0))
    late = graph.call_function(aten.mul.Tensor, (x, 2.0))
    graph.output((first, late))
    moved = rewrite.hoist([late], first) is None
    a, b = fx.GraphModule({}, graph)(torch.ones(2))
    return "" if (a.tolist(), b.tolist()) == ([3.0, 3.0], [4.0, 4.0]) else f"moved {moved}: {a} and {b}"


def tags_apart() -> str:
    """Compiled code is cached apart for each rank, world, plan and choice of rules."""
    def tag(rank: int = 0, world: int = 2, name: str = "sharded", config: Config | None = None) -> str:
        group._register(Group("tagged", world, lambda: rank, torch.clone, torch.clone))
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(collectives.all_reduce.target, (x, "tagged")))
        return capture.cache_tag(plan.Plan(name, fx.GraphModule({}, graph)), config or Config())

    others = {"rank": tag(rank=1), "world": tag(world=4), "plan": tag(name="replicated"),
              "rules": tag(config=Config(rules={"sink_all_gather": Bounds(64)}))}
    same = [what for what, other in others.items() if other == tag()]
    group._made.pop("tagged")
    return "" if not same and tag() == tag() else f"the cache key does not depend on {same}"


def supported_backend() -> str:
    """Lowering names a backend that supports the arguments, or the reference, and says who refused."""
    def run(x: Tensor) -> Tensor:
        raise AssertionError("an unsupported backend ran")

    amax.backends.insert(0, Backend("never", run, lambda x: "no such device", amax.target))
    try:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.ones(2)
        n = graph.call_function(amax.target, (x,))
        graph.output(n)
        lower.lower(graph)
        said = n.meta["choice"].backend.name, n.meta["choice"].refused, fx.GraphModule({}, graph)(torch.ones(2)).item()
    except AssertionError as e:
        return str(e)
    finally:
        amax.backends.pop(0)
    return "" if said == ("reference", ["never: no such device"], 1.0) else str(said)


def two_readers() -> tuple[fx.GraphModule, list]:
    """A norm that a quantized matmul and a 16-bit one read: its rows have to travel, and need not travel twice."""
    graph, g = fx.Graph(), test_random_graphs.graphs.groups(2)[0].name
    shapes = {"x": (4, 64), "weight": (64,), "w": (32, 64), "scale": (32, 1), "router": (8, 64)}
    inputs = {name: graph.placeholder(name) for name in shapes}
    for name, n in inputs.items():
        dtype = {"w": torch.float8_e4m3fn, "scale": torch.float32}.get(name, torch.bfloat16)
        n.meta["val"] = torch.empty(shapes[name], dtype=dtype, device="meta")
    with graph.inserting_after(n):
        end = graph.output(None)
    with graph.inserting_before(end):
        reduced = rewrite.call(graph, collectives.all_reduce, inputs["x"], g)
        normed = rewrite.call(graph, rms_norm, reduced, inputs["weight"], 1e-5, 0.0, False)
        parts = rewrite.call(graph, dense.quantize, normed, [], "fp8_token")
        y = rewrite.call(graph, dense.matmul, parts, [], [inputs["w"], inputs["scale"]], None, "fp8_token", torch.bfloat16)
        logits = rewrite.call(graph, dense.matmul, [normed], [], [inputs["router"]], None, "bf16", torch.bfloat16)
    end.args = ((y, logits),)
    return fx.GraphModule({}, graph), [n.meta["val"] for n in inputs.values()]


def rows_travel_once() -> str:
    """The rules of the sharded plan do not add bytes where the rows are needed anyway."""
    graph = two_readers()[0].graph
    before = sent_by(graph)
    for rules in PLANS["sharded"]:
        rewrite.run(graph, rules)
    return "" if sent_by(graph) <= before else f"{sent_by(graph)} bytes instead of {before}"


def plans_add_no_bytes() -> str:
    """A plan whose rules added bytes is taken back, and says so."""
    gm, fakes = two_readers()
    for n in gm.graph.nodes:
        if "val" in n.meta:
            n.meta["val"] = torch.utils._pytree.tree_map(lambda t: torch.empty_like(t, device="cpu"), n.meta["val"])
    with planted(sequence_parallel, "sink_all_gather", BYTE_GATE):
        found = plan.capture(gm, [torch.empty_like(t, device="cpu") for t in fakes], Config())
    sharded, most = found.ranges[0].plans["sharded"], found.unfused.sent(1)[0]
    said = re.search(r" bytes instead of \d+ for \d+ tokens$", sharded.refused)
    return "" if sharded.sent(1)[0] <= most and said else f"{sharded.sent(1)[0]} bytes instead of {most}; {sharded.refused!r}"


def a_norm_is_made_once() -> str:
    """Of two quantizes of one norm the first becomes one op with it, which keeps the norm for the second."""
    graph = test_random_graphs.graphs.crafted("a norm is quantized twice").gm.graph
    for rules in PLANS["sharded"]:
        rewrite.run(graph, rules)
    made = [o.name for n in graph.nodes if (o := op_of(n)) in (rms_norm, fused.norm_quant_all_gather_matmul)]
    return "" if made == ["norm_quant_all_gather_matmul"] else f"the norm is made by {made}"


CHECKS = (programs, rows_travel_once, a_norm_is_made_once, plans_add_no_bytes, reads_apart, late_operand_stays, tags_apart,
          supported_backend)


@pytest.mark.parametrize("check", CHECKS[1:], ids=lambda c: c.__name__)
def test_checks_are_green(check):
    assert check() == ""


def test_programs_are_green():
    """Negative control: the random programs are green where nothing is planted (all of them: test_random_graphs)."""
    assert programs(range(40)) == ""


# --- the bugs

ANY_ROWS = (sequence_parallel, "sink_all_gather", ("if not swizzled and not all(", "if False and not all("))
BUGS: dict[str, tuple | list[tuple]] = {
    # ops
    "shard takes the first rank's rows": (collectives, "shard", ("[resolve(group).rank()]", "[0]")),
    "all_gather in the wrong rank order": (
        collectives, "_all_gather_flat", (".view(g.world_size, -1)\n", ".view(g.world_size, -1).flip(0)\n")),
    "all_gather returns what this rank sent": (
        collectives, "_all_gather_flat", ("g.all_gather(", "(lambda mine: mine.repeat(g.world_size))(")),
    "parts in one message cut at the wrong offsets": (
        collectives, "_all_gather_flat", ("wire.split(sizes, 1)", "wire.roll(1, 1).split(sizes, 1)")),
    "all_reduce_max takes the first rank's value": (collectives, "all_reduce_max", (".amax(0)", "[0].clone()")),
    "params of another rank": (
        collectives, "all_reduce_max", (".amax(0)", "[(resolve(group).rank() + 1) % world_size(group)].clone()")),
    "sums in 16 bits": (collectives, "_sum_of_chunks", ("torch.promote_types(x.dtype, torch.float32)", "x.dtype")),
    "sums in the opposite order": (collectives, "_sum_of_chunks", (".view(g.world_size, -1)", ".view(g.world_size, -1).flip(0)")),
    "a sum starts with this rank": (
        collectives, "_sum_of_chunks", (".view(g.world_size, -1)", ".view(g.world_size, -1).roll(-g.rank(), 0)")),
    "a rank is left out of the sum": (collectives, "_sum_of_chunks", ("chunks[1:]", "chunks[2:]")),
    "gather and matmul: one weight for all": (dense, "split_weights", ("ws[i:i + n]", "ws[:n]")),
    "gather and matmul: bias lost": (dense, "matmuls", ("b, fmt, dtype) for", "None, fmt, dtype) for")),
    "matmul and scatter: bias lost": (fused, "matmul_reduce_scatter", ("w, bias, fmt", "w, None, fmt")),
    "swizzled scales not made after the gather": (dense, "matmuls_of_linear", ('if f.layout != "linear"', "if False")),
    "eps is a constant": (fused, "all_reduce_norm_quant", ("weight, eps, offset", "weight, 1e-5, offset")),
    "offset dropped": (fused, "all_reduce_norm_quant", ("eps, offset, cast_first)\n", "eps, 0.0, cast_first)\n")),
    "cast_first ignored": (fused, "all_reduce_norm_quant", ("offset, cast_first)\n", "offset, False)\n")),
    "the norm in place of the sum": (fused, "all_reduce_norm_quant", ("[total, *([y]", "[y, *([total]")),
    "boundary: the residual lost": (fused, "norm_quant_all_gather_matmul", ("add_rms_norm(x, residual,", "add_rms_norm(x, x,")),
    "boundary: the norm in place of the sum": (fused, "norm_quant_all_gather_matmul", ("total = [new]", "total = [y.clone()]")),
    "boundary: a kept norm left out": (fused, "norm_quant_all_gather_matmul", ("[y] if keep_norm else []", "[]")),
    # rules
    "outputs of add_rms_norm swapped": (
        sequence_parallel, "sink_all_gather", ("replace(old, full[i])", "replace(old, full[len(full) - 1 - i])")),
    "local amax for the global one": (
        sequence_parallel, "sink_below_amax",
        ("call(n.graph, all_reduce_max, call(n.graph, amax, x), group", "call(n.graph, amax, x")),
    "the rows are gathered too": (
        sequence_parallel, "sink_all_gather", BYTE_GATE),
    "residual not cut": (sequence_parallel, "sink_all_gather", ("call(graph, shard, a, group) for a", "a for a")),
    "an operand of one rank is cut": (
        sequence_parallel, "sink_all_gather", ("not same_on_all_ranks(a, group)", "False")),
    "swizzled shards gathered as they are": (
        sequence_parallel, "sink_all_gather", ("args = (*args[:-1], travels)", "pass"),
        ('full = call(graph, relayout, full, travels, arg(n, "fmt"), val(cut[0]).shape[1], sites=sites)', "pass")),
    "tokens that do not divide are split": (
        sequence_parallel, "split_all_reduce", ("if not compat.known_true(tokens % w == 0)", "if False")),
    "two groups taken for one": (
        sequence_parallel, "sink_all_gather", ("if len(groups) > 1:", "if False:"), ("[group] = groups", "group = min(groups)")),
    "replicated over any group will do": (tokens, "same_on_all_ranks", ("if m.args[-1] != group", "if False")),
    "a transpose or flip of the tokens is token-local": (
        tokens, "token_args",
        ('if is_aten(n, "slice")', 'if is_aten(n, "flip", "t"):\n        return [n.args[0]]\n    if is_aten(n, "slice")')),
    # two defences each: what is token-local, and that its rows are as many
    "the last token is token-local": [(tokens, "token_args", (".dim() != 0:", ".dim() >= 0:")), ANY_ROWS],
    "a view that changes the rows is token-local": [
        (tokens, "token_args", ("compat.known_true(val(n.args[0]).shape[0] == out.shape[0])", "True")), ANY_ROWS],
    "a sum over tokens is token-local": [
        (tokens, "token_args", ("_reduces_other_dims(n, 1)", "_reduces_other_dims(n, 0)")), ANY_ROWS],
    "positions flattened like a bias": (tokens, "flatten_tokens", ("elif val(a).dim() > 1:", "elif False:")),
    "keep_norm off by one": (all_reduce_norm, "fuse_all_reduce_norm_quant", ("made[i + keep_norm]", "made[i + 1]")),
    "the sum added to itself": (all_reduce_norm, "fuse_all_reduce_norm_quant", ("residual = b if a is ar else a", "residual = a")),
    "results of two matmuls swapped": (async_tp, "fuse_all_gather_matmul", ("zip(readers, ys,", "zip(readers, reversed(ys),")),
    "matmuls of two dtypes in one": (async_tp, "fuse_all_gather_matmul", ("if len(kinds) > 1", "if False")),
    "a norm that others read is made again for them": (
        boundary, "fuse_norm_quant_all_gather_matmul", ("keep_norm = len(normed.users) > 1", "keep_norm = False")),
    "a sum taken for a norm": (boundary, "fuse_norm_quant_all_gather_matmul", ("and normed.args[1] != 0", "and False")),
    "the residual of a boundary is its norm's": (
        boundary, "fuse_norm_quant_all_gather_matmul", ("outputs(norm).get(1)", "outputs(norm).get(0)")),
    "operands are not moved up": (rewrite, "hoist", ("before.prepend(m)", "pass")),
    "an operand moved above what it is made of": (rewrite, "hoist", (" or before in chain", "")),
    "casts to two dtypes merged": (rewrite, "merge_equal_calls", ("_hashable(n.kwargs)", "()")),
    "merged across a write": (rewrite, "merge_equal_calls", ("seen.clear()", "pass")),
    "moved across a write": (rewrite, "hoist", (" or _mutates_between(before, n)", "")),
    # what is said, and what is chosen
    "a fused op costs nothing": (op_module, "Meter.__torch_dispatch__", ("self.bytes +=", "self.bytes += 0 *")),
    "a plan that adds bytes is kept": (plan, "build", ("> most]:", "> most and False]:")),
    "odd sizes run sharded": (plan, "Capture.why_not_sharded", ("size % sharded.multiple or", "False and")),
    "cache key without rank": (capture, "cache_tag", ("(g := resolve(name)).rank(), g.world_size", "resolve(name).world_size")),
    "cache key without world": (capture, "cache_tag", (".rank(), g.world_size)", ".rank())")),
    "cache key without plan": (capture, "cache_tag", (" {plan.name}", "")),
    "cache key without rules": (capture, "cache_tag", (" {sorted(config.rules.items())}", "")),
    "an unsupported backend is chosen": (op_module, "Op.candidates", ("if why is None:", "if True:")),
}
SEEN_BY = {
    "the rows are gathered too": rows_travel_once, "a norm that others read is made again for them": a_norm_is_made_once,
    "a plan that adds bytes is kept": plans_add_no_bytes,
    "merged across a write": reads_apart, "moved across a write": late_operand_stays,
    "an unsupported backend is chosen": supported_backend, **{name: tags_apart for name in BUGS if name.startswith("cache key")}}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug):
    check = SEEN_BY.get(bug, programs)
    with ExitStack() as stack:
        for module, name, *changes in BUGS[bug] if isinstance(BUGS[bug], list) else [BUGS[bug]]:
            stack.enter_context(planted(module, name, *changes))
        wrong = check()
    assert wrong, f"{check.__name__} stays green"
    print(wrong)


@pytest.mark.parametrize(("o", "share"), [(all_gather, 2), (reduce_scatter, 2), (OPS["all_reduce"], 2), (all_gather, 0)],
                         ids=lambda v: str(getattr(v, "name", v)))
def test_bytes_that_are_not_sent_are_seen(o, share, monkeypatch):
    """What `wire` says is compared with what really went through the group."""
    real = o.wire
    monkeypatch.setattr(o, "wire", lambda *args: real(*args) // share if share else 0)
    assert "said" in programs()


def test_a_mutant_that_does_not_apply_is_an_error():
    with pytest.raises(AssertionError, match="plant another bug"), planted(collectives, "shard", ("no such text", "")):
        pass


def test_nothing_stays_planted():
    before = collectives._sum_of_chunks, rewrite.hoist, async_tp.hoist, list(sequence_parallel.rules), collectives.shard._reference
    for bug in ("sums in 16 bits", "operands are not moved up", "residual not cut", "shard takes the first rank's rows"):
        with planted(*BUGS[bug]):
            assert before != (collectives._sum_of_chunks, rewrite.hoist, async_tp.hoist, list(sequence_parallel.rules),
                              collectives.shard._reference)
    assert before == (collectives._sum_of_chunks, rewrite.hoist, async_tp.hoist, list(sequence_parallel.rules),
                      collectives.shard._reference)
