"""Tiny random Hugging Face decoders, two layers each, by family name."""
from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fusewire import formats
from fusewire.models.layers import RowParallelLinear, ShardedLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
MOE = {  # sizes of tiny mixtures of experts; DeepSeek's attention has sizes of its own
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
                    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
                    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "norm_topk_prob": True},
}
VOCAB = 101  # divides by nothing


def config(family: str, *, heads: int = 4, kv_heads: int = 2, hidden: int | None = None, intermediate: int = 96, head_dim: int = 16,
           vocab: int = VOCAB, layers: int = 2, **extra):
    """A config of `family` with the given sizes (hidden is heads * head_dim unless given); `extra` overrides anything."""
    extra = {"sliding_window": 8, **extra} if family.startswith("gemma") else extra
    return AutoConfig.for_model(
        family, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=hidden or heads * head_dim,
        intermediate_size=intermediate, head_dim=head_dim, vocab_size=vocab, num_hidden_layers=layers, max_position_embeddings=64,
        **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, **extra})


def model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu", **sizes) -> PreTrainedModel:
    """A model of `config(family, **sizes)` whose every weight is random: norms, which start at one or zero, and biases too."""
    with torch.device(device):
        m = AutoModelForCausalLM.from_config(config(family, **sizes), dtype=dtype).eval().requires_grad_(False)
    if device == "meta":
        return m
    generator = torch.Generator().manual_seed(seed)
    for name, p in m.named_parameters():
        spread = 0.3 if p.dim() == 1 else 2 / p.shape[-1] ** 0.5
        centre = 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
        p.copy_(centre + spread * torch.randn(p.shape, generator=generator))
    for name, b in m.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return m


def ids(batch: int = 2, length: int = 12, vocab: int = VOCAB, seed: int = 1) -> torch.Tensor:
    """(batch, length) random token ids."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class FakeQuantized(nn.Module):
    """A linear that computes in one piece what the ranks' quantized shards of it compute together (heads must divide)."""

    def __init__(self, shards: list[ShardedLinear]):
        super().__init__()
        self.shards = [shards]  # in a list, so that they are not this module's own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (shards,), out = self.shards, []
        f = formats.get(shards[0].fmt)
        for s in shards:
            part = x.reshape(-1, x.shape[-1])[:, s.cols.start:s.cols.stop]
            params = [getattr(s, name) for name in s.param_names]
            if params and params[0] is None:
                params = f.params_from_amax(part.abs().amax().float())
            y = f.dequantize(f.quantize(part, params), params) @ f.dequantize_weight(s.weights()).t()
            out.append(y if s.bias is None else y + s.bias)
        y = sum(out) if isinstance(shards[0], RowParallelLinear) else torch.cat(out, 1)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def fake_quantized(model: PreTrainedModel, shards: list[nn.Module]) -> PreTrainedModel:
    """A copy of the whole model with the shards' weights and quantization in its linear layers: the oracle for their logits."""
    oracle = copy.deepcopy(model)
    for name, module in shards[0].named_modules():
        if isinstance(module, ShardedLinear):
            oracle.set_submodule(name, FakeQuantized([s.get_submodule(name) for s in shards]))
    return oracle


def tokenizer(folder: Path, words: int) -> None:
    """Words w3, w4, ... are tokens 3, 4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, words)}}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
