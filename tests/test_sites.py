"""Every collective of a decoder is fused or says why not, in both plans, for every way its linears can be quantized."""
from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from dist import run_ranks
from test_checkpoint import EXPORTERS, export

import fusewire
from fusewire.compiler.capture import Compiled
from fusewire.compiler.explain import Report, report
from fusewire.compiler.passes import RULES, moe
from fusewire.compiler.plan import Capture
from fusewire.compiler.rewrite import arg
from fusewire.config import Bounds, Config
from fusewire.errors import StrictError
from fusewire.group import close, fake_group, loopback_group
from fusewire.op import op_of
from fusewire.ops.collectives import all_reduce
from fusewire.ops.dense import matmul, quantize
from fusewire.ops.fused import all_reduce_norm_quant, norm_quant_all_gather_matmul
from fusewire.ops.norm import rms_norm

torch.set_num_threads(1)
SIZES = {"head_dim": 64, "intermediate": 512}  # every format holds them on two ranks
LAYERS = ["self_attn.o_proj", "mlp.down_proj"]
SITES = ["model.embed_tokens", *(f"model.layers.{i}.{m}" for i in range(2) for m in LAYERS), "lm_head"]
OFF = Bounds(0, -1)


@pytest.fixture
def group():
    made = fake_group(2)
    yield made
    close(made)


def captured(model, config: Config | None = None, **inputs) -> Capture:
    """The one capture of a parallelized model, which does not run."""
    torch._dynamo.reset()
    compiled = fusewire.compile(model, config)
    compiled.capture_only = True
    compiled(**(inputs or {"input_ids": tiny.ids(1, 12), "use_cache": False, "logits_to_keep": 1}))
    [found] = compiled.captures
    return found


def reports(found: Capture, size: int = 12) -> tuple[Report, Report]:
    plans = found.range_of(size).plans
    return report(found, size, plans["replicated"]), report(found, size, plans["sharded"])


LOGITS_STAY = "all_gather stays: it feeds permute of shape ({}), not a matmul"
HEAD_READS_ROWS = "into matmul_reduce_scatter; all_gather stays: it feeds slice of shape (1, 256), not a matmul"
EMBEDDING = "into all_gather_matmul; reduce_scatter stays: its input is masked_fill of shape (12, 256), not a matmul: " \
            "there is nothing to hide it behind"
BOTH = "into all_gather_matmul; into matmul_reduce_scatter"
DYNAMIC = "into all_reduce_norm_quant, quantize after it: its scale needs the whole tensor's amax first"


@pytest.mark.parametrize("family,fmt", [
    *(("llama", fmt) for fmt in (None, "fp8", "fp8_token", "fp8_block", "nvfp4", "mxfp8")),
    *((family, fmt) for family in ("qwen3", "gemma2", "gemma3_text") for fmt in ("fp8", "nvfp4")),
])
def test_every_site_but_the_head(group, family, fmt):
    found = captured(fusewire.parallelize(tiny.model(family, torch.bfloat16, **SIZES), group, fmt), Config(strict=True))
    for r in reports(found):
        sharded = r.plan == "sharded"
        assert [s.module for s in r.sites] == SITES
        why = {s.module: s.why for s in r.sites}
        unfused = {s.module for s in r.sites if s.verdict == "missed"}
        assert unfused == {"lm_head", *(SITES[-2:-1] if sharded else [])}
        assert why["lm_head"] == LOGITS_STAY.format("1, 2, 51")
        assert not r.avoidable_misses and not any(s.avoidable for s in r.sites)
        if sharded:
            assert why[SITES[-2]] == HEAD_READS_ROWS and why[SITES[0]] == EMBEDDING
            assert {why[m] for m in SITES[1:-2]} == {BOTH}
        else:
            waits = fmt in ("fp8", "nvfp4")
            normed_again = family.startswith("gemma")  # what was reduced is normed, added, and normed again to be quantized
            for i, m in enumerate(SITES[:-1]):
                last = i == len(SITES) - 2 or (normed_again and i > 0)
                assert why[m] == (DYNAMIC if waits and not last else "into all_reduce_norm_quant"), m
        assert {s.what for s in r.sites[:-1]} == {"all_reduce"} and r.sites[-1].what == "all_gather"
    assert found.unfused.sent(12)[0] == report(found, 12, found.unfused).sent_after == r.sent_before
    assert r.sent_after < r.sent_before  # in bf16, too: behind the last layer one row is gathered for the head


def test_logits_of_all_tokens(group):
    """Then the head reads what was gathered, and its matmul hides the gather."""
    model = fusewire.parallelize(tiny.model("llama", torch.bfloat16, **SIZES), group, "fp8")
    found = captured(model, None, input_ids=tiny.ids(1, 12), use_cache=False)
    for r in reports(found):
        assert [s.module for s in r.sites if s.verdict == "missed"] == ["lm_head"]
        assert r.sites[-1].why == LOGITS_STAY.format("12, 2, 51")
    assert r.sites[-2].why == BOTH


