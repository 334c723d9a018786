"""Compiled steps of ranks that hold different numbers of tokens: padded to one size, with the numbers of steps that are not."""
from __future__ import annotations

import copy

import pytest
import tiny
import torch
from dist import run_ranks
from test_moe import answers, double, model
from test_moe_steps import Counted
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import fusewire
from fusewire import formats
from fusewire.compiler.capture import TOKEN_DIMS
from fusewire.config import Config
from fusewire.errors import InputError
from fusewire.group import simulate
from fusewire.models import parallelize
from fusewire.models.padding import Step, size_for

torch.set_num_threads(1)
COUNTS = (5, 0, 1, 12, 3, 0, 2, 7)
SCALED = [name for name, f in formats.FORMATS.items() if f.params and f.layout == "linear"]  # by the whole tensor


def tokens(counts, rows: int = 1) -> list[Tensor]:
    return [tiny.ids(rows, max(n, 1), seed=10 + i)[:, :n] for i, n in enumerate(counts)]


def padded(shards: list[nn.Module], group, ids: list[Tensor], sizes: tuple[int, ...] = (), fill: int = 0, **more) -> list[Tensor]:
    """The logits of a step as compiled code takes it, here by the code itself; `fill` is the id of a token of padding."""
    def program(rank: int) -> Tensor:
        m = shards[rank]
        step = m.layout.begin_compiled({"input_ids": ids[rank], "use_cache": False, **more}, TOKEN_DIMS, sizes, True)
        step.given["input_ids"][:, ids[rank].shape[1]:] = fill
        return step.cut(m.forward(**step.given)).logits

    return simulate(group, program)


def test_sizes():
    assert [size_for(n, ()) for n in (0, 1, 2, 3, 8, 9, 1000)] == [1, 1, 2, 4, 8, 16, 1024]
    assert [size_for(n, (3, 8)) for n in (0, 1, 3, 4, 8, 9, 16, 17)] == [3, 3, 3, 8, 8, 16, 16, 24]
    for bad in ((0,), (4, 4), (8, 4), (-1, 2)):
        with pytest.raises(InputError, match=r"pad_to is \(.*; give sizes of 1 or more, each larger than the one before"):
            Config(pad_to=bad)


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize(("world", "dp", "rows"), [(2, 2, 1), (4, 4, 2), (4, 2, 1), (8, 8, 1)], ids=str)
def test_float32_equals_the_whole_model(ranks, family, world, dp, rows):
    whole, group = model(family, heads=8, kv_heads=4), ranks(world)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, dp=dp))
    ids = [t for t in tokens(COUNTS[:dp], rows) for _ in range(world // dp)]
    for mine, y in zip(ids, padded(shards, group, ids), strict=True):
        assert y.shape == (*mine.shape, tiny.VOCAB)
        if mine.shape[1]:
            torch.testing.assert_close(y, whole(mine, use_cache=False).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize("fmt", [None, "fp8_token", *SCALED])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_bf16_and_formats_are_as_close_as_without_padding(ranks, family, fmt, world):
    """Error against float64 at most 1.5 times that of the same ranks whose steps are not padded."""
    whole, group = model(family, torch.bfloat16, heads=8), ranks(world)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, fmt, dp=world))
    ids = tokens([9, 0, 1, 16, 7, 0, 1, 30][:world])
    want = [double(whole)(t, use_cache=False).logits[0] for t in ids if t.shape[1]]
    plain = [y.double()[0] for y in answers(shards, group, ids) if y is not None]
    ours = [y.double()[0] for y in padded(shards, group, ids, (6, 20)) if y.shape[1]]
    plain, ours, want = (torch.cat(t) for t in (plain, ours, want))
    assert 0 < (plain - want).norm() and (ours - want).norm() <= 1.5 * (plain - want).norm()


@pytest.mark.parametrize("family", tiny.MOE)
@pytest.mark.parametrize("fmt", SCALED)
@pytest.mark.parametrize(("world", "how"), [(2, {"dp": 2}), (4, {"dp": 2, "tp": 2}), (8, {"dp": 8})], ids=str)
def test_no_scale_knows_of_padding(ranks, family, fmt, world, how):
    """Whatever the tokens of padding are, logits have the same bits: in attention, dense layers, shared experts and experts."""
    whole, group = model(family, torch.bfloat16, heads=8, kv_heads=4, hidden=64, intermediate=128), ranks(world)
    # tokens of padding would have larger values than all others
    whole.get_input_embeddings().weight[0] = 0
    whole.get_input_embeddings().weight[0, :2] = 50
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, fmt, **how))
    ids = [t.clamp(min=2) for t in tokens(COUNTS[:how["dp"]], 2) for _ in range(world // how["dp"])]
    zero, one = (padded(shards, group, ids, fill=fill) for fill in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True)) and zero[0].abs().max() > 0


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (1, 1), (5, 5), (4, 3)], ids=str)
@pytest.mark.parametrize("fmt", [None, *SCALED])
def test_any_counts(ranks, counts, fmt):
    whole, group = model("qwen3_moe"), ranks(2)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, fmt, dp=2))
    ids = tokens(counts, 2)
    plain, ours = answers(shards, group, ids), padded(shards, group, ids)
    for mine, y, z in zip(ids, ours, plain, strict=True):
        assert y.shape == (*mine.shape, tiny.VOCAB) and y.isfinite().all()
        if z is not None:
            assert (y - z).norm() <= 1e-4 * z.norm()


