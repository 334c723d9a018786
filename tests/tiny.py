"""Tiny random Hugging Face decoders, two layers each, by family name."""
from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
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
        spread = 0.3 if p.dim() == 1 else 2 / p.shape[1] ** 0.5
        centre = 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
        p.copy_(centre + spread * torch.randn(p.shape, generator=generator))
    return m


def ids(batch: int = 2, length: int = 12, vocab: int = VOCAB, seed: int = 1) -> torch.Tensor:
    """(batch, length) random token ids."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
