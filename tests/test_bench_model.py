"""`fusewire bench model` on CPUs: what it writes, its floor, and that a fused model with other logits is not measured."""
from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from command import forked
from dist import run_ranks
from rich.console import Console

from fusewire import compat
from fusewire import group as groups
from fusewire.backends.cuda import gemm
from fusewire.bench import cases, experts, floor, model, repeat, results, shapes
from fusewire.bench.repeat import repeating
from fusewire.bench.stack import stack
from fusewire.compiler import capture
from fusewire.compiler.capture import compile
from fusewire.config import Config
from fusewire.errors import FusewireError
from fusewire.models.layers import VocabParallelEmbedding
from fusewire.models.parallelize import resolve
from fusewire.models.slices import even
from fusewire.op import OPS, op_of

CPU = torch.device("cpu")
FIELDS = {"suite", "shape", "layers", "format", "world_size", "codegen", "tokens", "candidate", "us", "plan", "gpu", "torch",
          "date"}
NAMES = ("unfused", "fused", "floor")
ARGS = Namespace(shape="tiny", plan="auto", codegen="fx", loopback=True, eager=False, context=8, tiles=[])


def bench(*args: object, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fusewire", "bench", "model", "--shape", "tiny", *map(str, args)],
                          capture_output=True, text=True, timeout=timeout)


def test_a_prompts_program_settles_on_a_gpu():
    """Before it is timed; not a step, which is below the power limit, nor what is on a CPU or has experts."""
    gpu, found = torch.device("cuda", 0), {}
    for shape, decode, device in (("tiny", False, gpu), ("tiny", True, gpu), ("tiny-experts", False, gpu), ("tiny", False, CPU)):
        found[shape, decode, device.type] = model.settles(Namespace(shape=shape, decode=decode), device)
    assert list(found.values()) == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.dist
def test_two_ranks_print_write_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "lines.jsonl", tmp_path / "plot.png"
    done = bench("-tp", 2, "--layers", 1, "--tokens", "8,33", "--plan", "sharded", "--out", out, "--plot", plot)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line.keys() == FIELDS and line["us"] > 0 and line["suite"] == "model" for line in lines)
    assert {(line["tokens"], line["candidate"], line["plan"]) for line in lines} == {
        (tokens, name, plan) for tokens, plan in ((8, "sharded"), (33, "replicated")) for name in NAMES} | {
        (8, "floor:sharded", "sharded")}
    assert re.search(r"^fp8_tensor +8 +sharded +\d+\.\d{3} ", done.stdout, re.M), done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_decode_in_loopback(tmp_path):
    out = tmp_path / "lines.jsonl"
    done = bench("-tp", 2, "--layers", 1, "--tokens", "1,3", "--decode", "--context", 8, "--loopback", "--formats", "bf16",
                 "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line.keys() == FIELDS | {"loopback", "context"} and line["suite"] == "decode" for line in lines)
    assert {(line["tokens"], line["candidate"]) for line in lines} == {(n, c) for n in (1, 3) for c in NAMES}


@pytest.mark.dist
def test_a_stack_with_experts(tmp_path):
    out = tmp_path / "lines.jsonl"
    done = bench("--shape", "tiny-experts", "-tp", 2, "--layers", 1, "--tokens", "8,33", "--formats", "fp8_block", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line.keys() == FIELDS and line["us"] > 0 and line["shape"] == "tiny-experts" for line in lines)
    assert {(line["tokens"], line["candidate"]) for line in lines} == {(n, c) for n in (8, 33) for c in (*NAMES, "floor:unfused")}
    assert re.search(r"^fp8_block +33 +\d+\.\d{3} ", done.stdout, re.M), done.stdout


@pytest.mark.dist
def test_a_deep_decode_step_on_two_ranks(tmp_path):
    out = tmp_path / "lines.jsonl"
    done = bench("-tp", 2, "--layers", 5, "--tokens", "4", "--decode", "--context", 8, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["candidate"] for line in lines} == {*NAMES, *results.OP_ALONE} and {line["layers"] for line in lines} == {5}
    assert re.search(r"^all_reduce_norm_quant alone, us; what a step saves", done.stdout, re.M), done.stdout


@pytest.mark.parametrize(("command", "sentence"), {
    "--shape tiny-experts --decode": "tiny-experts has experts, of which a prompt is measured between ranks, as FX runs it; leave "
                                     "--decode out",
    "--shape tiny-experts --loopback": "tiny-experts has experts, ",
    "--shape experts": "unknown shape 'experts'; known: llama-3-70b, llama-3-8b, tiny, deepseek-r1, tiny-experts",
    "--layers 0": "--layers 0 is too small; give 1 or more",
    "--decode --context 1": "--context 1 is too small; give 2 or more",
    "-tp 1": "--tensor-parallel-size 1 is too small; give 2 or more",
    "--formats fp7": "unknown quantization 'fp7'; choose one of fp8, ",
    "--tokens x": "argument --tokens: 'x' is not a list of positive whole numbers",
    "--tiles 100": "no tile has 100 columns; known: 64, 96, 128, 160, 192, 224, 256",
    "--shape tiny-experts --tiles 256": "tiny-experts has experts, of which a prompt is measured between ranks, as FX runs it; "
                                        "leave --tiles out",
}.items())
def test_a_refusal_is_one_sentence(tmp_path, command, sentence):
    done = forked(tmp_path, "bench", "model", "--shape", "tiny", *command.split())
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"fusewire: {sentence}"), done.stderr


