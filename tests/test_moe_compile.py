"""The compiler finds experts: in our layers, and in a model written with plain collectives. Every plan has the same bits."""
from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from dist import run_ranks
from torch import Tensor, nn

import fusewire
from fusewire import compat, formats
from fusewire.compiler.capture import _Captured, program
from fusewire.compiler.explain import report
from fusewire.compiler.plan import Capture, Plan
from fusewire.config import Bounds, Config
from fusewire.group import simulate
from fusewire.models import parallelize
from fusewire.op import op_of
from fusewire.ops.collectives import all_gather, reduce_scatter
from fusewire.ops.dense import amax, params_from_amax, quantize
from fusewire.ops.moe import experts, place, route

torch.set_num_threads(1)
HIDDEN, MID, EXPERTS, K = 64, 32, 8, 2


class Plain(nn.Module):
    """Attention is somebody else's: a norm, then experts behind a gather of hidden states, as such models are written.

    first   this rank's first expert is a number, where else it asks `place`
    other   what is routed is not what is quantized
    """

    def __init__(self, rank: int, world: int, fmt: str, group: str, first: bool = False, other: bool = False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.fmt, self.group, self.n, self.other = fmt, group, EXPERTS // world, other
        self.register_buffer("router", torch.randn(EXPERTS, HIDDEN, generator=g).bfloat16())
        self.register_buffer("first", torch.tensor(rank * self.n) if first else None)
        f = formats.get(fmt)
        for name, shape in (("gate", (MID, HIDDEN)), ("up", (MID, HIDDEN)), ("down", (HIDDEN, MID))):
            whole = [f.quantize_weight(torch.randn(shape, generator=g).bfloat16() / shape[1]**0.5) for _ in range(EXPERTS)]
            for i, part in enumerate(zip(*whole[rank * self.n:(rank + 1) * self.n], strict=True)):
                self.register_buffer(f"{name}{i}", torch.stack(part))

    def weights(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}{i}") for i in range(formats.get(self.fmt).weight_len)]

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        [x] = all_gather([x], self.group)
        params = params_from_amax(amax(x), self.fmt) if formats.get(self.fmt).params else []
        parts = [x] if self.fmt == "bf16" else quantize(x, params, self.fmt)
        ids, weights = route(x + 1 if self.other else x, self.router, None, K, 1, 1, 1.0, "softmax_renormalized")
        first = place(self.n, self.group, x.device) if self.first is None else self.first
        y = experts(parts, params, ids, weights, first, self.weights("gate"), self.weights("up"), self.weights("down"), [], "silu",
                    self.fmt, x.dtype)
        return reduce_scatter(y, self.group)


class Everywhere:
    """A model captured once, as rank 0 has it, whose plans run on every rank of a simulated group: their graphs are the same."""

    def __init__(self, models: list[nn.Module], args: list[dict], group, config: Config, token_dims: dict[str, int]):
        compiled = fusewire.compile(models[0], config, token_dims)
        compiled.capture_only, seen = True, []

        def stop(found: Capture, index: int, inputs: list) -> None:
            seen.append(inputs)
            raise _Captured

        compiled._dispatch = stop
        compat.reset_compiler()
        compiled(**args[0])
        [self.found], self.group = compiled.captures, group
        where = [{**dict(m.named_parameters()), **dict(m.named_buffers()), **a} for m, a in zip(models, args, strict=True)]
        names = {t.data_ptr(): name for name, t in where[0].items() if isinstance(t, Tensor)}
        self.size = self.found.size_of(seen[0])
        self.inputs = [[w[names[t.data_ptr()]] if isinstance(t, Tensor) else t for t in seen[0]] for w in where]

    def run(self, plan: str) -> list[Tensor]:
        """Every rank's first output."""
        gm = (self.found.unfused if plan == "unfused" else self.found.range_of(self.size).plans[plan]).gm
        return simulate(self.group, lambda rank: gm(*self.inputs[rank])[0])

    def ops(self, plan: str) -> list[str]:
        return [op_of(n).name for n in self.found.range_of(self.size).plans[plan].gm.graph.nodes if op_of(n)]

    def sites(self, plan: str) -> tuple:
        return report(self.found, self.size, self.found.range_of(self.size).plans[plan]).sites

    def check(self) -> None:
        """All plans have the bits of the unfused one, and the captures no guard of ours."""
        want = self.run("unfused")
        for plan in self.found.range_of(self.size).plans:
            assert all(torch.equal(y, w) for y, w in zip(self.run(plan), want, strict=True)), plan
        assert not self.found.new_guards


def plain(group, fmt: str, tokens: int = 6, config: Config | None = None, **how) -> Everywhere:
    models = [Plain(rank, group.world_size, fmt, group.name, **how) for rank in range(group.world_size)]
    xs = [{"x": torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(r)).bfloat16()}
          for r in range(group.world_size)]
    made = Everywhere(models, xs, group, config or Config(), {"x": 0})
    eager = simulate(group, lambda rank: models[rank](**xs[rank]))
    assert all(torch.equal(y, e) for y, e in zip(made.run("unfused"), eager, strict=True))
    made.check()
    return made


