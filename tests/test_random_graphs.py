"""Random tensor-parallel programs, on every rank: each plan gives the bits of the unfused program, and that one is accurate.

A seed that fails can be run alone: `python tests/test_random_graphs.py SEED`.
"""
from __future__ import annotations

import copy
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import graphs
import pytest
import torch
from torch import Tensor, fx

from fusewire import compat, group
from fusewire.compiler import adopt, plan, tokens
from fusewire.compiler.passes import PLANS, RULES
from fusewire.compiler.rewrite import Rule, merge_equal_calls, run
from fusewire.config import Config

ADOPTED = (adopt.adopt_functional_collective, adopt.adopt_matmul, adopt.adopt_rms_norm, adopt.adopt_add_rms_norm)
FIRES = sorted({*RULES, *(r.name for r in (*ADOPTED, *tokens.rules))})  # other spellings have tests of their own


# --- running one program


@dataclass
class Variant:
    """One way to run a program: what a rank calls with its inputs, and the bytes it says it sends."""

    name: str
    run: object
    wire: int


def counted(rule: Rule, fires: Counter) -> Rule:
    """The rule, counting how often it changes the graph."""

    def apply(n: fx.Node):
        before = len(n.graph.nodes), n.args
        verdict = rule.apply(n)
        changed = not n.users or (len(n.graph.nodes), n.args) != before
        if (verdict.kind == "fused") if verdict else changed:
            fires[rule.name] += 1
        return verdict

    return rule._replace(apply=apply)


def rewritten(p: graphs.Program, fires: Counter) -> list[Variant]:
    """Unfused and both plans by the rules themselves, on shapes alone: quicker than `plan.capture`, which adds fake tensors."""

    def apply(graph: fx.Graph, rules) -> None:
        run(graph, [counted(r, fires) for r in rules])

    base = copy.deepcopy(p.gm.graph)
    apply(base, adopt.rules)
    plan.number_sites(base)
    apply(base, tokens.rules)
    merge_equal_calls(base)
    apply(base, [tokens.cancel_views])
    made = {"unfused": base}
    for name, passes in PLANS.items():
        made[name] = copy.deepcopy(base)
        for rules in passes:
            apply(made[name], rules)
            merge_equal_calls(made[name])
    return [Variant(name, lambda inputs, g=g: graphs.execute(g, inputs), sent_by(g)) for name, g in made.items()]


def sent_by(graph: fx.Graph) -> int:
    """The bytes that a graph of fixed shapes says it sends."""
    return plan.Plan("", SimpleNamespace(graph=graph)).sent(1)[0]


