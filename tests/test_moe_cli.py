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