def captured(group, decode=False, config=None, layers=1):
    """(a tiny stack compiled and run once unfused, its inputs, its logits)."""
    m = stack(shapes.get("tiny"), layers, "fp8_tensor", group, CPU, (4, ARGS.context) if decode else None)
    compiled = compile(m, config or Config(), {"input_ids": 0} if decode else None)
    compiled.plan = "unfused"
    inputs = (model.decode_inputs if decode else model.prompt_inputs)(4, ARGS, CPU)
    return compiled, inputs, compiled(**inputs).logits


def test_programs_with_other_tiles_are_compared_and_measured(monkeypatch, capsys):
    g, checked, timed = groups.loopback_group(2), [], []
    m = stack(shapes.get("tiny"), 2, "fp8_tensor", g, CPU)
    inner = model.check

    def check(got, want, *rest):
        checked.append(dict(gemm._given))
        inner(got, want, *rest)

    class Noting(model.Repeating):
        def run(self, **inputs):
            timed.append((self.plan, *gemm._given.values()))
            return super().run(**inputs)

    monkeypatch.setattr(model, "check", check)
    compiled = Noting(m, Config(), capture.TOKEN_DIMS, layers=list(m.model.layers))
    args = Namespace(**{**vars(ARGS), "tiles": [(256, False), (160, True)], "decode": False, "plan": "sharded"})
    us, plan = model.measure(compiled, model.prompt_inputs(8, ARGS, CPU), args, g, CPU)
    groups.close(g)
    assert plan == "sharded" and us.keys() == {*NAMES, "floor:sharded", "fused:256", "fused:160t"}
    assert checked == [{}] * 3 and set(timed) == {
        (p,) for p in ("unfused", "sharded", "floor", "floor:sharded")} | {("sharded", 256, False), ("sharded", 160, True)}
    us = {"unfused": 30.0, "fused": 20.0, "floor": 10.0, "fused:160t": 15.0}
    results.print_model(Console(width=200), [{"format": "fp8_tensor", "tokens": 8, "candidate": c, "us": t, "plan": "sharded"}
                                             for c, t in us.items()])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["fused:160t", "fp8_tensor", "8", "0.015", "+100.0%", "25.0%"]


def test_floors_have_tokens_whose_embeddings_this_rank_holds(monkeypatch):
    """Without the ranks' sum, others would be zeros: rows that are all alike, which no prompt has."""
    for rank, held in ((0, range(51)), (1, range(51, 101))):
        weight = torch.nn.Parameter(torch.ones(51, 4))
        embedding = VocabParallelEmbedding(even(101, rank, 2), 101, 4, "", weight, torch.tensor(0), None)
        assert model.held(torch.nn.Sequential(embedding), torch.arange(101)).unique().tolist() == list(held)
    g, seen = groups.loopback_group(2), {}
    m = stack(shapes.get("tiny"), 1, "fp8_tensor", g, CPU)

    class Noting(model.Repeating):
        def run(self, **inputs):
            seen.setdefault(self.plan, []).append(inputs["input_ids"])
            return super().run(**inputs)

    monkeypatch.setattr(model, "check", lambda *args: None)
    monkeypatch.setattr(model, "timed", lambda runs, *args: [run() for run in runs.values()])
    monkeypatch.setattr(floor, "by_library", lambda plan: floor.replaced(plan, "library", {}))
    compiled = Noting(m, Config(), capture.TOKEN_DIMS, layers=list(m.model.layers))
    given = model.prompt_inputs(64, ARGS, CPU)
    assert given["input_ids"].amax() > 50
    for loopback in (False, True):  # where this rank is all there is
        args = Namespace(**{**vars(ARGS), "decode": False, "plan": "sharded", "loopback": loopback})
        model.measure(compiled, given, args, g, CPU)
        assert seen.keys() == {"unfused", "sharded", "floor", "floor:sharded", *([] if loopback else ["library"])}
        for plan, ids in seen.items():
            own = loopback or plan.startswith("floor")
            assert all(int(i.amax()) <= 50 if own else torch.equal(i, given["input_ids"]) for i in ids)
        seen.clear()
    groups.close(g)


