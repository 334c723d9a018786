"""Explaining a model from its config: fast, small, and the same as capturing every layer."""
from __future__ import annotations

import io
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from fusewire import screen
from fusewire.backends import device
from fusewire.compiler.explain import Report
from fusewire.config import Config
from fusewire.engine.explain import explain_model
from fusewire.group import close, fake_group
from fusewire.models.skeleton import skeleton

LLAMA_3_3_70B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 28672, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}
# what this process gives the command, then what the command took
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def written(folder: Path, config) -> Path:
    folder.mkdir()
    text = config if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize("quantization", ["fp8"])
def test_llama_3_3_70b_on_eight_ranks(tmp_path, quantization):
    folder = written(tmp_path / "m", LLAMA_3_3_70B)
    command = [sys.executable, "-m", "fusewire.cli", "explain", str(folder), "-tp", "8", "-q", quantization, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, timeout=240)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # its own, however busy the machine is
    assert done.returncode == 0, done.stderr
    report, kib = json.loads(done.stdout), int(done.stderr.split()[-1])
    print(f"{seconds:.1f} s of computing, {kib / 2**20:.2f} GiB")
    assert seconds < 60 and kib < 4 * 2**20
    assert done.stderr.strip() == str(kib), "nothing else is said"
    assert len(report["sites"]) == 162 and report["fused"] == 160 and report["plan"] == "sharded"
    assert [s["module"] for s in report["sites"][:4]] == [
        "model.embed_tokens", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    whole = 4096 * 8192
    assert report["sites"][80]["sent_before"] == 2 * 7 * whole * 2 // 8
    assert report["sites"][80]["sent_after"] == 7 * (whole * 2 // 8 + whole // 8 + 4)


def captured_layers(folder: Path) -> list[int]:
    group = fake_group(2)
    found = sorted(skeleton(folder, group).stands_for)
    close(group)
    return found


def same_reports(short: Report, full: Report) -> None:
    assert (short.plan, short.why, short.tokens) == (full.plan, full.why, full.tokens)
    for a, b in zip(short.sites, full.sites, strict=True):
        assert a == b


@pytest.mark.parametrize("plan,all_logits", [("sharded", False), ("replicated", True)])
def test_few_layers_stand_for_all_of_llama(tmp_path, plan, all_logits):
    folder = written(tmp_path / "m", LLAMA_3_3_70B | {"num_hidden_layers": 4})
    short, full = (explain_model(folder, 8, 4096, "fp8", Config(plan=plan), all_logits, full=f) for f in (False, True))
    same_reports(short, full)
    assert len(full.sites) == 2 * 4 + 2


def test_few_layers_stand_for_a_periodic_stack(tmp_path):
    """Two layers that see a window, then one that sees all, and a rest; five of them are captured."""
    kinds = [*["sliding_attention"] * 2, "full_attention"] * 2
    config = tiny.config("gemma3_text", layers=8, layer_types=[*kinds, *["sliding_attention"] * 2])
    folder = written(tmp_path / "m", config)
    assert captured_layers(folder) == [0, 1, 2, 3, 4]
    short, full = (explain_model(folder, 2, 32, "fp8", full=f) for f in (False, True))
    same_reports(short, full)
    assert [s.module for s in full.sites[-3:-1]] == [f"model.layers.7.{m}" for m in ("self_attn.o_proj", "mlp.down_proj")]


def not_quantized(folder: Path, layers: int, *excluded: str) -> Path:
    config = json.loads(tiny.config("llama", layers=layers, head_dim=64).to_json_string(use_diff=False))
    quantized = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", *excluded]}
    return written(folder, config | {"quantization_config": quantized})


def test_few_layers_stand_for_a_stack_of_which_some_are_not_quantized(tmp_path):
    folder = not_quantized(tmp_path / "m", 8, r"re:.*layers\.(2|5)\.self_attn\.[qkv]_proj")
    assert captured_layers(folder) == [0, 1, 2, 3, 4]
    short, full = (explain_model(folder, 2, 32, None, Config(plan="sharded"), full=f) for f in (False, True))
    same_reports(short, full)
    sent = [s.sent_after for s in full.sites[1:-2]]
    assert len(set(sent)) > 1, "some layers send more than others"


@pytest.mark.parametrize("excluded", [
    ["model.layers.1.self_attn.o_proj", "model.layers.4.mlp.down_proj", "model.layers.4.mlp.gate_proj"],
    ["model.layers.0", "model.layers.5"],
    ["model.layers.3.self_attn.v_proj"],
])
def test_a_stack_without_a_period_is_captured_whole(tmp_path, excluded):
    assert captured_layers(not_quantized(tmp_path / "m", 6, *excluded)) == list(range(6))


def test_the_report_is_plain_json(tmp_path):
    report = explain_model(written(tmp_path / "m", tiny.config("llama")), 2, 32, "fp8_token")
    again = json.loads(json.dumps(report.to_dict()))
    assert again["sent_after"] == sum(s["sent_after"] for s in again["sites"]) == report.sent_after
    assert again["fused"] == [s["verdict"] for s in again["sites"]].count("fused") == report.fused
    assert set(again["sites"][0]) == {"module", "what", "verdict", "why", "avoidable", "sent_before", "sent_after", "messages",
                                      "backend", "chosen", "refused", "inside"}


SAID = {  # of the grouped matmul for each format: what runs it and how, or why it cannot
    **dict.fromkeys((None, "fp8_tensor", "fp8_token", "fp8_block"), ("grouped_matmul.triton", "inside experts")),
    "nvfp4": ("grouped_matmul.triton", "inside experts, nvfp4 is expanded to bf16 first, exactly"),
    "mxfp8": ("grouped_matmul.reference", "inside experts"),
}


@pytest.mark.parametrize(("fmt", "plan"), [*((fmt, "sharded") for fmt in SAID), ("nvfp4", "unfused"), ("mxfp8", "replicated")],
                         ids=str)
def test_what_experts_call_is_told(tmp_path, monkeypatch, fmt, plan):
    """As on a GPU with kernels: who multiplies for the experts, in which way, and why another could not. Each plan tells the same,
    once for each layer, whether the experts are an op of their own there or inside one that exchanges their tokens."""
    monkeypatch.setattr(device, "why_not", lambda *args, **kwargs: None)
    folder = written(tmp_path / "m", tiny.config("qwen3_moe", head_dim=32, **tiny.MOE["qwen3_moe"]))
    found = explain_model(folder, 2, 32, fmt, Config(plan=plan), device="cuda")
    blocks = [s for s in found.sites if s.inside]
    assert [s.module for s in blocks] == [f"model.layers.{i}.mlp" for i in range(2)]
    whole = plan == "sharded" and fmt is not None
    for s in blocks:
        assert s.inside[whole:] == (SAID[fmt],) and (not whole or s.inside[0][0].startswith("experts."))
        assert any(b.startswith("expert_parallel.") for b in s.backends) == whole
        assert ("grouped_matmul.triton: it does not take mxfp8" in s.refused) == (fmt == "mxfp8")
    console = Console(file=io.StringIO(), width=200)
    screen.sites(console, found)
    name, how = SAID[fmt]
    assert re.search(rf"^{re.escape(name)} +32 +2 +{how} *$", console.file.getvalue(), re.M)
    assert ("not grouped_matmul.triton: it does not take mxfp8 (2 sites)" in console.file.getvalue()) == (fmt == "mxfp8")