def captured(p: graphs.Program, found: plan.Capture, size: int, fires: Counter) -> list[Variant]:
    """Every plan of a capture that can run at this size."""
    plans = {"unfused": found.unfused, **found.range_of(size).plans}
    if found.why_not_sharded(size):
        plans.pop("sharded", None)
    for made in plans.values():
        fires.update(v.rule for v in made.verdicts if v.kind == "fused")
    return [Variant(name, lambda inputs, gm=q.gm: gm(*inputs), q.sent(size)[0]) for name, q in plans.items()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    different = a.contiguous().view(bits) != b.contiguous().view(bits)
    return not (different & ~(a.isnan() & b.isnan())).any()


def differences(p: graphs.Program, size: int, variants: list[Variant]) -> list[str]:
    """Run every variant on every rank; a sentence for each output that has not the bits of the program as it was written."""
    inputs = [p.inputs(rank, size) for rank in range(p.world)]
    expected = graphs.lockstep(p.gm.graph, inputs, lambda n, args, kwargs: (
        args[0] if n.target is graphs.c10d.wait_tensor.default else n.target(*args, **kwargs)))
    before = copy.deepcopy(inputs[0]) if p.seed % 50 == 0 else None

    def program(rank: int) -> list:
        results = []
        for v in variants:
            graphs.sent[rank] = 0
            results.append((v.run(inputs[rank]), graphs.sent[rank]))
        return results

    found, ran = [], group.simulate(p.group, program)
    if graphs.STRIDED_NORM in p.notes:
        expected = [results[0][0] for results in ran]  # the unfused plan, whose norm is ours
    for rank, results in enumerate(ran):
        for v, (outputs, sent) in zip(variants, results, strict=True):
            wrong = [i for i, (y, e) in enumerate(zip(outputs, expected[rank], strict=True)) if not same_bits(y, e)]
            found += [f"{v.name}: rank {rank} of {p.world}, size {size}: output {i} differs" for i in wrong]
            if sent != v.wire:
                found.append(f"{v.name}: rank {rank} of {p.world}, size {size}: sent {sent} bytes, said {v.wire}")
    if p.full:  # the byte gate of a plan looks at all its passes at the end
        most = next(v.wire for v in variants if v.name == "unfused")
        found += [f"{v.name}: size {size}: {v.wire} bytes instead of {most}" for v in variants if v.wire > most]
    if before and not all(same_bits(a, b) for a, b in zip(before, inputs[0], strict=True) if isinstance(a, Tensor)):
        found.append("an input was written to")
    if p.exact:
        found += inaccuracies(p, inputs, expected)
    return found


def inaccuracies(p: graphs.Program, inputs: list[list], got: list[list]) -> list[str]:
    """Where an unquantized program is further from float64 than rounding allows.

    The yardstick is the same program in float64 with only each node's result rounded to its dtype: that much error no
    program with these dtypes avoids. Ours may have 1.5 times that and one unit roundoff, in the 2-norm over an output. It
    also rounds inside its float32 sums, which is nothing beside a 16-bit result; a float32 result has the error of about
    sqrt(k) such roundings for a sum of k <= 96 terms instead of one, so there 1.5 becomes 10.
    """
    def widen(xs: list) -> list:
        return [x.double() if isinstance(x, Tensor) else x for x in xs]

    wide = [widen(xs) for xs in inputs]
    exact = graphs.lockstep(p.gm.graph, wide, graphs.float64, torch.float64)
    rounded = graphs.lockstep(p.gm.graph, wide, graphs.float64_rounded, torch.float64)
    found = []
    for rank in range(p.world):
        for i, (y, r, e) in enumerate(zip(got[rank], rounded[rank], exact[rank], strict=True)):
            factor = 10 if y.dtype == torch.float32 else 1.5
            error, allowed = (y.double() - e).norm(), factor * (r - e).norm() + torch.finfo(y.dtype).eps / 2 * e.norm()
            if not error <= allowed:
                found.append(f"unfused: rank {rank} of {p.world}: output {i} is {error:.3g} from float64, {allowed:.3g} allowed")
    return found


def check(seed: int, fires: Counter | None = None) -> list[str]:
    """What is wrong with program number `seed`."""
    return wrong_in(graphs.program(seed), Counter() if fires is None else fires)


def wrong_in(p: graphs.Program, fires: Counter) -> list[str]:
    if p.full:
        found = plan.capture(p.gm, p.fakes, Config())
        assert not found.new_guards, found.new_guards
        wrong = [d for size in p.sizes for d in differences(p, size, captured(p, found, size, fires))]
    else:
        wrong = differences(p, p.sizes[0], rewritten(p, fires))
    return wrong


# --- the tests


@pytest.mark.parametrize("name", graphs.CRAFTED)
def test_a_crafted_program(name):
    fires: Counter = Counter()
    assert wrong_in(graphs.crafted(name), fires) == []
    assert fires["split_all_reduce"] >= 1


def test_ranks_that_are_threads_share_a_graph():
    """Its Python code is made by the first call, and here every rank's is the first."""
    ranks, often = group.simulated_group(8), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10):
            graph = fx.Graph()
            y = graph.placeholder("x")
            for i in range(200):  # named as the code would not name them
                y = graph.call_function(torch.add, (y, i), name=f"add_{7 * i % 200}")
            graph.output(y)
            shared = compat.graph_module(torch.nn.Module(), graph)
            found = group.simulate(ranks, lambda rank, shared=shared: shared(torch.tensor(0)).item())
            assert found == [sum(range(200))] * 8
    finally:
        sys.setswitchinterval(often)
        group.close(ranks)


BATCH = 50


def batch(seeds: range) -> tuple[Counter, list[str]]:
    """(how often each rule fired, the programs that went wrong); in a process of its own."""
    torch.set_num_threads(1)  # of the other threads there are none after a fork
    fires: Counter = Counter()
    failures = []
    for seed in seeds:
        try:
            wrong = check(seed, fires)
        except Exception as e:
            wrong = [f"{type(e).__name__}: {e}"]
        if wrong:
            failures.append(f"python tests/test_random_graphs.py {seed}  # {wrong[0][:200]}")
    return fires, failures


def sweep(seeds: range, least: int) -> None:
    fires: Counter = Counter()
    failures: list[str] = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as workers:
        for fired, failed in workers.map(batch, [seeds[i:i + BATCH] for i in range(0, len(seeds), BATCH)]):
            fires += fired
            failures += failed
    print({name: fires[name] for name in FIRES})
    assert not failures, f"{len(failures)} of {len(seeds)} graphs:\n" + "\n".join(failures[:20])
    assert {name: fires[name] for name in FIRES if fires[name] < least} == {}, "rules that the generator hardly reaches"


@pytest.mark.timeout(900)
def test_2000_random_graphs():
    sweep(range(2000), 100)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_10000_random_graphs():
    sweep(range(2000, 12000), 500)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in (a for a in sys.argv[1:] if a != "-v"):
        p = graphs.program(int(number))
        print(p.gm.graph) if "-v" in sys.argv else None
        print(number, f"{p.world} ranks, sizes {p.sizes}:", ", ".join(p.notes))
        print("\n".join(check(int(number))) or "equal")