def test_the_floor_sends_nothing_and_computes_the_rest():
    g = groups.loopback_group(2)
    compiled, inputs, _ = captured(g)
    found, _ = compiled.last
    found.others["floor"] = plan = floor.without_wire(found.unfused)
    left = [op_of(n).name for n in plan.gm.graph.nodes if op_of(n)]
    before = [op_of(n).name for n in found.unfused.gm.graph.nodes if op_of(n)]
    assert before.count("all_reduce") == 3 and before.count("all_gather") == 1
    assert left == [name for name in before if name not in ("all_reduce", "all_gather")]
    assert plan.sent(4) == (0, 0) and found.unfused.sent(4)[0] > 0
    compiled.plan = "floor"
    logits = compiled(**inputs).logits
    assert logits.shape == (1, 1, 101) and logits.isfinite().all()
    assert torch.equal(logits[..., :50], logits[..., 51:101])  # the gather of 51 + 51 columns repeats this rank's


@pytest.mark.parametrize("fmt", ["bf16", "fp8_token", "mxfp8:128x4"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", cases.OPS_MEASURED)
def test_an_op_without_its_wire(name, world_size, fmt, monkeypatch):
    """Of one rank it is the op itself; of two, a sum keeps this rank's part and a gather repeats it."""
    g = groups.loopback_group(world_size)
    # peers that send what this rank sends to gathers, and zeros to sums
    silent = groups.Group(g.name, world_size, lambda: 0, lambda x: x.repeat(world_size),
                          lambda x: torch.cat([x.chunk(world_size)[0], x.new_zeros(x.numel() - x.numel() // world_size)]))
    monkeypatch.setitem(groups._made, g.name, silent)
    args = cases.inputs(cases.Case(OPS[name], "a layer", fmt, 8, 32, 32, g), 0, CPU)
    got = floor.WITHOUT_WIRE[name](*args)
    if name == "all_reduce_norm_quant":  # whose reference cuts the sum, and would then repeat its first half
        monkeypatch.setitem(groups._made, g.name, groups.loopback_group(1))
    want = OPS[name].reference(*args)
    for y, z in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (got, want)), strict=True):
        assert torch.equal(y.view(torch.uint8), z.view(torch.uint8))


def test_the_sharded_floor_sends_nothing():
    compiled, inputs, _ = captured(groups.loopback_group(2))
    found, size = compiled.last
    plan = found.others["floor"] = floor.without_wire(found.choose(size, "sharded"))
    assert found.choose(size, "sharded").sent(size)[0] > 0 and plan.sent(size) == (0, 0)
    compiled.plan = "floor"
    assert compiled(**inputs).logits.isfinite().all()


def two_ranks(rank):
    compiled, inputs, want = captured(resolve(None))
    found, _ = compiled.last
    found.others["library"] = plan = floor.by_library(found.unfused)
    assert not [n for n in plan.gm.graph.nodes if op_of(n) and "group" in op_of(n).params]
    compiled.plan = "library"
    return [want, compiled(**inputs).logits]


@pytest.mark.dist
def test_the_librarys_collectives_give_the_same_logits():
    """Of two ranks a sum has one order, so even its bits are the same."""
    for want, got in run_ranks(two_ranks, 2):
        assert torch.equal(want, got)


def with_experts(rank):
    """What a floor that runs too early says, then of each program whether its logits are the unfused ones, and (dtype, bytes) of
    what it gathers by the library."""
    args, g, sent = Namespace(**{**vars(ARGS), "shape": "tiny-experts", "loopback": False}), resolve(None), []
    compiled = compile(stack(shapes.EXPERTS["tiny-experts"], 2, "fp8_block", g, CPU), Config())
    inputs = model.prompt_inputs(12, args, CPU, rank)
    compiled.plan = "unfused"
    want, (found, size) = compiled(**inputs).logits, compiled.last
    found.others = experts.programs(found.choose(size, "auto"), 12, CPU)
    gather = compat.functional_all_gather
    compat.functional_all_gather = lambda x, *args: sent.append((str(x.dtype), x.numel() * x.element_size())) or gather(x, *args)
    out: list = []
    for compiled.plan in ("floor", *found.others):
        try:
            out.append([bool(torch.equal(compiled(**inputs).logits, want)), list(map(list, sent))])
        except FusewireError as e:
            out.append(str(e))
        sent.clear()
    return out


@pytest.mark.dist
def test_programs_of_a_stack_with_experts():
    """The library sends bf16 tokens and logits and gives the same bits; a floor sends none, and its experts, which have the same
    work to do, give the same bits too."""
    each = [["torch.bfloat16", 12 * 64 * 2], ["torch.float32", 12 * 16 * 4]]
    for early, library, floor_, floor_library in run_ranks(with_experts, 2):
        assert early == "nothing has come yet to the experts of 12 tokens a rank; run the `library` program first"
        assert library == [True, 2 * each]
        assert floor_ == floor_library == [True, []]


def test_workspaces_are_for_the_tokens_of_all_ranks():
    """Ranks with experts have tokens of their own, others hold the same ones."""
    for shape, most in (("tiny", 12), ("tiny-experts", 36)):
        assert model.most_tokens(Namespace(shape=shape, tokens=[12, 4]), 3) == most
    g = groups.loopback_group(2)
    compiled = compile(stack(shapes.EXPERTS["tiny-experts"], 1, "fp8_block", g, CPU), Config())
    compiled(**model.prompt_inputs(12, Namespace(shape="tiny-experts"), CPU))
    found, size = compiled.last
    assert found.tokens(size) == 24


def test_exposed_dispatch_in_the_table(capsys):
    from rich.console import Console

    lines = [{"format": "nvfp4", "tokens": 1000, "world_size": 2, "candidate": c, "us": us, "plan": "sharded"}
             for c, us in {"unfused": 30e3, "fused": 12e3, "floor": 10e3, "floor:unfused": 22e3}.items()]
    results.print_experts(Console(width=200), lines)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "nvfp4", "1000", "30.000", "12.000", "22.000", "10.000", "66667", "166667", "+150.0%", "8.000", "2.000", "75%"]


def test_inductor_keeps_the_caches_of_two_layers_apart():
    """They are written to, and one fake value stands for both."""
    want, got = (captured(groups.loopback_group(2), True, Config(codegen=code), 2)[2] for code in ("fx", "inductor"))
    assert float((got - want).double().norm() / want.double().norm()) < model.FAR


def test_a_decode_step_sees_the_cache_and_the_new_token():
    g = groups.loopback_group(2)
    compiled, inputs, first = captured(g, decode=True)
    again = compiled(**inputs).logits
    assert torch.equal(first, again)  # it writes to the same place
    for m in compiled.model.modules():
        if hasattr(m, "cache"):
            m.cache[1, 1, :, :-1] += 1
    changed = compiled(**inputs).logits
    same = [torch.equal(a, b) for a, b in zip(first, changed, strict=True)]
    assert same[:2] == [True, False]  # in loopback the other half of a sum is this one again
    other = compiled(**{**inputs, "input_ids": (inputs["input_ids"] + 1) % 101}).logits
    assert not torch.equal(changed, other)


@pytest.mark.parametrize("wrong", [lambda y: y + 1e-3, lambda y: y * float("nan")])
def test_other_logits_than_the_unfused_models_are_refused(wrong):
    g, y = groups.loopback_group(2), torch.randn(1, 1, 7)
    args = Namespace(**{**vars(ARGS), "loopback": False})
    model.check(y.clone(), y, args, g, CPU)
    with pytest.raises(FusewireError, match=r"the fused logits of \(1, 1, 7\) are off by .* and at most 0 is allowed"):
        model.check(wrong(y), y, args, g, CPU)
    args.codegen = "inductor"
    model.check(y + 0.01, y, args, g, CPU)
    with pytest.raises(FusewireError, match=r"at most 0\.25 is allowed"):
        model.check(-y, y, args, g, CPU)


def deep(decode, make, plans=("unfused", "replicated", "sharded"), seen=lambda compiled: None):
    """Logits of five layers by each plan for several token counts, then the layers' caches."""
    torch._dynamo.reset()
    g = groups.loopback_group(2)
    m = stack(shapes.get("tiny"), 5, "fp8_tensor", g, CPU, (8, ARGS.context) if decode else None)
    caches = [layer.self_attn.cache for layer in m.model.layers] if decode else []
    compiled = make(m, Config(max_tokens=16), {"input_ids": 0} if decode else capture.TOKEN_DIMS)
    seen(compiled)
    found = []
    for tokens in (1, 4) if decode else (8, 7):
        for compiled.plan in plans:
            inputs = (model.decode_inputs if decode else model.prompt_inputs)(tokens, ARGS, CPU)
            found.append(compiled(**inputs).logits.clone())
    groups.close(g)
    return [*found, *caches]


@pytest.mark.parametrize("decode", [True, False])
def test_a_layer_that_runs_for_others_gives_their_logits_and_fills_their_caches(decode):
    want, got = deep(decode, compile), deep(decode, repeating)
    assert len(got) == (11 if decode else 6) and all(map(torch.equal, got, want))

    def reverse(compiled):
        compiled._tensors.reverse()

    assert not any(map(torch.equal, deep(decode, repeating, seen=reverse)[:6], want))


def test_numbers_are_compared_where_they_can_be(monkeypatch):
    monkeypatch.setattr(repeat, "SHALLOW", 3)

    def shallow(compiled):
        compiled.shallow = True

    want = deep(True, repeating, seen=lambda compiled: setattr(compiled, "_tensors", compiled._tensors[:1]))
    assert all(map(torch.equal, deep(True, repeating, seen=shallow), want))


def test_layers_that_are_no_equal_programs_are_refused():
    def other(m, config, token_dims):
        m.model.layers[-1].mlp.act_fn = torch.nn.Sigmoid()
        return repeating(m, config, token_dims)

    with pytest.raises(FusewireError, match=r"the second layer is another program than the last: .*silu.* is where the last "
                                            r"one has .*sigmoid.*; give --layers 3 or fewer"):
        deep(True, other)


def test_what_a_step_saves_beside_what_its_ops_save(capsys):
    us = {"unfused": 10e3, "fused": 9e3, "floor": 8.5e3, "op:unfused": 14.0, "op:fused": 4.0}
    assert results.saved(us, 50) == pytest.approx(1.0) and math.isnan(results.saved({"unfused": 2.0, "fused": 1.0}, 50))
    from rich.console import Console

    lines = [{"format": "bf16", "tokens": 8, "layers": 50, "candidate": c, "us": t, "plan": "replicated"} for c, t in us.items()]
    results.print_model(Console(width=200), lines)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["bf16", "8", "14.00", "4.00", "1000", "100%", "10.0%"]


def test_exposed_communication_and_the_table(capsys):
    assert results.exposed({"unfused": 30.0, "fused": 12.0, "floor": 10.0}) == pytest.approx(0.1)
    assert math.isnan(results.exposed({"unfused": 9.0, "fused": 12.0, "floor": 10.0}))
    from rich.console import Console

    lines = [{"format": "bf16", "tokens": 1000, "candidate": c, "us": us, "plan": "sharded"}
             for c, us in {"unfused": 30e3, "fused": 12e3, "floor": 10e3, "floor:sharded": 11e3}.items()]
    results.print_model(Console(width=200), lines)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "bf16", "1000", "sharded", "30.000", "12.000", "10.000", "11.000", "33333", "83333", "+150.0%", "10.0%", "5.3%"]


def test_inductor_looks_into_a_norm_and_a_quantization(monkeypatch):
    """As it does on GPUs: what is left of our ops is what was not a reference, or exchanges something."""
    seen = []
    monkeypatch.setattr(capture, "INLINED_ON", ("cpu",))
    monkeypatch.setattr(capture.compat, "inductor", lambda gm, fakes, tag: seen.append(gm) or (lambda inputs: gm(*inputs)))
    want = captured(groups.loopback_group(2), config=Config(codegen="inductor"))[2]
    assert {op_of(n).name for n in seen[0].graph.nodes if op_of(n)} == {"all_reduce", "all_gather", "matmul"}
    monkeypatch.undo()
    torch._dynamo.reset()
    assert torch.equal(want, captured(groups.loopback_group(2))[2])
