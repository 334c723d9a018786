"""Experts' shares that travel home quantized: the format's own error and no more, the same bits by either transport, bytes as
promised, the error measured; and nothing of it where it was not asked for."""
from __future__ import annotations

import copy
import re

import pytest
import tiny
import torch
from test_moe import Block, answers, meter, model  # noqa: F401  (meter is a fixture)
from test_moe_compile import HIDDEN, Everywhere, tiny_model
from torch import Tensor

from fusewire import formats
from fusewire.backends import moe as transport
from fusewire.config import Config
from fusewire.errors import FormatError, InputError
from fusewire.group import fake_group, simulate
from fusewire.models import combine_error, parallelize
from fusewire.models.moe import MoE
from fusewire.op import op_of
from fusewire.ops import moe
from fusewire.ops.moe import combine, combine_all, expert_parallel, experts, route

torch.set_num_threads(1)
HOMES = ["fp8_token", "fp8_block", "mxfp8"]
COUNTS = [(6,) * 8, (9, 2, 0, 13, 1, 0, 4, 3), (0,) * 8, (1, *(0,) * 7)]  # of each rank, of as many as there are


def held(x: Tensor, fmt: str) -> Tensor:
    """x as the format holds it, float32."""
    f = formats.get(fmt)
    return f.dequantize(f.quantize(x, []), [])


def rounding(x: Tensor, fmt: str) -> Tensor:
    """How far e4m3 can be from x (rows, n), element by element: 2^-4 of it, or half of the smallest step; what MXFP8 cuts off above
    448 times its scale; and float32's own rounding of scale, quotient and product."""
    scale = formats.get(fmt).quantize(x, [])[1]
    scale = torch.exp2(scale.double() - 127) if fmt == "mxfp8" else scale.double()
    block = {"fp8_token": x.shape[1], "fp8_block": 128, "mxfp8": 32}[fmt]
    scale, size = scale.repeat_interleave(block, 1)[:, :x.shape[1]], x.double().abs()
    cut = (size - 448 * scale).clamp(min=0) if fmt == "mxfp8" else 0.0
    return torch.maximum(size * 2.0**-4, scale * 2.0**-10) + cut + size * 2.0**-21


def shares_of(world: int, rows: int, n: int = 320) -> list[Tensor]:
    """What each rank's experts add to all tokens, some of which chose none of them; rows of very different sizes."""
    g = torch.Generator().manual_seed(world)
    made = [(torch.randn(rows, n, generator=g) * torch.exp(3 * torch.randn(rows, 1, generator=g))).bfloat16() for _ in range(world)]
    return [s * (torch.arange(rows).unsqueeze(1) % world != (r + 1) % world) for r, s in enumerate(made)]


@pytest.mark.parametrize("fmt", HOMES)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("counts", [(6, 6, 6, 6), (9, 2, 0, 13)], ids=str)
def test_the_error_is_the_format_s_own(ranks, fmt, world, counts):
    """Against float64: each element at most the sum of what each rank's share is rounded by, and one rounding to bf16."""
    group, counts = ranks(world), list(counts[:world])
    shares = shares_of(world, sum(counts))
    given = [] if len(set(counts)) == 1 else counts
    y = torch.cat(simulate(group, lambda rank: combine(shares[rank], fmt, given, group.name)))
    exact = torch.stack([s.double() for s in shares]).sum(0)
    allowed = torch.stack([rounding(s, fmt) for s in shares]).sum(0)
    size = torch.stack([s.double().abs() for s in shares]).sum(0)
    error = (y.double() - exact).abs()
    assert y.dtype == torch.bfloat16 and (error <= allowed * (1 + 2.0**-8) + exact.abs() * 2.0**-8 + size * 2.0**-20).all()
    off = float((y.double() - exact).norm() / exact.norm())
    assert 0.01 < off < 2**-4, off  # e4m3 rounds by up to 2^-4, on average by a third to a half of that
    as_it_is = torch.stack([s.float() for s in shares]).sum(0).bfloat16()
    assert (as_it_is.double() - exact).norm() < 0.2 * (y.double() - exact).norm()


@pytest.mark.parametrize("fmt", HOMES)
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_both_transports_add_what_the_format_holds_in_rank_order(ranks, fmt, world, counts):
    b = Block(ranks(world), "fp8_block", counts=counts, home=fmt)
    got = b.run(lambda rank: expert_parallel.reference(*b.args(rank)))
    sent = b.run(lambda rank: transport.all_to_all(*b.args(rank)))
    whole = torch.cat(b.x)
    parts, (ids, weights) = formats.get("fp8_block").quantize(whole, []), route(whole, *b.routing)
    each = b.run(lambda rank: held(experts(parts, [], ids, weights, *b.mine[rank], torch.bfloat16), fmt))
    want = sum(each[1:], each[0]).bfloat16()
    assert [len(y) for y in got] == b.counts and torch.equal(torch.cat(got), want)
    assert all(y.dtype == torch.bfloat16 and torch.equal(y, s) for y, s in zip(got, sent, strict=True))
    if len(set(b.counts)) == 1:
        equal = b.run(lambda rank: expert_parallel.reference(*b.args(rank, counts=False)))
        assert torch.equal(torch.cat(equal), want)


