"""The command as its user meets it: what it prints, one sentence for what it refuses, exit codes, and ranks that are killed."""
from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
from command import FUSEWIRE, forked, fusewire
from safetensors.torch import load_file, save_file
from test_checkpoint import export
from tiny import tokenizer

from fusewire.tuning import Tuning

torch.set_num_threads(1)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
PROMPT = "w5 w6 w7 w8 w9"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A whole tiny model, which tests copy before they break it. Its context has 64 tokens."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    export(tiny.model("llama", torch.bfloat16), "plain", folder)
    tokenizer(folder, tiny.VOCAB)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "m")


# ---------------------------------------------------------------------------------------------- what works

def test_run_prints_text_and_report_and_compares(saved):
    done = fusewire("run", saved, "-tp", 2, "-q", "fp8", "--plan", "sharded", "--compare", "--timings",
                    "--max-tokens", 6, "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text, _, rest = done.stdout.partition("\n")
    assert text.startswith(PROMPT) and re.fullmatch(r"( ?(w\d+|<unk>)){1,6}", text.removeprefix(PROMPT)), text
    assert "2 ranks, fp8, fx code; loaded in" in rest
    assert "identical to unfused: the same tokens" in rest
    rows = {m[1]: m for m in re.finditer(r"^(\d+ x \d+ tokens?) +(\w+) +(\d)/6 ", rest, re.M)}
    assert rows["1 x 4 tokens"][2] == "sharded", rest  # of five tokens four divide, the fifth comes after them
    assert [(step, m[2]) for step, m in rows.items() if step.endswith("x 1 token")] == [("6 x 1 token", "replicated")], rest
    assert "not fused: lm_head (replicated and sharded): all_gather stays" in rest
    assert re.search(r"^a rank sent .* \(\d+\.\d% of the unfused model's bytes\)$", rest, re.M)
    assert re.search(r"^fuse_all_gather_matmul +\d+\.\d+$", rest, re.M)


def test_explain_prints_a_table_or_json(saved, tmp_path):
    table = forked(tmp_path, "explain", saved, "-tp", 2, "-q", "fp8", "--tokens", 32)
    assert (table.returncode, table.stderr) == (0, "")
    assert "model.layers.1.mlp.down_proj" in table.stdout and "5 of 6 collectives fused; a rank sends" in table.stdout
    done = forked(tmp_path, "explain", saved, "-tp", 2, "-q", "fp8", "--tokens", 32, "--json", "--no-enable-sp",
                  "--plan", "sharded")
    report = json.loads(done.stdout)
    assert len(report["sites"]) == 6 and report["plan"] == "replicated"
    assert "the rule split_all_reduce is switched off" in report["why"]


def test_verify_prints_json(saved, tmp_path):
    text = tmp_path / "pages.jsonl"
    text.write_text("".join(json.dumps({"page": " ".join(f"w{i}" for i in range(3, n))}) + "\n" for n in (15, 20)))
    done = fusewire("verify", saved, "-tp", 2, "-q", "fp8", "--text", text, "--json", "--max-tokens", 5)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [v["plan"] for v in found] == ["replicated", "sharded"]
    for v in found:
        assert v["accepted"] and v["changed"] == 0 and v["tokens_equal"] and v["texts"] == 2 and v["tokens"] == 29
        assert v["logits"] == 29 * tiny.VOCAB and v["perplexity"] == v["perplexity_unfused"] > 1


def test_tune_says_that_there_is_nothing_to_choose_on_a_cpu(saved, tmp_path):
    done = forked(tmp_path, "tune", saved, "-tp", 2, "-q", "fp8", "--device", "cpu", "-o", tmp_path / "tuning.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "nothing to choose on cpu: every op has one backend here, its reference; no file was written\n"
    assert not (tmp_path / "tuning.json").exists()


def test_strict_exits_3(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "m")
    quantized = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["model.layers.1.self_attn.v_proj"]}
    edit(folder, quantization_config=quantized)
    assert forked(tmp_path, "explain", saved, "-tp", 2, "-q", "fp8", "--tokens", 32, "--strict").returncode == 0
    done = fusewire("explain", folder, "-tp", 2, "--tokens", 32, "--strict")
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(r"fusewire: strict: 1 of 6 collectives are not fused in the \w+ plan, the first in "
                        r"model.layers.0.mlp.down_proj: .*; fix that, or switch the rule off to accept it\n", done.stderr)


# ---------------------------------------------------------------------------------------------- what is refused

def edit(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def nan_scale(folder: Path) -> None:
    shutil.rmtree(folder)
    export(tiny.model("llama", torch.bfloat16, head_dim=64, intermediate=512), "fp8-static", folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name == "model.layers.1.mlp.up_proj.weight_scale":
                tensors[name] = torch.tensor(float("nan"))
        save_file(tensors, file)


def more_words(folder: Path) -> None:
    tokenizer(folder, 200)


# name -> (what is done to the model, the command, what the sentence says); MODEL in a command is the model's folder
def other_tuning(folder: Path) -> None:
    found = Tuning("NVIDIA H200", 4, False, "2.11.0", "2026-01-02", {"call": {1: {"a": 1.0}}})
    (folder / "tuning.json").write_text(found.text())


REFUSED = {
    "unknown quantization": (None, "run MODEL -tp 2 -q int3", "unknown quantization 'int3'; choose one of fp8, "),
    "not a folder": (None, "run MODEL/absent", "absent is not a folder; give one that save_pretrained wrote"),
    "model and demo": (None, "run MODEL --demo", "give a MODEL .* or --demo, one of the two"),
    "neither model nor demo": (None, "explain", "give a MODEL .* or --demo, one of the two"),
    "rule syntax": (None, "run MODEL --rule split_all_reduce=many", "--rule 'split_all_reduce=many' is not RULE=MIN:MAX"),
    "unknown rule": (None, "explain MODEL --disable-rule fuse_everything",
                     "unknown rule 'fuse_everything'; known: .*split_all_reduce"),
    "plan": (None, "run MODEL --plan fastest", "argument --plan: invalid choice: 'fastest'"),
    "no ranks": (None, "run MODEL -tp 0", "argument --tensor-parallel-size/-tp: 0 is not a positive number"),
    "no command": (None, "", "the following arguments are required: .*run,explain,tune,verify"),
    "missing shard": (lose_shard, "run MODEL -tp 2", "model-00002-of-00002.safetensors does not exist but .* names it"),
    "truncated shard": (truncate, "run MODEL -tp 2", "model-00001-of-00002.safetensors is truncated or no safetensors file"),
    "NaN scale": (nan_scale, "run MODEL -tp 2",
                  "model.layers.1.mlp.up_proj.weight_scale is the scale nan, which is not positive and fin"),
    "pickles": (only_pickles, "run MODEL -tp 2", "its .bin files are pickles, which can run code"),
    "auto_map": (lambda m: edit(m, auto_map={"AutoConfig": "x.Y"}), "explain MODEL -tp 2",
                 "has an auto_map, which asks to run Python code"),
    "block": (None, "run MODEL -tp 2 -q mxfp8", "down_proj.weight: mxfp8 needs a multiple of 32 input features .* would have 48"),
    "too many ranks": (None, "run MODEL -tp 5", "self_attn: 5 ranks share 4 query heads, .* use at most 4 ranks"),
    "token ids": (more_words, "run MODEL --prompt w150", "150.*10[01]"),
    "long prompt": (None, "run MODEL --prompt w5 --max-tokens 64",
                    "1 prompt tokens and 64 new ones do not fit the model's 64 positions"),
    "binary text": (None, "verify MODEL --text MODEL/model-00001-of-00002.safetensors",
                    "cannot be read as text .* give a UTF-8 text file"),
    "no tuning": (None, "run MODEL -tp 2 --tuning MODEL/none.json", r"the tuning .*none.json cannot be read \(No such file"),
    "no such tuning": (None, "explain MODEL -tp 2 --tuning MODEL/config.json",
                       "the tuning .*config.json is not a file that `fusewire tune` wrote .* run `fusewire tune` again"),
    "tuning of more ranks": (other_tuning, "run MODEL -tp 2 --tuning MODEL/tuning.json",
                             "tuning.json was measured on 4 ranks, not on 2; run `fusewire tune -tp 2`"),
    "tune what": (None, "tune MODEL --shape tiny", "give a MODEL .*, --demo or --shape, one of the three"),
    "tune to nowhere": (None, "tune MODEL -o MODEL/none/tuning.json", "none is not a folder, so no tuning can be written there"),
    "tune into another's": (other_tuning, "tune MODEL -tp 2 --device cpu -o MODEL/tuning.json",
                            "tuning.json was measured with 4 ranks on NVIDIA H200, torch 2.11.0, and this is 2 ranks on cpu, torch "
                            ".*; give another -o"),
    "tune into something": (None, "tune MODEL -tp 2 --device cpu -o MODEL/config.json",
                            "config.json exists and is not a tuning that can be added to; move it away, or give another -o"),
    "no device": (None, "run MODEL -tp 2 --device cuda", "none is visible here; leave --device out, or say cpu"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "run MODEL",
                     "its tokenizer cannot be loaded .* add tokenizer.json"),
}


def used() -> float:
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_sentence(model, tmp_path, case):
    """Imports aside, ten seconds of computing are the limit for all processes: this machine may be busy with others."""
    spoil, command, sentence = REFUSED[case]
    if spoil:
        spoil(model)
    before, start = used(), time.monotonic()
    done = forked(tmp_path, *(word.replace("MODEL", str(model)) for word in command.split()))
    seconds = used() - before
    print(f"{case}: {seconds:.1f} s of computing, {time.monotonic() - start:.1f} s in all: {done.stderr}")
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.split()) <= 1  # nothing, or the prompt
    assert done.stdout[-1:] in ("", "\n")
    [line] = done.stderr.splitlines()
    assert line.startswith("fusewire: ") and re.search(sentence, line), line
    assert seconds < 10


# ---------------------------------------------------------------------------------------------- killed ranks

def doing(folder: Path, rank: int) -> str:
    """What a rank says it is doing, in the memory it shares with the launcher."""
    for status in folder.glob("fusewire-launch-*/status"):
        return status.read_bytes()[256 * rank:256 * (rank + 1)].rstrip(b"\0").decode()
    return ""


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("phase", ["loading", "compiling", "decoding"])
def test_a_killed_rank_is_named_and_nothing_is_left(saved, tmp_path, phase):
    command = ["run", str(saved), "-tp", "2", "--prompt", PROMPT, "--max-tokens", "50"]
    run = subprocess.Popen([*FUSEWIRE, *command], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not doing(tmp_path, 1).startswith(phase):
            assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()
            time.sleep(0.001)
        ranks = children(run.pid)
        os.kill(ranks[1], signal.SIGKILL)
        start = time.monotonic()
        _, err = run.communicate(timeout=60)
        seconds = time.monotonic() - start
    finally:
        run.kill()
    assert seconds < 5, f"{seconds:.1f} s"
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not list(tmp_path.glob("fusewire-launch-*"))
    assert run.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(rf"fusewire: rank 1 \(pid {ranks[1]}\) was killed by SIGKILL while {phase}.*; "
                        "the other ranks were ended\n", err), err
