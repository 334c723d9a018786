"""`fusewire bench ops` on CPUs: what it writes, its means and ideals, and that wrong numbers are not measured."""
from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from command import forked

from fusewire import group as groups
from fusewire.backends.cuda import gemm
from fusewire.bench import cases, model, ops, peers, results, shapes
from fusewire.bench.checks import Check
from fusewire.errors import InputError
from fusewire.launch import RankContext
from fusewire.op import OPS

CPU = torch.device("cpu")
FIELDS = {"suite", "op", "format", "world_size", "M", "K", "N", "accumulation", "candidate", "us", "ideal_us", "gpu", "torch",
          "date"}
ALL = ",".join(cases.OPS_MEASURED)
FORMATS = ("bf16", "fp8_tensor", "fp8_token", "fp8_block", "mxfp8", "nvfp4")


def bench(*args: object, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fusewire", "bench", "ops", *map(str, args)], capture_output=True, text=True,
                          timeout=timeout)


def case(name: str, fmt: str = "fp8_token", m: int = 8, group=None) -> cases.Case:
    return cases.Case(OPS[name], "a layer", fmt, m, 32, 32, group or groups.loopback_group(2))


# ---------------------------------------------------------------------------------------------- the command

@pytest.mark.dist
def test_two_ranks_print_write_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "lines.jsonl", tmp_path / "plot.png"
    done = bench("--shape", "tiny", "-tp", 2, "--tokens", "8,33", "--ops", ALL, "--formats", "fp8_token", "--out", out,
                 "--plot", plot)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line.keys() == FIELDS for line in lines)
    assert all(line["suite"] == "ops" and line["world_size"] == 2 and line["us"] > 0 and line["ideal_us"] > 0 for line in lines)
    found = {(line["op"], line["K"], line["N"], line["M"]): set() for line in lines}
    for line in lines:
        found[line["op"], line["K"], line["N"], line["M"]].add(line["candidate"])
    matmul = {"fusewire", "fusewire:reference", "gloo", "gemm", "copy"}
    assert found == {("all_gather_matmul", 64, 64, 8): matmul, ("matmul_reduce_scatter", 32, 64, 8): matmul,
                     ("all_gather_matmul", 64, 192, 8): matmul, ("matmul_reduce_scatter", 96, 64, 8): matmul,
                     ("all_reduce_norm_quant", 64, 64, 8): matmul - {"gemm"} | {"norm"},
                     ("all_reduce_norm_quant", 64, 64, 33): matmul - {"gemm"} | {"norm"},
                     ("norm_quant_all_gather_matmul", 64, 64, 8): matmul | {"norm", "all_gather_matmul", "copy:norm"},
                     ("norm_quant_all_gather_matmul", 64, 192, 8): matmul | {"norm", "all_gather_matmul", "copy:norm"}}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^gate_up +8 +\d+\.\d +\d+\.\d \d+\.\d\d ", done.stdout, re.M), done.stdout
    assert re.search(r"^fp8_token +1-127 +\d+\.\d\d 1\.00x ", done.stdout, re.M), done.stdout
    assert re.search(r"^qkv +fp8_token +8 +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d{3} +- +-$", done.stdout, re.M), done.stdout
    assert "not measured: matmul_reduce_scatter: 33 tokens do not divide over 2 ranks" in done.stdout
    assert "not measured: torch_symm_mem: PyTorch's symmetric memory needs CUDA devices" in done.stdout