def test_float32_sums_depend_on_the_order_of_ranks(ranks):
    """So that the test above would see another order."""
    group = ranks(4)
    shares = [s.float() for s in shares_of(4, 24)]
    y = torch.cat(simulate(group, lambda rank: combine(shares[rank], "fp8_block", [], group.name)))
    each = [held(s, "fp8_block") for s in shares]
    assert torch.equal(y, sum(each[1:], each[0])) and not torch.equal(y, sum(each[-2::-1], each[-1]))


@pytest.mark.parametrize("fmt", HOMES)
@pytest.mark.parametrize("world", [2, 4])
def test_a_token_that_chose_none_of_a_rank_s_experts_gets_nothing_from_it(ranks, fmt, world):
    """Zero rows stay zeros, bit for bit, beside rows of any size."""
    group, shares = ranks(world), shares_of(world, 8 * world)
    zero = shares[0].abs().amax(1) == 0
    assert 0 < zero.sum() < 8 * world
    came = moe.unpacked_shares(moe.packed_shares(shares[0], fmt), shares[0], fmt)
    assert (came[zero].view(torch.int32) & 2**31 - 1 == 0).all() and torch.equal(came, held(shares[0], fmt))
    y = torch.cat(simulate(group, lambda rank: combine(shares[0] if rank == 0 else 0 * shares[0].abs(), fmt, [], group.name)))
    assert not y[zero].any() and torch.equal(y, held(shares[0], fmt).bfloat16())


@pytest.mark.parametrize("tokens", [0, 1, 7, 8])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_combine_all_is_combine_on_every_rank(ranks, world, tokens):
    """Also of tokens that the ranks do not divide."""
    group, shares = ranks(world), shares_of(world, tokens)
    every = simulate(group, lambda rank: combine_all(shares[rank], "fp8_block", group.name))
    each = [held(s, "fp8_block") for s in shares]
    assert all(torch.equal(y, sum(each[1:], each[0]).bfloat16()) for y in every)


# ---------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("fmt", "a_row"), [("fp8_token", 7168 + 4), ("fp8_block", 7168 + 224), ("mxfp8", 7168 + 224)])
@pytest.mark.parametrize("counts", [(3, 3), (3, 2)], ids=str)
def test_bytes_of_a_token_of_deepseek_r1(ranks, meter, fmt, a_row, counts):  # noqa: F811
    """Codes and scales in one message home, counted at the group, and as many as the op and `transports` say."""
    group = ranks(2)
    b = Block(group, "nvfp4", counts=counts, n=256, k=8, hidden=7168, mid=16, home=fmt)
    log = meter(group)
    b.run(lambda rank: expert_parallel.reference(*b.args(rank, counts=counts[0] != counts[1])))
    assert len(log) == 2 and log[1][1] == b.counts[1] * a_row
    bf16, quantized = (moe.transports(b.x[0], b.routing[0], 8, 128, "nvfp4", 6, 2, home)["all_gather"] for home in ("bf16", fmt))
    assert bf16[0] - quantized[0] == 3 * (2 * 7168 - a_row) and bf16[1] == quantized[1] == 2
    if counts[0] == counts[1]:
        usage = expert_parallel.usage(*b.args(0, counts=False))
        assert (usage.bytes, usage.messages) == (sum(sent for _, sent in log), 2)


def test_all_to_all_sends_quantized_rows_home(ranks, meter):  # noqa: F811
    group = ranks(4)
    b = Block(group, "nvfp4", counts=(3, 200, 3, 3), home="fp8_token")
    log = meter(group)
    b.run(lambda rank: transport.all_to_all(*b.args(rank)))
    rows = sum((route(b.x[r], *b.routing)[0].long() // 4 == 0).any(1).sum().item() for r in (1, 2, 3))
    assert [what for what, _ in log] == ["all_to_all", "exchange", "exchange"] and log[2][1] == rows * (128 + 4)
    bf16, quantized = (moe.transports(b.x[1], b.routing[0], 3, 4, "nvfp4", 800, 4, home)["all_to_all"]
                       for home in ("bf16", "fp8_token"))
    assert bf16[0] - quantized[0] == pytest.approx(3 * 200 * (256 - 132) * moe.ranks_reached(16, 4, 3), abs=4)


@pytest.mark.parametrize("tokens", [5, 8])
def test_bytes_of_combine_all(ranks, meter, tokens):  # noqa: F811
    group, shares = ranks(4), shares_of(4, tokens)
    log = meter(group)
    simulate(group, lambda rank: combine_all(shares[rank], "fp8_block", group.name))
    rows = 2  # of each rank
    assert log == [("exchange", 3 * rows * (320 + 3 * 4)), ("all_gather", 3 * rows * 640)]
    assert combine_all.wire(shares[0], "fp8_block", group.name) == sum(sent for _, sent in log)


# ---------------------------------------------------------------------------------------------- models


def shards_of(whole, group, combine=None, **how) -> list:
    return simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, "fp8_token", combine=combine, **how))


