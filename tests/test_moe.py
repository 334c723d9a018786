"""Experts over ranks: Hugging Face's numbers, whatever the ranks hold; every transport the same bits; bytes as promised."""
from __future__ import annotations

import copy
import itertools
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from dist import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusewire import formats, tuning
from fusewire.backends import moe as transport
from fusewire.config import GLOO
from fusewire.errors import FormatError, FusewireError, InputError
from fusewire.group import fake_group, grid, resolve, simulate
from fusewire.models import idle, parallelize
from fusewire.models.moe import FAMILIES, MoE, layout
from fusewire.ops import moe
from fusewire.ops.dense import quantize
from fusewire.ops.moe import dispatch, expert_parallel, experts, grouped_matmul, route

torch.set_num_threads(1)
QUANTIZED = [name for name, f in formats.FORMATS.items() if f.layout == "linear"]


def model(family: str, dtype: torch.dtype = torch.float32, **sizes) -> nn.Module:
    if family == "deepseek_v3":
        sizes["kv_heads"] = sizes.get("heads", 4)
    made = tiny.model(family, dtype, **{**tiny.MOE[family], **sizes})
    made.config._experts_implementation = "eager"  # the loop over experts, which takes float64 too
    return made


def answers(shards: list[nn.Module], group, ids: list[Tensor]) -> list[Tensor | None]:
    """The logits of each rank's own (1, n) tokens, None where it has none."""
    def program(rank: int) -> Tensor | None:
        if ids[rank].shape[1]:
            return shards[rank](ids[rank], use_cache=False).logits
        return idle(shards[rank])

    return simulate(group, program)


# ---------------------------------------------------------------------------------------------- routing