def test_loopback_marks_its_lines(tmp_path):
    out = tmp_path / "lines.jsonl"
    done = bench("--shape", "tiny", "-tp", 4, "--tokens", "8", "--ops", "all_gather_matmul", "--loopback", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines and all(line["loopback"] is True and line.keys() == FIELDS | {"loopback"} for line in lines)
    assert {line["world_size"] for line in lines} == {4} and "gloo" not in {line["candidate"] for line in lines}


def test_the_boundary_beside_what_it_cannot_do_without(capsys):
    from rich.console import Console

    name = "norm_quant_all_gather_matmul"
    us = {"fusewire": 126.0, "all_gather_matmul": 100.0, "copy:norm": 20.0, "norm:fusewire": 25.0, "copy:push": 27.0,
          "push:fusewire": 30.0}
    lines = [{"op": name, "format": "nvfp4", "K": 64, "N": 192, "M": 8, "candidate": c, "us": t} for c, t in us.items()]
    results.print_boundary(Console(width=200), lines, {(name, 64, 192): "qkv"})
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "qkv", "nvfp4", "8", "126.0", "100.0", "20.0", "1.050", "80%", "90%"]


def test_copies_are_of_what_the_boundary_reads_and_writes(monkeypatch):
    g, sizes = groups.loopback_group(4), {}
    monkeypatch.setattr(peers, "_copy", lambda name, nbytes, sets: sizes.setdefault(name, nbytes))
    list(peers.boundary_kernel(case("norm_quant_all_gather_matmul", m=8, group=g), [cases.inputs(
        case("norm_quant_all_gather_matmul", m=8, group=g), 0, CPU)]))
    read_and_written, parts = 2 * 32 * 2 * 3, 2 * (32 + 4)  # 2 rows of a rank: x, the residual, their sum; codes and a scale
    assert sizes == {"copy:norm": (read_and_written + parts) // 2, "copy:push": (read_and_written + 4 * parts) // 2}


@pytest.mark.parametrize(("command", "sentence"), {
    "--ops all_to_all": "unknown op 'all_to_all'; known: all_gather_matmul, matmul_reduce_scatter, all_reduce_norm_quant, "
                        "norm_quant_all_gather_matmul",
    "--formats int3": "unknown format 'int3'; known: bf16, ",
    "--shape huge": "unknown shape 'huge'; known: llama-3-70b, llama-3-8b, tiny",
    "--tokens 8,many": "argument --tokens: '8,many' is not a list of positive whole numbers like 128,1024",
    "--tokens 0": "argument --tokens: '0' is not a list of positive whole numbers",
    "--settle -1": "argument --settle: '-1' is not a number of seconds like 0.3",
    "--tiles 160x": "argument --tiles: '160x' is not a list of columns of tiles like 256,160t",
    "--tiles 100t": "no tile has 100 columns; known: 64, 96, 128, 160, 192, 224, 256",
    "-tp 1": "1 rank exchanges nothing; give -tp 2 or more",
    "-tp 3": "64 heads and 28672 intermediate features do not divide over 3 ranks; use another number of ranks",
    "--shape tiny --loopback --tokens 7": "nothing is left to measure: all_gather_matmul: 7 tokens do not divide over 2 ranks",
    "--out /nowhere/x.jsonl": "/nowhere/x.jsonl cannot be written: /nowhere is not a folder; give a path in one",
}.items())
def test_a_refusal_is_one_sentence(tmp_path, command, sentence):
    done = forked(tmp_path, "bench", "ops", *command.split())
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"fusewire: {sentence}"), done.stderr


@pytest.mark.parametrize("rank", [ops.rank, model.rank])
def test_ranks_that_share_a_gpu_are_not_timed(rank):
    context = RankContext(0, 2, 0, torch.device("cuda", 0), print, shared=True)
    with pytest.raises(InputError, match="2 ranks share cuda:0, so their times mean nothing; give each a GPU, or use --loopback"):
        rank(context, None)


def test_a_missing_matplotlib_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Exception, match=r"needs matplotlib, which is not installed; pip install 'fusewire\[bench\]'"):
        results.check_writable(None, tmp_path / "x.png")


# ---------------------------------------------------------------------------------------------- shapes and ideals