ARGS = {"use_cache": False, "position_ids": torch.arange(8)[None]}


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize("how", [{}, {"dp": 4}], ids=str)
def test_every_plan_has_the_unfused_bits(ranks, family, how):
    group = ranks(4)
    shards = shards_of(tiny_model(family), group, "fp8_block", **how)
    args = [{"input_ids": tiny.ids(1, 8, seed=rank if how else 0), **ARGS} for rank in range(4)]
    made = Everywhere(shards, args, group, Config(), {"input_ids": 1, "position_ids": 1})
    made.check()
    unfused = [op_of(n) for n in made.found.unfused.gm.graph.nodes]
    blocks = sum(isinstance(m, MoE) for m in shards[0].modules())
    assert unfused.count(combine if how else combine_all) == blocks
    if how or family != "deepseek_v3":  # of which attention is whole, and the sharded plan is taken back
        fused = [n for n in made.found.range_of(made.size).plans["sharded"].gm.graph.nodes if op_of(n) is expert_parallel]
        assert fused and all(n.args[-3] == "fp8_block" for n in fused)
    if how:
        return
    lone = [s for s in made.sites("replicated") if s.what == "combine_all"]
    assert len(lone) == blocks and not any(s.avoidable for s in lone)
    assert all("its shares travel in fp8_block, as was asked for, and no other op adds such" in s.why for s in lone)


def test_rows_and_columns_of_ranks(ranks):
    """Shares go home quantized over the column, dp; the row, tp, adds what came as it is."""
    group, whole = ranks(4), tiny_model("qwen3_moe")
    ids = [tiny.ids(1, n, seed=n) for n in (8, 8, 3, 3)]
    shards = shards_of(whole, group, "fp8_block", dp=2, tp=2)
    plain, quantized = (answers(s, group, ids) for s in (shards_of(whole, group, dp=2, tp=2), shards))
    for p, q in zip(plain, quantized, strict=True):
        assert 0 < (p - q).float().norm() < 0.1 * p.float().norm()
    assert torch.equal(quantized[0], quantized[1]) and torch.equal(quantized[2], quantized[3])

    def combined(rank: int) -> int:
        with moe.watch_combine() as seen:
            shards[rank](ids[rank], use_cache=False)
        return len(seen)

    assert simulate(group, combined) == [2] * 4  # once in each layer


@pytest.mark.parametrize("how", [{}, {"dp": 2}], ids=str)
def test_what_was_not_asked_for_changes_nothing(ranks, meter, how):  # noqa: F811
    """None and "bf16" make the graph, the messages and the bits that there were without quantized combines."""
    group, whole = ranks(2), tiny_model("qwen3_moe")
    ids, seen = [tiny.ids(1, 8, seed=rank if how else 0) for rank in range(2)], []
    for asked in (None, "bf16", "fp8_block"):
        shards = shards_of(whole, group, asked, **how)
        log = meter(group)
        y, sent = answers(shards, group, ids), log[:]  # a later meter counts through this one
        made = Everywhere(shards_of(whole, group, asked, **how), [{"input_ids": i, **ARGS} for i in ids], group, Config(),
                          {"input_ids": 1, "position_ids": 1})
        seen.append((y, sent, [op_of(n).name for n in made.found.unfused.gm.graph.nodes if op_of(n)]))
    (plain, log, ops), (same, again, as_well), (other, less, more) = seen
    assert all(map(torch.equal, plain, same)) and log == again and ops == as_well and not {"combine", "combine_all"} & set(ops)
    assert not any(map(torch.equal, plain, other)) and {"combine", "combine_all"} & set(more)
    assert sum(sent for _, sent in less) < sum(sent for _, sent in log)


def test_the_symmetric_memory_kernels_leave_it_to_the_reference():
    b = Block(fake_group(2), "fp8_block", counts=(4, 4), home="mxfp8")
    able, refused = expert_parallel.candidates(*b.args(0, counts=False))
    assert "pushed: its kernel adds shares as they are, and they are to travel in mxfp8" in refused
    assert {a.name for a in able} == {"all_to_all", "reference"}


