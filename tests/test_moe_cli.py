"""The command on a mixture of experts."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from command import forked, fusewire
from test_cli import PROMPT, tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny Qwen3-MoE as transformers saves it."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-moe"
    tiny.model("qwen3_moe", torch.bfloat16, **tiny.MOE["qwen3_moe"]).save_pretrained(folder)
    tokenizer(folder, tiny.VOCAB)
    return folder


def test_run_compares(saved):
    done = fusewire("run", saved, "-tp", 2, "-q", "fp8_token", "--plan", "sharded", "--compare", "--max-tokens", 3,
                    "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    assert "identical to unfused: the same tokens" in done.stdout
    assert re.search(r"^1 x 4 tokens +sharded +4/6 ", done.stdout, re.M), done.stdout


def test_verify_accepts(saved):
    done = fusewire("verify", saved, "-tp", 2, "-q", "nvfp4", "--prompt", PROMPT, "--max-tokens", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("logits bitwise equal; greedy tokens equal") == 2


def test_explain_shows_both_transports(saved, tmp_path):
    done = forked(tmp_path, "explain", saved, "-tp", 4, "-q", "nvfp4", "--plan", "sharded", "--tokens", 4096, "--json")
    assert done.returncode == 0, done.stderr
    sites = {s["module"]: s for s in json.loads(done.stdout)["sites"]}
    record = 32 + 4 + 16 + 4  # codes, scales, weights, ids
    assert f"dispatch: {record} bytes a token in one message" in sites["model.layers.0.self_attn.o_proj"]["why"]
    both = rf"a rank sends {3 * (record + 128)} bytes for each of its tokens by all_gather, in 2 messages, or about \d+ by all_to"
    assert re.search(both, sites["model.layers.0.mlp"]["why"])


OFF = r"^combine in fp8_block: off by (\d\.\de-\d\d) of its size \(root mean square\) over (\d+) tokens in 2 layers$"


def test_run_says_how_far_a_quantized_combine_is_off(saved):
    done = fusewire("run", saved, "-tp", 2, "--combine", "fp8_block", "--compare", "--max-tokens", 2, "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    assert "identical to unfused: the same tokens" in done.stdout  # which combines in the format as well
    [(error, tokens)] = re.findall(OFF, done.stdout, re.M)
    assert 0.005 < float(error) < 2**-4 and int(tokens) == 6  # the prompt's five and one that was read
    assert "(with compilation), tokens/s only from the third token on\n" in done.stdout


def test_verify_says_so_too(saved):
    done = fusewire("verify", saved, "-tp", 2, "-q", "fp8_token", "--combine", "fp8_block", "--prompt", PROMPT, "--max-tokens", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("logits bitwise equal; greedy tokens equal") == 2 and len(re.findall(OFF, done.stdout, re.M)) == 1


def test_explain_counts_quantized_shares(saved, tmp_path):
    sent = {}
    for plan in ("unfused", "sharded"):
        for asked in ((), ("--combine", "fp8_block")):
            done = forked(tmp_path, "explain", saved, "-tp", 4, "-q", "nvfp4", "--plan", plan, "--tokens", 4096, "--json", *asked)
            assert done.returncode == 0, done.stderr
            sent[plan, asked] = {s["module"]: s for s in json.loads(done.stdout)["sites"]}["model.layers.0.mlp"]
    plain, quantized = (sent["unfused", asked] for asked in ((), ("--combine", "fp8_block")))
    assert (plain["what"], quantized["what"]) == ("all_reduce", "combine_all")
    assert plain["sent_after"] - quantized["sent_after"] == 3 * 1024 * (128 - 68)  # of 64 values in bf16, or in codes and a scale
    record = 32 + 4 + 16 + 4
    assert f"a rank sends {3 * (record + 68)} bytes for each of its tokens by all_gather" in sent["sharded", asked]["why"]


@pytest.mark.parametrize(("args", "sentence"), [
    (("-tp", 2, "--combine", "nvfp4"), "combine='nvfp4': experts' shares travel in a format that quantizes row by row, with linear "
                                       "scales and no static one; choose one of bf16, fp8_block, fp8_token, mxfp8"),
    (("--combine", "fp8_block"), "combine='fp8_block': on one rank no experts' shares travel; leave combine out, or start more"),
])
@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_combine_that_cannot_be_is_one_sentence(saved, tmp_path, command, args, sentence):
    done = forked(tmp_path, command, saved, *args)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
