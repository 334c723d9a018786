"""Choosing among backends: measurements, the model where there are none, workspaces that are too small, and files."""
from __future__ import annotations

import argparse
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from dist import run_ranks
from rich.console import Console

from fusewire import cli, group, screen, timing, tuning
from fusewire.backends import workspace
from fusewire.compiler.capture import compile
from fusewire.compiler.explain import explain
from fusewire.config import GLOO, NVLINK, Config, Link
from fusewire.engine.explain import explain_model
from fusewire.engine.tune import calls_of, inputs, random, tune
from fusewire.errors import InputError, MismatchError
from fusewire.launch import RankContext
from fusewire.models import parallelize
from fusewire.op import Backend, op_of
from fusewire.ops.collectives import reduce_scatter
from fusewire.ops.dense import matmul
from fusewire.ops.fused import matmul_reduce_scatter as OP
from fusewire.ops.moe import expert_parallel
from fusewire.tuning import Tuning

ran: list[str] = []
asked: list[str] = []


def backend(name: str, **facts) -> Backend:
    """The reference under another name, which notes that it was asked and that it ran."""
    def run(x, params, w, bias, fmt, dtype, group):
        ran.append(name)
        return OP.reference(x, params, w, bias, fmt, dtype, group)

    def supports(*args):
        asked.append(name)
        return None

    return Backend(name, run, facts.pop("supports", supports), OP._define(f"test_{name}", run), **facts)


# "small" starts sooner, "large" sends less
SMALL = backend("small", seconds=lambda u: 1e-6 + 2 * u.wire_s + u.matmul_s)
LARGE = backend("large", seconds=lambda u: 30e-6 + u.wire_s + u.matmul_s)
SILENT = backend("silent")
HUNGRY = backend("hungry", nbytes=lambda x, *rest: 100 * x[0].shape[0])
REFUSES = backend("refuses", supports=lambda *args: "it is Tuesday")


@pytest.fixture
def g():
    made = group.loopback_group(2)
    ran.clear()
    asked.clear()
    OP._remembered.clear()
    yield made
    group.close(made)


def use(monkeypatch, *backends: Backend) -> None:
    monkeypatch.setattr(OP, "backends", list(backends))
    OP._remembered.clear()


def args(g, tokens: int = 4, k: int = 8, n: int = 6):
    return [torch.ones(tokens, k)], [], [torch.ones(n, k)], None, "bf16", torch.float32, g.name


def table(us, gpu="cpu", loopback=False, world_size=2) -> Tuning:
    return Tuning(gpu, world_size, loopback, torch.__version__, "2026-01-02", us)


CALL = "matmul_reduce_scatter x=float32[*,8] params= w=float32[6,8] bias=None fmt=bf16 dtype=float32"


# --- the rules

@pytest.mark.parametrize("tokens,best", [
    (1, "a"), (16, "a"), (64, "a"),  # the middle of 16 and 256, by logarithm: the smaller
    (65, "b"), (136, "b"), (256, "b"), (9999, "b"), (0, "a")])
def test_the_measured_size_nearest_in_logarithm_decides(tokens, best):
    t = table({"call": {256: {"a": 2.0, "b": 1.0}, 16: {"a": 1.0, "b": 2.0}}})
    assert t.fastest("call", tokens, ["a", "b"]) == best


def test_ties_go_to_the_earlier_and_only_candidates_count():
    t = table({"call": {16: {"c": 0.5, "a": 1.0, "b": 1.0}, 32: {"c": 0.5}}})
    assert t.fastest("call", 16, ["a", "b"]) == "a" and t.fastest("call", 16, ["b", "a"]) == "b"
    assert t.fastest("call", 32, ["a", "b"]) == "a", "at 32 neither was measured"
    assert t.fastest("call", 16, ["d"]) is None and t.fastest("other", 16, ["a"]) is None


def test_measurements_decide_and_the_choice_says_so(g, monkeypatch):
    use(monkeypatch, SMALL, LARGE, REFUSES)
    assert OP.call(*args(g)) == (CALL, 4)
    measured = table({CALL: {2: {"small": 3.0, "large": 4.0, "reference": 9.0}, 64: {"small": 3.0, "large": 2.0}}})
    tuning.use(g, measured, GLOO)
    for tokens, name in ((2, "small"), (4, "small"), (40, "large"), (64, "large")):
        choice = OP.select(*args(g, tokens))
        assert (choice.backend.name, choice.refused) == (name, ["refuses: it is Tuesday"])
        assert choice.how == f"measured 2026-01-02, tuning {measured.hash}"
    assert OP.select(*args(g, k=10)).how == "modelled", "no such k was measured"