# ---------------------------------------------------------------------------------------------- the error


@pytest.mark.parametrize("fmt", HOMES)
def test_the_error_is_measured_where_it_is_asked_for(ranks, meter, fmt):  # noqa: F811
    """By either transport, against float64, of all ranks' tokens; nothing more is sent where nobody asks."""
    group = ranks(4)
    b = Block(group, "fp8_block", torch.float32, counts=(9, 2, 0, 13), home=fmt)
    whole = torch.cat(b.x)
    parts, (ids, weights) = formats.get("fp8_block").quantize(whole, []), route(whole, *b.routing)
    each = b.run(lambda rank: experts(parts, [], ids, weights, *b.mine[rank], torch.float32))
    exact, got = (torch.stack([s.double() for s in shares]).sum(0) for shares in (each, [held(s, fmt) for s in each]))
    for run, messages in ((expert_parallel.reference, 2), (transport.all_to_all, 3)):
        def watched(rank: int, run=run) -> tuple[list, Tensor]:
            with moe.watch_combine() as seen:
                y = run(*b.args(rank))
            return seen, y

        found, log = b.run(watched), meter(group)
        alone = b.run(lambda rank, run=run: run(*b.args(rank)))
        assert len(log) == messages and all(torch.equal(y, z) for (_, y), z in zip(found, alone, strict=True))
        [(off, size)] = found[0][0]
        assert all(seen == [(off, size)] for seen, _ in found)
        assert off == pytest.approx(float((got - exact).square().sum()), rel=1e-3)
        assert size == pytest.approx(float(exact.square().sum()), rel=1e-5) and 0.005 < (off / size) ** 0.5 < 2**-4


@pytest.mark.parametrize("how", [{}, {"dp": 2}], ids=str)
def test_a_model_s_error(ranks, how):
    group, whole = ranks(2), tiny_model("qwen3_moe")
    pieces = [tiny.ids(1, 8), tiny.ids(1, 5, seed=3)]
    shards = shards_of(whole, group, "fp8_block", **how)
    found = simulate(group, lambda rank: combine_error(shards[rank], pieces))
    assert found[0] == found[1] and found[0].layers == 2 and found[0].tokens == 13 * (2 if how else 1)
    assert 0.005 < found[0].error < 2**-4
    assert re.fullmatch(rf"combine in fp8_block: off by {found[0].error:.1e} of its size \(root mean square\) over "
                        rf"{found[0].tokens} tokens in 2 layers", found[0].sentence())
    plain = shards_of(whole, group, **how)
    assert simulate(group, lambda rank: combine_error(plain[rank], pieces)) == [None, None]


# ---------------------------------------------------------------------------------------------- refusals


def test_refusals(ranks):
    group, whole = ranks(2), model("qwen3_moe")
    choices = "choose one of bf16, fp8_block, fp8_token, mxfp8"
    for name in ("nvfp4", "fp8_tensor", "mxfp8:128x4", "fp8", "int8"):
        sentence = (f"combine='{name}': experts' shares travel in a format that quantizes row by row, with linear scales and no "
                    f"static one; {choices}")
        with pytest.raises(InputError, match=re.escape(sentence)):
            parallelize(copy.deepcopy(whole), fake_group(2), combine=name)
        with pytest.raises(InputError, match=choices):
            simulate(group, lambda rank, name=name: combine(torch.zeros(2, 64), name, [], group.name))
    with pytest.raises(InputError, match="combine='fp8_block': on one rank no experts' shares travel; leave combine out, or start"):
        parallelize(copy.deepcopy(whole), fake_group(1), combine="fp8_block")
    with pytest.raises(InputError, match="combine='fp8_token': LlamaForCausalLM has no experts whose shares travel; leave"):
        parallelize(tiny.model("llama"), fake_group(2), combine="fp8_token")
    odd = model("qwen3_moe", hidden=80)
    with pytest.raises(FormatError, match="combine='mxfp8' needs a multiple of 32 hidden features and there are 80; use another"):
        parallelize(odd, fake_group(2), combine="mxfp8")
    with pytest.raises(InputError, match="combine: 3 tokens do not divide over 2 ranks; give the counts of the ranks"):
        simulate(group, lambda rank: combine(torch.zeros(3, HIDDEN), "fp8_token", [], group.name))
    with pytest.raises(InputError, match="combine: this rank has 3 rows and the counts \\[1, 1\\] say 2"):
        simulate(group, lambda rank: combine(torch.zeros(3, HIDDEN), "fp8_token", [1, 1], group.name))