def exact(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, and how far float32 can be from them."""
    wide = x.double() @ w.double().t()
    return wide, 2.0**-20 * (x.double().abs() @ w.double().abs().t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_is_routed_alike_whatever_the_others_are(dtype):
    """Bit for bit, which a matmul does not promise: sizes with and without a vector's tail, and strided rows."""
    for hidden, n in ((160, 8), (513, 40), (1, 5)):
        g = torch.Generator().manual_seed(hidden)
        x, w = torch.randn(37, hidden, generator=g).to(dtype), torch.randn(n, hidden, generator=g).to(dtype)
        whole = moe.logits(x, w)
        for start, end in ((0, 1), (36, 37), (3, 20), (5, 5)):
            assert torch.equal(moe.logits(x[start:end], w), whole[start:end])
        assert torch.equal(moe.logits(torch.stack([x, x], -1).flatten(1)[:, ::2], w), whole)
        wide, margin = exact(x, w)
        assert ((whole - wide).abs() <= margin).all()


def test_many_rows_are_routed_in_pieces(monkeypatch):
    x, w = torch.randn(50, 96), torch.randn(12, 96)
    whole = moe.logits(x, w)
    monkeypatch.setattr(moe, "_LOGIT_BYTES", 4 * 12 * 128 * 7)
    assert torch.equal(moe.logits(x, w), whole)


@pytest.mark.parametrize("family", tiny.MOE)
def test_routing_is_the_family_s_own(family):
    """Against Hugging Face's router: the same experts wherever the choice is not within rounding, and their weights."""
    block = next(m for m in model(family).modules() if type(m).__name__ in FAMILIES)
    r = FAMILIES[type(block).__name__].routing(tiny.config(family, **tiny.MOE[family]))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    _, want, want_ids = block.gate(x)
    bias = getattr(block.gate, "e_score_correction_bias", None)
    ids, weights = route(x, block.gate.weight, bias, *r[:1], r.groups, r.top_groups, r.scale, r.how)
    assert ids.dtype == torch.uint8 and weights.dtype == torch.float32
    same = (ids.long().sort(1).values == want_ids.sort(1).values).all(1)
    assert same.sum() >= 198
    by_id = [torch.zeros(200, block.gate.weight.shape[0]).scatter_(1, i, v.float())
             for i, v in ((ids.long(), weights), (want_ids, want))]
    torch.testing.assert_close(by_id[0][same], by_id[1][same], rtol=1e-5, atol=1e-6)


def test_equal_scores_go_to_the_first_expert():
    ids, weights = route(torch.ones(3, 8), torch.ones(6, 8), None, 2, 1, 1, 1.0, "softmax_renormalized")
    assert ids.tolist() == [[0, 1]] * 3 and weights.tolist() == [[0.5, 0.5]] * 3
    ids, _ = route(torch.ones(2, 8), torch.ones(300, 8), None, 2, 1, 1, 1.0, "softmax")
    assert ids.dtype == torch.int16


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize(("world", "how"), [
    (2, {}), (4, {"dp": 2, "tp": 2}), (4, {"ep": 4, "tp": 4}), (8, {"dp": 8}), (8, {"dp": 4})], ids=str)
def test_float32_equals_the_whole_model(ranks, family, world, how):
    """Rows of ranks with 5, 0, 1, 12, ... tokens; the ranks of a row hold the same."""
    whole, group = model(family, heads=8, kv_heads=4), ranks(world)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, **how))
    blocks = [m for m in whole.modules() if type(m).__name__ in FAMILIES]
    held = [m.experts.mine.size for s in shards for m in s.modules() if isinstance(m, MoE)]
    assert len(held) == len(blocks) * world and sum(held) == sum(len(m.gate.weight) for m in blocks)
    dp = how.get("dp", 1)
    tokens = [tiny.ids(1, n, seed=n)[:, :n] for n in (5, 0, 1, 12, 3, 0, 2, 7)][:dp] if dp > 1 else [tiny.ids(2, 12)]
    got = answers(shards, group, [tokens[rank // (world // dp)] for rank in range(world)])
    for rank, y in enumerate(got):
        ids = tokens[rank // (world // dp)]
        if y is not None:
            torch.testing.assert_close(y, whole(ids, use_cache=False).logits, rtol=1e-5, atol=2e-5)
        assert y is None or torch.equal(y, got[rank - rank % (world // dp)])  # the same bits in a row


def double(whole: nn.Module) -> nn.Module:
    """The model in float64."""
    return copy.deepcopy(whole).double()


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize("how", [{}, {"tp": 1}], ids=str)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_bf16_is_as_close_as_eager(ranks, family, world, how):
    """Error against float64 at most 1.5 times eager's own, tokens that rounding sends to other experts included."""
    whole, group = model(family, torch.bfloat16, heads=8), ranks(world)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, **how))
    tokens = [tiny.ids(2, 16, seed=s) for s in range(world)] if how else [tiny.ids(8, 16)] * world
    ours = torch.cat(answers(shards, group, tokens)[:world if how else 1]).double()
    ids = torch.cat(tokens[:world if how else 1])
    want = double(whole)(ids, use_cache=False).logits
    eager = whole(ids, use_cache=False).logits.double()
    assert (ours - want).norm() <= 1.5 * (eager - want).norm()
    assert (eager - want).norm() > 0


def skew(whole: nn.Module, how: str) -> list[set[int]]:
    """Make every token choose the first experts, or none choose expert 5; -> what a block's tokens chose together, a set for each
    call, in a list that fills while the model runs."""
    chosen: list[set[int]] = []
    whole.get_input_embeddings().weight[:, 0] = 40.0  # large and positive in every token
    for m in whole.modules():
        if type(m).__name__ in FAMILIES:
            bias = getattr(m.gate, "e_score_correction_bias", m.gate.weight[:, 0])
            if how == "all to the first":
                bias[:whole.config.num_experts_per_tok] += 3.0
            else:
                bias[5] -= 100.0
            m.gate.register_forward_hook(lambda gate, args, out: chosen.append(set(out[2].flatten().tolist())))
    return chosen


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize("how", ["as it comes", "all to the first", "one has none"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_bf16_of_unequal_counts_and_skewed_experts(ranks, family, how, world):
    """As above, for ranks that hold 9, 0, 1, ... tokens and experts of which all choose the same or one gets nothing."""
    whole, group = model(family, torch.bfloat16, heads=8), ranks(world)
    chosen = skew(whole, how) if how != "as it comes" else []
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, dp=world))
    tokens = [tiny.ids(1, max(n, 1), seed=n)[:, :n] for n in (9, 0, 1, 16, 7, 0, 1, 30)][:world]
    ours, want, eager = [], [], []
    for ids, y in zip(tokens, answers(shards, group, tokens), strict=True):
        assert (y is None) == (not ids.shape[1])
        if y is not None:
            ours.append(y.double()[0])
            want.append(double(whole)(ids, use_cache=False).logits[0])
            eager.append(whole(ids, use_cache=False).logits.double()[0])
    ours, want, eager = torch.cat(ours), torch.cat(want), torch.cat(eager)
    assert 0 < (eager - want).norm() and (ours - want).norm() <= 1.5 * (eager - want).norm()
    first = set(range(whole.config.num_experts_per_tok))
    assert all(c == first if how == "all to the first" else 5 not in c for c in chosen) and bool(chosen) == (how != "as it comes")


class Block:
    """The arguments of `expert_parallel` for one layer of random experts, on each rank."""

    def __init__(self, group, fmt: str, dtype: torch.dtype = torch.bfloat16, counts: tuple[int, ...] = (5, 0, 1, 9), n: int = 16,
                 k: int = 3, hidden: int = 128, mid: int = 64, bias: Tensor | None = None, seed: int = 0, top: int = 2,
                 home: str = "bf16"):
        self.home, world = home, group.world_size
        g = torch.Generator().manual_seed(seed)
        self.group, self.fmt, self.dtype, self.counts = group, fmt, dtype, list(counts[:world])
        self.x = [torch.randn(c, hidden, generator=g).to(dtype) for c in self.counts]
        make = formats.get(fmt).params_from_amax
        self.params = make(torch.cat([*self.x, torch.ones(1, hidden)]).abs().amax().float()) if make else []
        self.routing = torch.randn(n, hidden, generator=g).to(dtype), bias, k, 4, top, 2.5, "grouped_sigmoid_renormalized"
        self.whole = {name: torch.randn(n, *shape, generator=g).to(dtype) / shape[1]**0.5
                      for name, shape in (("gate", (mid, hidden)), ("up", (mid, hidden)), ("down", (hidden, mid)))}
        quantized = {name: [formats.get(fmt).quantize_weight(w) for w in ws] for name, ws in self.whole.items()}
        per = n // world
        self.mine = [(torch.tensor(r * per), *([torch.stack(p) for p in zip(*ws[r * per:(r + 1) * per], strict=True)]
                                               for ws in quantized.values()), [], "silu", fmt) for r in range(world)]

    def args(self, rank: int, counts: bool = True) -> tuple:
        return self.x[rank], self.params, *self.routing, *self.mine[rank], self.home, self.counts if counts else [], self.group.name

    def run(self, f) -> list[Tensor]:
        return simulate(self.group, f)


def by_hand(b: Block) -> list[Tensor]:
    """Every token for itself, in float64, on weights and activations as the format holds them."""
    f, out = formats.get(b.fmt), []
    n = b.whole["gate"].shape[0]
    held = {name: [f.dequantize_weight(f.quantize_weight(w)).double() for w in ws] for name, ws in b.whole.items()}
    for x in b.x:
        ids, weights = route(x, *b.routing)
        xs = (x if b.fmt == "bf16" else f.dequantize(quantize(x, b.params, b.fmt), b.params)).double()
        y = torch.zeros(x.shape, dtype=torch.float64)
        for t, slot in itertools.product(range(len(x)), range(ids.shape[1])):
            e = int(ids[t, slot])
            assert e < n
            mid = nn.functional.silu(held["gate"][e] @ xs[t]) * (held["up"][e] @ xs[t])
            y[t] += float(weights[t, slot]) * (held["down"][e] @ mid)
        out.append(y)
    return out


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_both_transports_have_the_same_bits_and_are_right(ranks, fmt, world):
    b = Block(ranks(world), fmt)
    got = b.run(lambda rank: expert_parallel.reference(*b.args(rank)))
    sent = b.run(lambda rank: transport.all_to_all(*b.args(rank)))
    assert all(torch.equal(a, c) for a, c in zip(got, sent, strict=True))
    for y, want in zip(got, by_hand(b), strict=True):
        error = (y.double() - want).norm()
        # beside one bf16 rounding of gate, up, their product and the result, the middle is quantized again
        allowed = {"bf16": 0.01, "fp8_tensor": 0.05, "fp8_token": 0.05, "fp8_block": 0.05, "mxfp8": 0.05, "nvfp4": 0.15}[fmt]
        assert error <= allowed * want.norm() and y.dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [(6, 6, 6, 6), (9, 2, 0, 13)], ids=str)
def test_shares_are_added_in_rank_order(ranks, counts):
    """Float32 shares of all four ranks for each token, whose sum has other bits in another order."""
    b = Block(ranks(4), "bf16", torch.float32, counts=counts, k=12, top=4)

    def shares(rank: int) -> Tensor:
        parts, ids, weights = b.everything
        return experts(parts, b.params, ids, weights, *b.mine[rank], torch.float32)

    whole = torch.cat(b.x)
    b.everything = [whole], *route(whole, *b.routing)
    each = b.run(shares)
    forward, backward = (sum(order[1:], order[0]) for order in (each, each[::-1]))
    assert not torch.equal(forward, backward)
    for run in (expert_parallel.reference, transport.all_to_all):
        assert torch.equal(torch.cat(b.run(lambda rank, run=run: run(*b.args(rank)))), forward)


SKEWED = {"all to one": [(0, 100.0), (1, 90.0), (2, 80.0)], "one has none": [(7, -100.0)]}


@pytest.mark.parametrize("skew", SKEWED)
@pytest.mark.parametrize("fmt", ["bf16", "fp8_block", "nvfp4"])
def test_skewed_routing(ranks, fmt, skew):
    """All tokens choose the same three experts, of one rank; or one expert is never chosen."""
    bias = torch.zeros(16)
    for e, value in SKEWED[skew]:
        bias[e] = value
    b = Block(ranks(4), fmt, bias=bias)
    chosen = torch.cat([route(x, *b.routing)[0] for x in b.x])
    assert (chosen.sort(1).values == torch.tensor([0, 1, 2])).all() if skew == "all to one" else not (chosen == 7).any()
    got = b.run(lambda rank: expert_parallel.reference(*b.args(rank)))
    sent = b.run(lambda rank: transport.all_to_all(*b.args(rank)))
    for y, other, want in zip(got, sent, by_hand(b), strict=True):
        assert torch.equal(y, other)
        assert (y.double() - want).norm() <= {"bf16": 0.01, "fp8_block": 0.05, "nvfp4": 0.15}[fmt] * want.norm()


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, 0, 0, 0), (64, 1, 1, 0), (3, 3, 3, 3)], ids=str)
def test_any_counts(ranks, counts):
    b = Block(ranks(4), "fp8_block", counts=counts)
    got = b.run(lambda rank: expert_parallel.reference(*b.args(rank)))
    sent = b.run(lambda rank: transport.all_to_all(*b.args(rank)))
    assert [len(y) for y in got] == list(counts) and all(torch.equal(y, s) for y, s in zip(got, sent, strict=True))
    if len(set(counts)) == 1:
        equal = b.run(lambda rank: expert_parallel.reference(*b.args(rank, counts=False)))
        assert all(torch.equal(y, e) for y, e in zip(got, equal, strict=True))


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantizing_before_the_gather_gives_the_bits_of_quantizing_after_it(ranks, fmt):
    b = Block(ranks(4), fmt, counts=(6, 6, 6, 6))
    *parts, ids, weights = b.run(lambda rank: dispatch(b.x[rank], b.params, *b.routing, fmt, b.group.name))[0]
    whole = torch.cat(b.x)
    after = [whole] if fmt == "bf16" else quantize(whole, b.params, fmt)
    for got, want in zip([*parts, ids, weights], [*after, *route(whole, *b.routing)], strict=True):
        assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_grouped_matmul_is_a_matmul_for_each_expert(fmt):
    f, x = formats.get(fmt), torch.randn(11, 64).bfloat16()
    params = f.params_from_amax(x.abs().amax().float()) if f.params else []
    ws = [f.quantize_weight(torch.randn(48, 64).bfloat16()) for _ in range(4)]
    ends = torch.tensor([0, 4, 4, 9])
    y = grouped_matmul(f.quantize(x, params), params, [torch.stack(p) for p in zip(*ws, strict=True)], ends, fmt, torch.bfloat16)
    assert y[9:].abs().max() == 0 and y[0:4].abs().max() > 0
    for e, rows in ((1, slice(0, 4)), (3, slice(4, 9))):
        want = f.dequantize(f.quantize(x, params), params)[rows] @ f.dequantize_weight(ws[e]).t()
        torch.testing.assert_close(y[rows].float(), want, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_static_shapes_give_the_reference_s_bits(ranks, fmt, tokens):
    """As GPUs run experts: some are other ranks', and none is asked for its number of rows."""
    b = Block(ranks(2), fmt, counts=(tokens, tokens))
    parts, (ids, weights) = transport.moe._quantized(b.x[0], b.params, fmt), route(b.x[0], *b.routing)
    for rank in range(2):
        args = parts, b.params, ids, weights, *b.mine[rank], torch.bfloat16
        assert torch.equal(transport.static(*args), experts.reference(*args))


def test_each_expert_has_its_own_static_scale_of_the_middle():
    b = Block(SimpleNamespace(world_size=1, name=""), "fp8_tensor", counts=(7,), n=4, k=2)
    parts, (ids, weights) = quantize(b.x[0], b.params, "fp8_tensor"), route(b.x[0], *b.routing)
    first, gate, up, down, _, act, fmt = b.mine[0]
    own, one = (experts(parts, b.params, ids, weights, first, gate, up, down, [torch.tensor(scales)], act, fmt, torch.bfloat16)
                for scales in ([0.01, 0.02, 0.03, 0.04], [0.01] * 4))
    alone = (ids == 0).any(1) & ~((ids > 0) & (weights > 0)).any(1)
    assert not torch.equal(own, one) and torch.equal(own[alone], one[alone])


# ---------------------------------------------------------------------------------------------- bytes


def counted(group, log: list) -> dict:
    """The group's functions, wrapped so that each call adds (function, bytes sent to others) to rank 0's log."""
    g = resolve(group.name)

    def note(what: str, sent: int) -> None:
        if g.rank() == 0:
            log.append((what, sent))

    def all_gather(x: Tensor) -> Tensor:
        note("all_gather", (g.world_size - 1) * x.numel())
        return g.all_gather(x)

    def all_to_all(x: Tensor) -> Tensor:
        note("all_to_all", x.numel() // g.world_size * (g.world_size - 1))
        return g.all_to_all(x)

    def exchange(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        note("exchange", sum(sent) - sent[g.rank()])
        return g.exchange(x, sent, received)

    return {"all_gather": all_gather, "all_to_all": all_to_all, "exchange": exchange}


@pytest.fixture
def meter(monkeypatch):
    """group -> the log of what rank 0 sends, counted at the group."""
    import dataclasses

    from fusewire import group as groups

    def watch(group) -> list:
        log: list = []
        monkeypatch.setitem(groups._made, group.name, dataclasses.replace(group, **counted(group, log)))
        return log

    return watch


@pytest.mark.parametrize(("fmt", "allowed"), [("nvfp4", 4096), ("fp8_block", 7456)])
@pytest.mark.parametrize("counts", [(3, 3), (3, 2)], ids=str)
def test_bytes_of_a_token_of_deepseek_r1(ranks, meter, fmt, allowed, counts):
    """Hidden 7168, 256 experts, the best 8: one payload message a dispatch, counted at the group."""
    group = ranks(2)
    b = Block(group, fmt, counts=counts, n=256, k=8, hidden=7168, mid=16)
    log = meter(group)
    b.run(lambda rank: expert_parallel.reference(*b.args(rank, counts=counts[0] != counts[1])))
    dispatched, *combined = log
    a_token = dispatched[1] / b.counts[0]
    assert a_token == {"nvfp4": 3584 + 448 + 8 + 32, "fp8_block": 7168 + 224 + 8 + 32}[fmt] and a_token <= allowed
    assert len(combined) == 1 and combined[0][1] == b.counts[1] * 7168 * 2  # the combine, in bf16


def test_counts_are_exchanged_once_a_step(ranks, meter):
    whole, group = model("qwen3_moe"), ranks(2)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, dp=2))
    log = meter(group)
    answers(shards, group, [tiny.ids(1, 5), tiny.ids(1, 3)])
    assert log[0] == ("all_gather", 8) and [what for what, _ in log[1:]] == ["exchange"] * 4  # two layers, there and back


def test_all_to_all_sends_what_was_chosen(ranks, meter):
    group = ranks(4)
    b = Block(group, "nvfp4", counts=(200, 3, 3, 3))
    log = meter(group)
    b.run(lambda rank: transport.all_to_all(*b.args(rank)))
    ids = route(b.x[0], *b.routing)[0].long() // 4
    reached = sum((ids == r).any(1).sum().item() for r in (1, 2, 3))
    record = 128 // 2 + 128 // 16 + 3 + 12
    assert [what for what, _ in log] == ["all_to_all", "exchange", "exchange"]
    assert log[0][1] == 24 and log[1][1] == reached * record
    expected = moe.transports(b.x[0], b.routing[0], 3, 4, "nvfp4", 800, 4)
    assert reached < 600 and expected["all_to_all"][0] < expected["all_gather"][0] == 3 * 200 * (record + 256)


def test_an_all_to_all_is_refused_while_a_graph_is_captured(ranks, monkeypatch):
    b = Block(ranks(2), "fp8_block", counts=(2, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FusewireError, match="all_to_all, chosen for 2 tokens, asks the device how many go to each rank"):
        transport.all_to_all(*b.args(0))


def test_the_transport_is_chosen_by_bytes_and_messages(ranks):
    """Few tokens: the all-gather, for it has fewer messages. Many tokens on many ranks: the all-to-all."""
    few, many = (Block(ranks(4), "nvfp4", counts=(n, 0, n, 2 * n), hidden=512) for n in (2, 4096))
    for b, name in ((few, "reference"), (many, "all_to_all")):
        tuning.use(b.group, None, GLOO)
        chosen = {expert_parallel.select(*b.args(rank)).backend.name for rank in range(4)}  # whatever a rank itself holds
        assert chosen == {name} and expert_parallel.select(*b.args(0)).how == "modelled"
    found = moe.transports(few.x[0], few.routing[0], 3, 4, "nvfp4", 8, 4)
    assert found == {"all_gather": (3 * 2 * (256 + 32 + 3 + 12 + 1024), 2), "all_to_all": (4858, 3)}
    assert moe.ranks_reached(256, 128, 8) == pytest.approx(0.9966, abs=1e-4)


# ---------------------------------------------------------------------------------------------- refusals


def test_refusals(ranks):
    group = ranks(2)
    whole = model("qwen3_moe", num_experts=5)
    with pytest.raises(InputError, match="5 experts do not divide over 2 ranks"):
        simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group))
    with pytest.raises(InputError, match="dp=2 times tp=2 is not the number of ranks, 2"):
        layout(fake_group(2), 2, 2, None)
    for how, sentence in (({"dp": 0}, "2 ranks do not divide into dp=0"), ({"tp": 3}, "2 ranks do not divide into tp=3")):
        with pytest.raises(InputError, match=sentence):
            layout(fake_group(2), **{"dp": None, "tp": None, "ep": None, **how})
    shards = simulate(group, lambda rank: parallelize(model("qwen3_moe"), group, dp=2))
    with pytest.raises(InputError, match=r"this rank has no tokens in this step; call fusewire\.models\.idle\(model\)"):
        shards[0](tiny.ids(1, 1)[:, :0])
    with pytest.raises(InputError, match="ep=1: experts are spread over all 2 ranks"):
        layout(fake_group(2), 2, None, 1)
    with pytest.raises(FormatError, match="nvfp4 needs a multiple of 16 input features and the down projections have 24"):
        parallelize(model("qwen3_moe", moe_intermediate_size=24, head_dim=64), fake_group(1), "nvfp4")
    with pytest.raises(InputError, match="OlmoeSparseMoeBlock is not a mixture of experts that is known here"):
        parallelize(tiny.model("olmoe", num_experts=4, num_experts_per_tok=2), fake_group(1))
    with pytest.raises(InputError, match="this rank has 3 rows and the counts \\[3, 2\\] say 2"):
        simulate(group, lambda rank: moe.all_gather_v([torch.zeros(3, 2)], [3, 2], group.name))
    with pytest.raises(InputError, match="1 token counts were given for 2 ranks"):
        simulate(group, lambda rank: moe.all_gather_v([torch.zeros(3, 2)], [3], group.name))


def test_a_grid_of_ranks(ranks):
    group = ranks(6)
    found = simulate(group, lambda rank: [(g.world_size, g.rank(), g.all_gather(torch.tensor([rank], dtype=torch.uint8)).tolist())
                                          for g in grid(group, 3)])
    assert found[4] == [(2, 1, [1, 4]), (3, 1, [3, 4, 5])]
    with pytest.raises(InputError, match="6 ranks do not divide into rows of 4"):
        simulate(group, lambda rank: grid(group, 4))


# ---------------------------------------------------------------------------------------------- processes


def gloo_rank(rank: int, world: int, family: str, how: dict, tokens: list[Tensor]) -> Tensor:
    shard = parallelize(model(family, torch.bfloat16, heads=8, kv_heads=8), **how)
    with torch.no_grad():
        ids = tokens[rank // (world // how["dp"])]
        if ids.shape[1]:
            return shard(ids, use_cache=False).logits
        idle(shard)
        return torch.zeros(0)


@pytest.mark.dist
@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize(("world", "how"), [(2, {"dp": 2}), (4, {"dp": 2, "tp": 2}), (8, {"dp": 8})], ids=str)
def test_gloo_ranks_have_the_bits_of_threads(ranks, family, world, how):
    tokens = [tiny.ids(1, n, seed=n)[:, :n] for n in (5, 0, 1, 12, 3, 0, 2, 7)][:how["dp"]]
    whole, group = model(family, torch.bfloat16, heads=8, kv_heads=8), ranks(world)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, **how))
    want = answers(shards, group, [tokens[rank // (world // how["dp"])] for rank in range(world)])
    got = run_ranks(gloo_rank, world, world, family, how, tokens, timeout_s=90)
    assert all(torch.equal(g, torch.zeros(0) if w is None else w) for g, w in zip(got, want, strict=True))


def mesh_rank(rank: int) -> list[Tensor]:
    """Logits by dp and tp, and by device meshes that say the same."""
    names = ("dp", "tp")
    ways = [{"dp": 2, "tp": 2}, {"group": init_device_mesh("cpu", (2, 2), mesh_dim_names=names)},
            {"dp": 4}, {"group": init_device_mesh("cpu", (4,), mesh_dim_names=names[:1])},
            {}, {"group": init_device_mesh("cpu", (4,), mesh_dim_names=names[1:]), "ep": 4}]
    for mesh, given, sentence in (
            (init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp")), {}, "has the dimensions ('tp', 'dp'); name them dp, tp"),
            (DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=names), {}, "holds the ranks [0, 2, 1, 3]; one of two dimensions"),
            (ways[1]["group"], {"dp": 4}, "dp=4 and the device mesh has dp=2; leave dp out")):
        with pytest.raises(InputError, match=re.escape(sentence)):
            parallelize(model("qwen3_moe"), mesh, **given)
    with torch.no_grad():
        return [parallelize(model("qwen3_moe", heads=8), **how)(tiny.ids(1, 6), use_cache=False).logits for how in ways]


@pytest.mark.dist
def test_a_device_mesh_says_dp_and_tp():
    for found in run_ranks(mesh_rank, 4, timeout_s=90):
        assert all(torch.equal(a, b) for a, b in zip(found[::2], found[1::2], strict=True)) and not torch.equal(found[0], found[2])