def test_where_nothing_was_measured_the_model_decides(g, monkeypatch):
    use(monkeypatch, LARGE, SMALL)
    tuning.use(g, None, Link(100e-6, 1e6))
    few, many = OP.select(*args(g, 1)), OP.select(*args(g, 64))
    assert (few.backend.name, few.how) == ("small", "modelled") and (many.backend.name, many.how) == ("large", "modelled")
    tuning.use(g, None, Link(0.0, 1e18))  # nothing to hide and nothing to wait for
    assert OP.select(*args(g, 2)).backend.name == "reference"


def test_usage_is_what_the_reference_needs(g):
    u = OP.usage(*args(g, 4, 8, 6))
    assert (u.bytes, u.messages, u.flops) == (4 * 6 * 4 // 2, 1, 2 * 4 * 8 * 6 * 4)


def test_without_a_model_the_first_runs_and_with_one_candidate_nothing_is_chosen(g, monkeypatch):
    use(monkeypatch, SILENT, SMALL)
    assert OP.select(*args(g))[0::2] == (SILENT, "")
    use(monkeypatch, REFUSES)
    choice = OP.select(*args(g))
    assert (choice.backend.name, choice.how) == ("reference", "")


def test_a_call_that_the_workspace_cannot_hold_is_refused(g, monkeypatch):
    use(monkeypatch, HUNGRY)
    assert "has no workspace; call workspace.open(group, nbytes) on every rank" in OP.select(*args(g)).refused[0]
    group.workspaces[g.name] = 1000
    assert OP.select(*args(g, 10)).backend.name == "hungry"
    choice = OP.select(*args(g, 12))
    assert (choice.backend.name, choice.refused) == ("reference", ["hungry: it needs 1200 bytes of a workspace of 1000"])
    group.workspaces[g.name] = "no workspace: no peer access"
    assert OP.select(*args(g)).refused == ["hungry: no workspace: no peer access"]
    group.close(g)
    assert g.name not in group.workspaces


# --- at run time

def test_the_choice_at_run_time_is_made_once_for_each_shape(g, monkeypatch):
    use(monkeypatch, HUNGRY, SILENT)
    group.workspaces[g.name] = 1000
    for tokens in (4, 4, 12, 12, 4):
        OP(*args(g, tokens))
    assert ran == ["hungry", "hungry", "silent", "silent", "hungry"]
    assert asked == ["hungry", "silent"] * 2, "two shapes"
    group.workspaces[g.name] = 2000  # another workspace
    OP(*args(g, 12))
    OP(*args(g, 4))
    tuning.use(g, table({CALL: {4: {"silent": 1.0, "hungry": 2.0}}}), NVLINK)
    OP(*args(g, 4))
    assert ran[-3:] == ["hungry", "hungry", "silent"]


def test_a_remembered_choice_takes_microseconds(g, monkeypatch):
    use(monkeypatch, dataclasses.replace(SMALL, run=lambda *args: None), dataclasses.replace(LARGE, run=lambda *args: None))
    call = args(g)
    OP._run(*call)
    best = min(_seconds(lambda: OP._run(*call)) for _ in range(50))
    first = _seconds(lambda: OP.select(*call))
    print(f"{best * 1e6:.1f} us against {first * 1e6:.0f} us")
    assert best < first / 5, "choosing anew"


def _seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


# --- a compiled model

def compiled(g, config=None):
    return compile(parallelize(tiny.model("llama"), g), config or Config(plan="sharded"))


def lowered(c) -> set[str]:
    plan = c.captures[-1].ranges[0].plans["sharded"]
    return {str(n.target) for n in plan.gm.graph.nodes if op_of(n) is OP}


def test_a_graph_leaves_the_choice_open_where_it_depends_on_the_tokens(g, monkeypatch):
    use(monkeypatch, SMALL, LARGE)
    c = compiled(g, Config(plan="sharded", link=Link(100e-6, 1e6)))
    with torch.no_grad():
        c(input_ids=tiny.ids(1, 12), use_cache=False)
    assert lowered(c) == {"fusewire.matmul_reduce_scatter.default"}
    assert set(ran) == {"large"}
    sites = [s for s in explain(c, 12).sites if "matmul_reduce_scatter" in s.backend]
    assert sites and all("matmul_reduce_scatter.large" in s.backend and "modelled" in s.chosen for s in sites)
    ran.clear()
    tuning.use(g, tuning_of(c, {4: {"small": 1.0, "large": 2.0}, 8: {"small": 2.0, "large": 1.0}}), NVLINK)
    for tokens in (4, 8):
        c(input_ids=tiny.ids(1, tokens), use_cache=False)
    assert ran == ["small"] * 4 + ["large"] * 4
    assert all("matmul_reduce_scatter.small" in s.backend for s in explain(c, 4).sites if "matmul_reduce" in s.backend)
    assert any(how.startswith("measured 2026-01-02") for s in explain(c, 4).sites for how in s.chosen)


def tuning_of(c, sizes) -> Tuning:
    """The same measurements for every call of OP in a compiled model."""
    from fusewire.compiler.rewrite import val

    plan = c.captures[-1].ranges[0].plans["sharded"]
    calls = {OP.call(*val(n.args), at=plan.at(4))[0] for n in plan.gm.graph.nodes if op_of(n) is OP}
    return table({call: sizes for call in calls}, loopback=True)


def test_code_by_inductor_leaves_the_choice_open_too(g, monkeypatch):
    use(monkeypatch, SMALL, LARGE)
    torch._dynamo.reset()
    w = torch.randn(8, 16)

    def f(x):
        return reduce_scatter(matmul([x], [], [w], None, "bf16", torch.float32), g.name) * 2

    c = compile(f, Config(plan="sharded", codegen="inductor", link=Link(1e-3, 1e7)), {"x": 0})
    for tokens in (4, 64, 4):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(c(x), f(x))
    assert ran == ["small", "large", "small"] and len(c.captures) == 1


def test_a_graph_names_the_backend_where_there_is_nothing_to_choose(g, monkeypatch):
    for backends, name in (((), "reference"), ((REFUSES,), "reference"), ((SILENT, SMALL), "test_silent")):
        torch._dynamo.reset()
        use(monkeypatch, *backends)
        c = compiled(g)
        with torch.no_grad():
            c(input_ids=tiny.ids(1, 12), use_cache=False)
        assert lowered(c) == {f"fusewire.matmul_reduce_scatter.{name}"}


def test_a_workspace_that_cannot_be_made_is_said_and_the_reference_runs(g, monkeypatch):
    use(monkeypatch, HUNGRY)
    c = compiled(g, Config(plan="sharded", max_tokens=640))
    with torch.no_grad():
        c(input_ids=tiny.ids(1, 12), use_cache=False)
    assert c.captures[0].workspace_bytes(640) == {g.name: 64000}
    assert ran == [] and lowered(c) == {"fusewire.matmul_reduce_scatter.reference"}
    why = "matmul_reduce_scatter.hungry: no workspace: the workspace of group"
    assert any(r.startswith(why) and "needs a CUDA device" in r for s in explain(c).sites for r in s.refused)


def test_the_workspace_is_opened_once_before_the_first_run(g, monkeypatch):
    use(monkeypatch, HUNGRY)
    opened: list[tuple] = []

    def open_(name, nbytes, device):
        assert ran == [] and torch.arange(3).tolist() == [0, 1, 2], "memory can be allocated here"
        opened.append((name, nbytes, device.type))
        group.workspaces[name] = nbytes

    monkeypatch.setattr(workspace, "open", open_)
    c = compiled(g, Config(plan="sharded", max_tokens=640))
    with torch.no_grad():
        for tokens in (12, 1):  # two captures
            c(input_ids=tiny.ids(1, tokens), use_cache=False)
    assert opened == [(g.name, 64000, "cpu")] and len(c.captures) == 2 and ran == ["hungry"] * 4


@pytest.mark.dist
def test_if_one_rank_cannot_have_a_workspace_none_has_one():
    def program(rank):
        def open_(name, nbytes, device):
            if rank == 1:
                raise RuntimeError("no peer access\nand a stack")
            group.workspaces[name] = nbytes

        workspace.open = open_
        name = dist.group.WORLD.group_name
        workspace.try_open(name, 1000, torch.device("cpu"))
        return group.workspaces[name]

    theirs, own = run_ranks(program, 2)
    assert theirs == "no workspace: opening it: 'why not' is \"\" on rank 0 and \"no peer access\" on rank 1"
    assert own == "no workspace: no peer access"


def test_calls_above_the_workspace_run_otherwise(g, monkeypatch):
    use(monkeypatch, HUNGRY)
    group.workspaces[g.name] = 1000
    c = compiled(g)
    with torch.no_grad():
        for tokens in (8, 12):
            c(input_ids=tiny.ids(1, tokens), use_cache=False)
    assert ran == ["hungry"] * 4 and len(c.captures) == 1
    assert any("matmul_reduce_scatter.hungry: it needs 1200 bytes of a workspace of 1000" in s.refused for s in explain(c).sites)
    assert not any("hungry" in r for s in explain(c, 8).sites for r in s.refused)


# --- files

def written(tmp_path, t: Tuning) -> str:
    file = tmp_path / "tuning.json"
    file.write_text(t.text())
    return str(file)


MEASURED = table({CALL: {4: {"small": 1.25, "reference": 3.0}, 16: {"small": 2.0}}, "b": {1: {"x": 7.0}}})


def test_a_file_holds_what_was_measured(tmp_path, g):
    found = tuning.read(written(tmp_path, MEASURED))
    assert dataclasses.asdict(found) == dataclasses.asdict(MEASURED) and found.hash == MEASURED.hash
    assert json.loads(MEASURED.text().splitlines()[1].rstrip(",")) == {
        "call": CALL, "tokens": 4, "candidate": "small", "us": 1.25}
    assert tuning.load(written(tmp_path, MEASURED), g, torch.device("cpu")).hash == MEASURED.hash


@pytest.mark.parametrize("change,sentence", [
    (lambda t: t.replace("1.25", "0.25"), "was changed after it was written"),
    (lambda t: t[:-40], "is not a file that `fusewire tune` wrote"),
    (lambda t: "[]", "is not a file that `fusewire tune` wrote"),
    (lambda t: t.replace('"version": 1', '"version": 2'), "is of version 2, and this Fusewire reads version 1"),
    (lambda t: t.replace('"us": 1.25', '"us": "fast"'), "is not a file that `fusewire tune` wrote"),
])
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, change, sentence):
    file = tmp_path / "tuning.json"
    file.write_text(change(MEASURED.text()))
    with pytest.raises(InputError, match=sentence) as e:
        tuning.read(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_the_file_of_another_machine_is_refused(tmp_path, g):
    cpu, process = torch.device("cpu"), dataclasses.replace(g, name="somewhere")
    with pytest.raises(InputError, match="was measured on NVIDIA H200, and this is cpu"):
        tuning.load(written(tmp_path, dataclasses.replace(MEASURED, gpu="NVIDIA H200")), g, cpu)
    in_loopback = dataclasses.replace(MEASURED, loopback=True, world_size=1)
    with pytest.raises(InputError, match="was measured in loopback"):
        tuning.load(written(tmp_path, in_loopback), dataclasses.replace(process, world_size=1), cpu)
    assert tuning.load(written(tmp_path, dataclasses.replace(MEASURED, world_size=4)), g, cpu) is None
    with pytest.raises(InputError, match="cannot be read"):
        tuning.load(str(tmp_path / "none.json"), g, cpu)


def test_tune_adds_to_the_file(tmp_path, monkeypatch, capsys):
    """What it measures replaces what the file has of the same call; of others that stays."""
    first = Tuning("cpu", 2, True, torch.__version__, "2026-01-02", {c: {1: {"x": 1.0, "y": 2.0}} for c in "ab"})
    second = dataclasses.replace(first, date="2026-01-03", us={c: {4: {"x": 3.0}} for c in "bc"})
    monkeypatch.setattr("fusewire.engine.tune.tune", lambda *args: second)
    file = tmp_path / "tuning.json"

    def tuned() -> Tuning:
        cli.tune_rank(RankContext(0, 1, 0, torch.device("cpu"), lambda text: None), "m", argparse.Namespace(
            output=file, loopback=True, tensor_parallel_size=2, quantization=None, tokens=None))
        return tuning.read(file)

    assert tuned().us == second.us and f"written to {file}; use it with" in capsys.readouterr().out
    file.write_text(first.text())
    found = tuned()
    assert f"written to {file}, where other calls stay; use it with" in capsys.readouterr().out
    assert found.us == {"a": first.us["a"], **second.us} and found.date == second.date
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_packaged_can_be_read_and_says_where_it_was_measured():
    found = [tuning.read(file) for file in sorted(tuning.PACKAGED.glob("*.json"))]
    assert found and all(t.us and not t.loopback for t in found)
    assert len({(t.gpu, t.world_size) for t in found}) == len(found)  # else the second of them would never be used


def test_the_environment_and_packaged_files(tmp_path, g, monkeypatch):
    cpu = torch.device("cpu")
    assert tuning.load(None, g, cpu) is None
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path)
    for i, t in enumerate((dataclasses.replace(MEASURED, gpu="other"), dataclasses.replace(MEASURED, world_size=4), MEASURED,
                           dataclasses.replace(MEASURED, loopback=True))):
        (tmp_path / f"{i}.json").write_text(t.text())
    assert tuning.load(None, g, cpu).hash == MEASURED.hash
    named = dataclasses.replace(MEASURED, date="2026-03-04")
    (tmp_path / "named").write_text(named.text())
    monkeypatch.setenv("FUSEWIRE_TUNING", str(tmp_path / "named"))
    assert tuning.load(None, g, cpu).hash == named.hash