@pytest.mark.parametrize("counts", [(5, 0, 2, 12), (1, 0, 2, 0)], ids=str)
@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_tokens_logits_are_those_of_own_tokens(ranks, counts, keep):
    """Where a rank has fewer, and where the padded row has fewer, too."""
    whole, group = model("qwen3_moe"), ranks(4)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(whole), group, dp=4))
    ids = tokens(counts, 2)
    every, last = padded(shards, group, ids), padded(shards, group, ids, logits_to_keep=keep)
    for mine, y, z in zip(ids, every, last, strict=True):
        assert z.shape[1] == min(keep, mine.shape[1])
        torch.testing.assert_close(z, y[:, max(mine.shape[1] - keep, 0):], rtol=1e-5, atol=2e-5)


def test_what_a_cuda_graph_holds_stays_where_it_is(ranks):
    """A graph reads how many tokens are a rank's own from one place, and returns one object."""
    group = ranks(2)
    shards = simulate(group, lambda rank: parallelize(copy.deepcopy(model("qwen3_moe")), group, dp=2))
    seen = []
    for counts in ((3, 4), (1, 2), (4, 4)):
        padded(shards, group, tokens(counts), (4,))
        seen.append([(m.layout.padding.data_ptr(), m.layout.padding.tolist()) for m in shards])
    assert [[at for at, _ in s] for s in seen] == [[at for at, _ in seen[0]]] * 3
    assert [[own for _, own in s] for s in seen] == [[[3, 4], [4, 4]], [[1, 4], [2, 4]], [[4, 4], [4, 4]]]
    out, step = CausalLMOutputWithPast(logits=torch.arange(8).view(1, 4, 2)), Step({}, (1, 2))
    assert step.cut(out).logits.tolist() == step.cut(out)["logits"].tolist() == [[[2, 3], [4, 5]]] and out.logits.shape[1] == 4


# ---------------------------------------------------------------------------------------------- compiled


STEPS = ((5, 0), (5, 5), (1, 3), (0, 0), (8, 7), (1, 1), (0, 1), (16, 2), (3, 8))
# pad_to, and how often that is compiled: for one token and for more, and, where a scale leaves padding out, with and without it
HOW = [(None, (), 2), ("fp8_tensor", (), 4), (None, (4, 16), 1), ("fp8_tensor", (4, 16), 1)]