@pytest.mark.parametrize("fmt", [name for name, f in formats.FORMATS.items() if f.layout == "linear"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_plain_model_gets_its_gather_sunk(ranks, fmt, world):
    made = plain(ranks(world), fmt)
    gather, scatter = made.sites("sharded")
    assert not gather.inside and scatter.inside[-1] == ("grouped_matmul.reference", "inside experts")
    if fmt == "bf16":
        now, then = HIDDEN * 2, HIDDEN * 2 + K * 5
        assert "dispatch" not in made.ops("sharded") and gather.sent_before == gather.sent_after == (world - 1) * 6 * now
        assert gather.verdict == "missed" and not gather.avoidable
        assert gather.why == (f"all_gather stays: routing before it would send {then} bytes a token to each of {world - 1} ranks "
                              f"instead of {now}")
        return
    record = formats.nbytes(formats.get(fmt), 1, HIDDEN) + K * 5
    assert "expert_parallel" in made.ops("sharded") and not {"all_gather", "route", "reduce_scatter"} & set(made.ops("sharded"))
    assert gather.verdict == "fused" and f"dispatch: {record} bytes a token in one message" in gather.why
    assert scatter.verdict == "fused"
    assert f"expert_parallel: a rank sends {(world - 1) * (record + HIDDEN * 2)} bytes for each of its tokens" in scatter.why
    assert gather.sent_before + scatter.sent_before == (world - 1) * 6 * HIDDEN * 4
    if scatter.backend == "expert_parallel.reference":
        dynamic = (world - 1) * 4 * bool(formats.get(fmt).params)
        assert gather.sent_after + scatter.sent_after == (world - 1) * 6 * (record + HIDDEN * 2) + dynamic
    else:
        assert world == 4 and scatter.backend == "expert_parallel.all_to_all"


def test_many_tokens_go_all_to_all_with_the_same_bits(ranks):
    """At a bandwidth that makes bytes worth more than messages; the bytes that are reported are those that are expected."""
    made = plain(ranks(4), "fp8_token", 2000)
    _, scatter = made.sites("sharded")
    chance = 1 - math.comb(6, 2) / math.comb(8, 2)
    assert scatter.backend == "expert_parallel.all_to_all" and scatter.messages == 3
    assert scatter.sent_after == pytest.approx(3 * 2000 * (HIDDEN + 4 + K * 5 + HIDDEN * 2) * chance, rel=1e-3)


def test_who_holds_what_must_be_known(ranks):
    made = plain(ranks(2), "fp8_token", first=True)
    assert "dispatch" in made.ops("sharded") and "expert_parallel" not in made.ops("sharded")
    assert "which experts the other ranks hold is not known: `first` is not place(4, group)" in made.sites("sharded")[1].why


def test_what_is_routed_must_be_what_is_quantized(ranks):
    made = plain(ranks(2), "fp8_token", other=True)
    assert "dispatch" not in made.ops("sharded") and made.ops("sharded").count("all_gather") == 1
    assert "its parts are quantize, not one quantization of what was routed" in made.sites("sharded")[0].why


def test_rules_can_be_switched_off(ranks):
    off = Config(rules={"fuse_expert_parallel": Bounds(0, -1), "fuse_dispatch": Bounds(0, -1)})
    made = plain(ranks(2), "fp8_token", config=off)
    assert made.ops("sharded").count("all_gather") == 1 and "dispatch" not in made.ops("sharded")


SIZES = {"qwen3_moe": {"head_dim": 32}, "mixtral": {"head_dim": 32, "intermediate": 128}, "deepseek_v3": {"kv_heads": 4}}


def tiny_model(family: str) -> nn.Module:
    return tiny.model(family, torch.bfloat16, **{**tiny.MOE[family], **SIZES[family]})


@pytest.mark.parametrize(("family", "fmt"), [("qwen3_moe", None), ("qwen3_moe", "nvfp4"), ("mixtral", "fp8_token"),
                                             ("deepseek_v3", "fp8_token")])
@pytest.mark.parametrize("how", [{}, {"dp": 4}], ids=str)
def test_every_plan_of_a_model_has_the_unfused_bits(ranks, family, fmt, how):
    group, whole = ranks(4), tiny_model(family)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, fmt, **how))
    args = [{"input_ids": tiny.ids(1, 8, seed=rank if how else 0), "position_ids": torch.arange(8)[None], "use_cache": False}
            for rank in range(4)]
    made = Everywhere(shards, args, group, Config(), {"input_ids": 1, "position_ids": 1})
    made.check()
    if how:
        assert "expert_parallel" in made.ops("sharded")
    elif family != "deepseek_v3" and fmt is not None:  # its attention is whole on every rank, so its tokens are too
        assert "expert_parallel" in made.ops("sharded")
        assert sum(s.sent_after for s in made.sites("sharded")) < sum(s.sent_before for s in made.sites("sharded"))


def run_model(rank: int, how: dict, lengths: list[int]) -> dict:
    compiled = fusewire.compile(parallelize(tiny_model("qwen3_moe"), None, "fp8_token", **how))
    found = {}
    for plan in ("unfused", "sharded"):
        compiled.plan = plan
        found[plan] = compiled(input_ids=tiny.ids(1, lengths[rank], seed=rank // 2), use_cache=False).logits
    return found


@pytest.mark.dist
def test_compiled_on_rows_and_columns_of_processes():
    """Their graphs name different groups, and are agreed on as the same."""
    ranks = run_ranks(run_model, 4, {"dp": 2, "tp": 2}, [8] * 4)
    assert all(torch.equal(r["unfused"], r["sharded"]) for r in ranks)
    assert torch.equal(ranks[0]["sharded"], ranks[1]["sharded"]) and not torch.equal(ranks[0]["sharded"], ranks[2]["sharded"])


def test_ranks_with_a_gpu_each_have_the_same_program():
    """What they compare names no rank's own device."""
    def on(index: int, n: int = 2) -> str:
        graph = torch.fx.Graph()
        graph.output(graph.call_function(place.target, (n, "a group", torch.device("cuda", index))))
        return program(Plan("any", torch.fx.GraphModule(nn.Module(), graph), []))

    assert on(0) == on(1) != on(0, 3)
