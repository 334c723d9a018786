"""Checkpoints of mixtures of experts: what exporters write of each expert comes back, and a rank reads its own experts alone."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import EXPORTERS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fusewire import formats
from fusewire.errors import InputError
from fusewire.group import close, fake_group, simulate, simulated_group
from fusewire.models import load, parallelize
from fusewire.models.moe import PROJECTIONS, MoE

torch.set_num_threads(1)
SIZES = {"qwen3_moe": {"head_dim": 64, "intermediate": 128, "moe_intermediate_size": 128},
         "mixtral": {"head_dim": 64, "intermediate": 128},
         "deepseek_v3": {"head_dim": 32, "kv_heads": 4, "hidden": 256, "intermediate": 128, "moe_intermediate_size": 128,
                         "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}}
KINDS = ["plain", "fp8-block", "ct-nvfp4", "modelopt-nvfp4"]


def is_linear(name: str) -> bool:
    """Is a tensor of the checkpoint a quantized linear layer's weight: not a router's, an embedding's or a norm's?"""
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight", "_proj_with_mqa.weight"))


def export(folder: Path, family: str, kind: str) -> dict[str, Tensor]:
    """Write a checkpoint as `kind` exports it; -> what its linear layers mean, by the name of the weight."""
    sizes = {**tiny.MOE[family], **SIZES[family]}
    tiny.model(family, torch.bfloat16, **sizes).save_pretrained(folder)
    _, config, embedded, quantize = EXPORTERS[kind]
    held, meant = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        if not is_linear(name):
            held[name] = w
            continue
        tensors, meant[name] = quantize(w)
        if "input_global_scale" in tensors:  # of an expert its own, as calibration makes them
            tensors["input_global_scale"] = torch.tensor([300.0 + len(held) % 7])
        held.update({name.removesuffix("weight") + end: t.clone().contiguous() for end, t in tensors.items()})
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    if config is not None:
        config = {**config, **({"quantization": {**config["quantization"], "exclude_modules": ["lm_head", "*.gate"]}}
                               if "quantization" in config else {"ignore": ["lm_head", "re:.*[.]gate$"]})}
        if embedded:
            raw["quantization_config"] = config
        else:
            (folder / "hf_quant_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(raw))
    return meant


def blocks(model: nn.Module) -> dict[str, MoE]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}


@pytest.fixture
def group():
    made = simulated_group(2)
    yield made
    close(made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.MOE)
def test_a_rank_holds_its_experts_as_the_file_has_them(tmp_path, group, family, kind):
    meant = export(tmp_path, family, kind)
    shards = simulate(group, lambda rank: load(tmp_path, group))
    fmt = formats.get(EXPORTERS[kind][0])
    seen = set()
    for rank, shard in enumerate(shards):
        for block in blocks(shard).values():
            e = block.experts
            assert e.fmt == fmt.name and e.mine.start == rank * e.mine.size and e.total == 2 * e.mine.size
            for i, projection in enumerate(PROJECTIONS):
                for at in range(e.mine.size):
                    name = f"{e.stored(e.mine.start + at, PROJECTIONS[i])}.weight"
                    got = fmt.dequantize_weight([w[at] for w in e.weights(projection)])
                    assert torch.equal(got, meant[name].float()), name
                    seen.add(name)
    assert seen == {n for n in meant if ".experts." in n}


@pytest.mark.parametrize("family", tiny.MOE)
def test_loaded_is_parallelized(tmp_path, group, family):
    export(tmp_path, family, "plain")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = tiny.ids(2, 7)
    for how in ({}, {"dp": 2}):
        one = simulate(group, lambda rank, how=how: load(tmp_path, group, "fp8_token", **how))
        two = simulate(group, lambda rank, how=how: parallelize(copy.deepcopy(whole), group, "fp8_token", **how))
        got, want = (simulate(group, lambda rank, m=m: m[rank](ids, use_cache=False).logits) for m in (one, two))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_only_this_rank_s_experts_are_read(tmp_path, group):
    export(tmp_path, "qwen3_moe", "plain")
    whole = load(tmp_path, fake_group(1)).bytes_read
    half = simulate(group, lambda rank: load(tmp_path, group, dp=2).bytes_read)
    experts = sum(t.nbytes for n, t in load_file(tmp_path / "model.safetensors").items() if ".experts." in n)
    assert experts > whole / 2 and half == [whole - experts // 2] * 2


@pytest.mark.parametrize("kind", ["ct-nvfp4", "modelopt-nvfp4"])
def test_experts_share_the_widest_scale_of_their_tokens(tmp_path, group, kind):
    export(tmp_path, "qwen3_moe", kind)
    shards = simulate(group, lambda rank: load(tmp_path, group))
    held = load_file(tmp_path / "model.safetensors")
    for name, block in blocks(shards[0]).items():
        ends = {"ct-nvfp4": "input_global_scale", "modelopt-nvfp4": "input_scale"}[kind]
        found = [held[f"{name}.experts.{e}.{p}_proj.{ends}"].float().reshape(()) for e in range(16) for p in ("gate", "up")]
        widest = torch.stack(found).amin() if kind == "ct-nvfp4" else torch.stack(found).amax().reciprocal()
        other = dict(blocks(shards[1]))[name]
        assert block.experts.input_global_scale == widest == other.experts.input_global_scale
        assert block.experts.down_input_global_scale.shape == (8,)


def damaged(folder: Path, change) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def test_bad_experts_get_a_sentence(tmp_path, group):
    export(tmp_path, "mixtral", "fp8-block")
    name = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
    damaged(tmp_path, lambda held: held.pop(name))
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        simulate(group, lambda rank: load(tmp_path, group))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] = ["lm_head", "gate", "model.layers.0.block_sparse_moe.experts.3.w1"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"experts\.3\.w1 is held as bf16 and .*experts\.0\.w1 as fp8_block"):
        load(tmp_path, fake_group(1))