def test_the_projections_of_llama_70b_on_two_ranks():
    assert shapes.projections(shapes.get("llama-3-70b"), 2) == {
        "qkv": ("all_gather_matmul", 8192, 5120), "o": ("matmul_reduce_scatter", 4096, 8192),
        "gate_up": ("all_gather_matmul", 8192, 28672), "down": ("matmul_reduce_scatter", 14336, 8192)}
    assert shapes.projections(shapes.get("llama-3-8b"), 16)["qkv"] == ("all_gather_matmul", 4096, (2 + 2 * 1) * 128)


def test_wire_bytes_are_what_a_ring_sends():
    assert case("all_gather_matmul", "fp8_token").wire == 4 * (32 + 4)  # the shard, 4 tokens with a scale each
    assert case("matmul_reduce_scatter", "fp8_token").wire == 8 * 32 * 2 // 2
    assert case("all_reduce_norm_quant", "fp8_token").wire == 2 * 8 * 32 * 2 // 2


def test_the_ideal_is_the_longer_of_computing_and_sending():
    gather, norm = case("all_gather_matmul"), case("all_reduce_norm_quant")
    us = {"fusewire": 1.0, "nccl": 9.0, "gemm": 5.0, "gemm:fusewire": 4.0, "gemm:fast": 3.0, "copy": 0.5}
    assert ops.ideal_us(gather, us, None) == 4.0  # the fast mode is not the op's
    assert ops.ideal_us(gather, us, None, fast=True) == 3.0
    assert ops.ideal_us(gather, us, gather.wire / 7e-6) == pytest.approx(7.0)
    assert ops.ideal_us(gather, us, gather.wire / 1e-6) == 4.0
    assert ops.ideal_us(norm, {"norm": 2.0, "copy": 0.5}, None) == 0.5
    assert ops.ideal_us(norm, {"norm": 2.0, "copy": 0.5}, norm.wire / 3e-6) == pytest.approx(3.0)
    boundary = case("norm_quant_all_gather_matmul")
    assert boundary.wire == gather.wire
    assert ops.ideal_us(boundary, us | {"norm": 2.0}, None) == 4.0 + 2.0
    assert ops.ideal_us(boundary, us | {"norm": 2.0}, boundary.wire / 7e-6) == pytest.approx(7.0 + 2.0)


def test_means_are_geometric_and_only_of_those_that_always_took_part():
    def line(m, candidate, us, k=1):
        return {"op": "all_gather_matmul", "format": "bf16", "K": k, "N": 1, "M": m, "candidate": candidate, "us": us,
                "ideal_us": 2.0}

    lines = [line(128, "fusewire", 4.0), line(128, "nccl", 8.0), line(512, "fusewire", 16.0), line(512, "nccl", 64.0),
             line(128, "torch", 1.0), line(1024, "fusewire", 2.0, 2), line(1024, "torch", 5.0, 2)]
    found = {(r["tokens"], r["candidate"]): (r["over_ideal"], r["over_fusewire"]) for r in results.means(lines)}
    assert found == {("128-512", "fusewire"): pytest.approx((4.0, 1.0)),
                     ("128-512", "nccl"): pytest.approx((math.sqrt(4 * 32), math.sqrt(2 * 4))),
                     ("1024-2048", "fusewire"): pytest.approx((1.0, 1.0)), ("1024-2048", "torch"): pytest.approx((2.5, 2.5))}


# ---------------------------------------------------------------------------------------------- numbers first

@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", cases.OPS_MEASURED)
def test_right_numbers_pass_and_wrong_ones_do_not(name, fmt):
    c = cases.Case(OPS[name], "a layer", fmt, 8, 256, 256, groups.loopback_group(2))
    sets = [cases.inputs(c, v, CPU) for v in range(2)]
    check = Check(c, sets[1], CPU)
    found, _ = peers.candidates(c, sets, CPU)
    assert {p.name for p in found} >= {"fusewire", "fusewire:reference", "copy"}
    for p in found:
        assert check.why_wrong(p.run(1), p.does) is None, p.name
        if p.does == "copy":
            continue
        for spoil in (stale, one_element, zeros, nan):
            why = check.why_wrong(spoil(p), p.does)
            assert why and re.search(r"the largest errors are .*, at most .* are allowed", why), (p.name, spoil)