def steps(rank: int, fmt: str | None, pad_to: tuple[int, ...]) -> list[dict]:
    """Of each step what it gave, what it gives if it is not padded, and what went through the process group."""
    counted, found = Counted(), []
    m = parallelize(model("qwen3_moe"), None, fmt, dp=2)
    compiled = fusewire.compile(m, Config(pad_to=pad_to))
    for counts in STEPS:
        mine = tokens(counts, 2)[rank]
        counted.calls.clear()
        y = compiled(input_ids=mine, use_cache=False).logits
        found.append({"y": y, "calls": dict(counted.calls), "size": compiled.last[1], "captures": len(compiled.captures)})
    for counts, step in zip(STEPS, found, strict=True):
        mine = tokens(counts, 2)[rank]
        plain = m(mine, use_cache=False).logits if mine.shape[1] else fusewire.models.idle(m)
        step["plain"] = step["y"][:, :0] if plain is None else plain
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("fmt", "pad_to", "compilations"), HOW, ids=str)
def test_compiled_steps(fmt, pad_to, compilations):
    """Numbers; one exchange of counts a step and one message a dispatch; and no compilation for a number of tokens."""
    for mine in run_ranks(steps, 2, fmt, pad_to, timeout_s=200):
        for counts, step in zip(STEPS, mine, strict=True):
            assert (step["y"] - step["plain"]).norm() <= 1e-4 * step["plain"].norm()
            # in each of two layers an amax where there is a scale, a dispatch, and a combine, which is an all-to-all
            assert step["calls"] == {"all_gather_single": 1 + 2 * (1 + (fmt is not None)), "all_to_all_single": 2}
            equal = not pad_to and len(set(counts)) == 1 and counts[0]
            assert step["size"] == (counts[0] if equal else size_for(max(counts), pad_to))
        assert mine[-1]["captures"] == compilations


