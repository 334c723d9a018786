"""`fusewire bench moe`, where it can be run without a GPU."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fusewire.bench import moe, moe_kernels
from fusewire.group import close, loopback_group

CPU = torch.device("cpu")
BYTES = {("dispatch", "unfused"): 15360, ("dispatch", "bf16"): 14336 + 40, ("dispatch", "fp8_block"): 7168 + 224 + 40,
         ("dispatch", "nvfp4"): 3584 + 448 + 40, ("combine", "bf16"): 14336, ("combine", "fp8_block"): 7168 + 224}


def bench(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fusewire", "bench", "moe", *map(str, args)], capture_output=True, text=True,
                          timeout=240)


@pytest.mark.dist
def test_two_ranks_print_and_write(tmp_path):
    out = tmp_path / "lines.jsonl"
    done = bench("-tp", 2, "--tokens", "1,2", "--combine", "bf16,fp8_block", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line["suite"] == "moe" and line["us"] > 0 and line["world_size"] == 2 and "loopback" not in line for line in lines)
    assert {(what, fmt): n for what, fmt, n in ((line["what"], line["format"], line["bytes_per_token"]) for line in lines)
            if what in ("dispatch", "combine")} == BYTES
    assert len({(line["what"], line["format"], line["candidate"], line["tokens"]) for line in lines}) == len(lines)
    assert {line["candidate"] for line in lines if line["format"] == "unfused"} == {"reference", "gloo"}
    assert "dispatch, nvfp4: us, 4072 bytes a token" in done.stdout
    off = [line["combine_error"] for line in lines if (line["what"], line["format"]) == ("combine", "fp8_block")]
    assert len(off) == 2 and all(0.01 < e < 2**-4 for e in off) and sum("combine_error" in line for line in lines) == 2
    assert f"combine in fp8_block, 2 tokens: off by {off[1]:.1e} of its size (root mean square)\n" in done.stdout
    assert "not measured: dispatch, pushed: it runs on CUDA devices, not on cpu" in done.stdout


def test_loopback_marks_its_lines(tmp_path):
    out = tmp_path / "lines.jsonl"
    done = bench("--loopback", "--tokens", "1", "--formats", "nvfp4", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines and all(line["loopback"] is True for line in lines)
    assert "not measured: pack: its kernels run on CUDA devices, not on cpu" in done.stdout


@pytest.mark.parametrize(("command", "sentence"), {
    "--formats nvfp4:128x4": "nvfp4:128x4 does not travel: its scales are swizzled; give a format with linear ones",
    "--combine nvfp4": "combine='nvfp4': experts' shares travel in a format that quantizes row by row, with linear scales and no "
                       "static one; choose one of bf16, fp8_block, fp8_token, mxfp8",
    "--parts all": "unknown part 'all'; known: exchange, pack, grouped_matmul",
    "--parts pack": "pack is measured on one GPU; add --loopback",
    "-tp 1": "1 rank exchanges nothing; give -tp 2 or more",
    "--plot x.png": "unrecognized arguments: --plot x.png; see fusewire --help",
}.items())
def test_a_refusal_is_one_sentence(command, sentence):
    done = bench(*command.split())
    assert (done.returncode, done.stderr) == (2, f"fusewire: {sentence}\n")


def test_wrong_numbers_are_not_measured(monkeypatch):
    group = loopback_group(2)
    [way] = moe.combines(group, sets := moe.inputs(group, 2, CPU), [], {})
    bad = way._replace(candidate="bad", run=lambda i: [y + 1 for y in way.run(i)])
    monkeypatch.setattr(moe, "inputs", lambda *args: sets)
    monkeypatch.setattr(moe, "combines", lambda *args: [way, bad])
    wrong: list[str] = []
    lines = list(moe.exchange(group, CPU, 2, ["nvfp4"], [], None, {}, wrong))
    close(group)
    assert wrong == ["bad of combine in bf16, 2 tokens: outputs [0] differ from the first way's"]
    assert "bad" not in {line["candidate"] for line in lines} and {line["what"] for line in lines} >= {"dispatch", "combine"}


def test_skewed_experts_have_as_many_rows_in_all():
    for rows in moe_kernels.ROWS_AN_EXPERT:
        sizes = moe_kernels._sizes(rows, True)
        assert sum(sizes) == sum(moe_kernels._sizes(rows, False)) and sizes[0] > 3 * rows and len(sizes) == moe_kernels.LOCAL


def test_what_cannot_run_is_a_sentence():
    """Without a GPU every check of a kernel fails, and says so, instead of ending the others."""
    if not torch.cuda.is_available():
        wrong = moe_kernels.check(CPU)
        assert len(wrong) == 1 + 6 + 3 * len(moe_kernels.triton.TILE) and all(": " in line for line in wrong)