def stale(p):
    return p.run(0)


def zeros(p):
    return [torch.zeros_like(y) for y in p.run(1)]


def one_element(p):
    y = p.run(1)
    y[0][3, 5] += 0.5
    return y


def nan(p):
    y = p.run(1)
    y[0][-1, 1] = float("nan")
    return y


def test_other_tiles_of_our_kernels_take_part():
    """Who runs our kernel does so with each tile that was asked for too, and with its own outside."""
    def seen(i):
        return [gemm._given.get("columns"), gemm._given.get("turns")]

    found = [peers.Candidate(name, seen, does) for name, does in (("fusewire:push", "op"), ("fusewire:epilogue", "op"),
                                                                  ("gemm:fusewire", "gemm"))]
    made = [c for tile in ((256, False), (160, True)) for c in peers.tiled(found, "fp8_tensor", *tile)]
    assert [c if isinstance(c, str) else (c.name, c.does, c.run(0)) for c in made] == [
        ("fusewire:epilogue:256", "op", [256, False]), ("gemm:fusewire:256", "gemm", [256, False]),
        "fusewire:epilogue has no tiles of 160 columns in turns", ("gemm:fusewire:160t", "gemm", [160, True])]
    assert seen(0) == [None, None]


def test_who_may_settle_is_timed_so_and_its_lines_say_it(monkeypatch, tmp_path):
    from fusewire.cli import main

    given, measure = [], ops.timing.measure

    def spy(*args, **kwargs):
        given.append((args[2], kwargs["settle_s"]) if "settle_s" in kwargs else ())
        return measure(*args, **kwargs)

    monkeypatch.setattr(ops.timing, "measure", spy)
    args = ["bench", "ops", "--shape", "tiny", "--loopback", "--tokens", "8", "--ops", "all_gather_matmul"]
    assert main([*args, "--settle", "0.001", "--out", str(tmp_path / "own.jsonl")]) == 0
    assert main([*args, "--out", str(tmp_path / "turns.jsonl")]) == 0
    assert given == [(5, 0.001)] * 2 + [(None, 0.0)] * 2
    said = {name: {json.loads(line).get("settle_s") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
            for name in ("own", "turns")}
    assert said == {"own": {0.001}, "turns": {None}}


def test_a_peer_with_wrong_numbers_is_named_and_not_measured(monkeypatch):
    c = case("matmul_reduce_scatter")

    def broken(case, sets, device):
        yield peers.Candidate("broken", lambda i: [2 * case.op.reference(*sets[i])])

    monkeypatch.setattr(peers, "torch_symm_mem", broken)
    done = ops.measure(c, CPU, None, {})
    assert [w.partition(":")[0] for w in done.wrong] == ["broken of a layer in fp8_token, 8 tokens"]
    names = {line["candidate"] for line in done.lines}
    assert "broken" not in names and "fusewire" in names


def test_wrong_numbers_fail_the_command(monkeypatch, tmp_path, capsys):
    from fusewire.cli import main

    right = peers.cublas
    monkeypatch.setattr(peers, "cublas", lambda x, *args: right([t.roll(1, 0) for t in x], *args))
    args = ["bench", "ops", "--shape", "tiny", "--loopback", "--tokens", "8", "--ops", "all_reduce_norm_quant,all_gather_matmul"]
    assert main([*args, "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "fusewire: wrong numbers, which were not measured: gemm of qkv in fp8_tensor, 8 tokens: " in capsys.readouterr().err
    assert {json.loads(line)["op"] for line in (tmp_path / "x.jsonl").read_text().splitlines()} == {"all_reduce_norm_quant"}