def rows_and_columns(rank: int) -> dict:
    m = parallelize(model("qwen3_moe", torch.bfloat16, head_dim=32), None, "fp8_tensor", dp=2, tp=2)
    compiled, mine, found = fusewire.compile(m), tokens((7, 3), 2)[rank // 2], {}
    for plan in ("unfused", "replicated", "sharded"):
        compiled.plan = plan
        found[plan] = compiled(input_ids=mine, use_cache=False, logits_to_keep=4).logits
    return found


@pytest.mark.dist
def test_every_plan_has_the_unfused_bits_where_rows_hold_other_counts():
    for rank, found in enumerate(run_ranks(rows_and_columns, 4, timeout_s=200)):
        assert found["unfused"].shape[1] == (4, 3)[rank // 2]
        assert all(torch.equal(y, found["unfused"]) for y in found.values())


def other_arguments(rank: int) -> list[float]:
    """How far a padded step is from one that is not, relatively: embeddings with positions; one row of positions for two of ids."""
    m = parallelize(model("qwen3_moe"), None, "fp8_tensor", dp=2)
    compiled, [a, b], off = fusewire.compile(m, Config(pad_to=(8,))), tokens((5, 3), 2), []
    mine = (a, b)[rank]
    at = torch.arange(mine.shape[1])
    for given in ({"inputs_embeds": m.get_input_embeddings()(mine), "position_ids": at[None].expand(2, -1)},
                  {"position_ids": at[None], "input_ids": mine}):
        want = m(**given, use_cache=False).logits
        off.append(float((compiled(**given, use_cache=False).logits - want).norm() / want.norm()))
    return off


@pytest.mark.dist
def test_embeddings_and_positions_are_padded_too():
    assert all(off < 1e-4 for mine in run_ranks(other_arguments, 2) for off in mine)


def generated(rank: int, steps: int) -> list[list[list[int]]]:
    """Greedy texts of two rows of ids each, compiled and not, of prompts of two lengths that grow from bucket to bucket."""
    m = parallelize(model("mixtral"), None, None, dp=2)
    compiled = fusewire.compile(m, Config(pad_to=(4, 8, 16)))
    texts = []
    for call in (compiled, m):
        text = tokens((3, 6), 2)[rank]
        for _ in range(steps):
            text = torch.cat([text, call(input_ids=text, use_cache=False, logits_to_keep=1).logits[:, -1:].argmax(-1)], 1)
        texts.append(text.tolist())
    assert len(compiled.captures) == 1
    return texts


@pytest.mark.dist
def test_greedy_texts_are_those_of_the_model_that_is_not_compiled():
    for compiled, plain in run_ranks(generated, 2, 5):
        assert compiled == plain


# ---------------------------------------------------------------------------------------------- refusals

FIVE_OR_TWO = {"input_ids": ((1, 5), (1, 2)), "use_cache": False}
PADS = "the ranks hold [5, 2] tokens in a row, a compiled step pads them to 8, and rank "
REFUSED = {
    "rows": ({"input_ids": ((2, 5), (1, 5)), "use_cache": False},
             "the ranks hold [2, 1] rows of tokens and a compiled step needs as many on each; give as many rows everywhere, of no "
             "tokens where there are none, or run the model without compiling it"),
    "a cache": ({**FIVE_OR_TWO, "use_cache": None},
                PADS + "0 would keep the padding in a cache; give use_cache=False, or run the model without compiling it"),
    "a mask": ({**FIVE_OR_TWO, "attention_mask": (None, (1, 2))},
               PADS + "1 gives more than token ids, embeddings, positions, use_cache and logits_to_keep; leave it out, or run the "
               "model without compiling it"),
    "which logits": ({**FIVE_OR_TWO, "logits_to_keep": ((1,), None)},
                     PADS + "0 gives a tensor of logits_to_keep; give a number, or run the model without compiling it"),
}


def refusals(rank: int) -> dict[str, str]:
    compiled, said = fusewire.compile(parallelize(model("qwen3_moe"), None, dp=2)), {}
    for what, (given, _) in REFUSED.items():
        mine = {k: v[rank] if isinstance(v, tuple) else v for k, v in given.items()}
        with pytest.raises(InputError) as e:
            compiled(**{k: torch.ones(v, dtype=torch.int64) if isinstance(v, tuple) else v for k, v in mine.items()})
        said[what] = str(e.value)
    assert not compiled.captures
    return said


@pytest.mark.dist
def test_what_cannot_be_padded_is_refused_on_every_rank():
    """In the same words, before anything is compiled."""
    assert run_ranks(refusals, 2) == [{what: sentence for what, (_, sentence) in REFUSED.items()}] * 2


def with_a_cache(rank: int, length: int) -> list[list[int]]:
    m = parallelize(model("qwen3_moe"), None, dp=2)
    ids = tiny.ids(1, length, seed=rank)
    return [fusewire.generate(call, fusewire.static_cache(m, 1, 16), ids, 3).tolist()
            for call in (fusewire.compile(m, Config(pad_to=(1, 4))), m)]


@pytest.mark.dist
def test_a_cache_of_no_padding_is_taken():
    """Prompts of as many tokens as are padded to, and steps of one."""
    for compiled, plain in run_ranks(with_a_cache, 2, 4):
        assert compiled == plain
    with pytest.raises(InputError, match=r"hold \[3, 3\] tokens in a row, a compiled step pads them to 4, and rank 0 would"):
        run_ranks(with_a_cache, 2, 3)


def test_what_is_called_for_another_model(ranks):
    m = simulate(ranks(1), lambda rank: parallelize(model("qwen3_moe"), ranks(1)))[0]
    compiled = fusewire.compile(m)
    with pytest.raises(InputError, match="begin: the ranks of this model hold the same tokens; call the model instead"):
        compiled.begin(input_ids=tiny.ids(1, 4))
    with pytest.raises(InputError, match="idle was given a Compiled, not a module; call a compiled model with inputs of no tokens"):
        fusewire.models.idle(compiled)