@pytest.mark.dist
def test_rank_0_reads_and_a_difference_is_named(tmp_path):
    file = written(tmp_path, MEASURED)

    def program(rank):
        g, cpu = group.resolve(dist.group.WORLD.group_name), torch.device("cpu")
        said = [tuning.load(file if rank == 0 else "/none", g, cpu).hash]
        for path in ("/none", file):
            if rank == 1 and path == file:
                tuning.parse = lambda text, where: dataclasses.replace(MEASURED, date="1999")
            try:
                tuning.load(path, g, cpu)
            except (InputError, MismatchError) as e:
                said.append(f"{type(e).__name__} {e}")
        return said

    first, second = run_ranks(program, 2)
    assert first == second and first[0] == MEASURED.hash
    assert first[1].startswith("InputError the tuning /none cannot be read")
    assert first[2].startswith("MismatchError tuning: 'hash' is ") and "on rank 0 and" in first[2]


# --- measuring

def slow(name: str, seconds: float) -> Backend:
    def run(*args):
        time.sleep(seconds)

    return dataclasses.replace(SILENT, name=name, run=run, seconds=None)


def test_tune_measures_what_could_run_and_the_file_decides(g, monkeypatch, tmp_path):
    folder = written_model(tmp_path)
    use(monkeypatch, slow("sleepy", 0.03), REFUSES)
    monkeypatch.setattr(OP, "reference", lambda *args: None)
    monkeypatch.setattr(OP, "_reference", dataclasses.replace(OP._reference, run=lambda *args: time.sleep(0.001)))
    monkeypatch.setitem(timing.ROUND_S, "cpu", 1e-3)
    said: list[str] = []
    found = tune(folder, g, "fp8", torch.device("cpu"), (1, 4, 8), said.append)
    assert (found.gpu, found.world_size, found.loopback) == ("cpu", 2, True)
    assert len(found.us) == 2 and all(call.startswith("matmul_reduce_scatter x=float8_e4m3fn[*,") for call in found.us)
    for sizes in found.us.values():
        assert list(sizes) == [4, 8], "one token does not divide"
        for us in sizes.values():
            assert list(us) == ["sleepy", "reference"] and 1e3 < us["reference"] < us["sleepy"] < 1e5
    assert said == [f"matmul_reduce_scatter, {n} tokens" for n in (4, 8)] * 2
    monkeypatch.undo()
    use(monkeypatch, SILENT, SMALL)
    renamed = {call: {n: {"small": us["reference"], "silent": us["sleepy"]} for n, us in s.items()} for call, s in found.us.items()}
    file = written(tmp_path, dataclasses.replace(found, us=renamed, loopback=False))
    report = explain_model(folder, 2, 8, "fp8", Config(plan="sharded", tuning=file), device="cpu")
    runs = [(s.backends, s.chosen) for s in report.sites if "matmul_reduce_scatter" in s.backend]
    assert len(runs) == 4 and all("matmul_reduce_scatter.small" in names and any(h.startswith("measured") for h in how)
                                  for names, how in runs)


