"""Inductor: its numbers, and its cache on disk, warm, cold or lost by one rank."""
from __future__ import annotations

import copy
import os
import shutil
import time
from collections import Counter

import pytest
import tiny
import torch
from dist import run_ranks

import fusewire
from fusewire import formats
from fusewire.compiler.capture import cache_tag
from fusewire.config import Bounds, Config
from fusewire.group import close, simulate, simulated_group
from fusewire.models.layers import RowParallelLinear, ShardedLinear
from fusewire.op import op_of
from fusewire.ops.collectives import all_reduce

torch.set_num_threads(1)
pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

PLANS = ("unfused", "replicated", "sharded")
LENGTHS = (12, 40, 4)  # one compilation for all
FORMAT = "fp8_token"
LIMIT_S = 400.0


def model():
    return tiny.model("llama", torch.bfloat16, layers=1)


def started(rank: int, folder: str, plans: tuple[str, ...]) -> dict:
    """A start of the program on one rank: {"logits": {plan: [...]}, "kernels": hits and misses, "tags", "ops"}."""
    from torch._dynamo.utils import counters

    counters.clear()  # a rank is forked from a process that may have compiled
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{rank}"
    compiled = fusewire.compile(fusewire.parallelize(model(), None, FORMAT), Config(codegen="inductor"))
    logits, ran = {}, Counter()
    for plan in plans:
        compiled.plan = plan
        logits[plan] = [compiled(input_ids=tiny.ids(1, n), use_cache=False).logits for n in LENGTHS]
        ran[fusewire.explain(compiled).plan] += 1
    assert set(ran) == set(plans) and len(compiled.captures) == 1
    [found] = compiled.captures
    made = {"unfused": found.unfused, **found.ranges[0].plans}
    kernels = {k: n for k, n in counters["inductor"].items() if k.startswith("fxgraph_cache")}
    return {"logits": logits, "kernels": kernels, "tags": {name: cache_tag(p, compiled.config) for name, p in made.items()},
            "ops": {name: sorted({o.name for n in p.gm.graph.nodes if (o := op_of(n))}) for name, p in made.items()}}


class Exact(tiny.FakeQuantized):
    """The same in float64, but for what is quantized: that has the codes of the float32 value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (shards,), out = self.shards, []
        f = formats.get(shards[0].fmt)
        for s in shards:
            # with the zeros of heads that do not divide, which the oracle's attention carries along
            part = x.reshape(-1, x.shape[-1])[:, s.cols.start:s.cols.start + s.cols.size].float()
            params = f.params_from_amax(part.abs().amax()) if f.params else []
            part = f.dequantize(f.quantize(part, params), params)
            out.append(part.double() @ f.dequantize_weight(s.weights()).double().t())
        y = sum(out) if isinstance(shards[0], RowParallelLinear) else torch.cat(out, 1)
        return y.view(*x.shape[:-1], -1)


def exact(whole: torch.nn.Module, fmt: str | None, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits of the model, quantized on two ranks, in float64."""
    group = simulated_group(2)
    shards = simulate(group, lambda rank: fusewire.parallelize(copy.deepcopy(whole), group, fmt))
    close(group)
    oracle = copy.deepcopy(whole).double()
    for name, module in shards[0].named_modules():
        if isinstance(module, ShardedLinear):
            oracle.set_submodule(name, Exact([s.get_submodule(name) for s in shards]))
    with torch.no_grad():
        return [oracle(ids, use_cache=False).logits for ids in batches]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return float(torch.cat([(g.double() - w).flatten() for g, w in zip(got, want, strict=True)]).norm())


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A start with no cache at all; (the folder of the caches, what the ranks returned)."""
    folder = tmp_path_factory.mktemp("inductor")
    return folder, run_ranks(started, 2, str(folder), PLANS, timeout_s=LIMIT_S)


def test_fused_plans_are_as_exact_as_the_unfused_one(cold):
    want = exact(model(), FORMAT, [tiny.ids(1, n) for n in LENGTHS])
    for rank in cold[1]:
        errors = {plan: error(rank["logits"][plan], want) for plan in PLANS}
        scale = float(torch.cat([w.flatten() for w in want]).norm())
        print({plan: f"{e / scale:.3%}" for plan, e in errors.items()})
        assert errors["unfused"] < 0.15 * scale, f"the unfused model itself is off by {errors['unfused'] / scale:.1%}"
        for plan in PLANS[1:]:
            new = set(rank["ops"][plan]) - set(rank["ops"]["unfused"])
            assert errors[plan] <= 1.5 * errors["unfused"], f"{plan}: {errors}; the ops that only it has: {sorted(new)}"
    one, other = (r["logits"] for r in cold[1])
    assert all(torch.equal(a, b) for plan in PLANS for a, b in zip(one[plan], other[plan], strict=True))


def same(now: list[dict], then: list[dict], plans: tuple[str, ...]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(now, then, strict=True) for plan in plans
               for a, b in zip(x["logits"][plan], y["logits"][plan], strict=True))


def test_a_warm_start_and_one_where_a_rank_lost_its_cache(cold):
    folder, first = cold
    assert [r["kernels"] for r in first] == [{"fxgraph_cache_miss": len(PLANS)}] * 2
    start = time.monotonic()
    warm = run_ranks(started, 2, str(folder), PLANS, timeout_s=LIMIT_S)
    print(f"a warm start takes {time.monotonic() - start:.1f} s")
    assert same(warm, first, PLANS)
    assert [r["kernels"] for r in warm] == [{"fxgraph_cache_hit": len(PLANS)}] * 2
    shutil.rmtree(folder / "1")
    lost = run_ranks(started, 2, str(folder), ("sharded",), timeout_s=LIMIT_S)
    assert same(lost, first, ("sharded",))
    assert [r["kernels"] for r in lost] == [{"fxgraph_cache_hit": 1}, {"fxgraph_cache_miss": 1}]


class RowParallel(torch.nn.Module):
    """As small as a program with all three plans can be: what keys are made of needs no more."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, 8), requires_grad=False)

    def forward(self, x):
        return all_reduce(x @ self.weight.t(), torch.distributed.group.WORLD.group_name) + 1.0


def tags(rank: int, configs: list[Config]) -> list[dict[str, str]]:
    """The keys of each plan, by config."""
    made = []
    for config in configs:
        torch._dynamo.reset()
        compiled = fusewire.compile(RowParallel(), config, {"x": 0})
        compiled.capture_only = True
        compiled(torch.ones(12, 8))
        [found] = compiled.captures
        plans = {"unfused": found.unfused, **found.range_of(12).plans}
        assert set(plans) == set(PLANS)
        made.append({name: cache_tag(p, config) for name, p in plans.items()})
    return made


def test_cache_keys_tell_ranks_plans_rules_and_worlds_apart():
    configs = [Config(), Config(rules={"fuse_matmul_reduce_scatter": Bounds(64)})]
    two = run_ranks(tags, 2, configs)
    every = [tag for made in (*two, *run_ranks(tags, 3, configs[:1])) for by_plan in made for tag in by_plan.values()]
    assert len(set(every)) == len(every) == (2 * 2 + 3) * 3
    assert run_ranks(tags, 2, configs) == two
