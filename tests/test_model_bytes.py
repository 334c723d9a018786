"""What a whole model sends: by hand for Llama-3-70B, and counted at the process group for a real one."""
from __future__ import annotations

import json

import pytest
import tiny
import torch
import torch.distributed as dist
from dist import run_ranks

import fusewire
from fusewire.config import Config
from fusewire.engine.explain import explain_model

torch.set_num_threads(1)

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 80, "dtype": "bfloat16",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}
TOKENS, HIDDEN, LAYERS, VOCAB = 4096, 8192, 80, 128256
# What half of the tokens cost in the format, by hand: data, scales, and for a dynamic tensor scale a 4-byte maximum.
GATHERED = {
    None: TOKENS // 2 * HIDDEN * 2,
    "fp8": TOKENS // 2 * HIDDEN + 4,
    "fp8_token": TOKENS // 2 * (HIDDEN + 4),
    "nvfp4": TOKENS // 2 * (HIDDEN // 2 + HIDDEN // 16) + 4,
}


@pytest.mark.parametrize("quantization,most", [(None, 1.0), ("fp8", 0.76), ("fp8_token", 0.76), ("nvfp4", 0.65)])
def test_llama_3_70b_on_two_ranks(tmp_path, quantization, most):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B))
    r = explain_model(tmp_path, 2, TOKENS, quantization, Config(plan="sharded"))
    reduced = TOKENS * HIDDEN * 2 // 2  # the half of a bf16 activation that a rank sends in a reduce_scatter, or an all_gather
    logits = VOCAB // 2 * 2
    bf16 = (2 * LAYERS + 1) * 2 * reduced + logits
    assert r.plan == "sharded" and len(r.sites) == 2 * LAYERS + 2
    assert r.sent_before == bf16
    [site] = [s for s in r.sites if s.module == "model.layers.41.mlp.down_proj"]
    assert (site.sent_before, site.sent_after) == (2 * reduced, reduced + GATHERED[quantization])
    assert {s.sent_after for s in r.sites[:-2]} == {site.sent_after}
    assert [s.sent_after for s in r.sites[-2:]] == [reduced + 2 * HIDDEN, logits]  # the head reads bf16, of one token
    assert r.sent_after <= most * bf16, f"{quantization}: {r.sent_after / bf16:.2%} of the bf16 model's bytes"


# ---------------------------------------------------------------------------------------------- counted

SIZES = {"head_dim": 64, "intermediate": 512}  # every format holds them on two ranks


class Counted:
    """What goes through torch.distributed: a rank sends (w - 1) / w of the whole buffer in each call, as rings do."""

    def __init__(self) -> None:
        self.bytes, self.calls = 0, 0
        for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single"):
            if hasattr(dist, name):
                setattr(dist, name, self.counting(getattr(dist, name)))
        for name in ("all_reduce", "all_gather", "all_to_all", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "send",
                     "isend", "batch_isend_irecv", "all_gather_object", "broadcast_object_list", "gather", "reduce", "scatter"):
            setattr(dist, name, self.refusing(name))

    def counting(self, real):
        def call(output, input, *args, **kwargs):
            whole, w = max(t.numel() * t.element_size() for t in (output, input)), dist.get_world_size()
            self.bytes, self.calls = self.bytes + whole * (w - 1) // w, self.calls + 1
            return real(output, input, *args, **kwargs)

        return call

    def refusing(self, name):
        def call(*args, **kwargs):
            raise AssertionError(f"torch.distributed.{name} was called, and nobody counts it")

        return call

    def taken(self) -> tuple[int, int]:
        found, self.bytes, self.calls = (self.bytes, self.calls), 0, 0
        return found


def counted_and_said(rank: int, family: str, layers: int, quantization: str | None, lengths: list[int]) -> list[dict]:
    model = fusewire.parallelize(tiny.model(family, torch.bfloat16, layers=layers, **SIZES), None, quantization)
    compiled = fusewire.compile(model)
    counter, rows = Counted(), []
    for n in lengths:
        for plan in ("unfused", "replicated", "sharded"):
            compiled.plan = plan
            compiled(input_ids=tiny.ids(1, n), use_cache=False)
            r = fusewire.explain(compiled)
            # an all_reduce is one message to the cost model; between processes it is an all_to_all and an all_gather
            twice = 0 if r.plan == "sharded" else sum(s.what == "all_reduce" for s in r.sites)
            rows.append({"asked": plan, "plan": r.plan, "tokens": r.tokens, "counted": list(counter.taken()),
                         "said": [r.sent_after, r.messages + twice], "before": r.sent_before})
    return rows


@pytest.mark.dist
@pytest.mark.parametrize("family,layers,quantization,lengths", [
    *(("llama", 1, quantization, [8, 12, 7]) for quantization in (None, "fp8", "fp8_token", "fp8_block", "mxfp8")),
    ("llama", 2, "nvfp4", [8, 12, 7, 1]), ("gemma3_text", 2, "fp8", [8, 12, 7, 1]),
])
def test_a_real_model_sends_what_its_report_says(family, layers, quantization, lengths):
    for rows in run_ranks(counted_and_said, 2, family, layers, quantization, lengths):
        for row in rows:
            assert row["counted"] == row["said"], row
            if row["asked"] == "unfused":
                unfused = row["counted"][0]
            assert row["before"] == unfused, row
            if row["tokens"] > 1:
                divides = row["tokens"] % 2 == 0
                assert row["plan"] == (row["asked"] if divides or row["asked"] == "unfused" else "replicated"), row
                assert (row["counted"][0] < unfused) == (row["plan"] == "sharded" and quantization is not None), row