def written_model(tmp_path, family: str = "llama", **sizes):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(tiny.config(family, **sizes).to_json_string(use_diff=False))
    return folder


@pytest.mark.parametrize("call", ["x=float8_e4m3fn", "w=float8_e8m0fnu", "w=uint8", "x=bfloat16", "w=float32"])
def test_random_args_have_their_shapes_strides_and_no_nan(call):
    dtype = getattr(torch, call.partition("=")[2])
    like = torch.empty(6, 4, dtype=dtype).t()
    made = random(like, int, torch.device("cpu"))
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), dtype)
    assert made.float().isfinite().all() and made.float().unique().numel() > 1


def test_explain_for_a_gpu_needs_none(monkeypatch, tmp_path, g):
    """Backends are asked about tensors on that device, and the workspace is taken to be there."""
    def cuda_only(x, *rest):
        return None if x[0].device.type == "cuda" else f"it runs on CUDA devices, not on {x[0].device.type}"

    use(monkeypatch, dataclasses.replace(HUNGRY, supports=cuda_only))
    monkeypatch.setattr(tuning, "gpu_name", lambda device: device.type)
    folder = written_model(tmp_path)
    on = {device: explain_model(folder, 2, 8, "fp8", Config(plan="sharded"), device=device) for device in ("cuda", "cpu")}
    there, here = ([s for s in on[d].sites if "matmul_reduce_scatter" in s.backend] for d in ("cuda", "cpu"))
    assert len(there) == len(here) == 4
    assert all("matmul_reduce_scatter.hungry" in s.backends for s in there)
    assert all("matmul_reduce_scatter.reference" in s.backends for s in here)
    assert {r for s in here for r in s.refused if "hungry" in r} == {
        "matmul_reduce_scatter.hungry: it runs on CUDA devices, not on cpu"}
    over = explain_model(folder, 2, 8, "fp8", Config(plan="sharded", max_tokens=4), device="cuda")
    assert {r for s in over.sites for r in s.refused if "hungry" in r} == {
        "matmul_reduce_scatter.hungry: it needs 800 bytes of a workspace of 400"}
    text = shown(on["cuda"])
    assert "matmul_reduce_scatter.hungry" in text and "the only one" in text, text
    assert "backend" not in shown(on["cpu"]), "on a CPU there is nothing to tell"
    assert "not matmul_reduce_scatter.hungry: it needs 800 bytes of a workspace of 400 (4 sites)" in shown(over)