# ---------------------------------------------------------------------------------------------- static scales

STATIC = ["fp8-static", "ct-tensor", "ct-nvfp4", "modelopt-fp8", "modelopt-embedded"]


@pytest.mark.parametrize("kind", STATIC)
def test_static_scales_are_given_so_quantizing_folds_into_the_all_reduce(group, tmp_path, kind):
    fmt = EXPORTERS[kind][0]
    export(tiny.model("llama", torch.bfloat16, **SIZES), kind, tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scales of a KV cache
        found = captured(fusewire.load(tmp_path / "m", group), Config(strict=True))
    replicated, sharded = reports(found)
    assert {s.why for s in replicated.sites[:-1]} == {"into all_reduce_norm_quant"}
    assert {s.why for s in sharded.sites[1:-2]} == {BOTH}

    nodes = {name: list(p.gm.graph.nodes) for name, p in found.ranges[0].plans.items()}
    folded = [n for n in nodes["replicated"] if op_of(n) is all_reduce_norm_quant]
    assert [arg(n, "fmt") for n in folded] == [fmt] * 4 + ["bf16"] and not any(arg(n, "keep_norm") for n in folded[:4])
    gathers = [n for n in nodes["sharded"] if op_of(n) is norm_quant_all_gather_matmul]
    assert [len(arg(n, "biases")) for n in gathers] == [3, 2] * 2  # q, k and v; gate and up
    assert [n.meta["val"][-len(arg(n, "biases"))].shape[1] for n in gathers] == [128, 256] * 2
    assert [arg(n, "residual") is None for n in gathers] == [True] + [False] * 3 and not any(arg(n, "keep_norm") for n in gathers)
    quantized = [n for n in nodes["sharded"] if op_of(n) is quantize]
    assert len(quantized) == 4  # o_proj's and down_proj's: what the gathers carry is quantized where it is normalized
    assert sharded.messages == 2 * 5 + 1  # a scale that is given needs no message


# ---------------------------------------------------------------------------------------------- strict

def routed(group: str, strict: bool) -> Compiled:
    """A router that reads, in bf16, the norm that quantized experts read too."""
    def block(x, weight, router, w, scale):
        y = rms_norm(all_reduce(x, group), weight, 1e-6, 0.0, True)
        scores = matmul([y], [], [router], None, "bf16", y.dtype)
        return scores, matmul(quantize(y, [], "fp8_token"), [], [w, scale], None, "fp8_token", y.dtype)

    compiled = fusewire.compile(block, Config(strict=strict), {"x": 0})
    compiled.capture_only = True
    return compiled


def router_inputs() -> list[torch.Tensor]:
    h = torch.ones(8, 64, dtype=torch.bfloat16)
    return [h, h[0].clone(), torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(32, 64).to(torch.float8_e4m3fn), torch.ones(32, 1)]


def test_strict_refuses_what_could_have_been_fused(group):
    torch._dynamo.reset()
    loose = routed(group.name, False)
    loose(*router_inputs())
    replicated, sharded = reports(loose.captures[0], 8)
    assert [s.verdict for s in replicated.sites] == ["fused"]
    [site] = sharded.avoidable_misses
    assert "all_gather stays: it feeds quantize, not only matmuls" in site.why
    torch._dynamo.reset()
    with pytest.raises(StrictError, match=r"^strict: 1 of 1 collectives are not fused in the sharded plan, the first in .*not only "
                                          "matmuls; fix that, or switch the rule off to accept it$") as refused:
        routed(group.name, True)(*router_inputs())
    assert refused.value.exit_code == 3


# ---------------------------------------------------------------------------------------------- rules off, token counts

OF_DENSE = sorted(RULES.keys() - {r.name for r in moe.rules})  # a llama has no experts
SAID = {  # rule that is off -> (the plan that would use it, the collective that is left there)
    "fuse_all_gather_matmul": ("sharded", "all_gather"),
    "fuse_matmul_reduce_scatter": ("sharded", "reduce_scatter"),
    "fuse_all_reduce_norm_quant": ("replicated", "all_reduce"),
}


def with_rules(rank: int, named: list[str]) -> list[dict]:
    """For every plan at 6 and at 8 tokens: its numbers, and what its sites say; rules start at 8, or are off."""
    model = fusewire.parallelize(tiny.model("llama", torch.bfloat16, layers=1, **SIZES), None, "fp8")
    rows = []
    for name in named:
        for bounds in (OFF, Bounds(8)) if name == "split_all_reduce" else (OFF,):
            torch._dynamo.reset()
            compiled = fusewire.compile(model, Config(rules={name: bounds}))
            for n in (6, 8):
                for plan in ("unfused", "replicated", "sharded"):
                    compiled.plan = plan
                    logits = compiled(input_ids=tiny.ids(1, n), use_cache=False).logits
                    r = fusewire.explain(compiled)
                    rows.append({"rule": name, "off": bounds == OFF, "tokens": n, "plan": r.plan, "asked": plan, "logits": logits,
                                 "reason": r.why, "why": [s.why for s in r.sites], "avoidable": len(r.avoidable_misses)})
    return rows


@pytest.mark.dist
@pytest.mark.parametrize("named", [OF_DENSE[::2], OF_DENSE[1::2]])
def test_a_rule_that_is_off_says_so_and_changes_no_number(named):
    for rows in run_ranks(with_rules, 2, named):
        want = {r["tokens"]: r["logits"] for r in rows if r["asked"] == "unfused"}
        for r in rows:
            where = {k: v for k, v in r.items() if k != "logits"}
            is_off = r["off"] or r["tokens"] < 8
            if r["rule"] == "split_all_reduce" and r["asked"] == "sharded" and is_off:  # there is no sharded plan without it
                assert r["plan"] == "replicated" and "the rule split_all_reduce is switched off" in r["reason"], where
            else:
                assert r["plan"] == r["asked"], where
            assert torch.equal(r["logits"], want[r["tokens"]]), where
            plan, left = SAID.get(r["rule"], ("", ""))
            sentence = f"{left} stays: the rule {r['rule']} is switched off at {r['tokens']} tokens"
            if r["plan"] == plan:
                assert any(sentence in w for w in r["why"]) == is_off and not r["avoidable"], where
            elif plan:
                assert not any("switched off" in w for w in r["why"][:-1]), where  # the last is the gather of the logits


def token_counts(rank: int) -> list[dict]:
    model = fusewire.parallelize(tiny.model("llama", torch.bfloat16, layers=1, **SIZES), None, "fp8_token")
    compiled = fusewire.compile(model)
    rows = []
    for n in range(1, 10):
        for plan in ("unfused", "sharded"):
            compiled.plan = plan
            logits = compiled(input_ids=tiny.ids(1, n), use_cache=False).logits
        r = fusewire.explain(compiled)
        rows.append({"tokens": r.tokens, "plan": r.plan, "why": r.why, "captures": len(compiled.captures), "logits": logits})
    return rows


@pytest.mark.dist
def test_one_capture_for_every_token_count_but_one():
    for rows in run_ranks(token_counts, 2):
        assert [r["tokens"] for r in rows] == list(range(1, 10))
        assert [r["captures"] for r in rows] == [1] + [2] * 8
        for r in rows:
            n = r["tokens"]
            assert r["plan"] == ("sharded" if n % 2 == 0 and n >= 4 else "replicated")
            if n == 1:
                assert r["why"] == "1 tokens do not divide over 2 ranks"
            elif r["plan"] == "replicated":
                assert r["why"] == f"{n} tokens: the sharded plan takes multiples of 2 from 4 on"


def decoded(rank: int) -> dict:
    model = fusewire.parallelize(tiny.model("llama", torch.bfloat16, **SIZES), None, "fp8")
    compiled, found = fusewire.compile(model), {}
    for plan in ("unfused", "sharded"):
        compiled.plan = plan
        cache = fusewire.static_cache(model, 1, 5 + 64)
        found[plan] = fusewire.generate(compiled, cache, tiny.ids(1, 5), 64, multiple=2)
        found[f"{plan} captures"] = len(compiled.captures)
    return found


@pytest.mark.dist
def test_64_decoded_tokens_take_three_captures_at_most():
    """An odd prompt is read in two steps; the second has one token, as every step of decoding has."""
    for found in run_ranks(decoded, 2):
        assert found["unfused"].shape == (1, 64) and torch.equal(found["unfused"], found["sharded"])
        assert found["unfused captures"] == found["sharded captures"] <= 3


def test_batch_and_length_may_both_vary():
    torch._dynamo.reset()
    g = loopback_group(2)
    compiled = fusewire.compile(fusewire.parallelize(tiny.model("llama"), g))
    for batch, length in ((1, 12), (2, 10), (3, 7)):  # the second time torch lets the batch vary too
        want, got = [], []
        for plan, out in (("unfused", want), ("auto", got)):
            compiled.plan = plan
            out.append(compiled(input_ids=tiny.ids(batch, length), use_cache=False).logits)
        assert torch.equal(want[0], got[0]) and got[0].shape[:2] == (batch, length)
        shown = fusewire.explain(compiled)
        assert shown.tokens == batch * length
        assert shown.plan == "replicated" or batch == 1
        sent = [s.sent_before for s in shown.sites if s.module == "model.layers.0.mlp.down_proj"]
        assert sent == [batch * length * 64 * 4], "a ring of two ranks sends each element once"
    assert "the token count depends on 2 sizes that vary" in shown.why
    close(g)