def shown(report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    screen.sites(console, report)
    return console.export_text()


@pytest.mark.dist
def test_ranks_tune_alike():
    def program(rank):
        with tempfile.TemporaryDirectory() as d:
            OP.backends = [slow("sleepy", 0.01 * (1 + rank))]
            g = group.resolve(dist.group.WORLD.group_name)
            found = tune(written_model(Path(d)), g, None, torch.device("cpu"), (4,))
        return [found.hash, min(us["sleepy"] for sizes in found.us.values() for us in sizes.values())]

    first, second = run_ranks(program, 2)
    assert first == second and first[1] > 20e3, "the slower rank counts"


@pytest.mark.dist
def test_transports_of_experts_are_tuned():
    """Both are measured on experts that tokens are for, and the file decides."""
    def program(rank):
        with tempfile.TemporaryDirectory() as d:
            folder = written_model(Path(d), "qwen3_moe", **tiny.MOE["qwen3_moe"], head_dim=32)
            g, cpu = group.resolve(dist.group.WORLD.group_name), torch.device("cpu")
            _, calls = calls_of(folder, 2, "fp8_token", cpu, 8)
            [call] = [c for c in calls.values() if c.op is expert_parallel]
            args = next(inputs(call, 8, g, cpu))
            found = tune(folder, g, "fp8_token", cpu, (8,))
        [sizes] = found.us.values()
        return [int(args[call.op.params.index("first")]), float(expert_parallel.reference(*args).abs().amax(1).min()),
                {b.name: b.asks for b in expert_parallel.backends if b.name in sizes[4]}, sorted(sizes[4])]

    for rank, (first, least, asks, names) in enumerate(run_ranks(program, 2)):
        assert first == 8 * rank and least > 0, "every token has an expert"
        assert asks == {"all_to_all": True} and names == ["all_to_all", "reference"]
